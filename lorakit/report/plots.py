"""Plots of a run as files: PNG, or a self-contained HTML page."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lorakit.errors import UsageError
from lorakit.report.history import RankRecord
from lorakit.report.output import save_output
from lorakit.report.rank_figure import STYLE, figure
from lorakit.report.rank_page import page


def plot_ranks(
    records: Sequence[RankRecord],
    path: Path,
    title: str,
    result: Mapping[str, Any] | None = None,
    densities: Mapping[int, float] | None = None,
) -> None:
    """Write a picture of `records` to `path`: .png, or .html with the numbers as tables too.

    `result` is result.json, None for a run that is still going; `densities` {step: density of the
    factors after it}. Raises UsageError for another suffix, and if the file can not be written.
    """
    save_figure(
        path,
        lambda: figure(records, title, result, densities or {}),
        lambda image: page(records, image, title, result),
    )


def save_figure(path: Path, draw: Callable[[], Figure], page: Callable[[bytes], str]) -> None:
    """Write a figure to `path`: .png, or .html, which is `page` of the PNG.

    Raises UsageError for another suffix, and if the file can not be written.
    """
    suffix = path.suffix.lower()
    if suffix not in (".png", ".html"):
        what = f"a plot can not be written as `{path.name}`"
        raise UsageError(what, "Give it a name that ends in .png or .html.")
    image = io.BytesIO()
    with rc_context(STYLE):
        FigureCanvasAgg(draw()).print_png(image)
    content = image.getvalue()
    save_output(path, page(content).encode() if suffix == ".html" else content)
