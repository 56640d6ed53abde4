"""Cells: the values of a file's columns, character by character.

A cell is a kind and a text. The kind is the type that the source gives (a string, a whole number, a
list …); the text is the cell as it stands in the source, where the source is text. Nothing is
guessed: a cell of a CSV file has only the kind CELL, and code that needs a number parses its text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.data.typed import Fraction, Whole, dumps


class Kind(IntEnum):
    """Kind of a cell, as far as its source says. CELL: a cell of a CSV or TSV file, which has no
    types; EMPTY: such a cell without characters. MISSING: the row lacks the column; NULL: the
    column is there, with null in it."""

    CELL = 0
    EMPTY = 1
    STRING = 2
    WHOLE = 3
    FRACTION = 4
    BOOLEAN = 5
    NULL = 6
    MISSING = 7
    LIST = 8
    MAPPING = 9


NOTHING = (Kind.NULL, Kind.MISSING)
MISSING = (Kind.MISSING, "")
NESTED = (Kind.LIST, Kind.MAPPING)
KINDS: dict[type, Kind] = {
    str: Kind.STRING,
    Whole: Kind.WHOLE,
    Fraction: Kind.FRACTION,
    int: Kind.WHOLE,
    float: Kind.FRACTION,
    bool: Kind.BOOLEAN,
    type(None): Kind.NULL,
    list: Kind.LIST,
    dict: Kind.MAPPING,
}


@dataclass(frozen=True)
class Cells:
    """The cells of a column. kinds: Kind of each row [rows] uint8; texts [rows]: "" where there is
    no value, JSON for lists and mappings."""

    kinds: NDArray[np.uint8]
    texts: list[str]

    def has(self, *kinds: Kind) -> bool:
        return bool(np.isin(self.kinds, kinds).any())


def cell_of(value: Any) -> tuple[Kind, str]:
    """A JSON value as a cell. Raises TypeError for a value of another type."""
    kind = KINDS.get(type(value))
    if kind is Kind.STRING:
        return kind, value
    if kind is None:
        raise TypeError(f"a {type(value).__name__} has no text")
    if kind in (Kind.NULL, Kind.LIST, Kind.MAPPING, Kind.BOOLEAN):
        return kind, "" if kind == Kind.NULL else dumps(value)
    return kind, value if isinstance(value, str) else str(value)


def cells_of(values: Sequence[Any]) -> Cells:
    """JSON values as a column. Raises TypeError for a value of another type."""
    cells = [cell_of(value) for value in values]
    return Cells(np.array([kind for kind, _ in cells], np.uint8), [text for _, text in cells])


def loads(text: str) -> Any:
    """JSON with numbers kept as their texts. Raises ValueError."""
    return DECODER.decode(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {dumps(twice)} is there twice in one object")
    return found


DECODER = json.JSONDecoder(
    parse_int=Whole, parse_float=Fraction, parse_constant=Fraction, object_pairs_hook=_object
)


def value_of(kind: Kind, text: str) -> Any:
    if kind in NOTHING:
        return None
    if kind == Kind.WHOLE:
        return int(text)
    if kind == Kind.FRACTION:
        return float(text)
    return json.loads(text) if kind in (*NESTED, Kind.BOOLEAN) else text
