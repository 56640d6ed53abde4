"""Table: rows of columns whose cells are a file's texts, or Arrow's values."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lorakit.data.cells import Cells, Kind, cell_of, cells_of, loads, value_of
from lorakit.data.typed import plain_values
from lorakit.errors import RecipeError, first_line

KEY = "data.name_or_path"
CHUNK = 10_000  # rows that a Builder keeps as Python's objects


@dataclass(frozen=True)
class ReadColumn:
    """A column made by lorakit's own readers: kinds uint8 and texts large_string, row by row."""

    kinds: pa.ChunkedArray
    texts: pa.ChunkedArray

    def cells(self, rows: NDArray[np.int64]) -> Cells:
        kinds = self.kinds.to_numpy()[rows]
        return Cells(kinds, _taken(self.texts, rows).to_pylist())

    def arrays(self, name: str) -> dict[str, pa.ChunkedArray]:
        return {f"kind of {name}": self.kinds, f"text of {name}": self.texts}


@dataclass(frozen=True)
class TypedColumn:
    """A column of Arrow values (Parquet, the hub). class_names: for a column of class numbers;
    as_json: the strings are JSON."""

    values: pa.ChunkedArray
    class_names: tuple[str, ...] | None = None
    as_json: bool = False

    def cells(self, rows: NDArray[np.int64]) -> Cells:
        """The cells of these rows. Raises ValueError or TypeError for a value that has no text."""
        taken, kind = _taken(self.values, rows), self.values.type
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        if (text and not self.as_json) or pa.types.is_integer(kind):
            texts = (taken if text else taken.cast(pa.large_string())).fill_null("").to_pylist()
            empty = taken.is_null().to_numpy()
            return Cells(
                np.where(empty, Kind.NULL, Kind.STRING if text else Kind.WHOLE).astype(np.uint8),
                texts,
            )
        values = plain_values(taken)
        if self.as_json:
            values = [None if value is None else loads(value) for value in values]
        return cells_of(values)

    def arrays(self, name: str) -> dict[str, pa.ChunkedArray]:
        return {f"value of {name}": self.values}


Column = ReadColumn | TypedColumn


@dataclass(frozen=True)
class Origin:
    """A file, or a part of a set, that rows come from. name: "" where there is none; lines [rows]:
    the line on which each row begins, from 1, or None."""

    name: str
    count: int
    lines: NDArray[np.int64] | None = None

    def place(self, row: int) -> str:
        """`row 3 (rows.jsonl:4)`; rows are counted from 1, as an editor counts lines."""
        if self.lines is not None:
            return f"row {row + 1} ({self.name}:{self.lines[row]})"
        return f"row {row + 1} ({self.name})" if self.name else f"row {row + 1}"


@dataclass(frozen=True)
class Table:
    """Rows, in the order of their sources or a selection of them. selected [rows]: indices into the
    columns."""

    columns: Mapping[str, Column]
    origins: tuple[Origin, ...]
    selected: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.selected)

    @property
    def column_names(self) -> list[str]:
        return list(self.columns)

    def cells(self, column: str) -> Cells:
        """The cells of a column. Raises RecipeError, with the row, for a value that has no text
        (bytes that are not UTF-8)."""
        try:
            return self.columns[column].cells(self.selected)
        except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
            self._explain(column, error)

    def _explain(self, column: str, error: Exception) -> NoReturn:
        for row in range(len(self)):
            try:
                self.columns[column].cells(self.selected[row : row + 1])
            except (ValueError, TypeError, OverflowError, pa.ArrowException) as single:
                what = f"{self.place(row)} has no text in `{column}`: {first_line(single)}"
                raise RecipeError.at(
                    KEY, what, "text, numbers, booleans or dates; or another column"
                ) from error
        raise RecipeError.at(
            KEY, f"the column `{column}` can not be read: {first_line(error)}"
        ) from error

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """The names of a column of class numbers; None for others."""
        found = self.columns[column]
        return found.class_names if isinstance(found, TypedColumn) else None

    def place(self, row: int) -> str:
        """The row's place in its source: `row 3 (rows.jsonl:4)`."""
        number = int(self.selected[row])
        ends = np.cumsum([origin.count for origin in self.origins])
        part = bisect_right(ends.tolist(), number)
        return self.origins[part].place(number - (int(ends[part - 1]) if part else 0))

    @property
    def row_numbers(self) -> NDArray[np.int64]:
        """The number of each row in its source, from 1; numbering continues across the files of a
        split."""
        return self.selected + 1

    def select(self, rows: Sequence[int] | NDArray[Any] | range) -> Table:
        """These rows, in this order."""
        return replace(self, selected=self.selected[np.asarray(rows, np.int64)])

    def to_list(self) -> list[dict[str, Any]]:
        """Every row as a mapping of its columns' values, with numbers as Python's own; for small
        tables."""
        columns = {name: self.cells(name) for name in self.columns}
        rows: list[dict[str, Any]] = []
        for row in range(len(self)):
            cells = {
                name: (Kind(cells.kinds[row]), cells.texts[row]) for name, cells in columns.items()
            }
            rows.append(
                {name: value_of(*cell) for name, cell in cells.items() if cell[0] != Kind.MISSING}
            )
        return rows

    @property
    def nbytes(self) -> int:
        """Approximate bytes of the rows; a selection is counted by its share."""
        arrays = [
            array for name, column in self.columns.items() for array in column.arrays(name).values()
        ]
        total = sum(len(array) for array in arrays[:1])
        return int(sum(array.nbytes for array in arrays) * len(self) / max(total, 1))

    def digest(self) -> str:
        """sha256 of the rows: all columns, in their order, with the names of classes; independent
        of where the rows come from.

        Raises pa.ArrowException for a column of a type that Arrow cannot copy or write.
        """
        digest = hashlib.sha256()
        names = {name: self.class_names(name) for name in self.columns}
        digest.update(
            json.dumps(
                [(name, names[name], type(self.columns[name]).__name__) for name in self.columns]
            ).encode()
        )
        arrays = {
            label: array
            for name, column in self.columns.items()
            for label, array in column.arrays(name).items()
        }
        whole = pa.table(arrays) if arrays else pa.table({})
        for start in range(0, len(self), 1000):
            # Copied: a slice would be written with some bytes of its neighbours. One chunk per
            # column, however the rows were read.
            part = pa.table(
                {
                    name: _taken(whole[name], self.selected[start : start + 1000]).combine_chunks()
                    for name in whole.column_names
                }
            ).combine_chunks()
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, part.schema) as stream:
                stream.write_table(part)
            digest.update(sink.getvalue())
        return digest.hexdigest()

    @classmethod
    def from_list(cls, rows: Iterable[Mapping[str, Any]], name: str = "") -> Table:
        """A table of JSON rows."""
        builder = Builder()
        for row in rows:
            builder.add(row)
        return builder.table(name)

    @classmethod
    def from_arrow(
        cls,
        data: pa.Table,
        name: str = "",
        class_names: Mapping[str, Sequence[str]] | None = None,
        as_json: Sequence[str] = (),
    ) -> Table:
        """A table over Arrow's values, which are read on demand."""
        named = class_names or {}
        columns: dict[str, Column] = {
            column: TypedColumn(
                data[column], tuple(named[column]) if column in named else None, column in as_json
            )
            for column in data.column_names
        }
        return cls(columns, (Origin(name, len(data)),), np.arange(len(data)))

    @classmethod
    def joined(cls, parts: Sequence[Table]) -> Table:
        """The rows of all parts, one part after another. A column that a part lacks is MISSING
        there.

        Raises ValueError where parts disagree on a column's type.
        """
        if len(parts) == 1:
            return parts[0]
        columns: dict[str, Column] = {}
        for name in dict.fromkeys(name for part in parts for name in part.columns):
            found = [(part.columns.get(name), part) for part in parts]
            typed = [column for column, _ in found if isinstance(column, TypedColumn)]
            if (
                len(typed) == len(found)
                and len({(c.values.type, c.class_names, c.as_json) for c in typed}) == 1
            ):
                values = pa.chunked_array(
                    [chunk for c in typed for chunk in c.values.chunks], typed[0].values.type
                )
                columns[name] = replace(typed[0], values=values)
            elif typed and any(c.class_names is not None for c in typed):
                raise ValueError(f"the parts do not agree on the classes of `{name}`")
            else:
                columns[name] = _joined([_as_read(column, part) for column, part in found])
        origins = tuple(origin for part in parts for origin in part.origins)
        return cls(columns, origins, np.arange(sum(origin.count for origin in origins)))


class Builder:
    """Builds a table row by row: rows may have different columns, and every cell keeps its own
    kind."""

    def __init__(self) -> None:
        # Plain lists of texts and numbers: rows kept as objects would trigger Python's garbage
        # collector.
        self._columns: dict[str, tuple[list[int], list[str]]] = {}
        self._records: list[str] = []
        self._names: Sequence[str] = ()
        self._chunks: dict[str, list[tuple[pa.Array, pa.Array]]] = {}
        self._pending = self._flushed = 0

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row of JSON values. Raises TypeError for a value of another type."""
        columns, pending = self._columns, self._pending
        for name, value in row.items():
            column = columns.get(name)
            if column is None:
                column = columns[name] = ([Kind.MISSING] * pending, [""] * pending)
            kind, text = cell_of(value)
            column[0].append(kind)
            column[1].append(text)
        if len(row) < len(columns):
            for kinds, texts in columns.values():
                if len(kinds) == pending:
                    kinds.append(Kind.MISSING)
                    texts.append("")
        self._grown()

    def add_cells(self, names: Sequence[str], texts: Sequence[str]) -> None:
        """Add a row of a CSV file; `names` are those of its first line, and the table has no other
        rows."""
        self._names = names
        self._records += texts
        self._grown()

    def _grown(self) -> None:
        self._pending += 1
        if self._pending == CHUNK:
            self._flush()

    def _flush(self) -> None:
        for place, name in enumerate(self._names):
            column = pa.array(self._records[place :: len(self._names)], pa.large_string())
            empty = pc.equal(pc.binary_length(column), 0).to_numpy(zero_copy_only=False)
            self._keep(name, np.where(empty, Kind.EMPTY, Kind.CELL).astype(np.uint8), column)
        for name, (kinds, texts) in self._columns.items():
            self._keep(
                name, np.frombuffer(bytes(kinds), np.uint8), pa.array(texts, pa.large_string())
            )
            kinds.clear()
            texts.clear()
        self._records = []
        self._flushed += self._pending
        self._pending = 0

    def _keep(self, name: str, kinds: NDArray[np.uint8], texts: pa.Array) -> None:
        chunks = self._chunks.setdefault(name, [])
        if not chunks and self._flushed:
            chunks.append(_missing(self._flushed))
        chunks.append((pa.array(kinds), texts))

    def table(self, name: str, lines: Sequence[int] | None = None) -> Table:
        """The table of all added rows; `lines`: the line on which each begins. Raises
        UnicodeEncodeError for half a surrogate pair."""
        self._flush()
        columns: dict[str, Column] = {
            column: _read_column(chunks) for column, chunks in self._chunks.items()
        }
        origin = Origin(name, self._flushed, None if lines is None else np.asarray(lines, np.int64))
        return Table(columns, (origin,), np.arange(self._flushed))


def _taken(array: pa.ChunkedArray, rows: NDArray[np.int64]) -> pa.ChunkedArray:
    """The rows of an array; where they are consecutive, a slice, which copies nothing."""
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


def _missing(count: int) -> tuple[pa.Array, pa.Array]:
    return pa.array(np.full(count, Kind.MISSING, np.uint8)), pa.array(
        [""] * count, pa.large_string()
    )


def _read_column(chunks: Sequence[tuple[pa.Array, pa.Array]]) -> ReadColumn:
    kinds, texts = zip(*chunks, strict=True)
    return ReadColumn(
        pa.chunked_array(list(kinds), pa.uint8()), pa.chunked_array(list(texts), pa.large_string())
    )


def _as_read(column: Column | None, part: Table) -> ReadColumn:
    if isinstance(column, ReadColumn):
        return column
    if column is None:
        return _read_column([_missing(len(part))])
    cells = column.cells(part.selected)
    return _read_column(
        [(pa.array(cells.kinds, pa.uint8()), pa.array(cells.texts, pa.large_string()))]
    )


def _joined(columns: Sequence[ReadColumn]) -> ReadColumn:
    kinds = [chunk for column in columns for chunk in column.kinds.chunks]
    texts = [chunk for column in columns for chunk in column.texts.chunks]
    return ReadColumn(
        pa.chunked_array(kinds, pa.uint8()), pa.chunked_array(texts, pa.large_string())
    )
