"""Table: rows of columns whose cells are a file's texts, or Arrow's values."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lorakit.data.cells import Cells, Kind, cell_of, value_of
from lorakit.data.spill import BLOCK_BYTES, Spill, Spilled
from lorakit.data.stored import (
    Chunk,
    Column,
    Keep,
    ReadColumn,
    TypedColumn,
    missing,
    one,
    read_column,
    stays,
    taken,
)
from lorakit.errors import RecipeError, first_line

KEY = "data.name_or_path"
BLOCK_ROWS = 1000  # rows of a block, at most
CHUNK = 10_000  # rows that a Builder keeps as Python's objects


@dataclass(frozen=True)
class Origin:
    """A file, or a part of a set, that rows come from. name: "" where there is none; lines [rows]:
    the line on which each row begins, from 1, or None."""

    name: str
    count: int
    lines: Sequence[int] | NDArray[np.int64] | None = None

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
        arrays = self._arrays().values()
        total = next((len(array) for array in arrays), 0)
        return int(sum(array.nbytes for array in arrays) * len(self) / max(total, 1))

    @property
    def is_spilled(self) -> bool:
        """True if rows are in a file, since they are too large for memory: code that needs all of
        them goes by `blocks`."""
        return any(isinstance(array, Spilled) for array in self._arrays().values())

    def blocks(self, most: int | None = None) -> Iterator[tuple[int, Table]]:
        """(first row, rows from there on), block by block: at most `most` rows, by default
        BLOCK_ROWS; about BLOCK_BYTES, where rows are not in memory anyway."""
        count = most or BLOCK_ROWS
        if self.is_spilled:
            count = max(1, min(count, BLOCK_BYTES * len(self) // max(self.nbytes, 1)))
        for start in range(0, len(self), count):
            yield start, replace(self, selected=self.selected[start : start + count])

    def _arrays(self) -> dict[str, Any]:
        return {
            label: array
            for name, column in self.columns.items()
            for label, array in column.arrays(name).items()
        }

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
        arrays = self._arrays()
        for _, block in self.blocks():
            # Copied: a slice would be written with some bytes of its neighbours. One chunk per
            # column, however the rows were read.
            part = pa.table(
                {
                    label: taken(array, block.selected).combine_chunks()
                    for label, array in arrays.items()
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
        data: pa.Table | Mapping[str, Spilled],
        name: str = "",
        class_names: Mapping[str, Sequence[str]] | None = None,
        as_json: Sequence[str] = (),
    ) -> Table:
        """A table over Arrow's values, which are read on demand."""
        named = class_names or {}
        names = data.column_names if isinstance(data, pa.Table) else list(data)
        columns: dict[str, Column] = {
            column: TypedColumn(
                data[column], tuple(named[column]) if column in named else None, column in as_json
            )
            for column in names
        }
        count = len(data[names[0]]) if names else 0
        return cls(columns, (Origin(name, count),), np.arange(count))

    @classmethod
    def joined(cls, parts: Sequence[Table], keep: Keep = stays) -> Table:
        """The rows of all parts, one part after another. A column that a part lacks is MISSING
        there. keep: where columns go that have to be written anew.

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
                values = one([c.values for c in typed], typed[0].values.type)
                columns[name] = replace(typed[0], values=values)
            elif typed and any(c.class_names is not None for c in typed):
                raise ValueError(f"the parts do not agree on the classes of `{name}`")
            else:
                columns[name] = _joined([_as_read(column, part, keep) for column, part in found])
        origins = tuple(origin for part in parts for origin in part.origins)
        return cls(columns, origins, np.arange(sum(origin.count for origin in origins)))


class Builder:
    """Builds a table row by row: rows may have different columns, and every cell keeps its own
    kind."""

    def __init__(self, spill: Spill | None = None) -> None:
        """spill: the file that rows go to; None: they stay in memory."""
        self._spill = spill
        # Plain lists of texts and numbers: rows kept as objects would trigger Python's garbage
        # collector.
        self._columns: dict[str, tuple[list[int], list[str]]] = {}
        self._records: list[str] = []
        self._names: Sequence[str] = ()
        self._chunks: dict[str, list[tuple[Chunk, Chunk]]] = {}
        self._pending = self._flushed = self._letters = 0

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
            self._letters += len(text)
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
        self._letters += sum(map(len, texts))
        self._grown()

    def add_texts(self, name: str, texts: Sequence[str]) -> None:
        """Add rows with a string in one column; the table has no other columns."""
        kinds, found = self._columns.setdefault(name, ([], []))
        kinds += [Kind.STRING] * len(texts)
        found += texts
        self._letters += sum(map(len, texts))
        self._grown(len(texts))

    def _grown(self, rows: int = 1) -> None:
        self._pending += rows
        if self._pending >= CHUNK or self._letters > BLOCK_BYTES:
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
        self._pending = self._letters = 0

    def _keep(self, name: str, kinds: NDArray[np.uint8], texts: pa.Array) -> None:
        chunks = self._chunks.setdefault(name, [])
        if not chunks and self._flushed:
            chunks.append(missing(self._flushed, self._spill is not None))
        keep = stays if self._spill is None else self._spill.keep
        chunks.append((keep(pa.array(kinds)), keep(texts)))

    def table(self, name: str, lines: Sequence[int] | None = None) -> Table:
        """The table of all added rows; `lines`: the line on which each begins. Raises
        UnicodeEncodeError for half a surrogate pair."""
        self._flush()
        columns: dict[str, Column] = {
            column: read_column(chunks) for column, chunks in self._chunks.items()
        }
        known = lines if lines is None or isinstance(lines, range) else np.asarray(lines, np.int64)
        origin = Origin(name, self._flushed, known)
        return Table(columns, (origin,), np.arange(self._flushed))


def _as_read(column: Column | None, part: Table, keep: Keep) -> ReadColumn:
    if isinstance(column, ReadColumn):
        return column
    if column is None:
        chunks = [missing(len(part), keep is not stays)]
    else:
        cells = (column.cells(block.selected) for _, block in part.blocks())
        chunks = [
            (keep(pa.array(c.kinds, pa.uint8())), keep(pa.array(c.texts, pa.large_string())))
            for c in cells
        ]
    return read_column(chunks)


def _joined(columns: Sequence[ReadColumn]) -> ReadColumn:
    kinds, texts = [c.kinds for c in columns], [c.texts for c in columns]
    return ReadColumn(one(kinds, pa.uint8()), one(texts, pa.large_string()))
