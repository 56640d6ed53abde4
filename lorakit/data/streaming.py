"""Streaming: the decision whether the rows of a split are read into memory, or block by block into
a Spill."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
from datasets import Dataset

from lorakit.data.keys import DataKeys
from lorakit.data.readers import data_suffix
from lorakit.data.readers.lines import OPENERS
from lorakit.data.spill import MB, Spill, Spilled, spilled
from lorakit.data.table import BLOCK_ROWS
from lorakit.errors import RecipeError

log = logging.getLogger("lorakit")

KEY = "data.streaming"
# Bytes of a split's files above which it is streamed unless the recipe says otherwise. Rows in
# memory, with their texts and tokens as Python's objects, take up to ten times as much while they
# are tokenised; blocks take about 100 MB, at the same speed.
LARGE = 64 * MB
PACKED = 4  # bytes of text for each byte of a compressed file, about

Advance = Callable[[int, int], None]
"""Progress in megabytes: (read, in all)."""


class Streaming:
    """How the splits of a data set are read. asked: the recipe's key; progress: of the splits that
    are streamed."""

    def __init__(self, spec: DataKeys, progress: Advance = lambda done, total: None) -> None:
        self.asked, self._progress = spec.streaming, progress

    def of_files(self, files: Sequence[Path]) -> Spill | None:
        """The Spill for the rows of a split's files, or None where they are read into memory.

        Raises RecipeError for a file that can only be read whole, where the recipe asks for
        streaming.
        """
        size = sum(map(_size, files))
        if not self._wanted(size):
            return None
        whole = next((file for file in files if data_suffix(file) == ".json"), None)
        if whole is not None:
            what = f"`{whole}` is one JSON value, which is read whole"
            expected = "the rows as .jsonl (one object a line), which are read in blocks"
            if self.asked is True:
                raise RecipeError.at(KEY, what, f"{expected}; or streaming: false")
            log.info("%s, into memory; %s", what, expected)
            return None
        return self._spill(size, f"{len(files)} files" if len(files) > 1 else f"`{files[0].name}`")

    def of_dataset(self, data: Dataset, name: str) -> Spill | None:
        """The same for a split of a `datasets` data set, whose files are Arrow's."""
        size = int(data.data.nbytes)
        return self._spill(size, name) if self._wanted(size) else None

    def _wanted(self, size: int) -> bool:
        return size > LARGE if self.asked == "auto" else self.asked

    def _spill(self, size: int, name: str) -> Spill:
        if self.asked == "auto":
            log.info(
                "%s holds about %s MB, more than %d MB (the memory is %s MB): its rows are read in"
                " blocks and tokenised to files in the cache folder; %s: false reads them into"
                " memory",
                *(name, f"{size / MB:,.0f}", LARGE // MB, f"{_memory() / MB:,.0f}", KEY),
            )
        return Spill(self._progress, size)


def columns_of(data: Dataset, spill: Spill) -> dict[str, Spilled]:
    """The columns of a `datasets` data set, in a Spill."""

    def batches() -> Iterator[pa.RecordBatch]:
        tables: Iterable[pa.Table] = data.with_format("arrow").iter(BLOCK_ROWS)
        for table in tables:
            yield from table.to_batches()

    return spilled(batches(), data.data.schema, spill)


def _size(file: Path) -> int:
    """Bytes of a file's rows, about. A file that is not there is told of when it is read."""
    try:
        size = file.stat().st_size
    except OSError:
        return 0
    return size * PACKED if file.suffix.lower() in (*OPENERS, ".parquet") else size


def _memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
