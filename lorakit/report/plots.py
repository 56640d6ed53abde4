"""Plots of a run as files: PNG, or a self-contained HTML page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg

from lorakit.errors import UsageError
from lorakit.files import write_bytes
from lorakit.report.history import RankRecord
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
    suffix = path.suffix.lower()
    if suffix not in (".png", ".html"):
        what = f"a plot can not be written as `{path.name}`"
        raise UsageError(what, "Give it a name that ends in .png or .html.")
    image = io.BytesIO()
    with rc_context(STYLE):
        drawn = figure(records, title, result, densities or {})
        FigureCanvasAgg(drawn).print_png(image)
    content = image.getvalue()
    if suffix == ".html":
        content = page(records, content, title, result).encode()
    save_plot(path, content)


def save_plot(path: Path, content: bytes) -> None:
    """Write a picture or a page. Raises UsageError if it can not be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
    except OSError as error:
        raise UsageError(f"`{path}` can not be written: {error.strerror}") from error
