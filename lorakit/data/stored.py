"""Stored columns of a table: Arrow's arrays in memory, or in a Spill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lorakit.data.cells import Cells, Kind, cells_of, loads
from lorakit.data.spill import Constant, Segment, Spilled
from lorakit.data.typed import plain_values

SHARED = 100_000  # most distinct texts of a column that are each held once

Values: TypeAlias = pa.ChunkedArray | Spilled
"""An array in memory, or in a file."""
Chunk: TypeAlias = pa.Array | Segment | Constant
Keep = Callable[[pa.Array], Chunk]
"""Where a chunk of a column goes: it stays in memory, or is written to a Spill."""


def stays(chunk: pa.Array) -> pa.Array:
    return chunk


@dataclass(frozen=True)
class ReadColumn:
    """A column made by lorakit's own readers: kinds uint8 and texts large_string, row by row."""

    kinds: Values
    texts: Values

    def cells(self, rows: NDArray[np.int64]) -> Cells:
        return Cells(taken(self.kinds, rows).to_numpy(), texts_of(taken(self.texts, rows)))

    def arrays(self, name: str) -> dict[str, Values]:
        return {f"kind of {name}": self.kinds, f"text of {name}": self.texts}


@dataclass(frozen=True)
class TypedColumn:
    """A column of Arrow values (Parquet, the hub). class_names: for a column of class numbers;
    as_json: the strings are JSON."""

    values: Values
    class_names: tuple[str, ...] | None = None
    as_json: bool = False

    def cells(self, rows: NDArray[np.int64]) -> Cells:
        """The cells of these rows. Raises ValueError or TypeError for a value that has no text."""
        found, kind = taken(self.values, rows), self.values.type
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        if (text and not self.as_json) or pa.types.is_integer(kind):
            texts = texts_of((found if text else found.cast(pa.large_string())).fill_null(""))
            empty = found.is_null().to_numpy()
            return Cells(
                np.where(empty, Kind.NULL, Kind.STRING if text else Kind.WHOLE).astype(np.uint8),
                texts,
            )
        values = plain_values(found)
        if self.as_json:
            values = [None if value is None else loads(value) for value in values]
        return cells_of(values)

    def arrays(self, name: str) -> dict[str, Values]:
        return {f"value of {name}": self.values}


Column = ReadColumn | TypedColumn


def taken(array: Values, rows: NDArray[np.int64]) -> pa.ChunkedArray:
    """The rows of an array; where they are consecutive, a slice, which copies nothing."""
    if isinstance(array, Spilled):
        return array.take(rows)
    if len(rows) == 0:
        return array.slice(0, 0)
    first = int(rows[0])
    if int(rows[-1]) - first + 1 == len(rows) and (np.diff(rows) == 1).all():
        return array.slice(first, len(rows))
    try:
        return array.take(pa.array(rows))
    # views of strings, as Polars writes them, also inside lists
    except pa.ArrowNotImplementedError:
        single = [array.slice(row, 1).chunk(0) for row in rows.tolist()]
        return pa.chunked_array([pa.concat_arrays(single)])


def texts_of(values: pa.ChunkedArray) -> list[str]:
    """The texts of an array of strings. Equal ones, such as labels, are one object as long as there
    are few: a list of ten million rows then has 8 bytes a row."""
    if len(values) <= SHARED:
        found: list[str] = values.to_pylist()
        return found
    shared: dict[str, str] = {}
    texts: list[str] = []
    for start in range(0, len(values), SHARED):
        part = values.slice(start, SHARED).to_pylist()
        if len(shared) < SHARED:
            part = [shared.setdefault(text, text) for text in part]
        texts += part
    return texts


def missing(count: int, spilled: bool) -> tuple[Chunk, Chunk]:
    """(kinds, texts) of rows that lack a column."""
    kinds, texts = (
        Constant(int(Kind.MISSING), count, pa.uint8()),
        Constant("", count, pa.large_string()),
    )
    return (kinds, texts) if spilled else (kinds.read(), texts.read())


def read_column(chunks: Sequence[tuple[Chunk, Chunk]]) -> ReadColumn:
    """The column of (kinds, texts)."""
    kinds, texts = zip(*chunks, strict=True)
    return ReadColumn(one(kinds, pa.uint8()), one(texts, pa.large_string()))


def one(parts: Sequence[Chunk | Values], kind: pa.DataType) -> Values:
    """The array of all parts, one after another. Either all of them are in memory, or none."""
    chunks: list[Any] = []
    for part in parts:
        if isinstance(part, pa.ChunkedArray):
            chunks += part.chunks
        elif isinstance(part, Spilled):
            chunks += part.segments
        else:
            chunks.append(part)
    if any(isinstance(chunk, Segment | Constant) for chunk in chunks):
        return Spilled(chunks, kind)
    return pa.chunked_array(chunks, kind)
