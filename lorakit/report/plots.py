"""Pictures of a run's ranks: a heat map of where they are, and how they got there, as PNG or self-contained HTML."""

from __future__ import annotations

import base64
import html
import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lorakit.errors import UsageError
from lorakit.report.history import RankRecord
from lorakit.report.layout import Grid, layout, stacked
from lorakit.report.ranks import caption

DPI = 150
COLOUR_MAP = "YlGnBu"
BLANK, INK, FAINT = "#f1f1f1", "#222222", "#d9d9d9"
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
<p><img src="data:image/png;base64,{image}" alt="Ranks by layer and kind of module, and their course over the steps"></p>
<table>
{table}
</table>
</body>
</html>
"""


def plot_ranks(records: Sequence[RankRecord], path: Path, title: str) -> None:
    """Write a picture of `records` to `path`: .png, or .html with the picture and the numbers as a table.

    Raises UsageError for another suffix, and if the file can not be written.
    """
    suffix = path.suffix.lower()
    if suffix not in (".png", ".html"):
        raise UsageError(f"a plot can not be written as `{path.name}`", "Give it a name that ends in .png or .html.")
    image = _png(records, title)
    _write(path, image if suffix == ".png" else _page(records, image, title).encode())


def _write(path: Path, content: bytes) -> None:
    """Write beside `path`, then rename: a reader never sees half a file."""
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.stem}-", delete=False) as file:
            temporary = file.name
            file.write(content)
        # Temporary files are private; a plot gets the rights that any new file gets.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise UsageError(f"`{path}` can not be written: {error.strerror}") from error


# -- the picture -----------------------------------------------------------------------------------------------------


def _png(records: Sequence[RankRecord], title: str) -> bytes:
    grid = layout(records[-1].ranks)
    rows, columns = len(grid.layers), len(grid.kinds)
    # Inches. The left panel grows with the model; the course of the ranks needs no more room for a larger one.
    row_height = 0.34 if rows <= 16 else 0.26 if rows <= 40 else 0.2
    head_height = 0.25 + 0.16 * max(stacked(head).count("\n") for head in grid.heads.values())
    map_height = max(3.6, rows * row_height)
    map_width = max(3.0, 0.8 * columns)
    legend_width = 0.45 + 0.068 * max(map(len, grid.heads.values()))
    course_width, course_height = 5.0, min(map_height, 5.6)
    left = 0.55 + 0.075 * max(map(len, grid.layers))
    gap, top, bottom = 1.5 if len(records) > 1 else 0.9, 0.85 + head_height, 0.6
    width = left + map_width + gap + course_width + legend_width + 0.2
    height = top + max(map_height, course_height) + bottom

    def box(x: float, from_top: float, w: float, h: float) -> tuple[float, float, float, float]:
        return x / width, 1 - (top + from_top + h) / height, w / width, h / height

    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
        canvas = FigureCanvasAgg(figure)
        figure.text(0.15 / width, 1 - 0.3 / height, title, fontsize=13, fontweight="bold", color=INK, va="center")
        figure.text(0.15 / width, 1 - 0.57 / height, " · ".join(caption(records, grid)), fontsize=9, color="#555555", va="center")

        axes = figure.add_axes(box(left, 0, map_width, map_height))
        bar = figure.add_axes(box(left + map_width + 0.12, 0, 0.14, min(map_height, 3.6)))
        _heat_map(axes, bar, grid, records, font=min(8.5, row_height * 30))

        x = left + map_width + gap
        if len(records) == 1:
            bars_height = min(course_height, 0.4 + 0.34 * columns)
            _bars(figure.add_axes(box(x + legend_width, 0, course_width, bars_height)), grid, records[0])
        else:
            means_height = course_height * 0.66
            means = figure.add_axes(box(x, 0, course_width, means_height))
            totals = figure.add_axes(box(x, means_height + 0.4, course_width, course_height - means_height - 0.4), sharex=means)
            _mean_ranks(means, grid, records)
            _totals(totals, records)
        image = io.BytesIO()
        canvas.print_png(image)
    return image.getvalue()


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


def _course(axes: Any, records: Sequence[RankRecord], values: Sequence[float], **style: Any) -> None:
    """A step curve that goes on a little beyond the last record, whose ranks hold from its step on."""
    steps = [float(record.step) for record in records]
    steps.append(steps[-1] + 0.06 * (steps[-1] - steps[0]))
    axes.step(steps, [*values, values[-1]], where="post", linewidth=1.7, **style)


def _mean_ranks(axes: Any, grid: Grid, records: Sequence[RankRecord]) -> None:
    means = {kind: [_mean_rank(grid, kind, record) for record in records] for kind in grid.kinds}
    colours = dict(zip(grid.kinds, _kind_colours(len(grid.kinds)), strict=True))
    # The legend lists the curves as they end, top to bottom.
    for kind in sorted(grid.kinds, key=lambda kind: -means[kind][-1]):
        _course(axes, records, means[kind], color=colours[kind], label=grid.heads[kind])
    axes.set_title("mean rank of each kind of module", fontsize=9.5, loc="left", color=INK)
    _legend(axes)
    axes.margins(x=0.02, y=0.08)
    axes.tick_params(labelbottom=False)
    _quiet(axes)


def _totals(axes: Any, records: Sequence[RankRecord]) -> None:
    """What the ranks cost and what they may cost: two curves that meet when the pool is empty."""
    _course(axes, records, [record.cost for record in records], color="#225ea8", label="cost")
    _course(axes, records, [record.budget for record in records], color="#d95f0e", linestyle="--", label="budget")
    axes.set_ylim(0, 1.15 * max(1, *(max(record.cost, record.budget) for record in records)))
    axes.set_title("cost of the ranks", fontsize=9.5, loc="left", color=INK)
    axes.set_xlabel("step")
    _legend(axes)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
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


def _quiet(axes: Any) -> None:
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, length=2)
    _without_frame(axes)


def _without_frame(axes: Any) -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)


# -- the page --------------------------------------------------------------------------------------------------------


def _page(records: Sequence[RankRecord], image: bytes, title: str) -> str:
    grid = layout(records[-1].ranks)
    return PAGE.format(
        title=html.escape(title),
        caption=html.escape(" · ".join(caption(records, grid))),
        image=base64.b64encode(image).decode(),
        table=_html_table(records, grid),
    )


def _html_table(records: Sequence[RankRecord], grid: Grid) -> str:
    first, last = records[0], records[-1]

    def cell(modules: list[str]) -> str:
        if not modules:
            return "<td></td>"
        now = sum(last.ranks[name] for name in modules)
        delta = now - sum(first.ranks[name] for name in modules)
        move = f' <span class="{"up" if delta > 0 else "down"}">{delta:+d}</span>' if delta else ""
        return f"<td>{now}{move}</td>"

    def row(label: str, cells: list[str]) -> str:
        return f'<tr><th scope="row">{html.escape(label)}</th>{"".join(cells)}</tr>'

    heads = "".join(f'<th scope="col" title="{html.escape(kind)}">{html.escape(grid.heads[kind])}</th>' for kind in grid.kinds)
    body = [
        row(layer, [cell(grid.cells.get((layer, kind), [])) for kind in grid.kinds] + [cell(grid.of_layer(layer))])
        for layer in grid.layers
    ]
    foot = row("total", [cell(grid.of_kind(kind)) for kind in grid.kinds] + [cell(list(last.ranks))])
    return "\n".join(
        [
            f'<thead><tr><th scope="col">layer</th>{heads}<th scope="col">total</th></tr></thead>',
            "<tbody>",
            *body,
            "</tbody>",
            f"<tfoot>{foot}</tfoot>",
        ]
    )
