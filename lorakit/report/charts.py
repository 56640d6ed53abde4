"""Line charts as inline SVG, with the numbers that the page's script shows under the pointer."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import MaxNLocator

# Units of the SVG, about a pixel of a telephone.
WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 10, 24
MOST_POINTS = 800  # of a series; more can not be told apart in this width


@dataclass(frozen=True)
class Series:
    """One curve. steps, values: of its points; dots: mark each point, for few of them."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    dots: bool = False


def chart(title: str, series: Sequence[Series]) -> str:
    """A figure with the curves; their finite points only. "" where there are none."""
    drawn = [kept for one in series if (kept := _finite(one)).steps]
    if not drawn:
        return ""
    x_ticks, (first, last) = _scale([s for one in drawn for s in one.steps], integer=True)
    y_ticks, (low, high) = _scale([v for one in drawn for v in one.values])

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    lines = [
        f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{number(v)}</text>'
        for v in y_ticks
    ]
    lines += [
        f'<text x="{x(v):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{number(v)}</text>'
        for v in x_ticks
    ]
    for at, one in enumerate(drawn):
        places = [(x(s), y(v)) for s, v in zip(one.steps, one.values, strict=True)]
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        lines.append(f'<polyline class="curve c{at}" points="{points}"/>')
        if one.dots or len(places) == 1:
            lines += [
                f'<circle class="dot c{at}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in places
            ]
    ends = "; ".join(
        f"{one.name}: {number(one.values[0])} to {number(one.values[-1])}" for one in drawn
    )
    label = html.escape(f"{title} over the steps, {ends}")
    data: dict[str, Any] = {
        "x": [first, last, LEFT, WIDTH - RIGHT],
        "y": [low, high, HEIGHT - BOTTOM, TOP],
        "series": [
            {"name": one.name, "steps": list(one.steps), "values": list(one.values)}
            for one in drawn
        ],
    }
    return (
        f'<figure class="chart"><figcaption>{html.escape(title)}{_legend(drawn)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{label}">'
        f'{"".join(lines)}<g class="cursor"></g></svg><output class="tip" hidden></output>'
        f"{embedded(data)}</figure>"
    )


def embedded(data: Any) -> str:
    """Data for the page's script, in which no text can end the element."""
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json">{text}</script>'


def number(value: float) -> str:
    """Four digits: large numbers with k and M, small ones as 2.5e-4."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:.4g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.4g}k"
    if 0 < abs(value) < 0.01:
        digits, power = f"{value:.3e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:.4g}"


def _legend(drawn: Sequence[Series]) -> str:
    if len(drawn) < 2:
        return ""
    return "".join(
        f'<span class="key"><svg viewBox="0 0 24 8" aria-hidden="true">'
        f'<line class="curve c{at}" x1="0" x2="24" y1="4" y2="4"/></svg>{html.escape(one.name)}'
        "</span>"
        for at, one in enumerate(drawn)
    )


def _finite(one: Series) -> Series:
    """The finite points, every so many where there are more than can be drawn; always the last."""
    pairs = [(s, v) for s, v in zip(one.steps, one.values, strict=True) if math.isfinite(v)]
    every = -(-len(pairs) // MOST_POINTS) or 1
    kept = pairs[::-1][::every][::-1]
    return Series(one.name, [s for s, _ in kept], [v for _, v in kept], one.dots)


def _scale(values: Sequence[float], integer: bool = False) -> tuple[list[float], list[float]]:
    """(ticks, [low, high]) of an axis that holds the values. The steps end where the data ends;
    values get the ticks around them."""
    low, high = min(values), max(values)
    if low == high:
        spread = 1.0 if integer else abs(low) * 0.1 or 1.0
        low, high = low - spread, high + spread
    found = MaxNLocator(nbins=5 if integer else 4, integer=integer).tick_values(low, high)
    ticks = [float(tick) for tick in found]
    if integer:
        return [tick for tick in ticks if low <= tick <= high], [low, high]
    return ticks, [ticks[0], ticks[-1]]
