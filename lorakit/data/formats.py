"""Formats: how rows become examples. Classification (one text or a pair), prompt and completion, running text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from string import Formatter
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset

from lorakit.data.examples import Examples
from lorakit.data.load import Rows
from lorakit.data.spec import DataSpec, Format
from lorakit.errors import RecipeError
from lorakit.model import Labels, Task

log = logging.getLogger("lorakit")

PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
    ("text_a", "text_b"),
)
TEXTS = ("sentence", "text", "content", "review")
LABELS = ("label", "labels")
PROMPTS = ("prompt", "instruction", "question")
COMPLETIONS = ("completion", "response", "output", "answer")
CHUNK = 1000  # rows tokenised at a time


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
    if spec.prompt or spec.completion or (_first(columns, PROMPTS) and _first(columns, COMPLETIONS)):
        return "prompt-completion"
    if spec.text_columns or _first(columns, TEXTS):
        return "text"
    expected = "a prompt and a completion column, a text column, or data.prompt and data.completion as templates over the columns"
    raise RecipeError.at("data.format", f"the columns {_listed(columns)} do not tell how to read a row", expected)


# -- classification ----------------------------------------------------------------------------------------------


def text_columns(spec: DataSpec, columns: Sequence[str]) -> list[str]:
    """The one text column, or the two of a pair."""
    if spec.text_columns is not None:
        named = [spec.text_columns] if isinstance(spec.text_columns, str) else spec.text_columns
        for name in named:
            if name not in columns:
                raise _no_column("data.text_columns", name, columns)
        return named
    for pair in PAIRS:
        if all(name in columns for name in pair):
            return list(pair)
    found = _first(columns, TEXTS)
    if found is None:
        usual = ", ".join(TEXTS) + ", " + ", ".join(" + ".join(pair) for pair in PAIRS)
        raise RecipeError.at(
            "data.text_columns", f"no text column among {_listed(columns)}", f"the name of one; usual names are {usual}"
        )
    return [found]


def label_column(spec: DataSpec, columns: Sequence[str]) -> str:
    if spec.label_column is not None:
        if spec.label_column not in columns:
            raise _no_column("data.label_column", spec.label_column, columns)
        return spec.label_column
    found = _first(columns, LABELS)
    if found is None:
        raise RecipeError.at("data.label_column", f"no label column among {_listed(columns)}", "its name")
    return found


def count_labels(train: Dataset, spec: DataSpec) -> Labels:
    """The label space, counted from all the training rows."""
    column = label_column(spec, train.column_names)
    values = train[column][:] if hasattr(train[column], "__getitem__") else train[column]
    _refuse_missing(values, column)
    fractions = any(isinstance(value, float) and not float(value).is_integer() for value in values)
    if spec.problem_type == "regression" or (spec.problem_type is None and fractions):
        if not all(isinstance(value, int | float) for value in values):
            raise RecipeError.at("data.label_column", f"regression needs numbers in `{column}`")
        return Labels(regression=True)
    feature = train.features[column]
    if isinstance(feature, ClassLabel):
        if min(values) < 0:
            raise RecipeError.at("data.train_split", f"`{column}` has the label {min(values)}: these rows are not labelled")
        return Labels(list(feature.names))
    names = sorted({_label_name(value) for value in values}, key=_numbers_first)
    if len(names) < 2:
        raise RecipeError.at(
            "data.label_column", f"all rows of `{column}` have the label {names[0]}", "at least two different labels"
        )
    return Labels(names)


def label_ids(data: Dataset, labels: Labels, spec: DataSpec, split: str) -> Any:
    """The labels of a split as class ids [rows] int64, or as values [rows] float32 for regression."""
    column = label_column(spec, data.column_names)
    values = data[column][:] if hasattr(data[column], "__getitem__") else data[column]
    _refuse_missing(values, column)
    if labels.regression:
        return np.asarray(values, np.float32)
    if isinstance(data.features[column], ClassLabel):
        values = [data.features[column].names[value] if value >= 0 else value for value in values]
    ids = {name: i for i, name in enumerate(labels.names)}
    known = [ids.get(_label_name(value), -1) for value in values]
    if -1 in known:
        row = known.index(-1)
        what = f"the {split} label {_label_name(values[row])!r} (row {row}, column `{column}`) is not in the training data"
        raise RecipeError.at("data.name_or_path", what, f"one of {', '.join(labels.names)}")
    return np.asarray(known, np.int64)


def _label_name(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _numbers_first(name: str) -> tuple[int, float, str]:
    try:
        return 0, float(name), name
    except ValueError:
        return 1, 0.0, name


def _refuse_missing(values: Sequence[Any], column: str) -> None:
    for row, value in enumerate(values):
        if value is None or value != value:
            raise RecipeError.at("data.label_column", f"row {row} has nothing in the column `{column}`", "a label in every row")


def classification(
    data: Dataset, labels: Labels, spec: DataSpec, tokenizer: Any, max_length: int, split: str, progress: Callable[[int], None]
) -> Examples:
    columns = text_columns(spec, data.column_names)
    answers = label_ids(data, labels, spec, split)
    texts = [_texts(data, column) for column in columns]
    tokens: list[list[int]] = []
    types: list[list[int]] = []
    for start in range(0, len(data), CHUNK):
        parts = [column[start : start + CHUNK] for column in texts]
        encoded = tokenizer(*parts, truncation=True, max_length=max_length)
        tokens += encoded["input_ids"]
        types += encoded.get("token_type_ids", [])
        progress(min(CHUNK, len(data) - start))
    return _examples(tokens, range(len(data)), token_types=types or None, labels=answers)


# -- language modelling ------------------------------------------------------------------------------------------


def render(template: str, key: str, data: Dataset) -> list[str]:
    """`template` over the rows' columns; only {column} fields, `{{` for a brace. Raises RecipeError for others."""
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise RecipeError.at(
            key, f"`{template}` is not a template: {error}", "text with {column} fields; {{ and }} for braces"
        ) from error
    for _, name, form, conversion in parsed:
        if name is not None and name not in data.column_names:
            raise _no_column(key, name, data.column_names)
        if form or conversion:
            raise RecipeError.at(key, f"`{template}` formats the column `{name}`", f"the column alone: {{{name}}}")
    fields = [(text, name) for text, name, _, _ in parsed]
    used = {name: _texts(data, name) for _, name in fields if name}
    return ["".join(text + (used[name][row] if name else "") for text, name in fields) for row in range(len(data))]


def prompt_completion(
    data: Dataset, spec: DataSpec, tokenizer: Any, max_length: int, progress: Callable[[int], None]
) -> tuple[Examples, int]:
    """(examples, rows dropped because truncation left them no target). The end-of-sequence token ends a completion."""
    columns = data.column_names
    prompt = spec.prompt or _field("data.prompt", "prompt", _first(columns, PROMPTS), columns)
    completion = spec.completion or _field("data.completion", "completion", _first(columns, COMPLETIONS), columns)
    prompts = render(prompt, "data.prompt", data)
    completions = render(completion, "data.completion", data)
    tokens, first, kept = [], [], []
    # A prompt must not end the sequence, where the tokenizer closes every text with the token (T5 and its kin do).
    ends = tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    for start in range(0, len(data), CHUNK):
        part = slice(start, start + CHUNK)
        heads = tokenizer(prompts[part])["input_ids"]
        tails = tokenizer([text + tokenizer.eos_token for text in completions[part]], add_special_tokens=False)["input_ids"]
        for row, (head, tail) in enumerate(zip(heads, tails, strict=True), start):
            head = head[:-1] if ends else head
            begin = len(head) if spec.loss_on == "completion" else 0
            ids = (head + tail)[:max_length]
            if len(ids) > max(begin, 1):  # the first token of a row has nothing before it to be predicted from
                tokens.append(ids)
                first.append(begin)
                kept.append(row)
        progress(min(CHUNK, len(data) - start))
    return _examples(tokens, kept, first_target=first), len(data) - len(kept)


def text(
    data: Dataset, spec: DataSpec, tokenizer: Any, max_length: int, lines: bool, progress: Callable[[int], None]
) -> tuple[Examples, int]:
    """(examples, rows dropped as too short). Packed, rows are joined and cut into pieces of `max_length`; documents
    are told apart by the end-of-sequence token, lines of one text are not."""
    columns = text_columns(spec, data.column_names)
    if len(columns) > 1:
        raise RecipeError.at("data.text_columns", "a pair of columns is for classification", "one column")
    rows = _texts(data, columns[0])
    ending = [] if lines else [tokenizer.eos_token_id]
    tokens: list[list[int]] = []
    for start in range(0, len(rows), CHUNK):
        tokens += [ids + ending for ids in tokenizer(rows[start : start + CHUNK], add_special_tokens=False)["input_ids"]]
        progress(min(CHUNK, len(rows) - start))
    row_ids: Sequence[int] = range(len(tokens))
    if spec.packing is not False:
        stream = np.concatenate([np.asarray(ids, np.int32) for ids in tokens]) if tokens else np.empty(0, np.int32)
        ends = np.cumsum([len(ids) for ids in tokens])
        starts = range(0, len(stream), max_length)
        tokens = [stream[start : start + max_length].tolist() for start in starts]
        row_ids = np.searchsorted(ends, np.asarray(starts), side="right").tolist()  # the row a piece begins in
    kept = [i for i, ids in enumerate(tokens) if len(ids) > 1]
    examples = _examples([tokens[i][:max_length] for i in kept], [row_ids[i] for i in kept], first_target=[0] * len(kept))
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
        return self._split("training", rows.train, self.spec.max_train_samples, rows.lines)

    def validation(self, rows: Rows) -> Examples:
        return self._split("validation", rows.validation, self.spec.max_eval_samples, rows.lines)

    def _split(self, split: str, data: Dataset, limit: int | None, lines: bool) -> Examples:
        """Raises RecipeError when the split has no example left."""
        spec, tokenizer, max_length = self.spec, self.tokenizer, self.max_length
        data = data.select(range(min(limit, len(data)))) if limit else data
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self.progress(done, len(data))

        form = detect_format(self.task, spec, data.column_names)
        if form != "classification" and tokenizer.eos_token is None:
            raise RecipeError.at("model.name_or_path", "the tokenizer has no end-of-sequence token", "a model that writes text")
        dropped = 0
        if form == "classification":
            assert self.labels is not None
            examples = classification(data, self.labels, spec, tokenizer, max_length, split, advance)
        elif form == "prompt-completion":
            examples, dropped = prompt_completion(data, spec, tokenizer, max_length, advance)
        else:
            examples, dropped = text(data, spec, tokenizer, max_length, lines, advance)
        if len(examples) == 0:
            what = f"no {split} row has a target left after cutting to max_seq_length {max_length}"
            raise RecipeError.at("data.max_seq_length", what, "more tokens, or shorter prompts")
        if dropped:
            message = "%d of %d %s rows have no target within %d tokens and are left out"
            log.warning(message, dropped, len(data), split, max_length)
        return examples


# -- shared ------------------------------------------------------------------------------------------------------


def _texts(data: Dataset, column: str) -> list[str]:
    values = list(data[column])
    for row, value in enumerate(values):
        if not isinstance(value, str):
            if value is None or isinstance(value, dict | list):
                shown = "nothing" if value is None else f"a {type(value).__name__}"
                raise RecipeError.at("data.text_columns", f"row {row} has {shown} in the column `{column}`", "text in every row")
            values[row] = str(value)
    return values


def _examples(tokens: list[list[int]], row_ids: Sequence[int], **columns: Any) -> Examples:
    offsets = np.zeros(len(tokens) + 1, np.int64)
    np.cumsum([len(ids) for ids in tokens], out=offsets[1:])
    types = columns.pop("token_types", None)
    first = columns.pop("first_target", None)
    return Examples(
        tokens=np.fromiter((i for ids in tokens for i in ids), np.int32, int(offsets[-1])),
        offsets=offsets,
        row_ids=np.asarray(row_ids, np.int64),
        token_types=None if types is None else np.fromiter((i for ids in types for i in ids), np.int32, int(offsets[-1])),
        first_target=None if first is None else np.asarray(first, np.int64),
        **columns,
    )


def _first(columns: Sequence[str], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def _field(key: str, what: str, column: str | None, columns: Sequence[str]) -> str:
    if column is None:
        raise RecipeError.at(
            key, f"no {what} column among {_listed(columns)}", f'a template over the columns, as "{{{columns[0]}}}"'
        )
    return f"{{{column}}}"


def _no_column(key: str, name: str, columns: Sequence[str]) -> RecipeError:
    near = get_close_matches(name, columns, 1)
    return RecipeError.at(key, f"there is no column `{name}`", f"one of {_listed(columns)}", near[0] if near else None)


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(columns) if columns else "(none)"
