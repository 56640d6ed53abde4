"""Mixture: how many rows of an epoch come from each of several data sets, and which ones.

An epoch of a mixture is as long as all sets together. Weights are shares of its rows, not of its
tokens: rows are what a step counts, so shares of them hold exactly in every epoch, whatever the
tokenizer and max_seq_length, and mean the same as in `datasets.interleave_datasets`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Mixture:
    """Sets of so many units (rows, or packs), with their weights; None: every unit once an
    epoch."""

    sizes: tuple[int, ...]
    weights: tuple[float, ...] | None = None

    @cached_property
    def shares(self) -> tuple[int, ...]:
        """Units of each set in an epoch."""
        if self.weights is None:
            return self.sizes
        return largest_remainder(self.weights, sum(self.sizes))

    @staticmethod
    def _rng(seed: int, number: int, one: int) -> np.random.Generator:
        # The last 1 keeps it apart from the generator of an epoch's order, (seed, epoch): zeros at
        # the end change no seed sequence.
        return np.random.default_rng((seed, number, one, 1))

    def drawn(self, seed: int, epoch: int, shuffled: bool = True) -> NDArray[np.int64]:
        """The units of an epoch (the first is 0), set after set; those of a set follow upon those
        of the sets before it in number.

        The units of a set come in passes, each in an order drawn from (seed, set, pass), or in the
        order of the data. An epoch takes the next units of this sequence, so they depend on nothing
        but seed and epoch, and the counts of two units of a set never differ by more than 1.
        """
        firsts = np.cumsum([0, *self.sizes[:-1]])
        if self.weights is None:
            return np.arange(sum(self.sizes))
        parts = []
        for number, (size, share) in enumerate(zip(self.sizes, self.shares, strict=True)):
            start, end = epoch * share, (epoch + 1) * share
            for one in range(start // size, -(-end // size)):
                order = np.arange(size)
                if shuffled:
                    order = self._rng(seed, number, one).permutation(size)
                first = one * size
                parts.append(firsts[number] + order[max(0, start - first) : end - first])
        return np.concatenate(parts)


def largest_remainder(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """`total` divided in proportion to the weights into whole numbers: each rounded down, and one
    more for those that lost most, the first of equals (Hamilton's method)."""
    exact = np.asarray(weights) / np.sum(weights) * total
    shares = np.floor(exact).astype(np.int64)
    more = np.argsort(shares - exact, kind="stable")[: total - int(shares.sum())]
    shares[more] += 1
    return tuple(shares.tolist())
