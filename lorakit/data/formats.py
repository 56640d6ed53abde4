"""Formats: how rows become examples. Classification (one text or a pair), prompt and completion, running text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.data.columns import field_texts, text_columns
from lorakit.data.draw import limited
from lorakit.data.examples import Examples
from lorakit.data.inputs import completions, detect_format, prompts
from lorakit.data.labels import Labels, Task, label_ids
from lorakit.data.load import Rows
from lorakit.data.spec import DataSpec
from lorakit.data.table import Table
from lorakit.data.token_cache import kept
from lorakit.errors import RecipeError

log = logging.getLogger("lorakit")

CHUNK = 1000  # rows tokenised at a time
# Keys that say which rows there are, and those of which Reader passes on what they come to.
ABOUT_ROWS = {"name_or_path", "subset", "offline", "revision", "train_split", "validation_split", "max_train_samples"}
ABOUT_ROWS |= {"max_eval_samples", "references", "max_seq_length", "stride", "cache"}

Tokens = NDArray[np.int32]


# -- classification ----------------------------------------------------------------------------------------------


def classification(
    data: Table, labels: Labels, spec: DataSpec, tokenizer: Any, max_length: int, split: str, progress: Callable[[int], None]
) -> Examples:
    columns = text_columns(spec, data.column_names)
    answers = label_ids(data, labels, spec, split)
    rows = [field_texts(data, column, "data.text_columns") for column in columns]
    tokens: list[Tokens] = []
    types: list[Tokens] = []
    for start in range(0, len(data), CHUNK):
        parts = [column[start : start + CHUNK] for column in rows]
        encoded = tokenizer(*parts, truncation=True, max_length=max_length, return_attention_mask=False)
        tokens += map(_array, encoded["input_ids"])
        types += map(_array, encoded.get("token_type_ids", []))
        progress(min(CHUNK, len(data) - start))
    return _examples(tokens, range(len(data)), token_types=types or None, labels=answers)


# -- language modelling ------------------------------------------------------------------------------------------


def prompt_tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of prompts, the same for training and for generation."""
    # A prompt must not end the sequence, where the tokenizer closes every text with the token (T5 and its kin do).
    ends = tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    encoded = tokenizer(list(texts), return_attention_mask=False, return_token_type_ids=False)
    return [ids[:-1] if ends else ids for ids in encoded["input_ids"]]


def continuation_tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts that stand inside a sequence: without what the tokenizer puts around one."""
    options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    found: list[list[int]] = tokenizer(list(texts), **options)["input_ids"]
    return found


def prompt_completion(
    data: Table, spec: DataSpec, tokenizer: Any, max_length: int, progress: Callable[[int], None]
) -> tuple[Examples, int]:
    """(examples, rows dropped because truncation left them no target). The end-of-sequence token ends a completion."""
    asked, answered = prompts(data, spec), completions(data, spec)
    tokens: list[Tokens] = []
    first, kept = [], []
    for start in range(0, len(data), CHUNK):
        part = slice(start, start + CHUNK)
        heads = prompt_tokens(tokenizer, asked[part])
        tails = continuation_tokens(tokenizer, [text + tokenizer.eos_token for text in answered[part]])
        for row, (head, tail) in enumerate(zip(heads, tails, strict=True), start):
            begin = len(head) if spec.loss_on == "completion" else 0
            ids = (head + tail)[:max_length]
            if len(ids) > max(begin, 1):  # the first token of a row has nothing before it to be predicted from
                tokens.append(_array(ids))
                first.append(begin)
                kept.append(row)
        progress(min(CHUNK, len(data) - start))
    return _examples(tokens, kept, first_target=first), len(data) - len(kept)


def text(
    data: Table,
    spec: DataSpec,
    tokenizer: Any,
    max_length: int,
    stride: int | None,
    lines: bool,
    progress: Callable[[int], None],
) -> tuple[Examples, int]:
    """(examples, rows dropped as too short). Packed, rows are joined and cut into pieces of `max_length`; documents
    are told apart by the end-of-sequence token, lines of one text are not.

    With `stride` < `max_length` the pieces are windows that move by so many tokens, and only what the window before did not
    hold is a target (the sliding window of Transformers' documentation, "Perplexity of fixed-length models"): every
    token of the stream but its first is a target once, with at least max_length - stride tokens before it."""
    (column,) = text_columns(spec, data.column_names)
    rows = field_texts(data, column, "data.text_columns")
    ending = [] if lines else [tokenizer.eos_token_id]
    tokens: list[Tokens] = []
    for start in range(0, len(rows), CHUNK):
        tokens += [_array(ids + ending) for ids in continuation_tokens(tokenizer, rows[start : start + CHUNK])]
        progress(min(CHUNK, len(rows) - start))
    row_ids: Sequence[int] = range(len(tokens))
    first = [0] * len(tokens)
    if spec.packing is not False:
        stream = _joined(tokens)
        ends = np.cumsum([len(ids) for ids in tokens])
        overlap = max_length - stride if stride else 0
        starts = range(0, max(len(stream) - overlap, 1), max_length - overlap)
        first = [0] + [overlap] * (len(starts) - 1)
        tokens = [stream[start : start + max_length] for start in starts]
        row_ids = np.searchsorted(ends, np.asarray(starts), side="right").tolist()  # the row a piece begins in
    kept = [i for i, ids in enumerate(tokens) if len(ids) > 1]
    pieces = [tokens[i][:max_length] for i in kept]
    examples = _examples(pieces, [row_ids[i] for i in kept], first_target=[first[i] for i in kept])
    return examples, len(tokens) - len(kept)


@dataclass(frozen=True)
class Reader:
    """How rows of a recipe become examples: all but the rows. `progress(rows done, rows in all)` is called along the way."""

    task: Task
    labels: Labels | None
    spec: DataSpec
    tokenizer: Any
    max_length: int
    progress: Callable[[int, int], None]

    def read(self, rows: Rows) -> tuple[Examples, Examples]:
        """(training, validation) examples."""
        return self.train(rows), self.validation(rows)

    def train(self, rows: Rows) -> Examples:
        return self._split("training", rows.train, self.spec.max_train_samples, rows.lines, None)

    def validation(self, rows: Rows) -> Examples:
        return self._split("validation", rows.validation, self.spec.max_eval_samples, rows.lines, self.spec.stride)

    def _split(self, split: str, data: Table, limit: int | None, lines: bool, stride: int | None) -> Examples:
        """Raises RecipeError when the split has no example left."""
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

        def make() -> tuple[Examples, int]:
            if form == "classification":
                assert self.labels is not None
                return classification(data, self.labels, spec, tokenizer, max_length, split, advance), 0
            if form == "prompt-completion":
                return prompt_completion(data, spec, tokenizer, max_length, advance)
            return text(data, spec, tokenizer, max_length, stride, lines, advance)

        if spec.cache:
            labels = None if self.labels is None else asdict(self.labels)
            settings = {"task": self.task, "labels": labels, "max_length": max_length, "stride": stride, "lines": lines}
            settings["spec"] = spec.model_dump(exclude=ABOUT_ROWS)
            examples, dropped = kept(data, tokenizer, settings, make)
            advance(len(data) - done)  # all of them at once, if they were in the cache
        else:
            examples, dropped = make()
        if len(examples) == 0:
            what = f"no {split} row has a target left after cutting to max_seq_length {max_length}"
            raise RecipeError.at("data.max_seq_length", what, "more tokens, or shorter prompts")
        if dropped:
            message = "%d of %d %s rows have no target within %d tokens and are left out"
            log.warning(message, dropped, len(data), split, max_length)
        return replace(examples, row_ids=data.row_numbers[examples.row_ids])  # as an editor counts the rows of the source


# -- shared ------------------------------------------------------------------------------------------------------


def _array(ids: list[int]) -> Tokens:
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
