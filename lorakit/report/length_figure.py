"""Histogram of lengths in tokens, as SVG inside an HTML page whose style it takes."""

from __future__ import annotations

from collections.abc import Iterator

from lorakit.data.lengths import Bin, Lengths

BINS = 40
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 860, 240, 50, 56, 34  # pixels
LINE = 14  # pixels between the names of marks


def length_figure(lengths: Lengths, max_length: int) -> str:
    """The figure: a bar for each bin, red where all of its rows are longer than `max_length`, and
    lines at p50, p95 and `max_length`, if it is in the picture."""
    bins = lengths.bins(BINS)
    parts = [*_bars(bins, max_length), *_axis(bins), *_marks(bins, lengths, max_length)]
    label = "Number of rows by their length in tokens"
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    return "\n".join([f'<svg {size} role="img" aria-label="{label}">', *parts, "</svg>"])


def _bars(bins: list[Bin], max_length: int) -> Iterator[str]:
    most, step = max(bin.rows for bin in bins), _step(bins)
    for number, bin in enumerate(bins):
        height = (HEIGHT - TOP - BOTTOM) * bin.rows / most
        if bin.rows:
            height = max(height, 1.5)  # a single row is to be seen
        x, y = LEFT + number * step, HEIGHT - BOTTOM - height
        kind = "beyond" if bin.first > max_length else "bar"
        place = f'x="{x:.1f}" y="{y:.1f}" width="{step - 1:.1f}" height="{height:.1f}"'
        title = f"<title>{bin.name} tokens: {bin.rows:,} rows</title>"
        yield f'<rect class="{kind}" {place}>{title}</rect>'


def _axis(bins: list[Bin]) -> Iterator[str]:
    """The axis, with at most ten numbers, and the rows of the highest bar."""
    base, step = HEIGHT - BOTTOM, _step(bins)
    yield f'<line class="axis" x1="{LEFT}" x2="{WIDTH - 10}" y1="{base}" y2="{base}"/>'
    every = -(-len(bins) // 10)
    for number in range(0, len(bins), every):
        bin = bins[number]
        text = f"{bin.first:,}" + ("+" if bin.last is None else "")
        yield f'<text x="{LEFT + number * step:.1f}" y="{base + 16}">{text}</text>'
    most = max(bin.rows for bin in bins)
    yield f'<text x="{LEFT - 6}" y="{TOP + 4}" text-anchor="end">{most:,}</text>'


def _marks(bins: list[Bin], lengths: Lengths, max_length: int) -> Iterator[str]:
    named = [("p50", lengths.quantile(0.5), "mark"), ("p95", lengths.quantile(0.95), "mark")]
    named.append(("max_seq_length", max_length, "limit"))
    for line, (name, length, kind) in enumerate(named):
        x = _x(bins, length)
        if x is None:
            continue
        y = 10 + LINE * line
        yield f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{y}" y2="{HEIGHT - BOTTOM}"/>'
        side = "end" if x > WIDTH - 150 else "start"
        shift = -4 if side == "end" else 4
        yield f'<text x="{x + shift:.1f}" y="{y + 4}" text-anchor="{side}">{name} {length:,}</text>'


def _step(bins: list[Bin]) -> float:
    """Width of a bar with its gap, in pixels."""
    return (WIDTH - 10 - LEFT) / len(bins)


def _x(bins: list[Bin], length: int) -> float | None:
    """Where a length is on the axis; None beyond the bins of one width."""
    for number, bin in enumerate(bins):
        if bin.last is not None and bin.holds(length):
            inside = (length - bin.first + 0.5) / (bin.last - bin.first + 1)
            return LEFT + (number + inside) * _step(bins)
    return None
