"""Panels of the picture of a run: each function draws one into the axes that it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lorakit.report.history import RankRecord
from lorakit.report.layout import Grid, stacked
from lorakit.report.sparsity import Sparsity

COLOUR_MAP = "YlGnBu"
BLANK, INK, FAINT = "#f1f1f1", "#222222", "#d9d9d9"
BAR_COLOUR, DENSITY_COLOUR = "#7fb8d6", "#5b3a91"


# -- ranks by layer and kind -----------------------------------------------------------------------


def heat_map(axes: Any, bar: Any, grid: Grid, records: Sequence[RankRecord], font: float) -> None:
    """The newest rank of every module, with its move since the start in each cell that moved."""
    ranks = _rank_matrix(grid, records[-1])
    colours = colormaps[COLOUR_MAP].with_extremes(bad=BLANK)
    # From 0, so that a colour means the same share of the largest rank in every picture.
    highest = max(float(np.nanmax(ranks)), 1.0)
    constant = bool(np.nanmin(ranks) == np.nanmax(ranks))
    if constant:
        # One rank everywhere has no scale to read: a light colour, and no bar.
        bar.set_visible(False)
        highest *= 3
    scale = {"cmap": colours, "vmin": 0, "vmax": highest}
    image = axes.imshow(ranks, aspect="auto", interpolation="nearest", **scale)
    _cell_labels(axes, grid, records, lambda rank: colours(rank / highest), font)
    _layers_and_kinds(axes, grid, font)
    if not constant:
        colour_bar = bar.figure.colorbar(image, cax=bar, ticks=MaxNLocator(nbins=8, integer=True))
        colour_bar.set_label("rank", fontsize=8)
        colour_bar.ax.tick_params(labelsize=7.5, length=2)
        colour_bar.outline.set_visible(False)


def _rank_matrix(grid: Grid, record: RankRecord) -> NDArray[np.float64]:
    """The ranks [layers, kinds], NaN where the model has no such module."""
    ranks = [[grid.rank(record, layer, kind) for kind in grid.kinds] for layer in grid.layers]
    return np.array(ranks, dtype=float)  # None becomes NaN


def _cell_labels(
    axes: Any,
    grid: Grid,
    records: Sequence[RankRecord],
    colour: Callable[[int], Sequence[float]],
    font: float,
) -> None:
    """The rank in each cell, and how it moved; in white on a dark colour."""
    first, last = records[0], records[-1]
    for i, layer in enumerate(grid.layers):
        for j, kind in enumerate(grid.kinds):
            now, before = grid.rank(last, layer, kind), grid.rank(first, layer, kind)
            if now is None or before is None:
                continue
            label = f"{now}" if now == before else f"{now} ({now - before:+d})"
            ink = "white" if _luminance(colour(now)) < 0.2 else INK
            axes.text(j, i, label, ha="center", va="center", fontsize=font, color=ink)


def _layers_and_kinds(axes: Any, grid: Grid, font: float) -> None:
    """Names of the rows and columns of the heat map, and white lines between its cells."""
    heads = [stacked(grid.heads[kind]) for kind in grid.kinds]
    axes.set_xticks(range(len(grid.kinds)), heads, fontsize=8)
    axes.set_yticks(range(len(grid.layers)), grid.layers, fontsize=min(8.5, font + 0.5))
    axes.xaxis.tick_top()
    axes.set_ylabel("layer")
    axes.tick_params(length=0)
    # Neighbours of one colour stay apart.
    axes.set_xticks(np.arange(0.5, len(grid.kinds) - 1), minor=True)
    axes.set_yticks(np.arange(0.5, len(grid.layers) - 1), minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)
    _without_frame(axes)


def _luminance(colour: Sequence[float]) -> float:
    """The relative luminance (WCAG) of a colour [r, g, b, a] in 0 … 1."""

    def linear(c: float) -> float:
        return c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4

    red, green, blue = map(linear, colour[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


# -- over the steps -------------------------------------------------------------------------------


def mean_ranks(axes: Any, grid: Grid, records: Sequence[RankRecord], end: float) -> None:
    """The mean rank of each kind of module, a curve each."""
    means = {kind: [_mean_rank(grid, kind, record) for record in records] for kind in grid.kinds}
    colours = dict(zip(grid.kinds, _kind_colours(len(grid.kinds)), strict=True))
    # The legend lists the curves as they end, top to bottom.
    for kind in sorted(grid.kinds, key=lambda kind: -means[kind][-1]):
        _course(axes, records, means[kind], end, color=colours[kind], label=grid.heads[kind])
    axes.set_title("mean rank of each kind of module", fontsize=9.5, loc="left", color=INK)
    _legend(axes)
    axes.margins(x=0.02, y=0.08)
    steps_are_below(axes)
    _quiet(axes)


def _kind_colours(count: int) -> Any:
    """A colour [r, g, b, a] for each of `count` kinds; they repeat after twenty."""
    if count <= 10:
        return colormaps["tab10"](np.arange(count))
    return colormaps["tab20"](np.arange(count) % 20)


def totals(axes: Any, records: Sequence[RankRecord], end: float) -> None:
    """The cost of all ranks and their budget: two curves that meet where the pool is empty."""
    costs, budgets = [record.cost for record in records], [record.budget for record in records]
    _course(axes, records, costs, end, color="#225ea8", label="cost")
    _course(axes, records, budgets, end, color="#d95f0e", linestyle="--", label="budget")
    axes.set_ylim(0, 1.15 * max(1, *costs, *budgets))
    title = "cost of the ranks (1 each, or in + out), and the budget for it; between them: the pool"
    axes.set_title(title, fontsize=8.5, loc="left", color=INK)
    axes.set_xlabel("step")
    _legend(axes)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    _quiet(axes)


def _course(
    axes: Any,
    records: Sequence[RankRecord],
    values: Sequence[float],
    end: float,
    **style: Any,
) -> None:
    """A step curve that goes on to the step `end`, or a little beyond the last record.

    The ranks of a record hold from its step on.
    """
    steps = [float(record.step) for record in records]
    steps.append(max(end, steps[-1] + 0.06 * (steps[-1] - steps[0])))
    axes.step(steps, [*values, values[-1]], where="post", linewidth=1.7, **style)


def _legend(axes: Any) -> None:
    """Draw the legend beside the axes, where it hides no curve."""
    place = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.03)}
    axes.legend(fontsize=8, frameon=False, handlelength=1.4, **place)


def steps_are_below(axes: Any) -> None:
    """Leave the numbers of the steps to the panel below, which has the same steps."""
    axes.tick_params(labelbottom=False)
    axes.set_xlabel("")


def densities(axes: Any, densities: Mapping[int, float], finished: bool) -> None:
    """The density of the factors, from 0 to 1, with its value at the end."""
    steps, values = list(densities), list(densities.values())
    axes.step(steps, values, where="post", linewidth=1.7, color=DENSITY_COLOUR)
    axes.fill_between(steps, values, step="post", color=DENSITY_COLOUR, alpha=0.15, linewidth=0)
    axes.plot(steps[-1], values[-1], "o", markersize=3.5, color=DENSITY_COLOUR)
    label = f"{values[-1]:.3g}" + ("" if finished else " so far")
    # The curve comes from above: below its end there is room, down to the axis.
    offset, side = (-5, "top") if values[-1] > 0.25 else (5, "bottom")
    place = {"xytext": (0, offset), "textcoords": "offset points", "va": side, "ha": "right"}
    axes.annotate(label, (steps[-1], values[-1]), fontsize=9, fontweight="bold", color=INK, **place)
    axes.set_ylim(0, 1.05)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.margins(x=0.02)
    axes.set_title("density of the factors", fontsize=9.5, loc="left", color=INK)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    _quiet(axes)


# -- by kind, where no rank ever moved -------------------------------------------------------------


def bars(axes: Any, grid: Grid, record: RankRecord) -> None:
    """The mean rank of each kind of module, for a run whose ranks never moved."""
    means = [_mean_rank(grid, kind, record) for kind in grid.kinds]
    bars = axes.barh(range(len(means)), means, color=BAR_COLOUR, height=0.62)
    axes.bar_label(bars, fmt="{:.3g}", padding=3, fontsize=8)
    axes.set_yticks(range(len(means)), [grid.heads[kind] for kind in grid.kinds], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(1.0, *means))
    title = f"mean rank of each kind of module (no change since step {record.step})"
    axes.set_title(title, fontsize=9.5, loc="left", color=INK)
    _quiet(axes)
    axes.grid(visible=False, axis="y")


def _mean_rank(grid: Grid, kind: str, record: RankRecord) -> float:
    modules = grid.of_kind(kind)
    return record.sum_of(modules) / len(modules)


def sparse_bars(shares: Any, ranks: Any, sparse: Sparsity, record: RankRecord) -> None:
    """The share of non-zeros and the effective rank, for sparse factors whose ranks never moved.

    A bar for each kind of module with its number beside it, and a dot for each module.
    """
    grid = sparse.grid
    groups = [grid.of_kind(kind) for kind in grid.kinds]

    def draw(axes: Any, value: Callable[[list[str]], float], form: str, highest: float) -> None:
        dots = [(value([name]), at) for at, names in enumerate(groups) for name in names]
        values = [value(names) for names in groups]
        axes.barh(range(len(groups)), values, color=BAR_COLOUR, height=0.62)
        style = {"color": INK, "alpha": 0.55, "linewidths": 0}
        axes.scatter(*zip(*dots, strict=True), s=7, zorder=3, clip_on=False, **style)
        for at, height in enumerate(values):
            label = format(height, form)
            beside = axes.get_yaxis_transform()
            axes.text(1.03, at, label, transform=beside, va="center", fontsize=8, color=INK)
        axes.set_xlim(0, highest)
        axes.set_xlabel("dots: modules", fontsize=8)
        axes.invert_yaxis()
        _quiet(axes)
        axes.grid(visible=False, axis="y")

    draw(shares, lambda names: sparse.share(names) or 0.0, ".0%", 1.0)
    draw(ranks, sparse.effective_rank, ".1f", max(1.0, *record.ranks.values()))
    shares.set_title("share of non-zeros", fontsize=9.5, loc="left", color=INK)
    ranks.set_title("effective rank of B A", fontsize=9.5, loc="left", color=INK)
    shares.set_yticks(range(len(groups)), [grid.heads[kind] for kind in grid.kinds])
    ranks.set_yticks([])


# -- style -----------------------------------------------------------------------------------------


def _quiet(axes: Any) -> None:
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, length=2)
    _without_frame(axes)


def _without_frame(axes: Any) -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)
