"""Formats: how rows become examples. Classification (one text or a pair), prompt and completion, running text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from string import Formatter
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from lorakit.data.columns import (
    COMPLETIONS,
    PROMPTS,
    TEXTS,
    field_text_lists,
    field_texts,
    first_of,
    listed,
    render,
    text_columns,
)
from lorakit.data.examples import Examples
from lorakit.data.labels import Labels, Task, label_ids
from lorakit.data.load import Rows, first_rows
from lorakit.data.spec import DataSpec, Format
from lorakit.data.token_cache import kept
from lorakit.data.tokenise import Tokeniser, embedding_rows, special_texts, without_embedding
from lorakit.errors import RecipeError

log = logging.getLogger("lorakit")

CHUNK = 1000  # rows tokenised at a time
# Keys that say which rows there are, and those of which Reader passes on what they come to.
ABOUT_ROWS = {"name_or_path", "subset", "offline", "revision", "train_split", "validation_split", "max_train_samples"}
ABOUT_ROWS |= {"max_eval_samples", "references", "max_seq_length", "stride", "cache"}

Tokens = NDArray[np.int32]
Counts = dict[str, int]
"""How many rows of a split something is true of, and by `…_row` the first of them."""
Made = tuple[Examples, Counts]


def detect_format(task: Task, spec: DataSpec, columns: Sequence[str]) -> Format:
    """The recipe's format, or the one that task and columns suggest. Raises RecipeError when they do not fit."""
    if task == "sequence-classification":
        if spec.format not in (None, "classification"):
            raise RecipeError.at("data.format", f"`{spec.format}` is not for the task {task}", "classification")
        return "classification"
    if spec.format == "classification":
        raise RecipeError.at("data.format", f"`classification` is not for the task {task}", "prompt-completion or text")
    if spec.format:
        return spec.format
    if spec.prompt or spec.completion or (first_of(columns, PROMPTS) and first_of(columns, COMPLETIONS)):
        return "prompt-completion"
    if spec.text_columns or first_of(columns, TEXTS):
        return "text"
    expected = "a prompt and a completion column, a text column, or data.prompt and data.completion as templates over the columns"
    raise RecipeError.at("data.format", f"the columns {listed(columns)} do not tell how to read a row", expected)


# -- classification ----------------------------------------------------------------------------------------------


def classification(
    data: Dataset,
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
    rows = _Rows(spec, max_length, split)
    types: list[Tokens] = []
    for start in range(0, len(data), CHUNK):
        parts = [column[start : start + CHUNK] for column in texts]
        for row, one in enumerate(tokeniser.classified(parts, max_length), start):
            if not one.ids:
                where = " and ".join(f"`{column}`" for column in columns)
                what = f"row {row} of the {split} rows has no text in {where} that the tokenizer has a token for"
                raise RecipeError.at("data.text_columns", what, "at least a word in every row")
            if rows.add(row, one.ids, one.length) and one.types is not None:
                types.append(_array(one.types))
        progress(min(CHUNK, len(data) - start))
    rows.find_special(tokenizer, texts)
    return rows.made(token_types=types or None, labels=answers[rows.kept])


# -- language modelling ------------------------------------------------------------------------------------------


def prompts(data: Dataset, spec: DataSpec) -> list[str]:
    """The text of each row's prompt."""
    columns = data.column_names
    return render(spec.prompt or _field("data.prompt", "prompt", PROMPTS, columns), "data.prompt", data)


def completions(data: Dataset, spec: DataSpec) -> list[str]:
    """The text of each row's completion."""
    columns = data.column_names
    return render(spec.completion or _field("data.completion", "completion", COMPLETIONS, columns), "data.completion", data)


@dataclass(frozen=True)
class Question:
    """A prompt to be answered, and the answers that are accepted."""

    prompt: str
    references: list[str]


def questions(data: Dataset, spec: DataSpec) -> list[Question]:
    """The distinct prompts of the rows, in their order, each with the distinct references of all its rows.

    References are the texts of `data.references`, by default the completion. Raises RecipeError for what a row lacks.
    """
    if spec.references is not None:
        accepted = field_text_lists(data, spec.references, "data.references")
    else:
        accepted = [[completion] for completion in completions(data, spec)]
    found: dict[str, dict[str, None]] = {}
    for row, (prompt, references) in enumerate(zip(prompts(data, spec), accepted, strict=True)):
        if not prompt:
            raise RecipeError.at("data.prompt", f"the prompt of row {row} is empty", "at least a word to begin with")
        found.setdefault(prompt, {}).update(dict.fromkeys(references))
    return [Question(prompt, list(references)) for prompt, references in found.items()]


def prompt_completion(
    data: Dataset, spec: DataSpec, tokenizer: Any, max_length: int, split: str, progress: Callable[[int], None]
) -> Made:
    """One example a row: the prompt, the completion, and the end-of-sequence token that ends it."""
    asked, answered = prompts(data, spec), completions(data, spec)
    tokeniser = Tokeniser(tokenizer)
    rows = _Rows(spec, max_length, split)
    first = []
    for start in range(0, len(data), CHUNK):
        part = slice(start, start + CHUNK)
        for row, one in enumerate(tokeniser.completed(asked[part], answered[part]), start):
            begin = one.first if spec.loss_on == "completion" else 0
            # The first token of a row has nothing before it to be predicted from.
            if rows.add(row, one.ids, len(one.ids), max(begin, 1)):
                first.append(begin)
                if not one.exact:
                    rows.count("inexact", row)
        progress(min(CHUNK, len(data) - start))
    rows.find_special(tokenizer, [asked, answered], (spec.prompt or "") + (spec.completion or ""))
    return rows.made(first_target=first)


def text(
    data: Dataset,
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
    columns = text_columns(spec, data.column_names)
    if len(columns) > 1:
        raise RecipeError.at("data.text_columns", "a pair of columns is for classification", "one column")
    texts = field_texts(data, columns[0], "data.text_columns")
    tokeniser = Tokeniser(tokenizer)
    rows = _Rows(spec, max_length, split)
    if spec.packing is False:
        for start in range(0, len(texts), CHUNK):
            for row, ids in enumerate(tokeniser.documents(texts[start : start + CHUNK]), start):
                rows.add(row, ids, len(ids), 1)
            progress(min(CHUNK, len(texts) - start))
        rows.find_special(tokenizer, [texts])
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

    def _split(self, split: str, data: Dataset, limit: int | None, lines: bool, stride: int | None) -> Examples:
        """Raises RecipeError when the split has no example left, or one that the model can not read."""
        spec, tokenizer, max_length = self.spec, self.tokenizer, self.max_length
        data = first_rows(data, limit)
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self.progress(done, len(data))

        form = detect_format(self.task, spec, data.column_names)
        if form != "classification" and tokenizer.eos_token is None:
            raise RecipeError.at("model.name_or_path", "the tokenizer has no end-of-sequence token", "a model that writes text")
        if spec.stride is not None and form != "text":
            raise RecipeError.at("data.stride", f"a sliding window is for running text, not for {form}", "null")
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
            what = f"no {split} row has a target left after cutting to max_seq_length {max_length}"
            if spec.truncation == "drop":
                what = f"all {split} rows are longer than max_seq_length {max_length} or have no target"
            raise RecipeError.at("data.max_seq_length", what, "more tokens, or shorter prompts")
        for message in _said(counts, split, len(data), max_length, form, spec.truncation == "drop"):
            log.warning(message)
        self._check(examples, split)
        return examples

    def _check(self, examples: Examples, split: str) -> None:
        """Raises RecipeError for a row with a token that the model's embedding does not have, or without one that it needs."""
        if self.config is None:
            return
        rows = embedding_rows(self.config)
        if rows is not None and len(examples.tokens) and examples.tokens.max() >= rows:
            place = int(np.argmax(examples.tokens >= rows))
            row = _row_at(examples, place)
            what = f"row {row} of the {split} rows has {without_embedding(self.tokenizer, examples.tokens[place], rows)}"
            expected = "the model's own tokenizer, or a model whose embedding was resized for the tokens that were added"
            raise RecipeError.at("model.name_or_path", what, expected)
        types = getattr(self.config, "type_vocab_size", None)
        if types and examples.token_types is not None and examples.token_types.max(initial=0) >= types:
            row = _row_at(examples, int(np.argmax(examples.token_types >= types)))
            what = f"row {row} of the {split} rows has the token type {types}, and the model has types 0 to {types - 1}"
            raise RecipeError.at("model.name_or_path", what, "a tokenizer of this model")
        end = getattr(self.config, "eos_token_id", None)
        if self.task == "sequence-classification" and self.config.is_encoder_decoder and isinstance(end, int):
            present = np.zeros(len(examples), bool)
            present[np.searchsorted(examples.offsets, np.flatnonzero(examples.tokens == end), side="right") - 1] = True
            if not present.all():
                row = examples.row_ids[int(np.argmin(present))]
                name = self.tokenizer.convert_ids_to_tokens(end)
                what = f"row {row} of the {split} rows has no `{name}` (id {end}), at which the model reads the class"
                raise RecipeError.at("model.name_or_path", what, "a tokenizer that ends every text with it")


# -- shared ------------------------------------------------------------------------------------------------------


@dataclass
class _Rows:
    """Collects the rows of a split as they are tokenised, and what is to be said about them."""

    spec: DataSpec
    max_length: int
    split: str
    tokens: list[Tokens] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    """Which rows are in, in their order."""
    counts: Counts = field(default_factory=dict)

    def add(self, row: int, ids: Sequence[int] | Tokens, length: int, needs: int = 0) -> bool:
        """Whether the row is taken: it must have more than `needs` tokens. length: its tokens before anything was cut.

        Raises RecipeError for a row that is too long, where the recipe says so.
        """
        if length > self.max_length:
            if self.spec.truncation == "error":
                what = f"row {row} of the {self.split} rows has {length} tokens, and max_seq_length is {self.max_length}"
                raise RecipeError.at("data.truncation", what, "more tokens, shorter rows, or truncation: cut or drop")
            if self.spec.truncation == "drop":
                self.count("long", row)
                return False
        ids = ids[: self.max_length]
        if len(ids) <= needs:
            self.count("no_target", row)
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

    def made(self, **columns: Any) -> Made:
        return _examples(self.tokens, self.kept, **columns), self.counts


def _said(counts: Counts, split: str, rows: int, max_length: int, form: Format, drops: bool) -> Iterator[str]:
    """What a user should know of the rows of a split."""
    if many := counts.get("no_target"):
        yield f"{many} of {rows} {split} rows have no target within {max_length} tokens and are left out"
    if many := counts.get("long"):
        said = f"{many} of {rows} {split} rows have more than {max_length} tokens (the first is row {counts['long_row']}) and"
        if drops:
            yield f"{said} are left out"
        elif form == "classification":
            yield f"{said} are cut"
        else:
            yield f"{said} are cut: they lose their end, and nobody learns from them where to stop"
    if many := counts.get("inexact"):
        yield (
            f"in {many} of {rows} {split} rows (the first is row {counts['inexact_row']}) the tokenizer can not write prompt and "
            "completion next to each other as they are: what stands between them is lost, or a blank is added"
        )
    if many := counts.get("special"):
        yield (
            f"{many} of {rows} {split} rows (the first is row {counts['special_row']}) hold text that the tokenizer reads as a "
            "special token"
        )


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


def _field(key: str, what: str, names: Sequence[str], columns: Sequence[str]) -> str:
    """The template that is the column of one of these `names`."""
    column = first_of(columns, names)
    if column is None:
        raise RecipeError.at(
            key, f"no {what} column among {listed(columns)}", f'a template over the columns, as "{{{columns[0]}}}"'
        )
    return f"{{{column}}}"
