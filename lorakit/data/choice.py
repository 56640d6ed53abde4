"""The choice of format, columns and templates: made once, from the training rows, for every split and for later evaluations.

A split that chose for itself would be read from another column than the one that was trained on, if it had more columns.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from lorakit.data.columns import column_of, first_of, listed, template_columns, text_columns
from lorakit.data.inputs import (
    beside_column,
    check_keys,
    completion_template,
    detect_format,
    has_completion,
    prompt_template,
    used_columns,
)
from lorakit.data.labels import LABELS, Task, label_column
from lorakit.data.spec import ChosenSpec, DataSpec, Format
from lorakit.data.table import Table
from lorakit.errors import RecipeError

log = logging.getLogger("lorakit")

Record = Mapping[str, Any]
"""Record that a run keeps of its choice: {"format", "columns", "label_column", "prompt", "beside", "completion"}. Runs of earlier
versions have fewer of the keys."""


def choose(spec: DataSpec, task: Task, columns: Sequence[str], record: Record | None = None) -> ChosenSpec:
    """The choice for rows of these columns: what the recipe names, else what the run of `record` was trained on where the columns
    are there, else the usual names. A line in the log says which column stands in for one of the record's.

    Raises RecipeError where nothing can be chosen, and for keys that mean nothing for the format.
    """
    before = record or {}
    form = _format(spec, task, columns, before)
    check_keys(spec, form)
    chosen: dict[str, Any] = dict(spec) | {"format": form}
    if form == "prompt-completion":
        chosen |= _templates(spec, columns, before)
    else:
        chosen["text_columns"] = _texts(spec, columns, before)
        if form == "classification":
            chosen["label_column"] = _label(spec, columns, before)
    found = ChosenSpec.model_validate(chosen)
    used_columns(found, columns)
    return found


def recorded(spec: ChosenSpec) -> dict[str, Any]:
    """The choice as a run records it."""
    texts = spec.text_columns
    columns = [texts] if isinstance(texts, str) else texts
    names = ("label_column", "prompt", "beside", "completion")
    return {"format": spec.format, "columns": columns} | {name: getattr(spec, name) for name in names}


def check_columns(train: Table, validation: Table, spec: ChosenSpec) -> None:
    """Raises RecipeError for columns of the choice that the training rows have and the validation rows do not."""
    there = validation.column_names
    missing = {name: key for name, key in _keys(spec, train.column_names).items() if name not in there}
    if missing:
        names = ", ".join(f"`{name}`" for name in missing)
        what = f"the validation rows have no column {names}, which the training rows are read from; they have {listed(there)}"
        expected = f"the same columns in both, or {next(iter(missing.values()))} over columns of both"
        raise RecipeError.at(next(iter(missing.values())), what, expected)


def _keys(spec: ChosenSpec, columns: Sequence[str]) -> dict[str, str]:
    """{column that is read and is there: the key of the recipe that can name it}. Where a row has references, it needs no
    completion to be evaluated by."""
    found = dict.fromkeys(_fields(spec.prompt, "data.prompt", columns), "data.prompt")
    found |= {spec.beside: "data.prompt"} if spec.beside else {}
    if spec.references is None:
        found |= dict.fromkeys(_fields(spec.completion, "data.completion", columns), "data.completion")
    else:
        found[column_of(spec.references, columns)] = "data.references"
    texts = spec.text_columns or []
    found |= dict.fromkeys([texts] if isinstance(texts, str) else texts, "data.text_columns")
    found |= {spec.label_column: "data.label_column"} if spec.label_column else {}
    return {name: key for name, key in found.items() if name in columns}


def _format(spec: DataSpec, task: Task, columns: Sequence[str], before: Record) -> Format:
    plain = spec.format is None and spec.prompt is None and spec.completion is None
    if plain and before.get("format") == "text" and before.get("columns") and _are_there(before["columns"], columns):
        return "text"
    return detect_format(task, spec, columns)


def _texts(spec: DataSpec, columns: Sequence[str], before: Record) -> list[str]:
    named = before.get("columns")
    if spec.text_columns is not None or not named:
        return text_columns(spec, columns)
    if _are_there(named, columns):
        return list(named)
    found = text_columns(spec, columns)
    if len(found) == len(named):  # else the data is of another shape, which is an error of its own
        _say_stand_in("data.text_columns", named, found)
    return found


def _label(spec: DataSpec, columns: Sequence[str], before: Record) -> str:
    named = before.get("label_column")
    if spec.label_column is not None or named is None:
        return label_column(spec, columns)
    if named in columns:
        return str(named)
    if first_of(columns, LABELS) is None:
        raise RecipeError.at(
            "data.label_column",
            f"the run's label column `{named}` is not among {listed(columns)}",
            "the name of the label column as data.label_column",
        )
    found = label_column(spec, columns)
    _say_stand_in("data.label_column", [named], [found])
    return found


def _templates(spec: DataSpec, columns: Sequence[str], before: Record) -> dict[str, str | None]:
    """{"prompt", "beside", "completion"}; no completion where the recipe names references and the columns have none."""
    completion, named = spec.completion, before.get("completion")
    if completion is None and named is not None and _are_there(_fields(named, "data.completion", columns), columns):
        completion = named
    elif completion is None and (spec.references is None or has_completion(spec, columns)):
        completion = completion_template(spec, columns)
        if named is not None:
            _say_stand_in("data.completion", [named], [completion])
    if spec.prompt is not None:
        return {"prompt": spec.prompt, "beside": None, "completion": completion}
    named, beside = before.get("prompt"), before.get("beside")
    if named is not None and _are_there(_fields(named, "data.prompt", columns), columns):
        if beside is not None and beside not in columns:
            message = "the run's prompts have the column `%s`, which this data does not have: they are made as where it is empty"
            log.warning(message, beside)
        return {"prompt": named, "beside": beside, "completion": completion}
    prompt = prompt_template(spec, columns)
    if named is not None:
        _say_stand_in("data.prompt", [named], [prompt])
    beside = beside_column(spec.model_copy(update={"completion": completion}), columns)
    return {"prompt": prompt, "beside": beside, "completion": completion}


def _fields(template: str | None, key: str, columns: Sequence[str]) -> list[str]:
    """The columns that a template reads."""
    return template_columns(template, key, columns, required=False)


def _are_there(names: Sequence[str], columns: Sequence[str]) -> bool:
    return all(name in columns for name in names)


def _say_stand_in(key: str, named: Sequence[str], found: Sequence[str]) -> None:
    message = "the run was trained on %s, which this data does not have: %s stands in; %s names another"
    log.warning(message, *(" + ".join(f"`{name}`" for name in names) for names in (named, found)), key)
