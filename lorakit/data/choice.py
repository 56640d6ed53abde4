"""Choice of format, columns and templates: made once, from the training rows, for every split and
for later evaluations.

A split that made its own choice could read another column than the one that was trained on, if it
had more columns.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

from lorakit.data.cells import NESTED, Kind
from lorakit.data.columns import listed
from lorakit.data.formats import (
    Format,
    Record,
    check_keys,
    detect_format,
    format_named,
    format_of,
    formats_of_keys,
)
from lorakit.data.keys import ChosenSpec, DataKeys
from lorakit.data.table import Table
from lorakit.errors import RecipeError

log = logging.getLogger("lorakit")

LOOKED_AT = 1000  # rows in which a column is searched for text


def choose(
    spec: DataKeys,
    task: str,
    columns: Sequence[str],
    record: Record | None = None,
    inherited: Collection[str] = (),
) -> ChosenSpec:
    """The choice for rows with these columns: those that the recipe names, else those that the run
    of `record` was trained on if they exist, else the usual names. A log line reports a column that
    replaces one of the record's. inherited: keys that hold for several sets, which have no effect
    where a set's format lacks them.

    Raises RecipeError where nothing can be chosen, and for keys that do not apply to the format.
    """
    before = record or {}
    form = _format(spec, task, columns, before)
    spec = spec.model_copy(update=usual_values(without_effect(spec, form, inherited)))
    check_keys(spec, form)
    columns_chosen = form.chosen(spec, columns, before)
    loss_on = spec.loss_on or next(iter(form.losses), None)
    chosen = {"format": form.name, "loss_on": loss_on} | columns_chosen
    keys = {key: getattr(spec, key) for key in DataKeys.model_fields}
    found = ChosenSpec.model_validate(keys | chosen)
    form.used_columns(found, columns)
    return found


def without_effect(spec: DataKeys, form: Format, keys: Collection[str]) -> list[str]:
    """Those of the keys that are given and that the format does not have."""
    of_formats = formats_of_keys()
    given = [key for key in keys if getattr(spec, key) != DataKeys.model_fields[key].default]
    return [
        key
        for key in given
        if form.name not in of_formats.get(key, [form.name])
        or (key == "loss_on" and spec.loss_on not in form.losses)
    ]


def usual_values(keys: Collection[str]) -> dict[str, Any]:
    """{key: its default}."""
    return {key: DataKeys.model_fields[key].default for key in keys}


def recorded(spec: ChosenSpec) -> dict[str, Any]:
    """The choice as a run records it: {"format", "columns", "label_column", "prompt", "beside",
    "completion", "column_map"}."""
    texts = spec.text_columns
    columns = [texts] if isinstance(texts, str) else texts
    names = ("label_column", "prompt", "beside", "completion", "column_map")
    return {"format": spec.format, "columns": columns} | {
        name: getattr(spec, name) for name in names
    }


def check_columns(train: Table, validation: Table, spec: ChosenSpec) -> None:
    """Raise RecipeError for chosen columns that the training rows have and the validation rows
    lack."""
    there = validation.column_names
    named = format_of(spec).naming_keys(spec, train.column_names)
    missing = {
        name: key for name, key in named.items() if name in train.column_names and name not in there
    }
    if missing:
        names = ", ".join(f"`{name}`" for name in missing)
        what = (
            f"the validation rows have no column {names}, which the training rows are read from;"
            f" they have {listed(there)}"
        )
        expected = (
            f"the same columns in both, or {next(iter(missing.values()))} over columns of both"
        )
        raise RecipeError.at(next(iter(missing.values())), what, expected)


def warn_of_unused(train: Table, validation: Table, spec: ChosenSpec) -> None:
    """Log one line about all columns that hold text and are not used in any example."""
    form = format_of(spec)
    used = form.used_columns(spec, train.column_names)
    unused = [name for name in train.column_names if name not in used and _holds_text(train, name)]
    known = {*used, *train.column_names}
    more = [
        name
        for name in validation.column_names
        if name not in known and _holds_text(validation, name)
    ]
    unused += [f"{name} (in the validation rows alone)" for name in more]
    if unused:
        message = "columns with text that nothing reads: %s (read: %s; %s names others)"
        log.warning(message, listed(unused), listed(used), form.column_keys)


def _format(spec: DataKeys, task: str, columns: Sequence[str], before: Record) -> Format:
    if (
        spec.format is None
        and spec.prompt is None
        and spec.completion is None
        and before.get("format")
    ):
        form = format_named(before["format"])
        if form.is_recorded(before, columns):
            return form
    return detect_format(task, spec, columns)


def _holds_text(data: Table, column: str) -> bool:
    """True if one of the first rows has words in the column; numbers are not words."""
    try:
        for _, block in data.select(range(min(LOOKED_AT, len(data)))).blocks():
            cells = block.cells(column)
            if any(
                (kind == Kind.STRING and text.strip())
                or kind in NESTED
                or (kind == Kind.CELL and any(map(str.isalpha, text)))
                for kind, text in zip(cells.kinds, cells.texts, strict=True)
            ):
                return True
    except RecipeError:  # pictures, sounds: anything without text
        pass
    return False
