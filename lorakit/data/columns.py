"""Columns: the texts that rows hold, and templates over them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from string import Formatter
from typing import Any

from datasets import Dataset

from lorakit.data.spec import DataSpec
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
PROMPTS = ("prompt", "instruction", "question")
COMPLETIONS = ("completion", "response", "output", "answer")


def text_columns(spec: DataSpec, columns: Sequence[str]) -> list[str]:
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
            "data.text_columns", f"no text column among {listed(columns)}", f"the name of one; usual names are {usual}"
        )
    return [found]


def render(template: str, key: str, data: Dataset) -> list[str]:
    """`template` over the rows: text with {column} and {column[item]} fields, `{{` for a brace.

    Raises RecipeError at `key` for whatever else str.format could do, and for a field that a row does not have.
    """
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise RecipeError.at(
            key, f"`{template}` is not a template: {error}", "text with {column} fields; {{ and }} for braces"
        ) from error
    used: dict[str, list[str]] = {}
    for _, name, form, conversion in parsed:
        if name is not None and name not in used:
            used[name] = field_texts(data, name, key)
        if form or conversion:
            raise RecipeError.at(key, f"`{template}` formats the column `{name}`", f"the column alone: {{{name}}}")
    fields = [(text, name) for text, name, _, _ in parsed]
    return ["".join(text + (used[name][row] if name is not None else "") for text, name in fields) for row in range(len(data))]


def field_texts(data: Dataset, field: str, key: str) -> list[str]:
    """The text of `field` (a column, or an item inside one) in each row; numbers are written out.

    Raises RecipeError at `key` when the field is not there, or not a text.
    """
    return [_text(value, row, field, key) for row, value in enumerate(_values(data, field, key))]


def field_text_lists(data: Dataset, field: str, key: str) -> list[list[str]]:
    """The texts of `field` in each row, at least one; a single text is a list of one. Raises as `field_texts`."""
    found = []
    for row, value in enumerate(_values(data, field, key)):
        values = value if isinstance(value, list) else [value]
        if not values:
            raise RecipeError.at(key, f"row {row} has an empty list in `{field}`", "at least one text in every row")
        found.append([_text(value, row, field, key) for value in values])
    return found


def _values(data: Dataset, field: str, key: str) -> list[Any]:
    """What `field` holds in each row: Python's own syntax of replacement fields, with item access alone.

    (docs.python.org, string, "Format String Syntax".) As there, items are not quoted: answers[text][0].
    """
    if field in data.column_names:  # whatever its name looks like
        return list(data[field][:])  # the slice reads the column at once, not row by row
    parsed = FIELD.fullmatch(field)
    if parsed is None:
        raise RecipeError.at(
            key, f"`{field}` is neither a column nor an item inside one", "a column, or items inside it as in answers[text][0]"
        )
    column = parsed["column"]
    if column not in data.column_names:
        raise no_column(key, column, data.column_names)
    items = parsed["items"][1:-1].split("][")
    return [_item(value, items, row, column, key) for row, value in enumerate(data[column][:])]


def _item(value: Any, items: Sequence[str], row: int, column: str, key: str) -> Any:
    place = column
    for item in items:
        if isinstance(value, dict):
            if item not in value:
                near = get_close_matches(item, value, 1)
                what = f"row {row} has no `{item}` in `{place}`"
                raise RecipeError.at(key, what, f"one of {listed(value)}", near[0] if near else None)
            value = value[item]
        elif isinstance(value, list):
            if not item.isdecimal() or int(item) >= len(value):
                what = f"row {row} has no `{item}` in `{place}`, a list of {len(value)}"
                raise RecipeError.at(key, what, "a number below the length of every row's list")
            value = value[int(item)]
        else:
            raise RecipeError.at(key, f"row {row} has {_shown(value)} in `{place}`", f"something that has an item `{item}`")
        place += f"[{item}]"
    return value


def _text(value: Any, row: int, field: str, key: str) -> str:
    if value is None or isinstance(value, dict | list):
        raise RecipeError.at(key, f"row {row} has {_shown(value)} in `{field}`", "text in every row")
    return str(value)


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def first_of(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """The first of `names` that is a column."""
    return next((name for name in names if name in columns), None)


def no_column(key: str, name: str, columns: Sequence[str]) -> RecipeError:
    near = get_close_matches(name, columns, 1)
    return RecipeError.at(key, f"there is no column `{name}`", f"one of {listed(columns)}", near[0] if near else None)


def listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "(none)"
