"""Ranks by layer and kind of module: the tables that `train` and `inspect-ranks` print, and the JSON of `--json`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lorakit.report.history import RankRecord, changes
from lorakit.report.layout import NO_LAYER, Grid, layout, stacked

# Five shares of the largest rank, low to high: each has a contrast of at least 4 against black and against white, and
# comes out as a colour of its own on a terminal that has only sixteen.
SHARE_COLOURS = ("#3a70d0", "#0f8080", "#2d8500", "#a86a00", "#d03a3a")
MUTED, GROWN, SHRUNK = "#767676", "green", "red"

# With more columns than this there is one blank between them, not two.
ROOMY_COLUMNS = 7
# Room for the changes of one record beside the four numbers, in 80 columns.
CHANGES_WIDTH = 44
# What result.json says about the entries of the factors and of the base.
ENTRY_KEYS = ("density", "nonzeros", "effective_ranks", "base_density", "tiers", "mean_rank", "mean_chunk_length")


# -- tables ----------------------------------------------------------------------------------------------------------


# What the words of tables and pictures mean; a line each under those that use them.
MEANINGS = {
    "budget": "most that all ranks may cost: 1 each, or in + out (budget.unit: params)",
    "cost": "what all ranks cost of the budget",
    "pool": "part of the budget that is free, for modules that use all they have",
    "gate": "mean gate of the components: 1 is open; one that has closed is pruned",
}


def meanings(*words: str) -> Text:
    """A line for each of `words`, which the table above uses."""
    width = max(map(len, words))
    return Text("\n".join(f"{word:{width}}  {MEANINGS[word]}" for word in words), MUTED)


def fixed_ranks(records: Sequence[RankRecord], gates: Mapping[str, Sequence[float]] | None = None) -> Text | None:
    """The ranks in a few lines, where none ever moved; None where one did.

    One line if all are the same, else a line for each kind of module. `gates` as in `rank_table`.
    """
    last = records[-1]
    if len(records) > 1 and any(changes(before, after) for before, after in pairwise(records)):
        return None
    grid = layout(last.ranks)
    layers = sum(layer != NO_LAYER for layer in grid.layers)
    what = f"{len(last.ranks)} modules in {layers} layers" if layers else f"{len(last.ranks)} modules"
    total = f"{last.total:,} in all; none moved"
    if gates:
        total += f"\nmean gate {_mean_gate(gates, last.ranks)} (1 is open, 0 closed)"
    if len(found := set(last.ranks.values())) == 1:
        return Text(f"{what}, rank {found.pop()} each, {total}")
    width = max(map(len, grid.heads.values()))
    lines = [f"{what}, {_spread(last.ranks.values())}, {total}"]
    for kind in grid.kinds:
        names = grid.of_kind(kind)
        lines.append(f"  {grid.heads[kind]:{width}}  {_spread(last.ranks[name] for name in names)}")
    return Text("\n".join(lines))


def _spread(ranks: Iterable[int]) -> str:
    found = list(ranks)
    return f"rank {min(found)}" if min(found) == max(found) else f"ranks {min(found)} to {max(found)}"


def rank_table(records: Sequence[RankRecord], gates: Mapping[str, Sequence[float]] | None = None) -> Table:
    """The newest ranks, layers down and kinds across, each with how it moved since the first record.

    `gates` {module: the gates of its components} adds a line with the mean gate of each kind.
    """
    first, last = records[0], records[-1]
    grid = layout(last.ranks)
    colour = colouring(_sum(last, names) for names in grid.cells.values())

    def cells(groups: Sequence[list[str]], edge: bool) -> list[Text]:
        pairs = [(_sum(first, names), _sum(last, names)) for names in groups]
        styles = ["bold" if edge else colour(now) for _, now in pairs[:-1]]
        return [*_cells(pairs[:-1], styles), _total(*pairs[-1])]

    table = grid_table(grid, cells)
    if gates:
        groups = [*map(grid.of_kind, grid.kinds), list(last.ranks)]
        table.add_row(Text("gate", MUTED), *(Text(_mean_gate(gates, names), MUTED) for names in groups))
    parts = caption(records, grid)
    table.caption = Text(f"{' · '.join(parts[:3])}\n{' · '.join(parts[3:])}", MUTED)
    return table


def grid_table(
    grid: Grid, cells: Callable[[Sequence[list[str]], bool], list[Text]], whole: str = "total", roomy: int = ROOMY_COLUMNS
) -> Table:
    """Layers down, kinds across, and `whole`, the name of the last row and column, for all of them.

    `cells` makes a column, top to bottom, from the modules that each cell stands for; it is told whether the column is
    the last. Up to `roomy` kinds, two blanks part the columns.
    """
    columns = []
    for kind in grid.kinds:
        modules = {layer: grid.cells[layer, kind] for layer in grid.layers if (layer, kind) in grid.cells}
        *body, foot = cells([*modules.values(), grid.of_kind(kind)], False)
        there = dict(zip(modules, body, strict=True))
        columns.append([*(there.get(layer, Text("")) for layer in grid.layers), foot])
    everything = [name for names in grid.cells.values() for name in names]
    columns.append(cells([*map(grid.of_layer, grid.layers), everything], True))

    padding = (0, 1, 0, 0) if len(grid.kinds) <= roomy else 0
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=padding, caption_justify="left")
    table.add_column("layer", no_wrap=True)
    for kind, column in zip(grid.kinds, columns, strict=False):
        # Where room is short, the head breaks, never a number.
        widest = max(line.cell_len for cell in column for line in cell.split())
        table.add_column(Text(stacked(grid.heads[kind])), overflow="fold", min_width=widest)
    table.add_column(whole, no_wrap=True)
    *rows, last = zip(*columns, strict=True)
    for layer, row in zip(grid.layers, rows, strict=True):
        table.add_row(Text(layer), *row)
    table.add_section()
    table.add_row(Text(whole, "bold"), *last)
    return table


def colouring(values: Iterable[float]) -> Callable[[float], str]:
    """The colour of each of `values`, by its share of the largest; none where all are the same."""
    found = list(values)
    lowest, highest = min(found, default=0), max(found, default=0)

    def colour(value: float) -> str:
        if lowest == highest:
            return ""
        return MUTED if value == 0 else SHARE_COLOURS[min(int(value / highest * len(SHARE_COLOURS)), len(SHARE_COLOURS) - 1)]

    return colour


def caption(records: Sequence[RankRecord], grid: Grid) -> list[str]:
    """Summary of all modules: total, budget, pool, how many modules moved, and when last."""
    first, last = records[0], records[-1]
    parts = [
        f"total {last.total}",
        f"budget {last.budget}",
        f"pool {last.pool}",
        f"{len(changes(first, last))} of {len(last.ranks)} modules moved",
        f"last change at step {last.step}" if len(records) > 1 else f"step {last.step}",
    ]
    return parts + ["numbered parts of a layer are summed"] * grid.summed


def _sum(record: RankRecord, modules: Iterable[str]) -> int:
    return sum(record.ranks[name] for name in modules)


def _cells(pairs: Sequence[tuple[int, int]], styles: Sequence[str]) -> list[Text]:
    """`6 -2`, `11 +3` or plain `8` for (start, now), the numbers of one column right above one another."""
    width = max((len(str(now)) for _, now in pairs), default=0)
    cells = []
    for (start, now), style in zip(pairs, styles, strict=True):
        cell = Text(f"{now:>{width}}", style)
        if now != start:
            cell = Text.assemble(cell, " ", (f"{now - start:+d}", GROWN if now > start else SHRUNK))
        cells.append(cell)
    return cells


def _total(start: int, now: int) -> Text:
    """A kind's total, its move on a second line: side by side, the sums would be the widest thing of the column."""
    total = Text(str(now), "bold")
    if now == start:
        return total
    return Text.assemble(total, "\n", (f"{now - start:+d}", GROWN if now > start else SHRUNK))


def _mean_gate(gates: Mapping[str, Sequence[float]], modules: Iterable[str]) -> str:
    values = [value for name in modules for value in gates.get(name, ())]
    return f"{sum(values) / len(values):.2f}" if values else "-"


def history_table(records: Sequence[RankRecord]) -> Table:
    """A row a record: step, total, pool, budget, and which ranks changed, the largest changes first."""
    places = layout(records[0].ranks).places()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("step", "total", "pool", "budget"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("changed", overflow="fold")

    ranks = records[0].ranks.values()
    spread = _spread(ranks)
    for before, record in zip([None, *records], records, strict=False):
        changed = f"start: {len(ranks)} modules, {spread}" if before is None else _in_words(changes(before, record), places)
        table.add_row(*map(str, (record.step, record.total, record.pool, record.budget)), Text(changed))
    return table


def _in_words(moves: Mapping[str, int], places: Mapping[str, str]) -> str:
    """`+3 output.dense 2, -1 query 0 and 4 more`: as many as fit, at least one."""
    if not moves:
        return "nothing moved"
    items = [f"{delta:+d} {places[name]}" for name, delta in sorted(moves.items(), key=lambda move: -abs(move[1]))]
    shown = len(items)
    while shown > 1 and len(_listed(items, shown)) > CHANGES_WIDTH:
        shown -= 1
    return _listed(items, shown)


def _listed(items: Sequence[str], shown: int) -> str:
    left = len(items) - shown
    return ", ".join(items[:shown]) + (f" and {left} more" if left else "")


# -- JSON ------------------------------------------------------------------------------------------------------------


def as_json(
    records: Sequence[RankRecord],
    result: Mapping[str, Any] | None = None,
    run: Path | None = None,
    densities: Mapping[int, float] | None = None,
) -> dict[str, Any]:
    """Output of `inspect-ranks --json`. `result` is result.json; None while the run is still going, for which
    `densities` {step: density} has the density so far."""
    first, last = records[0], records[-1]
    entries = {key: result[key] for key in ENTRY_KEYS if key in result} if result is not None else {}
    if result is None and densities:
        step, density = list(densities.items())[-1]
        entries = {"density": {"total": density, "step": step}}
    grid = layout(last.ranks)

    def start_and_now(modules: list[str]) -> dict[str, int]:
        return {"start": _sum(first, modules), "now": _sum(last, modules)}

    return {
        "run": None if run is None else str(run),
        "method": (result or {}).get("method"),
        "step": last.step,
        "total": last.total,
        "cost": last.cost,
        "pool": last.pool,
        "budget": last.budget,
        "ranks": last.ranks,
        "initial_ranks": first.ranks,
        "moved": changes(first, last),
        "by_kind": {kind: start_and_now(grid.of_kind(kind)) for kind in grid.kinds},
        "by_layer": {layer: start_and_now(grid.of_layer(layer)) for layer in grid.layers},
        "history": [
            {
                "step": record.step,
                "total": record.total,
                "cost": record.cost,
                "pool": record.pool,
                "budget": record.budget,
                "changed": {} if before is None else changes(before, record),
            }
            for before, record in zip([None, *records], records, strict=False)
        ],
        **entries,
    }


# -- the end of a run ------------------------------------------------------------------------------------------------


def summary_panel(result: Mapping[str, Any]) -> RenderableType:
    """Panel that a finished run printed above its ranks, from result.json; keys that are missing are left out."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style=MUTED, no_wrap=True)
    table.add_column(overflow="fold")
    metrics = [f"{name} {metric_value(value, '.4g')}" for name, value in (result.get("metrics") or {}).items()]
    rows = {
        "metrics": "  ".join(metrics),
        "training": _quantity(result.get("train_seconds"), ".1f", "s"),
        "speed": _quantity(result.get("tokens_per_second"), ",.0f", "tokens/s"),
        "peak memory": _quantity(result.get("peak_memory_mb"), ",.0f", "MB"),
        "trainable": _quantity(result.get("trainable_parameters"), ",", "parameters"),
        "adapter": _size(result.get("adapter_bytes")),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, Text(value))
    title = Text(" · ".join(str(result[key]) for key in ("method", "task") if result.get(key)), "bold")
    return Panel(Group(*_stand_ins(result), table), title=title, title_align="left", expand=False)


def metric_value(value: float | None, form: str) -> str:
    """A metric in digits, or that it is undefined: NaN, which is null in files."""
    if value is None or math.isnan(value):
        return "undefined"
    return f"{value:{form}}" if isinstance(value, float) else str(value)


def _stand_ins(result: Mapping[str, Any]) -> list[Text]:
    """A line that can not be overlooked for each input that is not what the recipe names."""
    lines = []
    for what in ("data", "model"):
        used = result.get(what)
        if isinstance(used, Mapping) and used.get("stand_in"):
            # The mark is either a plain true, or the name of what was used in place of `name`.
            stand_in = used["stand_in"]
            names = f"{stand_in} instead of {used.get('name')}" if isinstance(stand_in, str) else str(used.get("name"))
            text = f" STAND-IN {what.upper()}: {names} (the hub could not be reached) "
            lines.append(Text(text, "bold reverse #c8553d"))
    return lines


def _quantity(value: float | None, form: str, unit: str) -> str:
    return "" if value is None else f"{value:{form}} {unit}"


def _size(count: float | None) -> str:
    if count is None:
        return ""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
