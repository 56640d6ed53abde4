"""Parquet: rows with the file's own types and class names."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lorakit.data.spill import BLOCK_BYTES, Spill, Spilled, spilled
from lorakit.data.table import CHUNK, KEY, Table
from lorakit.errors import RecipeError, first_line

BUFFER = 1 << 20  # bytes of a column that are read at once


def read_parquet(path: Path, spill: Spill | None = None) -> Table:
    found: pa.Table | dict[str, Spilled]
    try:
        # Without these settings, all of a row group is read at once.
        file = pq.ParquetFile(path, buffer_size=BUFFER if spill else 0, pre_buffer=False)
        schema = file.schema_arrow
        names = schema.names
        twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
        if twice is not None:
            raise RecipeError.at(
                KEY, f"{path}: the column `{twice}` is there twice", "names that differ"
            )
        if spill is None:
            found = file.read()
        else:
            found = spilled(file.iter_batches(_rows_at_once(file.metadata)), schema, spill)
    except (pa.ArrowException, ValueError) as error:
        raise RecipeError.at(KEY, f"{path}: {first_line(error)}", "rows as parquet") from error
    return Table.from_arrow(found, str(path), _class_names(schema))


def _rows_at_once(about: pq.FileMetaData) -> int:
    """Number of rows that take about BLOCK_BYTES."""
    total = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
    rows: int = about.num_rows
    return max(1, min(CHUNK, BLOCK_BYTES * rows // max(int(total), 1)))


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """{column of class numbers: names of its classes}, from the metadata that the library
    `datasets` writes into Parquet files."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        named = {
            name: about["names"]
            for name, about in features.items()
            if about.get("_type") == "ClassLabel"
        }
    # metadata of another program, or none
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}
    return {
        name: names
        for name, names in named.items()
        if name in schema.names and pa.types.is_integer(schema.field(name).type)
    }
