"""A picture of finished runs side by side: quality against adapter size and time, and losses."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lorakit.report.comparison import COSTS, Comparison, Group
from lorakit.report.comparison_tables import BEST, HEADS, shown
from lorakit.report.history import Line
from lorakit.report.panels import FAINT, INK
from lorakit.report.plots import save_figure
from lorakit.report.rank_figure import DPI
from lorakit.report.rank_page import PAGE
from lorakit.training.spec import LOWER_IS_BETTER

MARKERS = "osD^vPX*<>"  # groups are told apart by these and by dashes, not by colour alone
DASHES = ("-", "--", ":", "-.")
WIDTH, HEIGHT, GAP, LEFT, BELOW = 4.6, 2.9, 0.85, 0.75, 0.9  # inches
LEGEND_COLUMNS = 3
SMOOTHED_FROM = 60  # steps; noise of single steps hides the curves of longer runs
# More curves than this hide each other: those of groups are then means over the seeds.
MOST_CURVES = 12
SIZE, TIME = "adapter_bytes", "train_seconds"
UNITS = {SIZE: ("adapter, MB", 1e6), TIME: ("training time, s", 1.0)}


def plot_comparison(comparison: Comparison, path: Path) -> None:
    """Write the picture to `path`: .png, or .html with the numbers as a table too.

    Raises UsageError for another suffix, and if the file can not be written.
    """
    save_figure(path, lambda: figure(comparison), lambda image: _page(comparison, image))


def figure(comparison: Comparison) -> Figure:
    """Quality against size and against time, where the runs share a metric; then the losses."""
    metric = comparison.metrics[0] if comparison.metrics else None
    panels = ([SIZE, TIME] if metric is not None else []) + ["train"]
    panels += ["eval"] if any(len(run.evaluations) > 1 for run in _runs(comparison)) else []
    top = 0.5 + 0.2 * -(-len(comparison.groups) // LEGEND_COLUMNS)
    columns, rows = min(2, len(panels)), -(-len(panels) // 2)
    width = LEFT + columns * (WIDTH + GAP) - GAP + 0.2
    height = top + rows * (HEIGHT + BELOW)
    drawn = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    for at, what in enumerate(panels):
        down, across = divmod(at, 2)
        left = (LEFT + across * (WIDTH + GAP)) / width
        bottom = 1 - (top + HEIGHT + down * (HEIGHT + BELOW)) / height
        axes = drawn.add_axes((left, bottom, WIDTH / width, HEIGHT / height))
        if what in UNITS and metric is not None:
            _against(axes, comparison, metric, what)
        else:
            _losses(axes, comparison, what)
        _quiet(axes)
    handles = [_handle(comparison, group) for group in comparison.groups]
    place = {"loc": "upper left", "bbox_to_anchor": (LEFT / width - 0.01, 1 - 0.08 / height)}
    drawn.legend(handles=handles, ncols=min(LEGEND_COLUMNS, len(handles)), frameon=False, **place)
    return drawn


def _runs(comparison: Comparison) -> Iterator[Any]:
    return (run for group in comparison.groups for run in group.runs)


def _style(comparison: Comparison, group: Group) -> dict[str, Any]:
    at = comparison.groups.index(group)
    palette = colormaps["tab10" if len(comparison.groups) <= 10 else "tab20"]
    return {"color": palette(at % palette.N), "marker": MARKERS[at % len(MARKERS)]}


def _handle(comparison: Comparison, group: Group) -> Any:
    dash = DASHES[comparison.groups.index(group) % len(DASHES)]
    return Line2D([], [], linestyle=dash, label=group.name, **_style(comparison, group))


def _against(axes: Any, comparison: Comparison, metric: str, cost: str) -> None:
    """The mean of each group with its standard error both ways, and a faint mark for each run."""
    unit, divisor = UNITS[cost]
    for group in comparison.groups:
        style = _style(comparison, group)
        x, y = group.mean(cost), group.mean(metric)
        if x is None or y is None:
            continue
        each = [(run.value(cost), run.value(metric)) for run in group.runs]
        points = [(a / divisor, b) for a, b in each if a is not None and b is not None]
        if len(points) > 1:
            axes.scatter(*zip(*points, strict=True), s=14, alpha=0.4, linewidths=0, **style)
        errors = {"xerr": (x.error or 0) / divisor, "yerr": y.error or 0}
        bars = {"capsize": 2, "elinewidth": 1, "markersize": 7, **style}
        axes.errorbar(x.mean / divisor, y.mean, **errors, **bars)
    better = "lower" if metric in LOWER_IS_BETTER else "higher"
    axes.set_title(f"{metric} ({better} is better)", fontsize=9.5, loc="left", color=INK)
    axes.set_xlabel(unit)
    axes.margins(0.12)


def _losses(axes: Any, comparison: Comparison, part: str) -> None:
    """The training or the validation loss over the steps: a curve a run, or a group's mean."""
    means = sum(len(group.runs) for group in comparison.groups) > MOST_CURVES
    longest = 0
    for at, group in enumerate(comparison.groups):
        style = _style(comparison, group) | {"linestyle": DASHES[at % len(DASHES)]}
        if part == "train":
            style["marker"] = ""
        curves = [_curve(run.steps if part == "train" else run.evaluations) for run in group.runs]
        longest = max([longest, *map(len, curves)])
        for curve in [_mean_curve(curves)] if means else curves:
            values = list(curve.values())
            smooth = _smoothed(values) if part == "train" else values
            axes.plot(list(curve), smooth, linewidth=1.4, markersize=4, alpha=0.9, **style)
    smoothed = ", smoothed" if part == "train" and longest >= SMOOTHED_FROM else ""
    mean = ", means over seeds" if means else ""
    name = "training" if part == "train" else "validation"
    axes.set_title(f"{name} loss{smoothed}{mean}", fontsize=9.5, loc="left", color=INK)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.margins(x=0.02)


def _curve(lines: Sequence[Line]) -> dict[int, float]:
    found = {line["step"]: line.get("loss", line.get("eval_loss")) for line in lines}
    return {step: float(loss) for step, loss in found.items() if isinstance(loss, int | float)}


def _mean_curve(curves: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """The mean over all curves, at the steps that all have."""
    steps = [step for step in curves[0] if all(step in curve for curve in curves)]
    return {step: sum(curve[step] for curve in curves) / len(curves) for step in steps}


def _smoothed(values: Sequence[float]) -> list[float]:
    """An exponential mean over about a 25th of the curve, without the bias of its start."""
    if len(values) < SMOOTHED_FROM:
        return list(values)
    keep, mean, weight, found = 1 - 25 / len(values), 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + 1 - keep
        found.append(mean / weight)
    return found


def _quiet(axes: Any) -> None:
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, length=2)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _page(comparison: Comparison, image: bytes) -> str:
    """The HTML page: the picture, and its numbers as a table."""
    columns = [*comparison.metrics, *COSTS, "rank_total", "steps"]
    heads = "".join(f"<th>{html.escape(HEADS.get(name, name))}</th>" for name in columns)
    rows = []
    for group in comparison.groups:
        cells = "".join(
            f"<td>{html.escape(shown(column, group.mean(column)))}"
            f"{BEST if group.name in comparison.best(column) else ''}</td>"
            for column in columns
        )
        rows.append(f'<tr><th scope="row">{html.escape(group.name)}</th>{cells}</tr>')
    table = f"<table><thead><tr><th>run</th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody>"
    notes = "<br>".join(map(html.escape, [f"{BEST} best of its column", *comparison.notes]))
    return PAGE.format(
        title=f"{len(list(_runs(comparison)))} runs",
        caption="± standard error of the mean over the seeds",
        meanings=notes,
        image=base64.b64encode(image).decode(),
        alt="Quality against adapter size and time, and loss curves",
        tables=table + "</table>",
    )
