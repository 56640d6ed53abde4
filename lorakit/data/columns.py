"""Columns: the texts of rows, and templates over them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from string import Formatter
from typing import Any

import numpy as np

from lorakit.data.cells import NESTED, NOTHING, Cells, Kind, cells_of, loads
from lorakit.data.keys import DataKeys
from lorakit.data.table import Table
from lorakit.errors import RecipeError

FIELD = re.compile(r"(?P<column>[^.\[\]]*)(?P<items>(\[[^\[\]]+\])*)")
PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
    ("text_a", "text_b"),
)
TEXTS = ("sentence", "text", "content", "review")
WORDS = {
    Kind.CELL: "a text",
    Kind.EMPTY: "an empty cell",
    Kind.STRING: "a string",
    Kind.WHOLE: "a whole number",
    Kind.FRACTION: "a number",
    Kind.BOOLEAN: "true or false",
    Kind.NULL: "null",
    Kind.MISSING: "no value",
    Kind.LIST: "a list",
    Kind.MAPPING: "a mapping",
}


def text_columns(spec: DataKeys, columns: Sequence[str]) -> list[str]:
    """The one text column, or the two of a pair."""
    if spec.text_columns is not None:
        named = [spec.text_columns] if isinstance(spec.text_columns, str) else spec.text_columns
        for name in named:
            if name not in columns:
                raise no_column("data.text_columns", name, columns)
        return named
    for pair in PAIRS:
        if all(name in columns for name in pair):
            return list(pair)
    found = first_of(columns, TEXTS)
    if found is None:
        usual = ", ".join(TEXTS) + ", " + ", ".join(" + ".join(pair) for pair in PAIRS)
        raise RecipeError.at(
            "data.text_columns",
            f"no text column among {listed(columns)}",
            f"data.text_columns: the name of one; usual names are {usual}",
        )
    return [found]


def render(template: str, key: str, data: Table) -> list[str]:
    """`template` filled with each row: text with {column} and {column[item]} fields, `{{` for a
    brace.

    An empty cell of a CSV file becomes an empty text if the row has text in other fields, and is an
    error otherwise. Raises RecipeError at `key` for that, for any other syntax of str.format, and
    for a field that a row lacks.
    """
    fields = template_fields(template, key)
    used = {name: field_cells(data, name, key) for _, name in fields if name is not None}
    empty = [cells.kinds == Kind.EMPTY for cells in used.values()]
    for row in range(len(data)) if empty else ():
        if all(column[row] for column in empty):
            raise RecipeError.at(
                key, f"{data.place(row)} has an empty cell in `{listed(used)}`", "text in every row"
            )
    texts = {name: _texts(cells, data, name, key) for name, cells in used.items()}
    return [
        "".join(text + (texts[name][row] if name is not None else "") for text, name in fields)
        for row in range(len(data))
    ]


def template_fields(template: str, key: str) -> list[tuple[str, str | None]]:
    """[(literal text, the field after it or None)] of a template. Raises RecipeError at `key`."""
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise RecipeError.at(
            key,
            f"`{template}` is not a template: {error}",
            "text with {column} fields; {{ and }} for braces",
        ) from error
    for _, name, form, conversion in parsed:
        if form or conversion:
            raise RecipeError.at(
                key, f"`{template}` formats the column `{name}`", f"the column alone: {{{name}}}"
            )
    return [(text, name) for text, name, _, _ in parsed]


def column_of(field: str, columns: Sequence[str]) -> str:
    """The column that a field reads, even if it does not exist."""
    parsed = FIELD.fullmatch(field)
    return field if field in columns or parsed is None else parsed["column"]


def template_columns(
    template: str | None,
    key: str,
    columns: Sequence[str],
    required: bool = True,
) -> list[str]:
    """The columns that a template reads. Raises RecipeError at `key` where one does not exist,
    unless it is not required."""
    fields = [] if template is None else template_fields(template, key)
    found = [(name, column_of(name, columns)) for _, name in fields if name is not None]
    for name, column in found:
        # A malformed field is reported when the rows are read.
        if required and column not in columns and FIELD.fullmatch(name) is not None:
            raise no_column(key, column, columns)
    return [column for _, column in found]


def field_texts(data: Table, field: str, key: str) -> list[str]:
    """The text of `field` (a column, or an item inside one) in each row, as it is in the file.

    Raises RecipeError at `key` when the field does not exist, is empty in a CSV file, or is not a
    text.
    """
    cells = field_cells(data, field, key)
    if cells.has(Kind.EMPTY):
        row = int((cells.kinds == Kind.EMPTY).argmax())
        raise RecipeError.at(
            key, f"{data.place(row)} has an empty cell in `{field}`", "text in every row"
        )
    return _texts(cells, data, field, key)


def optional_texts(data: Table, column: str, key: str) -> list[str]:
    """The text of a column in each row, "" where there is none. Raises RecipeError at `key` for
    lists and mappings."""
    cells = data.cells(column)
    kinds = np.where(np.isin(cells.kinds, (*NOTHING, Kind.EMPTY)), Kind.STRING, cells.kinds)
    return _texts(Cells(kinds.astype(np.uint8), cells.texts), data, column, key)


def field_text_lists(data: Table, field: str, key: str) -> list[list[str]]:
    """The texts of `field` in each row, at least one; a single text becomes a list of one. Raises
    as `field_texts`."""
    found = []
    cells = field_cells(data, field, key)
    for row, (kind, text) in enumerate(zip(cells.kinds, cells.texts, strict=True)):
        part = (
            cells_of(loads(text))
            if kind == Kind.LIST
            else Cells(cells.kinds[row : row + 1], [text])
        )
        if not part.texts:
            raise RecipeError.at(
                key,
                f"{data.place(row)} has an empty list in `{field}`",
                "at least one text in every row",
            )
        found.append(_texts(part, data, field, key, row))
    return found


def _texts(cells: Cells, data: Table, field: str, key: str, row: int | None = None) -> list[str]:
    """The texts of cells, all of which must be texts; `row`: the row that all of them are from."""
    if cells.has(*NOTHING, *NESTED):
        wrong = next(i for i, kind in enumerate(cells.kinds) if kind in (*NOTHING, *NESTED))
        place = data.place(wrong if row is None else row)
        raise RecipeError.at(
            key, f"{place} has {WORDS[Kind(cells.kinds[wrong])]} in `{field}`", "text in every row"
        )
    return cells.texts


def field_cells(data: Table, field: str, key: str) -> Cells:
    """The cells that `field` names, one for each row. Its syntax is that of Python's replacement
    fields, with item access only (docs.python.org, string, "Format String Syntax"); as there, items
    are not quoted: answers[text][0].
    """
    if field in data.column_names:  # even if its name looks like an item access
        return data.cells(field)
    parsed = FIELD.fullmatch(field)
    if parsed is None:
        raise RecipeError.at(
            key,
            f"`{field}` is neither a column nor an item inside one",
            "a column, or items inside it as in answers[text][0]",
        )
    column = parsed["column"]
    if column not in data.column_names:
        raise no_column(key, column, data.column_names)
    items = parsed["items"][1:-1].split("][")
    cells = data.cells(column)
    found = []
    for row, (kind, text) in enumerate(zip(cells.kinds, cells.texts, strict=True)):
        if kind not in NESTED:
            what = f"{data.place(row)} has {WORDS[Kind(kind)]} in `{column}`"
            raise RecipeError.at(key, what, f"something that has an item `{items[0]}`")
        found.append(_item(loads(text), items, data.place, row, column, key))
    return cells_of(found)


def _item(value: Any, items: Sequence[str], place_of: Any, row: int, column: str, key: str) -> Any:
    place = column
    for item in items:
        if isinstance(value, dict):
            if item not in value:
                near = get_close_matches(item, value, 1)
                what = f"{place_of(row)} has no `{item}` in `{place}`"
                raise RecipeError.at(
                    key, what, f"one of {listed(value)}", near[0] if near else None
                )
            value = value[item]
        elif isinstance(value, list):
            if not item.isdecimal() or int(item) >= len(value):
                what = f"{place_of(row)} has no `{item}` in `{place}`, a list of {len(value)}"
                raise RecipeError.at(key, what, "a number below the length of every row's list")
            value = value[int(item)]
        else:
            what = f"{place_of(row)} has {WORDS[Kind(cells_of([value]).kinds[0])]} in `{place}`"
            raise RecipeError.at(key, what, f"something that has an item `{item}`")
        place += f"[{item}]"
    return value


def first_of(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """The first of `names` that is a column."""
    return next((name for name in names if name in columns), None)


def no_column(key: str, name: str, columns: Sequence[str]) -> RecipeError:
    near = get_close_matches(name, columns, 1)
    return RecipeError.at(
        key, f"there is no column `{name}`", f"one of {listed(columns)}", near[0] if near else None
    )


def listed(names: Iterable[str]) -> str:
    """Names for a sentence; a name with blanks around it, which would be invisible, in Python's
    quotes."""
    return ", ".join(name if name == name.strip() else repr(name) for name in names) or "(none)"
