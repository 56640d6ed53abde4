"""The panel that a finished run prints above its ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lorakit.report.grid_table import MUTED

LOUD = "bold reverse #c8553d"


def summary_panel(result: Mapping[str, Any]) -> RenderableType:
    """The panel, from result.json; keys that are missing are left out."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style=MUTED, no_wrap=True)
    table.add_column(overflow="fold")
    by_set = (result.get("metrics_by_set") or {}).items()
    rows = {
        "metrics": _metrics(result.get("metrics") or {}),
        **{f"of {name}": _metrics(metrics) for name, metrics in by_set},
        "training": _quantity(result.get("train_seconds"), ".1f", "s"),
        "speed": _quantity(result.get("tokens_per_second"), ",.0f", "tokens/s"),
        "peak memory": _quantity(result.get("peak_memory_mb"), ",.0f", "MB"),
        "trainable": _quantity(result.get("trainable_parameters"), ",", "parameters"),
        "adapter": size_in_words(result.get("adapter_bytes")),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, Text(value))
    names = [str(result[key]) for key in ("method", "task") if result.get(key)]
    title = Text(" · ".join(names), "bold")
    shown = Group(*(Text(f" {line} ", LOUD) for line in stand_ins(result)), table)
    return Panel(shown, title=title, title_align="left", expand=False)


def _metrics(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {metric_value(value, '.4g')}" for name, value in metrics.items())


def metric_value(value: float | None, form: str) -> str:
    """A metric in digits, or that it is undefined: NaN, which is null in files."""
    if value is None or math.isnan(value):
        return "undefined"
    return f"{value:{form}}" if isinstance(value, float) else str(value)


def stand_ins(result: Mapping[str, Any]) -> list[str]:
    """A line that can not be overlooked for each input that stands in for that of the recipe."""
    lines = []
    for what in ("data", "model"):
        used = result.get(what)
        if isinstance(used, Mapping) and used.get("stand_in"):
            # Either a plain true, or the name of the model or data used in place of `name`.
            stand_in = used["stand_in"]
            names = str(used.get("name"))
            if isinstance(stand_in, str):
                names = f"{stand_in} instead of {names}"
            lines.append(f"STAND-IN {what.upper()}: {names} (the hub could not be reached)")
    return lines


def _quantity(value: float | None, form: str, unit: str) -> str:
    return "" if value is None else f"{value:{form}} {unit}"


def size_in_words(count: float | None) -> str:
    """A number of bytes with its unit; "" for None."""
    if count is None:
        return ""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
