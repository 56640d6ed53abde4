"""Ranks by layer and kind of module, and their history, as tables of terminals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from rich import box
from rich.table import Table
from rich.text import Text

from lorakit.report.grid_table import MUTED, colouring, grid_table
from lorakit.report.history import RankRecord, changes
from lorakit.report.layout import NO_LAYER, Grid, layout

GROWN, SHRUNK = "green", "red"
# Room for the changes of one record beside the four numbers, in 80 columns.
CHANGES_WIDTH = 44


Gates = Mapping[str, Sequence[float]]  # {module: the gates of its components}


def fixed_ranks(records: Sequence[RankRecord], gates: Gates | None = None) -> Text | None:
    """The ranks in a few lines, where none ever moved; None where one did.

    One line if all are the same, else a line for each kind of module.
    """
    last = records[-1]
    if len(records) > 1 and any(changes(before, after) for before, after in pairwise(records)):
        return None
    grid = layout(last.ranks)
    layers = sum(layer != NO_LAYER for layer in grid.layers)
    what = f"{len(last.ranks)} modules" + (f" in {layers} layers" if layers else "")
    total = f"{last.total:,} in all; none moved"
    if gates:
        total += f"\nmean gate {_mean_gate(gates, last.ranks)} (1 is open, 0 closed)"
    if len(found := set(last.ranks.values())) == 1:
        return Text(f"{what}, rank {found.pop()} each, {total}")
    width = max(map(len, grid.heads.values()))
    lines = [f"{what}, {_spread(last.ranks.values())}, {total}"]
    for kind in grid.kinds:
        names = grid.of_kind(kind)
        spread = _spread(last.ranks[name] for name in names)
        lines.append(f"  {grid.heads[kind]:{width}}  {spread}")
    return Text("\n".join(lines))


def _spread(ranks: Iterable[int]) -> str:
    found = list(ranks)
    lowest, highest = min(found), max(found)
    return f"rank {lowest}" if lowest == highest else f"ranks {lowest} to {highest}"


def rank_table(records: Sequence[RankRecord], gates: Gates | None = None) -> Table:
    """The newest ranks, each with its move since the first record.

    `gates` adds a line with the mean gate of each kind.
    """
    first, last = records[0], records[-1]
    grid = layout(last.ranks)
    colour = colouring(last.sum_of(names) for names in grid.cells.values())

    def cells(groups: Sequence[list[str]], edge: bool) -> list[Text]:
        pairs = [(first.sum_of(names), last.sum_of(names)) for names in groups]
        styles = ["bold" if edge else colour(now) for _, now in pairs[:-1]]
        return [*_cells(pairs[:-1], styles), _total(*pairs[-1])]

    table = grid_table(grid, cells)
    if gates:
        groups = [*map(grid.of_kind, grid.kinds), list(last.ranks)]
        means = [_mean_gate(gates, names) for names in groups]
        table.add_row(*(Text(cell, MUTED) for cell in ("gate", *means)))
    parts = caption(records, grid)
    table.caption = Text(f"{' · '.join(parts[:3])}\n{' · '.join(parts[3:])}", MUTED)
    return table


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


def _cells(pairs: Sequence[tuple[int, int]], styles: Sequence[str]) -> list[Text]:
    """`6 -2`, `11 +3` or plain `8` for (start, now), the numbers of a column in line."""
    width = max((len(str(now)) for _, now in pairs), default=0)
    cells = []
    for (start, now), style in zip(pairs, styles, strict=True):
        cell = Text(f"{now:>{width}}", style)
        if now != start:
            cell = Text.assemble(cell, " ", (f"{now - start:+d}", GROWN if now > start else SHRUNK))
        cells.append(cell)
    return cells


def _total(start: int, now: int) -> Text:
    """A kind's total, its move on a second line: side by side they would widen the column."""
    total = Text(str(now), "bold")
    if now == start:
        return total
    return Text.assemble(total, "\n", (f"{now - start:+d}", GROWN if now > start else SHRUNK))


def _mean_gate(gates: Gates, modules: Iterable[str]) -> str:
    values = [value for name in modules for value in gates.get(name, ())]
    return f"{sum(values) / len(values):.2f}" if values else "-"


def history_table(records: Sequence[RankRecord]) -> Table:
    """A row for each record: step, total, pool, budget, and the changes, the largest first."""
    places = layout(records[0].ranks).places()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("step", "total", "pool", "budget"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("changed", overflow="fold")

    ranks = records[0].ranks.values()
    start = f"start: {len(ranks)} modules, {_spread(ranks)}"
    for before, record in zip([None, *records], records, strict=False):
        changed = start if before is None else _in_words(changes(before, record), places)
        numbers = (record.step, record.total, record.pool, record.budget)
        table.add_row(*map(str, numbers), Text(changed))
    return table


def _in_words(moves: Mapping[str, int], places: Mapping[str, str]) -> str:
    """`+3 output.dense 2, -1 query 0 and 4 more`: as many as fit, at least one."""
    if not moves:
        return "nothing moved"
    largest_first = sorted(moves.items(), key=lambda move: -abs(move[1]))
    items = [f"{delta:+d} {places[name]}" for name, delta in largest_first]
    shown = len(items)
    while shown > 1 and len(_listed(items, shown)) > CHANGES_WIDTH:
        shown -= 1
    return _listed(items, shown)


def _listed(items: Sequence[str], shown: int) -> str:
    left = len(items) - shown
    return ", ".join(items[:shown]) + (f" and {left} more" if left else "")
