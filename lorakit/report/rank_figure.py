"""The picture of a run: where its ranks are on the left, how they got there on the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from lorakit.report import panels
from lorakit.report.history import RankRecord
from lorakit.report.layout import Grid, layout, stacked
from lorakit.report.ranks import caption
from lorakit.report.sparsity import sparsity

DPI = 150
# Text is drawn as it is: a `$` in a module's name starts no formula.
STYLE = {"text.parse_math": False, "font.size": 9.0, "font.family": "DejaVu Sans"}
# Inches.
COURSE_WIDTH, COURSE_HEIGHT = 5.0, 5.6
DENSITY_HEIGHT = 1.3
BOTTOM, RIGHT = 0.6, 0.2

Box = tuple[float, float, float, float]


def figure(
    records: Sequence[RankRecord],
    title: str,
    result: Mapping[str, Any] | None,
    densities: Mapping[int, float],
) -> Figure:
    """Heat map of the ranks beside the courses of ranks and density, or bars if no rank moved."""
    grid, moved = layout(records[-1].ranks), len(records) > 1
    sizes = Sizes(grid, moved, bool(densities))
    drawn = Figure(figsize=(sizes.width, sizes.height), dpi=DPI, facecolor="white")
    _headline(drawn, sizes, 0.3, title, fontsize=13, fontweight="bold", color=panels.INK)
    below = subtitle(records, grid, result)
    _headline(drawn, sizes, 0.57, below, fontsize=9, color="#555555")
    axes = drawn.add_axes(sizes.box(sizes.left, 0, sizes.map_width, sizes.map_height))
    beside = sizes.left + sizes.map_width + 0.12
    bar = drawn.add_axes(sizes.box(beside, 0, 0.14, min(sizes.map_height, 3.6)))
    panels.heat_map(axes, bar, grid, records, font=min(8.5, sizes.row_height * 30))
    right = _courses if moved else _bars
    right(drawn, sizes, grid, records, result, densities)
    return drawn


@dataclass
class Sizes:
    """Sizes in inches. The left panel grows with the model; the right one needs no more room."""

    grid: Grid
    moved: bool
    density: bool  # there is one to draw

    def __post_init__(self) -> None:
        grid = self.grid
        rows, columns = len(grid.layers), len(grid.kinds)
        self.row_height = 0.34 if rows <= 16 else 0.26 if rows <= 40 else 0.2
        self.map_height = max(3.6, rows * self.row_height)
        self.map_width = max(3.0, 0.8 * columns)
        self.legend_width = 0.45 + 0.068 * max(map(len, grid.heads.values()))
        self.course_height = min(self.map_height, COURSE_HEIGHT)
        self.bars_height = min(self.course_height, 0.4 + 0.34 * columns)
        self.left = 0.55 + 0.075 * max(map(len, grid.layers))
        self.right = self.left + self.map_width + (1.5 if self.moved else 0.9)
        lines = max(stacked(head).count("\n") for head in grid.heads.values())
        self.top = 0.85 + (0.25 + 0.16 * lines)
        # The gap parts the density from its neighbour.
        gap = 0.4 if self.moved else 0.85
        self.density_height = DENSITY_HEIGHT + gap if self.density else 0.0
        self.width = self.right + COURSE_WIDTH + self.legend_width + RIGHT
        right_height = self.course_height if self.moved else self.bars_height
        right_height += self.density_height
        self.height = self.top + max(self.map_height, self.course_height, right_height) + BOTTOM

    def box(self, x: float, from_top: float, width: float, height: float) -> Box:
        """A place in the picture, as shares of it."""
        bottom = 1 - (self.top + from_top + height) / self.height
        return x / self.width, bottom, width / self.width, height / self.height


def _headline(drawn: Figure, sizes: Sizes, down: float, text: str, **style: Any) -> None:
    drawn.text(0.15 / sizes.width, 1 - down / sizes.height, text, va="center", **style)


def _courses(
    drawn: Figure,
    sizes: Sizes,
    grid: Grid,
    records: Sequence[RankRecord],
    result: Mapping[str, Any] | None,
    densities: Mapping[int, float],
) -> None:
    """Mean ranks, costs and density over the steps."""
    x, height = sizes.right, sizes.course_height
    end = max(densities, default=0)
    means_height = height * 0.66
    means = drawn.add_axes(sizes.box(x, 0, COURSE_WIDTH, means_height))
    below = sizes.box(x, means_height + 0.4, COURSE_WIDTH, height - means_height - 0.4)
    totals = drawn.add_axes(below, sharex=means)
    panels.mean_ranks(means, grid, records, end)
    panels.totals(totals, records, end)
    if densities:
        panels.steps_are_below(totals)
        place = sizes.box(x, height + 0.4, COURSE_WIDTH, DENSITY_HEIGHT)
        panels.densities(drawn.add_axes(place, sharex=means), densities, result is not None)


def _bars(
    drawn: Figure,
    sizes: Sizes,
    grid: Grid,
    records: Sequence[RankRecord],
    result: Mapping[str, Any] | None,
    densities: Mapping[int, float],
) -> None:
    """Density over the steps, and bars for the kinds of modules, whose names are on their left."""
    x, y, height = sizes.right + sizes.legend_width, sizes.density_height, sizes.bars_height
    if densities:
        place = sizes.box(x, 0, COURSE_WIDTH, DENSITY_HEIGHT)
        panels.densities(drawn.add_axes(place), densities, result is not None)
    sparse, half = sparsity(records, result), (COURSE_WIDTH - 0.9) / 2
    if sparse is None:
        panels.bars(drawn.add_axes(sizes.box(x, y, COURSE_WIDTH, height)), grid, records[0])
    else:
        shares = drawn.add_axes(sizes.box(x, y, half, height))
        ranks = drawn.add_axes(sizes.box(x + half + 0.45, y, half, height))
        panels.sparse_bars(shares, ranks, sparse, records[0])


def subtitle(records: Sequence[RankRecord], grid: Grid, result: Mapping[str, Any] | None) -> str:
    """The caption of the ranks, with the densities that result.json has."""
    parts = caption(records, grid)
    if (sparse := sparsity(records, result)) is not None:
        parts.append(f"density {sparse.density:.3g}")
    if result is not None and result.get("base_density"):
        parts.append(f"base density {result['base_density']['total']:.3g}")
    return " · ".join(parts)
