"""Formats: how rows become examples. Classification (one text or a pair), prompt and completion, running text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from string import Formatter
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from lorakit.data.columns import field_texts, text_columns
from lorakit.data.draw import limited
from lorakit.data.examples import Examples
from lorakit.data.inputs import completions, detect_format, prompts
from lorakit.data.labels import Labels, Task, label_ids
from lorakit.data.load import Rows
from lorakit.data.lost import listed_lost, lost_characters
from lorakit.data.spec import DataSpec, Format
from lorakit.data.table import Table
from lorakit.data.token_cache import kept
from lorakit.data.tokenise import Tokeniser, embedding_rows, special_texts, without_embedding
from lorakit.errors import RecipeError

log = logging.getLogger("lorakit")

CHUNK = 1000  # rows tokenised at a time
LOOKED_AT = 10_000  # rows in which is looked for what the tokenizer loses
# Keys that say which rows there are, and those of which Reader passes on what they come to.
ABOUT_ROWS = {"name_or_path", "subset", "offline", "revision", "train_split", "validation_split", "max_train_samples"}
ABOUT_ROWS |= {"max_eval_samples", "references", "max_seq_length", "stride", "cache"}

Tokens = NDArray[np.int32]
Counts = dict[str, int]
"""How many rows of a split something is true of, and by `…_row` the first of them."""
Made = tuple[Examples, Counts]


# -- classification ----------------------------------------------------------------------------------------------


def classification(
    data: Table,
    labels: Labels,
    spec: DataSpec,
    tokenizer: Any,
    max_length: int,
    split: str,
    progress: Callable[[int], None],
) -> Made:
    """One example a row. Raises RecipeError for a row of no tokens, which leaves the model nothing to read its class from."""
    columns = text_columns(spec, data.column_names)
    answers = label_ids(data, labels, spec, split)
    texts = [field_texts(data, column, "data.text_columns") for column in columns]
    tokeniser = Tokeniser(tokenizer)
    rows = _Rows(spec, max_length, data)
    types: list[Tokens] = []
    for start in range(0, len(data), CHUNK):
        parts = [column[start : start + CHUNK] for column in texts]
        for row, one in enumerate(tokeniser.classified(parts, max_length), start):
            if not one.ids:
                where = " and ".join(f"`{column}`" for column in columns)
                what = f"{data.place(row)} has no text in {where} that the tokenizer has a token for"
                raise RecipeError.at("data.text_columns", what, "at least a word in every row")
            if not any(part[row - start].strip() for part in parts):
                rows.count("textless", row)
            if rows.add(row, one.ids, one.length) and one.types is not None:
                types.append(_array(one.types))
        progress(min(CHUNK, len(data) - start))
    rows.find_special(tokenizer, texts)
    rows.find_unknown(tokeniser, rows.tokens, texts)
    return rows.made(token_types=types or None, labels=answers[rows.kept])


# -- language modelling ------------------------------------------------------------------------------------------


def prompt_completion(
    data: Table, spec: DataSpec, tokenizer: Any, max_length: int, split: str, progress: Callable[[int], None]
) -> Made:
    """One example a row: the prompt, the completion, and the end-of-sequence token that ends it."""
    asked, answered = prompts(data, spec), completions(data, spec)
    tokeniser = Tokeniser(tokenizer)
    rows = _Rows(spec, max_length, data)
    first = []
    for start in range(0, len(data), CHUNK):
        part = slice(start, start + CHUNK)
        for row, one in enumerate(tokeniser.completed(asked[part], answered[part]), start):
            begin = one.first if spec.loss_on == "completion" else 0
            if one.first == 0 and len(one.ids) > 1:
                rows.count("unprompted", row)
            # The first token of a row has nothing before it to be predicted from.
            if rows.add(row, one.ids, len(one.ids), max(begin, 1)):
                first.append(begin)
                if not one.exact:
                    rows.count("inexact", row)
        progress(min(CHUNK, len(data) - start))
    rows.find_special(tokenizer, [asked, answered], (spec.prompt or "") + (spec.completion or ""))
    rows.find_unknown(tokeniser, rows.tokens, [asked, answered])
    return rows.made(first_target=first)


def text(
    data: Table,
    spec: DataSpec,
    tokenizer: Any,
    max_length: int,
    split: str,
    stride: int | None,
    lines: bool,
    progress: Callable[[int], None],
) -> Made:
    """A row is a document, which begins as the tokenizer begins a text and ends with the end-of-sequence token; or, with `lines`,
    all rows are one running text, which begins once and stays open. Packed, rows are joined and cut into pieces of `max_length`;
    else each row is a document and an example.

    With `stride` < `max_length` the pieces are windows that move by so many tokens, and only what the window before did not
    hold is a target (the sliding window of Transformers' documentation, "Perplexity of fixed-length models"): every
    token of the stream but its first is a target once, with at least max_length - stride tokens before it."""
    (column,) = text_columns(spec, data.column_names)
    texts = field_texts(data, column, "data.text_columns")
    tokeniser = Tokeniser(tokenizer)
    rows = _Rows(spec, max_length, data)
    if spec.packing is False:
        for start in range(0, len(texts), CHUNK):
            for row, ids in enumerate(tokeniser.documents(texts[start : start + CHUNK]), start):
                rows.add(row, ids, len(ids), 1)
            progress(min(CHUNK, len(texts) - start))
        rows.find_special(tokenizer, [texts])
        rows.find_unknown(tokeniser, rows.tokens, [texts])
        return rows.made(first_target=[0] * len(rows.kept))
    tokens: list[Tokens] = []
    lengths: list[int] = []  # of each row
    if lines:
        for ids, counts in tokeniser.running(texts, progress):
            tokens.append(_array(ids))
            lengths += counts
    else:
        for start in range(0, len(texts), CHUNK):
            for ids in tokeniser.documents(texts[start : start + CHUNK]):
                tokens.append(_array(ids))
                lengths.append(len(ids))
            progress(min(CHUNK, len(texts) - start))
    stream, ends = _joined(tokens), np.cumsum(lengths)
    overlap = max_length - stride if stride else 0
    starts = range(0, max(len(stream) - overlap, 1), max_length - overlap)
    begins = np.searchsorted(ends, np.asarray(starts), side="right").tolist()  # the row a piece begins in
    first = []
    for number, (start, row) in enumerate(zip(starts, begins, strict=True)):
        piece = stream[start : start + max_length]
        if len(piece) > 1:  # the last one may be of one token, which has nothing before it to be predicted from
            rows.add(row, piece, len(piece))
            first.append(overlap if number else 0)
    rows.find_special(tokenizer, [texts])
    rows.find_unknown(tokeniser, tokens, [texts])
    return rows.made(first_target=first)


@dataclass(frozen=True)
class Reader:
    """How rows of a recipe become examples: all but the rows. `progress(rows done, rows in all)` is called along the way."""

    task: Task
    labels: Labels | None
    spec: DataSpec
    tokenizer: Any
    max_length: int
    progress: Callable[[int, int], None]
    config: Any = None
    """The model's configuration, to check that it can read what comes out."""

    def read(self, rows: Rows) -> tuple[Examples, Examples]:
        """(training, validation) examples."""
        return self.train(rows), self.validation(rows)

    def train(self, rows: Rows) -> Examples:
        return self._split("training", rows.train, self.spec.max_train_samples, rows.lines, None)

    def validation(self, rows: Rows) -> Examples:
        return self._split("validation", rows.validation, self.spec.max_eval_samples, rows.lines, self.spec.stride)

    def _split(self, split: str, data: Table, limit: int | None, lines: bool, stride: int | None) -> Examples:
        """Raises RecipeError when the split has no example left, or one that the model can not read."""
        spec, tokenizer, max_length = self.spec, self.tokenizer, self.max_length
        data = limited(data, limit, spec, self.task, lines)
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self.progress(done, len(data))

        form = detect_format(self.task, spec, data.column_names)
        if form != "classification" and tokenizer.eos_token is None:
            raise RecipeError.at("model.name_or_path", "the tokenizer has no end-of-sequence token", "a model that writes text")
        if spec.stride is not None and spec.stride >= max_length:
            what = f"windows of {max_length} tokens that move by {spec.stride} leave a target without context"
            raise RecipeError.at("data.stride", what, f"less than {max_length}")
        if spec.truncation != "cut" and form == "text" and spec.packing is not False:
            what = "packed text is cut into pieces and loses nothing: there are no rows too long"
            raise RecipeError.at("data.truncation", what, "cut, or packing: false")

        def make() -> Made:
            if form == "classification":
                assert self.labels is not None
                return classification(data, self.labels, spec, tokenizer, max_length, split, advance)
            if form == "prompt-completion":
                return prompt_completion(data, spec, tokenizer, max_length, split, advance)
            return text(data, spec, tokenizer, max_length, split, stride, lines, advance)

        if spec.cache:
            labels = None if self.labels is None else asdict(self.labels)
            settings = {"task": self.task, "labels": labels, "max_length": max_length, "stride": stride, "lines": lines}
            settings["spec"] = spec.model_dump(exclude=ABOUT_ROWS)
            examples, counts = kept(data, tokenizer, settings, make)
            advance(len(data) - done)  # all of them at once, if they were in the cache
        else:
            examples, counts = make()
        if len(examples) == 0:
            if max_length > 1 and not counts.keys() & {
                "no_target",
                "long",
            }:  # nothing was cut: packed text of a token, or rows that are empty
                self._refuse_empty(data, form, split, counts.get("empty_row", 0))
            what = f"no {split} row has a target left after cutting to max_seq_length {max_length}"
            if spec.truncation == "drop":
                what = f"all {split} rows are longer than max_seq_length {max_length} or have no target"
            raise RecipeError.at("data.max_seq_length", what, "more tokens, or shorter prompts")
        if form != "classification" and split == "training":  # a classifier may well do without capitals or line breaks
            self._say_lost(data, form, lines)
        for message in _said(counts, split, data, max_length, form, spec.truncation == "drop"):
            log.warning(message)
        self._check(examples, data)
        return replace(examples, row_ids=data.row_numbers[examples.row_ids])  # as an editor counts the rows of the source

    def _refuse_empty(self, data: Table, form: Format, split: str, row: int) -> NoReturn:
        """Raises the RecipeError for a split of rows that have no target, though nothing of them was cut; `row` is the first."""
        one = data.select(range(row, row + 1))
        if form == "prompt-completion":
            key, texts, empty = "data.completion", prompts(one, self.spec) + completions(one, self.spec), "prompt and completion"
        else:
            (column,) = text_columns(self.spec, data.column_names)
            key, texts, empty = "data.text_columns", field_texts(one, column, "data.text_columns"), "text"
        alone = "a single token, which has nothing before it to be predicted from"
        why = alone if "".join(texts).strip() else f"an empty {empty}"
        what = f"no {split} row has a target: {data.place(row)} has {why}"
        raise RecipeError.at(key, what, "text of at least two tokens in a row")

    def _say_lost(self, data: Table, form: Format, lines: bool) -> None:
        """Warn of what the tokenizer loses of every text. data: the training rows."""
        first = data.select(range(min(len(data), LOOKED_AT)))
        if form == "prompt-completion":
            texts = [
                asked + answered for asked, answered in zip(prompts(first, self.spec), completions(first, self.spec), strict=True)
            ]
        else:
            (column,) = text_columns(self.spec, data.column_names)
            texts = field_texts(first, column, "data.text_columns")
            if lines and self.spec.packing is not False:
                texts = ["".join(texts)]
        if lost := lost_characters(self.tokenizer, texts):
            log.warning("the text that is trained on is not that of the data: the tokenizer loses its %s", listed_lost(lost))

    def _check(self, examples: Examples, data: Table) -> None:
        """data: the rows that the examples' row_ids count. Raises RecipeError for a row with a token that the model's embedding
        does not have, or without one that it needs."""
        if self.config is None:
            return
        rows = embedding_rows(self.config)
        if rows is not None and len(examples.tokens) and examples.tokens.max() >= rows:
            place = int(np.argmax(examples.tokens >= rows))
            row = _row_at(examples, place)
            what = f"{data.place(row)} has {without_embedding(self.tokenizer, examples.tokens[place], rows)}"
            expected = "the model's own tokenizer, or a model whose embedding was resized for the tokens that were added"
            raise RecipeError.at("model.name_or_path", what, expected)
        types = getattr(self.config, "type_vocab_size", None)
        if types and examples.token_types is not None and examples.token_types.max(initial=0) >= types:
            row = _row_at(examples, int(np.argmax(examples.token_types >= types)))
            what = f"{data.place(row)} has the token type {types}, and the model has types 0 to {types - 1}"
            raise RecipeError.at("model.name_or_path", what, "a tokenizer of this model")
        end = getattr(self.config, "eos_token_id", None)
        if self.task == "sequence-classification" and self.config.is_encoder_decoder and isinstance(end, int):
            present = np.zeros(len(examples), bool)
            present[np.searchsorted(examples.offsets, np.flatnonzero(examples.tokens == end), side="right") - 1] = True
            if not present.all():
                row = int(examples.row_ids[int(np.argmin(present))])
                name = self.tokenizer.convert_ids_to_tokens(end)
                what = f"{data.place(row)} has no `{name}` (id {end}), at which the model reads the class"
                raise RecipeError.at("model.name_or_path", what, "a tokenizer that ends every text with it")


# -- shared ------------------------------------------------------------------------------------------------------


@dataclass
class _Rows:
    """Collects the rows of a split as they are tokenised, and what is to be said about them."""

    spec: DataSpec
    max_length: int
    data: Table
    tokens: list[Tokens] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    """Which rows are in, in their order."""
    counts: Counts = field(default_factory=dict)

    def add(self, row: int, ids: Sequence[int] | Tokens, length: int, needs: int = 0) -> bool:
        """True if the row is taken: it must have more than `needs` tokens. length: its tokens before anything was cut.

        Raises RecipeError for a row that is too long, where the recipe says so.
        """
        if length > self.max_length:
            if self.spec.truncation == "error":
                what = f"{self.data.place(row)} has {length} tokens, and max_seq_length is {self.max_length}"
                raise RecipeError.at("data.truncation", what, "more tokens, shorter rows, or truncation: cut or drop")
            if self.spec.truncation == "drop":
                self.count("long", row)
                return False
        ids = ids[: self.max_length]
        if len(ids) <= needs:
            self.count("no_target" if length > self.max_length else "empty", row)
            return False
        if length > self.max_length:
            self.count("long", row)
        self.tokens.append(_array(ids))
        self.kept.append(row)
        return True

    def count(self, what: str, row: int) -> None:
        """One more row of which `what` is true."""
        self.counts[what] = self.counts.get(what, 0) + 1
        self.counts.setdefault(f"{what}_row", row)

    def find_special(self, tokenizer: Any, columns: Sequence[Sequence[str]], template: str = "") -> None:
        """Count rows with text that the tokenizer reads as a special token, where it is not the template's."""
        pattern = special_texts(tokenizer)
        if pattern is None:
            return
        expected = len(pattern.findall("".join(part for part, *_ in Formatter().parse(template))))
        for row, texts in enumerate(zip(*columns, strict=True)):
            if sum(len(pattern.findall(text)) for text in texts) > expected:
                self.count("special", row)

    def find_unknown(self, tokeniser: Tokeniser, tokens: Sequence[Tokens], columns: Sequence[Sequence[str]]) -> None:
        """Count the tokens, and those among them that are the unknown token without being written out in the text."""
        unknown = tokeniser.unknown
        if unknown is None:
            return
        token, name = unknown
        found = sum(int((ids == token).sum()) for ids in tokens) - sum(text.count(name) for texts in columns for text in texts)
        if found > 0:
            self.counts |= {"unknown": found, "tokens": sum(map(len, tokens))}

    def made(self, **columns: Any) -> Made:
        return _examples(self.tokens, self.kept, **columns), self.counts


def _said(counts: Counts, split: str, data: Table, max_length: int, form: Format, drops: bool) -> Iterator[str]:
    """Messages to the user about the rows of a split."""
    rows = len(data)

    def first(what: str) -> str:
        return f"the first is {data.place(counts[f'{what}_row'])}"

    if many := counts.get("no_target"):
        yield f"{many} of {rows} {split} rows have no target within {max_length} tokens and are left out"
    if many := counts.get("empty"):
        yield f"{many} of {rows} {split} rows ({first('empty')}) are empty: they have no token to learn and are left out"
    if many := counts.get("textless"):
        yield f"{many} of {rows} {split} rows ({first('textless')}) have an empty text: nothing tells their class"
    if many := counts.get("unprompted"):
        yield (
            f"{many} of {rows} {split} rows ({first('unprompted')}) have an empty prompt, and the tokenizer puts no token at the "
            "beginning: the completion's first token has nothing before it to be predicted from and is no target"
        )
    if many := counts.get("long"):
        said = f"{many} of {rows} {split} rows have more than {max_length} tokens ({first('long')}) and"
        if drops:
            yield f"{said} are left out"
        elif form == "classification":
            yield f"{said} are cut"
        else:
            yield f"{said} are cut: they lose their end, and nobody learns from them where to stop"
    if many := counts.get("inexact"):
        yield (
            f"in {many} of {rows} {split} rows ({first('inexact')}) the tokenizer can not write prompt and "
            "completion next to each other as they are: what stands between them is lost, or a blank is added"
        )
    if many := counts.get("unknown"):
        yield (
            f"{many} of {counts['tokens']} {split} tokens ({many / counts['tokens']:.2%}) are the tokenizer's unknown token: it "
            "has no tokens for what stands there, and the model neither sees nor learns it"
        )
    if many := counts.get("special"):
        yield (f"{many} of {rows} {split} rows ({first('special')}) hold text that the tokenizer reads as a special token")


def _row_at(examples: Examples, place: int) -> int:
    """The row that the token at `place` is in."""
    return int(examples.row_ids[np.searchsorted(examples.offsets, place, side="right") - 1])


def _array(ids: Sequence[int] | Tokens) -> Tokens:
    """A row as it is kept: 4 bytes a token, where a list of Python's integers takes up to 36."""
    return np.array(ids, np.int32)


def _joined(rows: Sequence[Tokens]) -> Tokens:
    return np.concatenate([np.empty(0, np.int32), *rows])


def _examples(tokens: Sequence[Tokens], row_ids: Sequence[int], **columns: Any) -> Examples:
    offsets = np.zeros(len(tokens) + 1, np.int64)
    np.cumsum([len(ids) for ids in tokens], out=offsets[1:])
    types = columns.pop("token_types", None)
    first = columns.pop("first_target", None)
    return Examples(
        tokens=_joined(tokens),
        offsets=offsets,
        row_ids=np.asarray(row_ids, np.int64),
        token_types=None if types is None else _joined(types),
        first_target=None if first is None else np.asarray(first, np.int64),
        **columns,
    )
