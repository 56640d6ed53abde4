"""Lengths of rows in tokens: quantiles, a histogram, and what a limit takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

FAR = 3  # a longest row of more than this many times p95 is beyond a histogram's last closed bin


@dataclass(frozen=True)
class Truncation:
    """Loss to max_seq_length: tokens, and targets among them, of rows that are cut and of rows that
    are left out."""

    cut_rows: int
    left_out_rows: int
    tokens: int
    targets: int


def in_all(parts: Sequence[Truncation]) -> Truncation:
    """The loss of all parts together."""
    counts = [(p.cut_rows, p.left_out_rows, p.tokens, p.targets) for p in parts]
    return Truncation(*map(sum, zip(*counts, strict=True)))


@dataclass(frozen=True)
class Bin:
    """Rows with `first` to `last` tokens; last: None for all longer ones."""

    first: int
    last: int | None
    rows: int

    @property
    def name(self) -> str:
        """Its lengths in words: 20 – 39."""
        if self.last is None:
            return f"from {self.first:,}"
        return f"{self.first:,}" if self.first == self.last else f"{self.first:,} – {self.last:,}"

    def holds(self, length: int) -> bool:
        return self.first <= length and (self.last is None or length <= self.last)


@dataclass(frozen=True)
class Lengths:
    """Lengths of rows in tokens, at least one."""

    values: NDArray[np.int64] = field(repr=False)

    def quantile(self, share: float) -> int:
        """The smallest length that at least this share of the rows does not exceed."""
        return int(np.quantile(self.values, share, method="inverted_cdf"))

    @property
    def longest(self) -> int:
        return int(self.values.max())

    def bins(self, most: int) -> list[Bin]:
        """At most `most` bins of one width, 1, 2 or 5 times a power of ten. Where a few rows are
        far longer than the others, one more bin holds all of them."""
        p95, least = max(1, self.quantile(0.95)), int(self.values.min())
        end = self.longest if self.longest <= FAR * p95 else 2 * p95
        widths = (step * 10**power for power in range(10) for step in (1, 2, 5))
        width = next(width for width in widths if end // width - least // width < most)
        first, beyond = least // width, end // width + 1
        numbers = np.minimum(self.values // width, beyond)
        rows = np.bincount(numbers, minlength=beyond + 1).tolist()
        found = [Bin(n * width, (n + 1) * width - 1, rows[n]) for n in range(first, beyond)]
        return [*found, Bin(beyond * width, None, rows[beyond])] if rows[beyond] else found
