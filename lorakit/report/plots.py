"""Pictures of a run: a heat map of where its ranks are, how they and the density got there, as PNG or self-contained HTML."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lorakit.errors import UsageError
from lorakit.files import write_bytes
from lorakit.report.history import RankRecord
from lorakit.report.layout import Grid, layout, stacked
from lorakit.report.ranks import caption, meanings
from lorakit.report.sparsity import EFFECTIVE_RANKS, Sparsity, base_line, sparsity

DPI = 150
COLOUR_MAP = "YlGnBu"
BLANK, INK, FAINT = "#f1f1f1", "#222222", "#d9d9d9"
DENSITY_HEIGHT, DENSITY_COLOUR = 1.3, "#5b3a91"  # inches
# Text is drawn as it is: a `$` in a module's name starts no formula.
STYLE = {"text.parse_math": False, "font.size": 9.0, "font.family": "DejaVu Sans"}

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; color: #222; background: #fff; margin: 2rem auto; max-width: 72rem }}
img {{ max-width: 100%; height: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .2rem .6rem; text-align: right }}
thead th {{ border-bottom: 1px solid #999 }}
tfoot td, tfoot th {{ border-top: 1px solid #999; font-weight: 600 }}
.up {{ color: #2c7a2c }} .down {{ color: #b53333 }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{caption}</p>
<p><small>{meanings}</small></p>
<p><img src="data:image/png;base64,{image}" alt="Ranks by layer and kind of module, and their course over the steps"></p>
{tables}
</body>
</html>
"""


def plot_ranks(
    records: Sequence[RankRecord],
    path: Path,
    title: str,
    result: Mapping[str, Any] | None = None,
    densities: Mapping[int, float] | None = None,
) -> None:
    """Write a picture of `records` to `path`: .png, or .html with the picture and the numbers as tables.

    `result` is result.json, None for a run that is still going; `densities` {step: density of the factors after it}.
    Raises UsageError for another suffix, and if the file can not be written.
    """
    suffix = path.suffix.lower()
    if suffix not in (".png", ".html"):
        raise UsageError(f"a plot can not be written as `{path.name}`", "Give it a name that ends in .png or .html.")
    image = _png(records, title, result, densities or {})
    save_plot(path, image if suffix == ".png" else _page(records, image, title, result).encode())


def save_plot(path: Path, content: bytes) -> None:
    """Write a picture or a page. Raises UsageError if it can not be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
    except OSError as error:
        raise UsageError(f"`{path}` can not be written: {error.strerror}") from error


# -- the picture -----------------------------------------------------------------------------------------------------


def _png(records: Sequence[RankRecord], title: str, result: Mapping[str, Any] | None, densities: Mapping[int, float]) -> bytes:
    image = io.BytesIO()
    with rc_context(STYLE):
        FigureCanvasAgg(_figure(records, title, result, densities)).print_png(image)
    return image.getvalue()


def _figure(
    records: Sequence[RankRecord], title: str, result: Mapping[str, Any] | None, densities: Mapping[int, float]
) -> Figure:
    """The heat map on the left; on the right the courses of ranks and density, and bars where no rank ever moved."""
    grid, sparse, moved = layout(records[-1].ranks), sparsity(records, result), len(records) > 1
    rows, columns = len(grid.layers), len(grid.kinds)
    # Inches. The left panel grows with the model; the course of the ranks needs no more room for a larger one.
    row_height = 0.34 if rows <= 16 else 0.26 if rows <= 40 else 0.2
    head_height = 0.25 + 0.16 * max(stacked(head).count("\n") for head in grid.heads.values())
    map_height = max(3.6, rows * row_height)
    map_width = max(3.0, 0.8 * columns)
    legend_width = 0.45 + 0.068 * max(map(len, grid.heads.values()))
    course_width, course_height = 5.0, min(map_height, 5.6)
    left = 0.55 + 0.075 * max(map(len, grid.layers))
    bars_height = 0.4 + 0.34 * columns
    density_height = (DENSITY_HEIGHT + (0.4 if moved else 0.85)) if densities else 0.0  # and what parts it from its neighbour
    gap, top, bottom = 1.5 if moved else 0.9, 0.85 + head_height, 0.6
    width = left + map_width + gap + course_width + legend_width + 0.2
    right_height = (course_height if moved else min(course_height, bars_height)) + density_height
    height = top + max(map_height, course_height, right_height) + bottom

    def box(x: float, from_top: float, w: float, h: float) -> tuple[float, float, float, float]:
        return x / width, 1 - (top + from_top + h) / height, w / width, h / height

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    figure.text(0.15 / width, 1 - 0.3 / height, title, fontsize=13, fontweight="bold", color=INK, va="center")
    figure.text(0.15 / width, 1 - 0.57 / height, _subtitle(records, grid, result), fontsize=9, color="#555555", va="center")

    axes = figure.add_axes(box(left, 0, map_width, map_height))
    bar = figure.add_axes(box(left + map_width + 0.12, 0, 0.14, min(map_height, 3.6)))
    _heat_map(axes, bar, grid, records, font=min(8.5, row_height * 30))

    x = left + map_width + gap
    if moved:
        means_height, end = course_height * 0.66, max(densities, default=0)
        means = figure.add_axes(box(x, 0, course_width, means_height))
        totals = figure.add_axes(box(x, means_height + 0.4, course_width, course_height - means_height - 0.4), sharex=means)
        _mean_ranks(means, grid, records, end)
        _totals(totals, records, end)
        if densities:
            _above(totals)
            place = box(x, course_height + 0.4, course_width, DENSITY_HEIGHT)
            _densities(figure.add_axes(place, sharex=means), densities, result is not None)
    else:
        # The names of the kinds are on the left of the bars.
        x += legend_width
        if densities:
            _densities(figure.add_axes(box(x, 0, course_width, DENSITY_HEIGHT)), densities, result is not None)
        rest, half = min(course_height, bars_height), (course_width - 0.9) / 2
        if sparse is None:
            _bars(figure.add_axes(box(x, density_height, course_width, rest)), grid, records[0])
        else:
            shares = figure.add_axes(box(x, density_height, half, rest))
            ranks = figure.add_axes(box(x + half + 0.45, density_height, half, rest))
            _sparse_bars(shares, ranks, sparse, records[0])
    return figure


def _subtitle(records: Sequence[RankRecord], grid: Grid, result: Mapping[str, Any] | None) -> str:
    """The caption of the ranks, with the densities that result.json has."""
    parts = caption(records, grid)
    if (sparse := sparsity(records, result)) is not None:
        parts.append(f"density {sparse.density:.3g}")
    if result is not None and result.get("base_density"):
        parts.append(f"base density {result['base_density']['total']:.3g}")
    return " · ".join(parts)


def _heat_map(axes: Any, bar: Any, grid: Grid, records: Sequence[RankRecord], font: float) -> None:
    """The newest rank of every module, with its move since the start in each cell that moved."""
    first, last = records[0], records[-1]
    ranks = np.full((len(grid.layers), len(grid.kinds)), np.nan)
    for i, layer in enumerate(grid.layers):
        for j, kind in enumerate(grid.kinds):
            rank = grid.rank(last, layer, kind)
            if rank is not None:
                ranks[i, j] = rank
    colours = colormaps[COLOUR_MAP].with_extremes(bad=BLANK)
    # From 0, so that a colour means the same share of the largest rank in every picture.
    highest = max(float(np.nanmax(ranks)), 1.0)
    constant = bool(np.nanmin(ranks) == np.nanmax(ranks))
    if constant:
        # One rank everywhere has no scale to read: a light colour, and no bar.
        bar.set_visible(False)
        highest *= 3
    image = axes.imshow(ranks, cmap=colours, vmin=0, vmax=highest, aspect="auto", interpolation="nearest")
    for i, layer in enumerate(grid.layers):
        for j, kind in enumerate(grid.kinds):
            now, before = grid.rank(last, layer, kind), grid.rank(first, layer, kind)
            if now is None or before is None:
                continue
            label = f"{now}" if now == before else f"{now} ({now - before:+d})"
            ink = "white" if _luminance(colours(now / highest)) < 0.2 else INK
            axes.text(j, i, label, ha="center", va="center", fontsize=font, color=ink)

    axes.set_xticks(range(len(grid.kinds)), [stacked(grid.heads[kind]) for kind in grid.kinds], fontsize=8)
    axes.set_yticks(range(len(grid.layers)), grid.layers, fontsize=min(8.5, font + 0.5))
    axes.xaxis.tick_top()
    axes.set_ylabel("layer")
    axes.tick_params(length=0)
    # White lines between the cells, so that neighbours of one colour stay apart.
    axes.set_xticks(np.arange(0.5, len(grid.kinds) - 1), minor=True)
    axes.set_yticks(np.arange(0.5, len(grid.layers) - 1), minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)
    _without_frame(axes)
    if not constant:
        colour_bar = bar.figure.colorbar(image, cax=bar, ticks=MaxNLocator(nbins=8, integer=True))
        colour_bar.set_label("rank", fontsize=8)
        colour_bar.ax.tick_params(labelsize=7.5, length=2)
        colour_bar.outline.set_visible(False)


def _luminance(colour: Sequence[float]) -> float:
    """The relative luminance (WCAG) of a colour [r, g, b, a] in 0 … 1."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _kind_colours(count: int) -> Any:
    """A colour [r, g, b, a] for each of `count` kinds; they repeat after twenty."""
    return colormaps["tab10"](np.arange(count)) if count <= 10 else colormaps["tab20"](np.arange(count) % 20)


def _mean_rank(grid: Grid, kind: str, record: RankRecord) -> float:
    modules = grid.of_kind(kind)
    return sum(record.ranks[name] for name in modules) / len(modules)


def _course(axes: Any, records: Sequence[RankRecord], values: Sequence[float], end: float, **style: Any) -> None:
    """A step curve that goes on to the step `end`, or a little beyond the last record, whose ranks hold from its step on."""
    steps = [float(record.step) for record in records]
    steps.append(max(end, steps[-1] + 0.06 * (steps[-1] - steps[0])))
    axes.step(steps, [*values, values[-1]], where="post", linewidth=1.7, **style)


def _mean_ranks(axes: Any, grid: Grid, records: Sequence[RankRecord], end: float) -> None:
    means = {kind: [_mean_rank(grid, kind, record) for record in records] for kind in grid.kinds}
    colours = dict(zip(grid.kinds, _kind_colours(len(grid.kinds)), strict=True))
    # The legend lists the curves as they end, top to bottom.
    for kind in sorted(grid.kinds, key=lambda kind: -means[kind][-1]):
        _course(axes, records, means[kind], end, color=colours[kind], label=grid.heads[kind])
    axes.set_title("mean rank of each kind of module", fontsize=9.5, loc="left", color=INK)
    _legend(axes)
    axes.margins(x=0.02, y=0.08)
    _above(axes)
    _quiet(axes)


def _totals(axes: Any, records: Sequence[RankRecord], end: float) -> None:
    """Plot of what the ranks cost and of what they may cost: two curves that meet when the pool is empty."""
    _course(axes, records, [record.cost for record in records], end, color="#225ea8", label="cost")
    _course(axes, records, [record.budget for record in records], end, color="#d95f0e", linestyle="--", label="budget")
    axes.set_ylim(0, 1.15 * max(1, *(max(record.cost, record.budget) for record in records)))
    axes.set_title(
        "cost of the ranks (1 each, or in + out), and the budget for it; between them: the pool",
        fontsize=8.5,
        loc="left",
        color=INK,
    )
    axes.set_xlabel("step")
    _legend(axes)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    _quiet(axes)


def _above(axes: Any) -> None:
    """Another course with the same steps comes below: it has their numbers."""
    axes.tick_params(labelbottom=False)
    axes.set_xlabel("")


def _densities(axes: Any, densities: Mapping[int, float], finished: bool) -> None:
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


def _legend(axes: Any) -> None:
    """Beside the axes, where it hides no curve."""
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.03), handlelength=1.4)


def _bars(axes: Any, grid: Grid, record: RankRecord) -> None:
    """For a run without a change: there is no course to draw, but a mean for each kind."""
    means = [_mean_rank(grid, kind, record) for kind in grid.kinds]
    bars = axes.barh(range(len(means)), means, color="#7fb8d6", height=0.62)
    axes.bar_label(bars, fmt="{:.3g}", padding=3, fontsize=8)
    axes.set_yticks(range(len(means)), [grid.heads[kind] for kind in grid.kinds], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(1.0, *means))
    axes.set_title(f"mean rank of each kind of module (no change since step {record.step})", fontsize=9.5, loc="left", color=INK)
    _quiet(axes)
    axes.grid(visible=False, axis="y")


def _sparse_bars(shares: Any, ranks: Any, sparse: Sparsity, record: RankRecord) -> None:
    """For sparse factors whose ranks never moved: the share of non-zeros and the effective rank, a bar a kind of module, the
    number beside it, and a dot a module."""
    grid = sparse.grid
    groups = [grid.of_kind(kind) for kind in grid.kinds]

    def draw(axes: Any, value: Callable[[list[str]], float], form: str, highest: float) -> None:
        dots = [(value([name]), at) for at, names in enumerate(groups) for name in names]
        axes.barh(range(len(groups)), [value(names) for names in groups], color="#7fb8d6", height=0.62)
        axes.scatter(*zip(*dots, strict=True), s=7, color=INK, alpha=0.55, linewidths=0, zorder=3, clip_on=False)
        for at, names in enumerate(groups):
            label = format(value(names), form)
            axes.text(1.03, at, label, transform=axes.get_yaxis_transform(), va="center", fontsize=8, color=INK)
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


def _quiet(axes: Any) -> None:
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, length=2)
    _without_frame(axes)


def _without_frame(axes: Any) -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)


# -- the page --------------------------------------------------------------------------------------------------------


def _page(records: Sequence[RankRecord], image: bytes, title: str, result: Mapping[str, Any] | None) -> str:
    first, last = records[0], records[-1]
    grid, sparse = layout(last.ranks), sparsity(records, result)

    def rank(modules: list[str]) -> str:
        now = sum(last.ranks[name] for name in modules)
        delta = now - sum(first.ranks[name] for name in modules)
        return f"{now}" + (f' <span class="{"up" if delta > 0 else "down"}">{delta:+d}</span>' if delta else "")

    def nonzeros(modules: list[str]) -> str:
        assert sparse is not None
        share = sparse.share(modules)
        return f"{sparse.count(modules):,}" + ("" if share is None else f" <small>{100 * share:.3g}&nbsp;%</small>")

    def effective_rank(modules: list[str]) -> str:
        assert sparse is not None
        return f"{sparse.effective_rank(modules):.2f}"

    tables = [_html_table(grid, rank)]
    if sparse is not None:
        tables += [f"<h2>{html.escape(sparse.what)}</h2>", _html_table(sparse.grid, nonzeros)]
        tables += [f"<h2>{EFFECTIVE_RANKS}</h2>", _html_table(sparse.grid, effective_rank, "mean")]
    if result is not None and result.get("base_density"):
        tables.append(f"<p>{html.escape(base_line(result['base_density'], grid))}</p>")
    return PAGE.format(
        title=html.escape(title),
        caption=html.escape(_subtitle(records, grid, result)),
        meanings="<br>".join(html.escape(line) for line in meanings("budget", "cost", "pool").plain.splitlines()),
        image=base64.b64encode(image).decode(),
        tables="\n".join(tables),
    )


def _html_table(grid: Grid, text: Callable[[list[str]], str], whole: str = "total") -> str:
    """Layers down, kinds across; `text` is the HTML for the modules that a cell stands for."""

    def row(label: str, cells: list[list[str]]) -> str:
        filled = "".join(f"<td>{text(modules) if modules else ''}</td>" for modules in cells)
        return f'<tr><th scope="row">{html.escape(label)}</th>{filled}</tr>'

    heads = "".join(f'<th scope="col" title="{html.escape(kind)}">{html.escape(grid.heads[kind])}</th>' for kind in grid.kinds)
    body = [
        row(layer, [*(grid.cells.get((layer, kind), []) for kind in grid.kinds), grid.of_layer(layer)]) for layer in grid.layers
    ]
    everything = [name for names in grid.cells.values() for name in names]
    foot = row(whole, [*map(grid.of_kind, grid.kinds), everything])
    return "\n".join(
        [
            "<table>",
            f'<thead><tr><th scope="col">layer</th>{heads}<th scope="col">{whole}</th></tr></thead>',
            "<tbody>",
            *body,
            "</tbody>",
            f"<tfoot>{foot}</tfoot>",
            "</table>",
        ]
    )
