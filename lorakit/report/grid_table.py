"""A table of terminals for values of modules: layers down, kinds across, totals at the edges."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from lorakit.report.layout import Grid, stacked

# Five shares of the largest value, low to high: each has a contrast of at least 4 against black
# and against white, and is a colour of its own on a terminal that has only sixteen.
SHARE_COLOURS = ("#3a70d0", "#0f8080", "#2d8500", "#a86a00", "#d03a3a")
MUTED = "#767676"

# With more columns than this there is one blank between them, not two.
ROOMY_COLUMNS = 7

# The words of tables and pictures; a line each under those that use them.
MEANINGS = {
    "budget": "most that all ranks may cost: 1 each, or in + out (budget.unit: params)",
    "cost": "what all ranks cost of the budget",
    "pool": "part of the budget that is free, for modules that use all they have",
    "gate": "mean gate of the components: 1 is open; one that has closed is pruned",
}

# Cells of one column, top to bottom, from the modules of each; told if the column is the last.
Column = Callable[[Sequence[list[str]], bool], list[Text]]


def meanings(*words: str) -> Text:
    """A line for each of `words`, which the table above uses."""
    width = max(map(len, words))
    return Text("\n".join(f"{word:{width}}  {MEANINGS[word]}" for word in words), MUTED)


def grid_table(
    grid: Grid,
    column: Column,
    overall: str = "total",
    roomy: int = ROOMY_COLUMNS,
) -> Table:
    """The table. overall: the name of its last row and column.

    Up to `roomy` kinds, two blanks part the columns.
    """
    padding = (0, 1, 0, 0) if len(grid.kinds) <= roomy else 0
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=padding,
        caption_justify="left",
    )
    table.add_column("layer", no_wrap=True)
    columns = _columns(grid, column)
    for kind, cells in zip(grid.kinds, columns, strict=False):
        # Where room is short, the head breaks, never a number.
        widest = max(line.cell_len for cell in cells for line in cell.split())
        table.add_column(Text(stacked(grid.heads[kind])), overflow="fold", min_width=widest)
    table.add_column(overall, no_wrap=True)
    *rows, last = zip(*columns, strict=True)
    for layer, row in zip(grid.layers, rows, strict=True):
        table.add_row(Text(layer), *row)
    table.add_section()
    table.add_row(Text(overall, "bold"), *last)
    return table


def _columns(grid: Grid, column: Column) -> list[list[Text]]:
    """Cells of each kind, then those of all kinds; each with its total at the end."""
    columns = []
    for kind in grid.kinds:
        modules = {layer: grid.cells.get((layer, kind)) for layer in grid.layers}
        there = {layer: names for layer, names in modules.items() if names is not None}
        *body, foot = column([*there.values(), grid.of_kind(kind)], False)
        cells = dict(zip(there, body, strict=True))
        columns.append([*(cells.get(layer, Text("")) for layer in grid.layers), foot])
    everything = [name for names in grid.cells.values() for name in names]
    return [*columns, column([*map(grid.of_layer, grid.layers), everything], True)]


def colouring(values: Iterable[float]) -> Callable[[float], str]:
    """The colour of each of `values`, by its share of the largest; none where all are the same."""
    found = list(values)
    lowest, highest = min(found, default=0), max(found, default=0)

    def colour(value: float) -> str:
        if lowest == highest:
            return ""
        if value == 0:
            return MUTED
        place = int(value / highest * len(SHARE_COLOURS))
        return SHARE_COLOURS[min(place, len(SHARE_COLOURS) - 1)]

    return colour
