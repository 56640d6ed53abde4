"""JSON and JSON lines: strings stay strings, numbers and booleans keep the text that they have in
the file."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit.data.cells import DECODER, cell_of
from lorakit.data.readers.lines import lines_of
from lorakit.data.spill import Spill
from lorakit.data.table import KEY, Builder, Table
from lorakit.errors import RecipeError

ESCAPE = "\\u"  # start of a character escape in JSON
BLANK = re.compile(r"[ \t\r\n]*")  # white space between JSON values


def read_json_lines(path: Path, spill: Spill | None = None) -> Table:
    builder = Builder(spill)
    numbers = array("q")
    for number, line in lines_of(path):
        line = line.rstrip(" \t\r\n")
        start = _skip(line, 0)
        if start == len(line):
            continue
        try:
            row, end = DECODER.raw_decode(line, start)
            if end < len(line):
                raise json.JSONDecodeError("Extra data", line, _skip(line, end))
        except json.JSONDecodeError as error:
            if not numbers and line.lstrip().startswith("["):
                raise _list_of_rows(path, number) from error
            raise RecipeError.at(
                KEY,
                f"{path}:{number}:{error.colno}: not JSON: {error.msg}",
                "one JSON object a line",
            ) from error
        except (ValueError, RecursionError) as error:
            raise RecipeError.at(
                KEY, f"{path}:{number}: {_reason(error)}", "one JSON object a line"
            ) from error
        if not numbers and isinstance(row, list):
            raise _list_of_rows(path, number)
        if not isinstance(row, dict):
            raise RecipeError.at(
                KEY, f"{path}:{number}: a row must be a JSON object", "one JSON object a line"
            )
        _add(builder, row, path, number, ESCAPE in line)
        numbers.append(number)
    return builder.table(str(path), numbers)


def _list_of_rows(path: Path, line: int) -> RecipeError:
    expected = "one JSON object a line; a list of rows is named .json"
    return RecipeError.at(KEY, f"{path}:{line}: a list, and not a row", expected)


def _add(
    builder: Builder, row: dict[str, Any], path: Path, line: int | None, escaped: bool
) -> None:
    """Add a row of JSON. escaped: True if its source has escapes; without them it cannot contain
    half of a surrogate pair."""
    if "" in row:
        raise RecipeError.at(
            KEY, f"{_place(path, line)}: a column without a name", "a name for each column"
        )
    if escaped:
        try:
            for name, value in row.items():
                name.encode("utf-8")
                cell_of(value)[1].encode("utf-8")
        except UnicodeEncodeError as error:
            what = (
                f"{_place(path, line)}: a text has half of a surrogate pair (\\ud800 to \\udfff),"
                " which is no character"
            )
            raise RecipeError.at(KEY, what, "both halves, or the character itself") from error
    builder.add(row)


def _place(path: Path, line: int | None) -> str:
    return str(path) if line is None else f"{path}:{line}"


def read_json(path: Path, spill: Spill | None = None) -> Table:
    """Rows from a list of rows, from rows one after another, or from one object that contains a
    list of rows or columns. The file is read whole, so it takes no `spill`."""
    text = "".join(line for _, line in lines_of(path))
    start, escaped = _skip(text, 0), ESCAPE in text
    builder = Builder()
    numbers: list[int] = []
    if start < len(text) and text[start] == "[":
        rows = _items(path, text, start)
    else:
        rows = _sequence(path, text, start)
        first = next(rows, None)
        if first is None:
            raise RecipeError.at(KEY, f"the file `{path}` is empty", "at least one row")
        if _skip(text, first[2]) == len(text):
            return _inside(path, first[1], text)
        rows = _again(first, rows)
    line, seen = 1, 0
    for place, row, _ in rows:
        line += text.count("\n", seen, place)
        seen = place
        if not isinstance(row, dict):
            raise RecipeError.at(
                KEY,
                f"{path}:{line}: a row must be a JSON object",
                "a list of objects, or an object a line",
            )
        _add(builder, row, path, line, escaped)
        numbers.append(line)
    return builder.table(str(path), numbers)


def _inside(path: Path, whole: Any, text: str) -> Table:
    """The rows of a file that is one object: those of its only list of objects, or columns from its
    lists of equal length."""
    expected = (
        "a list of objects, one object a line, or one object with a single list of objects inside"
    )
    if not isinstance(whole, dict):
        raise RecipeError.at(KEY, f"`{path}` holds no rows", expected)
    lists = {name: value for name, value in _below(whole) if _is_rows(value)}
    builder = Builder()
    if len(lists) == 1:
        for row in next(iter(lists.values())):
            _add(builder, row, path, None, ESCAPE in text)
        return builder.table(str(path))
    if lists:
        what = (
            f"`{path}` holds {len(lists)} lists of rows: {', '.join(f'`{name}`' for name in lists)}"
        )
        raise RecipeError.at(
            KEY,
            what,
            "one list a file; a folder with train.json and validation.json holds the splits of"
            " a set",
        )
    columns = [value for value in whole.values() if isinstance(value, list)]
    if (
        columns
        and len(columns) == len(whole)
        and len({len(column) for column in columns}) == 1
        and columns[0]
    ):
        for row in zip(*columns, strict=True):
            _add(builder, dict(zip(whole, row, strict=True)), path, None, ESCAPE in text)
        return builder.table(str(path))
    raise RecipeError.at(KEY, f"`{path}` is one object, and no list of rows is in it", expected)


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _below(whole: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of everything inside an object and its nested objects, but not inside lists."""
    for name, value in whole.items():
        yield name, value
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", item) for inner, item in _below(value))


def _items(path: Path, text: str, start: int) -> Iterator[tuple[int, Any, int]]:
    """(start, value, end) of the items of the list at `start`."""
    place = _skip(text, start + 1)
    if text[place : place + 1] != "]":
        while True:
            value, end = _value_at(path, text, place)
            yield place, value, end
            place = _skip(text, end)
            if text[place : place + 1] == "]":
                break
            if text[place : place + 1] != ",":
                raise _broken(path, text, place, "Expecting ',' delimiter")
            place = _skip(text, place + 1)
    place = _skip(text, place + 1)
    if place < len(text):
        raise _broken(path, text, place, "Extra data")


def _sequence(path: Path, text: str, place: int) -> Iterator[tuple[int, Any, int]]:
    """(start, value, end) of consecutive values."""
    while place < len(text):
        value, end = _value_at(path, text, place)
        yield place, value, end
        place = _skip(text, end)


def _again(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _value_at(path: Path, text: str, place: int) -> tuple[Any, int]:
    try:
        return DECODER.raw_decode(text, place)
    except json.JSONDecodeError as error:
        raise _broken(path, text, error.pos, error.msg) from error
    except (ValueError, RecursionError) as error:
        raise RecipeError.at(
            KEY, f"{path}:{text.count(chr(10), 0, place) + 1}: {_reason(error)}", "rows as JSON"
        ) from error


def _broken(path: Path, text: str, place: int, why: str) -> RecipeError:
    found = json.JSONDecodeError(why, text, place)
    return RecipeError.at(
        KEY, f"{path}:{found.lineno}:{found.colno}: not JSON: {why}", "rows as JSON"
    )


def _skip(text: str, place: int) -> int:
    found = BLANK.match(text, place)
    assert found is not None
    return found.end()


def _reason(error: Exception) -> str:
    return (
        "lists and objects are nested too deeply"
        if isinstance(error, RecursionError)
        else str(error)
    )
