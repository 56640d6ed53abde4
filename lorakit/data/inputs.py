"""Inputs: which columns of a row are read, and the prompt and completion that they make.

Without `data.prompt` the prompt is the column prompt, instruction or question; an `input` or `context` beside an instruction is
put with it as Stanford Alpaca does (github.com/tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT), and a `context` or `passage`
beside a prompt or a question stands before it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorakit.data.columns import (
    TEXTS,
    column_of,
    field_cells,
    field_text_lists,
    first_of,
    listed,
    render,
    template_columns,
    template_fields,
    text_columns,
)
from lorakit.data.labels import Task, label_column
from lorakit.data.spec import FORMATS_OF_KEYS, ChosenSpec, DataSpec, Format
from lorakit.data.table import NESTED, NOTHING, Kind, Table
from lorakit.errors import Problem, RecipeError

log = logging.getLogger("lorakit")

PROMPTS = ("prompt", "instruction", "question")
COMPLETIONS = ("completion", "response", "output", "answer")
# What may stand beside a prompt, by the prompt's column, and what is made of the two. Rows in which it is empty do without.
BESIDE = {"instruction": ("input", "context"), "prompt": ("context", "passage"), "question": ("context", "passage")}
ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{%s}\n\n### Input:\n{%s}\n\n### Response:"
)
ALPACA_ALONE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{%s}\n\n### Response:"
)
LOOKED_AT = 1000  # rows in which a column's text is looked for


def detect_format(task: Task, spec: DataSpec, columns: Sequence[str]) -> Format:
    """The recipe's format, or the one that task and columns suggest. Raises RecipeError when they do not fit."""
    if task == "sequence-classification":
        if spec.format not in (None, "classification"):
            raise RecipeError.at("data.format", f"`{spec.format}` is not for the task {task}", "format: classification")
        return "classification"
    if spec.format == "classification":
        raise RecipeError.at("data.format", f"`classification` is not for the task {task}", "format: prompt-completion or text")
    if spec.format:
        return spec.format
    if spec.prompt or spec.completion or (first_of(columns, PROMPTS) and first_of(columns, COMPLETIONS)):
        return "prompt-completion"
    if spec.text_columns or first_of(columns, TEXTS):
        return "text"
    expected = (
        "a prompt and a completion column, a text column (data.text_columns), or data.prompt and data.completion as templates"
    )
    raise RecipeError.at("data.format", f"the columns {listed(columns)} do not tell how to read a row", expected)


def check_keys(spec: DataSpec, form: Format) -> None:
    """Raises RecipeError for every key of the recipe that means nothing for rows of this format."""
    problems = [
        Problem(f"`{name}` has no effect: rows are read as {form}", f"data.{name}", f"null, or format: {' or '.join(forms)}")
        for name, forms in FORMATS_OF_KEYS.items()
        if form not in forms and getattr(spec, name) != DataSpec.model_fields[name].default
    ]
    if problems:
        raise RecipeError(problems)


def used_columns(spec: ChosenSpec, columns: Sequence[str]) -> list[str]:
    """The columns that rows are read from. Raises RecipeError where one is missing or named twice."""
    if spec.format == "prompt-completion":
        found = template_columns(spec.prompt, "data.prompt", columns)
        # Rows with references need no completion to be evaluated by.
        required = spec.references is None
        found += template_columns(spec.completion, "data.completion", columns, required)
        if spec.references is not None:
            found.append(column_of(spec.references, columns))
        return list(dict.fromkeys([*found, *([spec.beside] if spec.beside else [])]))
    found = text_columns(spec, columns)
    if spec.format == "text":
        if len(found) > 1:
            raise RecipeError.at("data.text_columns", "a pair of columns is for classification", "one column")
        return found
    label = label_column(spec, columns)
    if label in found:
        raise RecipeError.at("data.text_columns", f"`{label}` is the label column (data.label_column)", "the column of the text")
    return [*found, label]


def warn_of_unused(train: Table, validation: Table, spec: ChosenSpec) -> None:
    """One line in the log about all columns that hold text and go into no example."""
    used = used_columns(spec, train.column_names)
    unused = [name for name in train.column_names if name not in used and _holds_text(train, name)]
    known = {*used, *train.column_names}
    more = [name for name in validation.column_names if name not in known and _holds_text(validation, name)]
    unused += [f"{name} (in the validation rows alone)" for name in more]
    if unused:
        keys = "data.prompt or data.completion" if spec.format == "prompt-completion" else "data.text_columns"
        log.warning("columns with text that nothing reads: %s (read: %s; %s names others)", listed(unused), listed(used), keys)


def prompts(data: Table, spec: DataSpec) -> list[str]:
    """The text of each row's prompt."""
    columns = data.column_names
    template, beside = prompt_template(spec, columns), beside_column(spec, columns)
    if beside is None:
        return render(template, "data.prompt", data)
    if beside not in columns:
        return render(_with_beside(template[1:-1], beside)[1], "data.prompt", data)
    cells = field_cells(data, beside, "data.prompt")
    there = [
        kind not in (*NOTHING, Kind.EMPTY) and bool(text.strip()) for kind, text in zip(cells.kinds, cells.texts, strict=True)
    ]
    both, alone = _with_beside(template[1:-1], beside)
    texts = render(alone, "data.prompt", data)
    rows = np.flatnonzero(there)
    for row, text in zip(rows, render(both, "data.prompt", data.select(rows)), strict=True):
        texts[row] = text
    return texts


def say_template(spec: ChosenSpec) -> None:
    """A line in the log where the prompt is made of two columns that the recipe does not name."""
    if spec.beside is not None and spec.prompt is not None:
        both, _ = _with_beside(spec.prompt[1:-1], spec.beside)
        log.info("the prompt is %r, without `%s` where it is empty; data.prompt sets another", both, spec.beside)


def completions(data: Table, spec: DataSpec) -> list[str]:
    """The text of each row's completion."""
    return render(completion_template(spec, data.column_names), "data.completion", data)


@dataclass(frozen=True)
class Question:
    """A prompt to be answered, and the answers that are accepted."""

    prompt: str
    references: list[str]


def questions(data: Table, spec: DataSpec) -> list[Question]:
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
            raise RecipeError.at("data.prompt", f"the prompt of {data.place(row)} is empty", "at least a word to begin with")
        found.setdefault(prompt, {}).update(dict.fromkeys(references))
    return [Question(prompt, list(references)) for prompt, references in found.items()]


def input_keys(data: Table, spec: DataSpec, form: Format) -> list[Any]:
    """Input that a model is given of each row, as a key: rows of equal keys must not be in both training and validation."""
    if form == "prompt-completion":
        return prompts(data, spec)
    columns = [data.cells(name).texts for name in text_columns(spec, data.column_names)]
    return list(zip(*columns, strict=True))


def prompt_template(spec: DataSpec, columns: Sequence[str]) -> str:
    return spec.prompt or _field("data.prompt", "prompt", PROMPTS, columns)


def has_completion(spec: DataSpec, columns: Sequence[str]) -> bool:
    return bool(spec.completion or first_of(columns, COMPLETIONS))


def completion_template(spec: DataSpec, columns: Sequence[str]) -> str:
    return spec.completion or _field("data.completion", "completion", COMPLETIONS, columns)


def beside_column(spec: DataSpec, columns: Sequence[str]) -> str | None:
    """The column that goes into the prompt beside its own, where the recipe has no template; not one that is answered."""
    if isinstance(spec, ChosenSpec):
        return spec.beside
    if spec.prompt is not None:
        return None
    answered: list[str] = []
    if has_completion(spec, columns):
        fields = template_fields(completion_template(spec, columns), "data.completion")
        answered = [column_of(name, columns) for _, name in fields if name]
    beside = BESIDE.get(prompt_template(spec, columns)[1:-1], ())
    return first_of([name for name in columns if name not in answered], beside)


def _with_beside(prompt: str, beside: str) -> tuple[str, str]:
    """Templates of (both columns, the prompt's column alone)."""
    if prompt == "instruction":
        return ALPACA % (prompt, beside), ALPACA_ALONE % prompt
    return f"{{{beside}}}\n\n{{{prompt}}}", f"{{{prompt}}}"


def _field(key: str, what: str, names: Sequence[str], columns: Sequence[str]) -> str:
    """The template that is the column of one of these `names`."""
    column = first_of(columns, names)
    if column is None:
        raise RecipeError.at(
            key, f"no {what} column among {listed(columns)}", f'{key}: a template over the columns, as "{{{columns[0]}}}"'
        )
    return f"{{{column}}}"


def _holds_text(data: Table, column: str) -> bool:
    """True if one of the first rows has words in the column; numbers are not words."""
    try:
        cells = data.select(range(min(LOOKED_AT, len(data)))).cells(column)
    except RecipeError:  # pictures, sounds: whatever has no text
        return False
    return any(
        (kind == Kind.STRING and text.strip()) or kind in NESTED or (kind == Kind.CELL and any(map(str.isalpha, text)))
        for kind, text in zip(cells.kinds, cells.texts, strict=True)
    )
