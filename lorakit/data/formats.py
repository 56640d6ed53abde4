"""Formats: how rows become examples. Classification (one text or a pair), prompt and completion, running text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
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
from lorakit.errors import RecipeError

log = logging.getLogger("lorakit")

CHUNK = 1000  # rows tokenised at a time
# Keys that say which rows there are, and those of which Reader passes on what they come to.
ABOUT_ROWS = {"name_or_path", "subset", "offline", "revision", "train_split", "validation_split", "max_train_samples"}
ABOUT_ROWS |= {"max_eval_samples", "references", "max_seq_length", "stride", "cache"}

Tokens = NDArray[np.int32]


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
    data: Dataset, labels: Labels, spec: DataSpec, tokenizer: Any, max_length: int, split: str, progress: Callable[[int], None]
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


def prompts(data: Dataset, spec: DataSpec) -> list[str]:
    """The text of each row's prompt."""
    columns = data.column_names
    return render(spec.prompt or _field("data.prompt", "prompt", PROMPTS, columns), "data.prompt", data)


def completions(data: Dataset, spec: DataSpec) -> list[str]:
    """The text of each row's completion."""
    columns = data.column_names
    return render(spec.completion or _field("data.completion", "completion", COMPLETIONS, columns), "data.completion", data)


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
    data: Dataset, spec: DataSpec, tokenizer: Any, max_length: int, progress: Callable[[int], None]
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
    data: Dataset,
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
    columns = text_columns(spec, data.column_names)
    if len(columns) > 1:
        raise RecipeError.at("data.text_columns", "a pair of columns is for classification", "one column")
    rows = field_texts(data, columns[0], "data.text_columns")
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

    def _split(self, split: str, data: Dataset, limit: int | None, lines: bool, stride: int | None) -> Examples:
        """Raises RecipeError when the split has no example left."""
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
        return examples


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


def _field(key: str, what: str, names: Sequence[str], columns: Sequence[str]) -> str:
    """The template that is the column of one of these `names`."""
    column = first_of(columns, names)
    if column is None:
        raise RecipeError.at(
            key, f"no {what} column among {listed(columns)}", f'a template over the columns, as "{{{columns[0]}}}"'
        )
    return f"{{{column}}}"
