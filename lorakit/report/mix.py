"""The data sets of a mix in a few lines: rows, tokens, and their shares of an epoch."""

from __future__ import annotations

from lorakit.data.joined import AnyExamples, set_figures

HEADS = ("data set", "rows", "tokens", "rows an epoch", "of rows", "of tokens", "passes an epoch")


def mix_lines(train: AnyExamples) -> list[str]:
    """A table, line by line; nothing for a single data set. Packs and pieces of joined text count
    as rows."""
    found = set_figures(train)
    if not found:
        return []
    rows = [HEADS]
    for one in found:
        counts = (f"{one.rows:,}", f"{one.tokens:,}", f"{one.rows_per_epoch:,}")
        shares = (f"{one.share_of_rows:.1%}", f"{one.share_of_tokens:.1%}")
        rows.append((one.name, *counts, *shares, f"{one.passes_per_epoch:.3g}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(_cells(row, widths)) for row in rows]


def _cells(row: tuple[str, ...], widths: list[int]) -> list[str]:
    """Names to the left, numbers to the right."""
    numbers = zip(row[1:], widths[1:], strict=True)
    return [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in numbers)]
