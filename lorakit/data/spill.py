"""Spill: columns of a data set that is too large for memory, in an unnamed file in the cache.

A Spilled array answers as an Arrow array does, by reading the parts of the file that hold the rows
asked for. The file is read, not mapped: pages of a map count as the process's memory. It has no
name, so nothing is left of it when the process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lorakit.errors import RunError
from lorakit.files import cache_root

MB = 1_000_000
BLOCK_BYTES = 8 * MB  # of rows in memory at once, about


class Spill:
    """The file. progress(megabytes written, expected) is called as it grows; expected: bytes of the
    data files, or 0 where they are not known."""

    def __init__(
        self, progress: Callable[[int, int], None] = lambda done, total: None, expected: int = 0
    ) -> None:
        self._progress, self._expected = progress, expected
        self._end = 0
        with disk_errors():
            folder = cache_root()
            folder.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def keep(self, values: pa.Array) -> Segment:
        """Write an array to the file. Raises RunError where the disk does not take it."""
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        buffer = pa.record_batch([values], ["values"]).serialize()
        start = self._end
        with disk_errors():
            self._file.seek(start)
            self._file.write(buffer)
            self._file.flush()
        self._end += buffer.size
        done = self._end // MB
        self._progress(done, max(done, self._expected // MB))
        return Segment(self, start, buffer.size, len(values), values.type)

    def read(self, segment: Segment) -> pa.Array:
        content = os.pread(self._file.fileno(), segment.size, segment.start)
        schema = pa.schema([("values", segment.type)])
        return pa.ipc.read_record_batch(pa.py_buffer(content), schema).column(0)


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of a column: `size` bytes from `start` of the spill's file."""

    spill: Spill = field(repr=False)
    start: int
    size: int
    rows: int
    type: pa.DataType

    def read(self) -> pa.Array:
        return self.spill.read(self)


@dataclass(frozen=True)
class Constant:
    """Consecutive rows that all have the same value."""

    value: Any
    rows: int
    type: pa.DataType
    size: int = 0

    def read(self) -> pa.Array:
        return pa.repeat(pa.scalar(self.value, self.type), self.rows)


class Spilled:
    """An array of segments, one after another. The segment that was read last is kept."""

    def __init__(self, segments: Sequence[Segment | Constant], kind: pa.DataType) -> None:
        self.segments, self.type = list(segments), kind
        self._ends: list[int] = np.cumsum([part.rows for part in segments]).tolist()
        self._last: tuple[int, pa.Array] | None = None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def nbytes(self) -> int:
        return sum(part.size for part in self.segments)

    def take(self, rows: NDArray[np.int64]) -> pa.ChunkedArray:
        """The values of these rows, in this order."""
        found, place = [], 0
        while place < len(rows):
            part = bisect_right(self._ends, int(rows[place]))
            end = self._ends[part]
            first = end - self.segments[part].rows
            # rising rows have no more than this many of the segment
            near = rows[place : place + end - first]
            inside = (near >= first) & (near < end)
            count = len(near) if inside.all() else int(inside.argmin())
            wanted = near[:count] - first
            values = self._segment(part)
            if int(wanted[-1] - wanted[0]) + 1 == count and (np.diff(wanted) == 1).all():
                found.append(values.slice(int(wanted[0]), count))
            else:
                found.append(values.take(pa.array(wanted)))
            place += count
        return pa.chunked_array(found, self.type)

    def _segment(self, number: int) -> pa.Array:
        if self._last is None or self._last[0] != number:
            self._last = number, self.segments[number].read()
        return self._last[1]


def spilled(
    batches: Iterable[pa.RecordBatch], schema: pa.Schema, spill: Spill
) -> dict[str, Spilled]:
    """{column: its values} of batches with this schema, written to a Spill one by one."""
    found: dict[str, list[Segment]] = {name: [] for name in schema.names}
    for batch in batches:
        for name, parts in found.items():
            parts.append(spill.keep(batch.column(name)))
    kinds = {name: plain_type(schema.field(name).type) for name in found}
    return {name: Spilled(parts, kinds[name]) for name, parts in found.items()}


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type that a Spill keeps an array in: that of its values, where it is a dictionary."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Context in which a disk that takes no more becomes one RunError, which names the cache."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG):
            raise
        what = f"the cache folder `{cache_root()}` can not be written: {error.strerror}"
        raise RunError(
            what,
            "A large data set is kept there while it is read, and its tokens afterwards. Free some"
            " space (what is in its folders tokenised and shards may be deleted), or name another"
            " folder in the environment variable LORAKIT_CACHE.",
        ) from error
