"""A picture of a text with its difficulty, chunks and tiers, as PNG."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lorakit.errors import UsageError
from lorakit.report.chunks import Shown
from lorakit.report.history import read_result
from lorakit.report.output import save_output, try_output
from lorakit.report.tiers import tier_colours

INK = "#222222"
HEAD, LINE, CURVE = 0.9, 1.75, 0.85  # inches: of the head, of a line, of the curve in it


def check_picture(path: Path, run: Path, prompts: int) -> None:
    """Raises UsageError unless one text of a run with tiers is to be drawn into a PNG."""
    if path.suffix.lower() != ".png":
        raise UsageError(
            f"a plot can not be written as `{path.name}`",
            "Give it a name that ends in .png.",
        )
    try_output(path, "Name another file for the plot.")
    if prompts != 1:
        raise UsageError(f"{prompts} texts do not fit one picture", "--plot is for one prompt.")
    if not (read_result(run) or {}).get("tiers"):
        raise UsageError(f"the run `{run}` has no tiers to draw", "--plot is for chunkwise runs.")


def save_picture(path: Path, shown: Shown, run: str) -> None:
    """Write the picture. Raises UsageError where that is not possible."""
    save_output(
        path,
        picture(shown, f"{run}: {len(shown.trace)} tokens, mean rank {shown.mean_rank:.2f}"),
    )


def picture(shown: Shown, title: str, columns: int = 40) -> bytes:
    """A PNG of the tokens in lines of `columns`.

    Difficulty is a step curve; chunks are areas in the colour of their tier.
    """
    lines = -(-len(shown.trace) // columns)
    inches = HEAD + LINE * lines
    inch = 1 / inches
    with rc_context({"text.parse_math": False, "font.size": 8.0, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(13.0, inches), dpi=130)
        figure.suptitle(title, x=0.045, ha="left", y=1 - 0.12 / inches, fontsize=11)
        handles = _legend(shown)
        figure.legend(handles=handles, loc="upper right", ncols=len(handles), frameon=False)
        for line in range(lines):
            bottom = 1 - (0.55 + LINE * line + CURVE) * inch
            axes = figure.add_axes((0.045, bottom, 0.945, CURVE * inch))
            _draw_line(axes, shown, line * columns, columns)
            if line == 0:
                axes.set_ylabel("difficulty")
        image = io.BytesIO()
        FigureCanvasAgg(figure).print_png(image)
    return image.getvalue()


def _legend(shown: Shown) -> list[Patch]:
    tiers = zip(shown.ladder, tier_colours(len(shown.ladder)), strict=True)
    return [Patch(color=colour, alpha=0.45, label=f"rank {rank}") for rank, colour in tiers]


def _draw_line(axes: Any, shown: Shown, first: int, columns: int) -> None:
    """Draw the tokens from `first` on, as many as there are columns."""
    colours, end = tier_colours(len(shown.ladder)), first + columns
    axes.set(xlim=(first - 0.5, end - 0.5), ylim=(0, 1), yticks=(0, 0.5, 1))
    for start, stop, tier in shown.chunks:
        if start < end and stop > first:
            span = max(start, first) - 0.5, min(stop, end) - 0.5
            axes.axvspan(*span, color=colours[tier], alpha=0.45, lw=0)
            if start >= first:
                axes.axvline(start - 0.5, color=INK, lw=0.8)
    if first <= shown.prompt < end:
        axes.axvline(shown.prompt - 0.5, color=INK, lw=1.6, ls=":")
    places = range(first, min(end, len(shown.trace)))
    difficulties = [shown.trace[i].difficulty for i in places]
    axes.step(places, difficulties, where="mid", color=INK, lw=1.0)
    names = [shown.pieces[i].strip(" ").replace("\n", "⏎") or "␣" for i in places]
    style = {"rotation": 60, "ha": "right", "rotation_mode": "anchor", "fontsize": 7}
    axes.set_xticks(list(places), names, **style)
    axes.tick_params(length=0)
    axes.spines[["top", "right"]].set_visible(False)
