"""Tables of terminals that show finished runs side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich import box
from rich.console import Group as Parts
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from lorakit.report.comparison import COSTS, Comparison, Group, Mean
from lorakit.report.grid_table import MUTED
from lorakit.report.summary import metric_value, size_in_words
from lorakit.training.spec import LOWER_IS_BETTER

BEST = "*"
HEADS = {
    "train_seconds": "train s",
    "tokens_per_second": "tokens/s",
    "peak_memory_mb": "memory\nMB",
    "trainable_parameters": "params",
    "adapter_bytes": "adapter",
    "rank_total": "ranks",
    "matthews_correlation": "matthews",
    "mean_squared_error": "mse",
}
FORMS: dict[str, Callable[[float], str]] = {
    "train_seconds": lambda value: f"{value:.1f}",
    "tokens_per_second": lambda value: f"{value:,.0f}",
    "peak_memory_mb": lambda value: f"{value:,.0f}",
    "trainable_parameters": lambda value: f"{value:,.0f}",
    "adapter_bytes": size_in_words,
    "rank_total": lambda value: f"{value:,.4g}",
    "steps": lambda value: f"{value:,.4g}",
}
WITH_ERROR = ("train_seconds", "tokens_per_second")


def comparison_tables(comparison: Comparison) -> Parts:
    """Quality, cost, paired differences and recipe keys, each a table, then notes."""
    legend = f"{BEST} best of its column"
    if any(len(group.seeds) > 1 for group in comparison.groups):
        legend += "; ± standard error of the mean over the seeds"
    parts: list[RenderableType] = [quality_table(comparison), Text(), cost_table(comparison)]
    parts += [Text(legend, MUTED)]
    if (differences := difference_table(comparison)) is not None:
        parts += [Text(), differences]
    if comparison.differing:
        parts += [Text("\nrecipes"), *recipe_lines(comparison)]
    parts += [
        Text(f"\nnote: {note}" if at == 0 else f"note: {note}")
        for at, note in enumerate(comparison.notes)
    ]
    return Parts(*parts)


def shown(column: str, mean: Mean | None, signed: bool = False) -> str:
    """A mean in digits, with its standard error where there is one."""
    form = FORMS.get(column)
    if mean is None:
        return "undefined" if form is None else "-"
    if form is not None:
        error = mean.error if column in WITH_ERROR else None
        return form(mean.mean) + ("" if error is None else f" ± {error:.2g}")
    number = f"{mean.mean:+.4f}" if signed else metric_value(float(mean.mean), ".4f")
    return number + ("" if mean.error is None else f" ± {mean.error:.4f}")


def _cell(comparison: Comparison, group: Group, column: str) -> Text:
    """A mean, marked where it is the best; the mark has a place of its own, so numbers align."""
    best = group.name in comparison.best(column)
    return Text(shown(column, group.mean(column)) + (BEST if best else " "), "bold" if best else "")


def _table(*heads: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(Text(heads[0]), overflow="fold")
    for head in heads[1:]:
        table.add_column(Text(head), justify="right", overflow="fold")
    return table


def quality_table(comparison: Comparison) -> Table:
    """A row for each group: method, seeds, and the metrics with their direction."""
    heads = [
        f"{HEADS.get(name, name)} {'↓' if name in LOWER_IS_BETTER else '↑'}"
        for name in comparison.metrics
    ]
    table = _table("run", "method", "seeds", *heads)
    for group in comparison.groups:
        method = str(group.runs[0].result.get("method"))
        cells = [_cell(comparison, group, column) for column in comparison.metrics]
        table.add_row(Text(group.name), Text(method), seeds_in_words(group), *cells)
    return table


def seeds_in_words(group: Group) -> str:
    """The seed, or how many there are; runs of the same seed are said."""
    number = f"seed {group.seeds[0]}" if len(group.seeds) == 1 else str(len(group.seeds))
    return number if len(group.runs) == len(group.seeds) else f"{number} ({len(group.runs)} runs)"


def cost_table(comparison: Comparison) -> Table:
    """A row for each group: time, memory, sizes, steps and precision."""
    columns = [*COSTS, "rank_total", "steps"]
    table = _table("run", *(HEADS.get(name, name) for name in columns), "type")
    for group in comparison.groups:
        cells = [_cell(comparison, group, column) for column in columns]
        precision = str(group.runs[0].result.get("precision"))
        table.add_row(Text(group.name), *cells, Text(precision))
    return table


def difference_table(comparison: Comparison) -> Table | None:
    """Paired differences to the baseline; None where no group has its seeds."""
    table = _table(
        f"difference to {comparison.baseline.name}",
        "seeds",
        *(HEADS.get(name, name) for name in comparison.metrics),
    )
    for group in comparison.groups:
        found = {name: comparison.difference(group, name) for name in comparison.metrics}
        if any(mean is not None for mean in found.values()):
            cells = [shown(name, mean, signed=True) for name, mean in found.items()]
            table.add_row(Text(group.name), str(len(group.seeds)), *cells)
    return table if table.rows else None


def recipe_lines(comparison: Comparison) -> Iterator[Text]:
    """`key: value (groups) · value (groups)` for each key that differs."""
    for key, values in comparison.differing.items():
        parts = [f"{value} ({', '.join(names)})" for value, names in values.items()]
        yield Text.assemble(("  " + key, "bold"), ": " + " · ".join(parts))
