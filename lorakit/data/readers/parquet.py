"""Parquet: rows with the types and the names of classes that the file says."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lorakit.data.table import KEY, Table
from lorakit.errors import RecipeError


def read_parquet(path: Path) -> Table:
    try:
        found = pq.ParquetFile(path).read()
    except (pa.ArrowException, ValueError) as error:
        raise RecipeError.at(
            KEY, f"{path}: {str(error).splitlines()[0]}", "rows as parquet"
        ) from error
    twice = next(
        (name for i, name in enumerate(found.column_names) if name in found.column_names[:i]), None
    )
    if twice is not None:
        raise RecipeError.at(
            KEY, f"{path}: the column `{twice}` is there twice", "names that differ"
        )
    return Table.from_arrow(found, str(path), _class_names(found.schema))


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """{column of class numbers: names of its classes}, which the library `datasets` writes beside
    the columns of Parquet."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        named = {
            name: about["names"]
            for name, about in features.items()
            if about.get("_type") == "ClassLabel"
        }
    except (KeyError, ValueError, TypeError, AttributeError):  # of somebody else, or none
        return {}
    return {
        name: names
        for name, names in named.items()
        if name in schema.names and pa.types.is_integer(schema.field(name).type)
    }
