"""Separated values. CSV: commas, quoting as in RFC 4180; TSV: tabs and no quoting, as in GLUE's
files. A line that does not fit is an error with its place."""

from __future__ import annotations

import csv
import re
import sys
from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from lorakit.data.readers.lines import lines_of
from lorakit.data.spill import Spill
from lorakit.data.table import KEY, Builder, Table
from lorakit.errors import RecipeError

LOOKED_AT = 1000  # lines in which the cells of the first line are searched for
SENTENCE = 5  # words
NUMBER = re.compile(r"[+-]?[0-9]+([.,][0-9]+)?")
CONVERTED = (
    "in Python, pandas.read_csv(FILE, sep=';', dtype=str, keep_default_na=False)"
    ".to_json('NEW.jsonl', orient='records', lines=True) converts a file with semicolons"
)
SEMICOLONS = f"commas between columns; {CONVERTED}"


def read_csv(path: Path, spill: Spill | None = None) -> Table:
    return _separated(path, ",", _csv_records(path), spill)


def read_tsv(path: Path, spill: Spill | None = None) -> Table:
    return _separated(path, "\t", _tsv_records(path), spill)


def _csv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line on which it begins, cells) of every record; [] for an empty line."""
    # a text may be longer than the module's default of 128 kB
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    begin = number = 0

    def lines() -> Iterator[str]:
        nonlocal number
        for number, line in lines_of(path):  # noqa: B007
            yield line

    reader = csv.reader(lines(), strict=True)
    while True:
        begin = number + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            place = f"{path}:{begin}" if begin >= number else f"{path}:{begin} to {number}"
            why = "a carriage return outside of quotes" if "new-line" in str(error) else error
            raise RecipeError.at(
                KEY,
                f"{place}: not CSV: {why}",
                'quotes around a whole cell, and "" for a quote in it',
            ) from error
        yield begin, record


def _tsv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    for number, line in lines_of(path):
        line = line.removesuffix("\n").removesuffix("\r")
        yield number, line.split("\t") if line else []


def _separated(
    path: Path, separator: str, records: Iterator[tuple[int, list[str]]], spill: Spill | None
) -> Table:
    names = next((record for _, record in records if record), None)
    if names is None:
        raise RecipeError.at(
            KEY,
            f"the file `{path}` is empty",
            "a line with the columns' names, and at least one row",
        )
    _check_names(path, names, separator)
    builder = Builder(spill)
    numbers = array("q")
    blank: list[int] = []
    for number, record in records:
        if not record:
            blank.append(number)
            continue
        # in a file of one column, an empty line between others is a row with an empty cell
        for line in blank if len(names) == 1 else ():
            builder.add_cells(names, [""])
            numbers.append(line)
        blank = []
        if len(record) != len(names):
            what = (
                f"{path}:{number}: {len(record)} cells, where the first line names {len(names)}"
                " columns"
            )
            raise RecipeError.at(KEY, what, _remedy(names, record, separator))
        builder.add_cells(names, record)
        numbers.append(number)
    if not numbers:
        raise RecipeError.at(
            KEY, f"the file `{path}` has the columns' names and no rows", "at least one row"
        )
    return builder.table(str(path), numbers)


def _check_names(path: Path, names: list[str], separator: str) -> None:
    if re.fullmatch("sep=.?", names[0]) and names[1:] in ([], [""]):
        what = f"{path}:1: `{separator.join(names)}` is for Excel, and not the columns' names"
        remedy = SEMICOLONS if ";" in names[0] else "the columns' names in the first line"
        raise RecipeError.at(KEY, what, f"no such line; {remedy}")
    empty = [i for i, name in enumerate(names, 1) if not name.strip()]
    if empty == [len(names)] and len(names) > 1:
        mark = "comma" if separator == "," else "tab"
        what = f"{path}:1: the line ends in a {mark}: column {len(names)} has no name"
        raise RecipeError.at(KEY, what, f"a name for it, or no {mark} at the ends of all lines")
    if empty:
        what = f"{path}:1: column {empty[0]} has no name"
        raise RecipeError.at(
            KEY,
            what,
            "a name for each column (pandas writes one without a name unless told `index=False`)",
        )
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise RecipeError.at(
            KEY, f"{path}:1: the column `{twice}` is there twice", "names that differ"
        )
    other = next((mark for mark in (";", "\t", ",", "|") if mark in names[0]), None)
    if len(names) == 1 and other is not None:
        kind = "commas (.csv)" if separator == "," else "tabs (.tsv)"
        what = f"{path}:1: one column, named `{names[0]}`"
        if other == ";":
            raise RecipeError.at(KEY, f"{what}: separated by semicolons", SEMICOLONS)
        named = {"\t": "; of tabs, name it .tsv", ",": "; of commas, name it .csv"}.get(other, "")
        raise RecipeError.at(KEY, what, f"columns that are separated by {kind}{named}")


def _remedy(names: list[str], record: list[str], separator: str) -> str:
    """Advice for a record whose number of cells differs from the number of names."""
    if len(names) == 1:
        return (
            f"the columns' names in the first line, which is `{names[0]}`; a quoted cell where it"
            " holds the separator"
        )
    if separator == "," and any(";" in name for name in names):
        return f"as many as there are names; do semicolons separate the columns? Then, {CONVERTED}"
    if len(record) == len(names) + 1 and not record[-1]:
        return (
            f"as many as there are names; no {'comma' if separator == ',' else 'tab'} at the end of"
            " a line"
        )
    hint = (
        "a quoted cell where it holds a comma"
        if separator == ","
        else "no tab in a cell: TSV is not quoted"
    )
    return f"as many as there are names; {hint}"


def first_line_is_data(path: Path, tabs: bool) -> bool:
    """True if the first line looks like one of the file's rows instead of column names.

    It does if one of its cells is a number, or a sentence, or also occurs further down in its
    column. False for a file that cannot be read.
    """
    found = _tsv_records(path) if tabs else _csv_records(path)
    try:
        names, *rows = islice((record for _, record in found if record), LOOKED_AT)
    except (RecipeError, OSError, EOFError, ValueError):
        return False
    return any(
        NUMBER.fullmatch(name.strip())
        or len(name.split()) >= SENTENCE
        or any(row[column : column + 1] == [name] for row in rows)
        for column, name in enumerate(names)
    )
