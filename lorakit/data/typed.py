"""Typed values as JSON: Arrow's values (Parquet, the hub), and numbers that keep their digits.

Whole numbers are written in digits, fractions as the shortest decimal that is the same number in
their own type, decimals with all their digits, dates and times in ISO 8601, bytes as the UTF-8 text
that they encode. A value without such a text is refused.
"""

from __future__ import annotations

import json
import math
from datetime import UTC, date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.types as types

PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


class Whole(str):
    """A whole number, as it is written."""

    __slots__ = ()


class Fraction(str):
    """A number with a fraction or an exponent (or NaN), as it is written."""

    __slots__ = ()


def dumps(value: Any) -> str:
    """A value as JSON; a Whole and a Fraction as they are written. Raises TypeError for a type that
    JSON lacks."""
    if isinstance(value, Whole | Fraction):
        return str(value)
    if isinstance(value, dict):
        return (
            "{"
            + ", ".join(f"{dumps(str(name))}: {dumps(item)}" for name, item in value.items())
            + "}"
        )
    if isinstance(value, list):
        return "[" + ", ".join(map(dumps, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def plain_values(array: pa.ChunkedArray) -> list[Any]:
    """The values of an Arrow array as str, Whole, Fraction, bool, None, list and dict.

    Raises TypeError for a type that has no text, ValueError (including UnicodeDecodeError) for a
    value that has none.
    """
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        array = pa.chunked_array([chunk.storage for chunk in array.chunks], kind.storage_type)
        return plain_values(array)
    if types.is_dictionary(kind):
        return plain_values(array.cast(kind.value_type))
    if types.is_timestamp(kind):
        return [
            None if value is None else _time(value, kind)
            for value in array.cast(pa.int64()).to_pylist()
        ]
    if _is_plain(kind):
        return list(array.to_pylist())
    return [_plain(value, kind) for value in array.to_pylist()]


def _is_plain(kind: pa.DataType) -> bool:
    texts = (
        types.is_string(kind)
        or types.is_large_string(kind)
        or getattr(types, "is_string_view", lambda _: False)(kind)
    )
    return bool(texts or types.is_boolean(kind) or types.is_null(kind))


def _plain(value: Any, kind: pa.DataType) -> Any:
    """`value`, which Arrow returned for a value of type `kind`, as a plain value."""
    if value is None or _is_plain(kind):
        return value
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(value, kind.storage_type)
    if types.is_dictionary(kind):
        return _plain(value, kind.value_type)
    if types.is_integer(kind):
        return Whole(value)
    if types.is_floating(kind):
        return _fraction(value, kind)
    if types.is_decimal(kind):
        return (Fraction if kind.scale > 0 else Whole)(format(value, "f"))
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if type(value) is date:
        return value.isoformat()
    if isinstance(value, datetime) and kind.unit != "ns":
        return value.isoformat()
    if types.is_map(kind):
        return {
            str(_plain(name, kind.key_type)): _plain(item, kind.item_type) for name, item in value
        }
    if types.is_struct(kind):
        return {
            kind.field(i).name: _plain(value[kind.field(i).name], kind.field(i).type)
            for i in range(kind.num_fields)
        }
    if isinstance(value, list):
        return [_plain(item, kind.value_type) for item in value]
    raise TypeError(f"values of the type {kind} have no text")


def _fraction(value: float, kind: pa.DataType) -> Fraction:
    if not math.isfinite(value):
        return Fraction("NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity")
    if types.is_float64(kind):
        return Fraction(repr(value))
    return Fraction(str((np.float32 if types.is_float32(kind) else np.float16)(value)))


def _time(value: int, kind: pa.TimestampType) -> str:
    """A timestamp in ISO 8601, with fractions of the second up to the last digit that is not 0.
    Raises OverflowError for year 10 000."""
    seconds, rest = divmod(value, PER_SECOND[kind.unit])
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
    digits = f"{rest:0{len(str(PER_SECOND[kind.unit])) - 1}d}".rstrip("0") if rest else ""
    if kind.tz is None:
        text = moment.replace(tzinfo=None).isoformat()
        return f"{text}.{digits}" if digits else text
    text = moment.astimezone(_zone(kind.tz)).isoformat()
    return f"{text[:19]}.{digits}{text[19:]}" if digits else text


def _zone(name: str) -> Any:
    """A time zone by its name, or by its offset such as +01:00, both of which Arrow uses. Raises
    ValueError for an unknown one."""
    if name[:1] in "+-":
        return datetime.fromisoformat(f"1970-01-01T00:00:00{name}").tzinfo
    return UTC if name.upper() == "UTC" else ZoneInfo(name)
