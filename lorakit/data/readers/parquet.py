"""Parquet: rows with the file's own types and class names."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lorakit.data.table import KEY, Table
from lorakit.errors import RecipeError, first_line


def read_parquet(path: Path) -> Table:
    try:
        found = pq.ParquetFile(path).read()
    except (pa.ArrowException, ValueError) as error:
        raise RecipeError.at(KEY, f"{path}: {first_line(error)}", "rows as parquet") from error
    twice = next(
        (name for i, name in enumerate(found.column_names) if name in found.column_names[:i]), None
    )
    if twice is not None:
        raise RecipeError.at(
            KEY, f"{path}: the column `{twice}` is there twice", "names that differ"
        )
    return Table.from_arrow(found, str(path), _class_names(found.schema))


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
