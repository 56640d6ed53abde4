"""Chunks: a sequence cut into stretches of like difficulty, each run at one tier of a ladder of
ranks.

Everything here is causal: what a token gets depends on the difficulties up to it and on nothing
later. The functions over whole arrays and the token-by-token `ChunkStream` give the same answers,
bit for bit: difficulties are multiples of 2⁻¹⁶ (`on_grid`), so their sums are exact in float64 in
whatever order they are taken.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

GRID = 2**16
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class ChunkRule:
    """When a chunk ends: once it has min_len tokens and the next one's difficulty is more than tau
    away from its mean, or at max_len tokens. Its tier follows from the mean difficulty of the last
    `trailing` tokens, the first of its own included."""

    min_len: int
    max_len: int
    tau: float
    trailing: int


@dataclass(frozen=True)
class Ladder:
    """Parameters by which chunks and tiers are made. blocks_of [tiers]: how many of the `blocks` of
    components a tier uses; fade: tokens from one tier to the next."""

    rule: ChunkRule
    fade: int
    blocks_of: Sequence[int]
    blocks: int


@dataclass(frozen=True)
class Chunks:
    """The chunks of one sequence of n tokens. starts [chunks]; tiers [chunks], numbers of rungs of
    the ladder from 0 on."""

    starts: Ints
    tiers: Ints
    length: int

    @property
    def lengths(self) -> Ints:
        return np.diff(self.starts, append=self.length)

    @property
    def token_tiers(self) -> Ints:
        """[n]"""
        return np.repeat(self.tiers, self.lengths)


def on_grid(difficulty: Floats) -> Floats:
    """Rounded to multiples of 2⁻¹⁶, whose sums are exact."""
    rounded: Floats = np.rint(difficulty * GRID) / GRID
    return rounded


def chunk_starts(difficulty: Floats, rule: ChunkRule) -> Ints:
    """Where chunks open in a sequence of difficulties [n], which are on the grid; the first at
    0."""
    n, start, starts = len(difficulty), 0, []
    while start < n:
        starts.append(start)
        # The tokens that may open the next chunk, against the mean of all before them in this one.
        ahead = difficulty[start : start + rule.max_len]
        counts = np.arange(rule.min_len, len(ahead))
        sums = np.cumsum(ahead)[counts - 1]
        surprising = np.abs(ahead[counts] * counts - sums) > rule.tau * counts
        first = int(surprising.argmax()) if surprising.any() else -1
        start += int(counts[first]) if first >= 0 else rule.max_len
    return np.asarray(starts, np.int64)


def opening_means(difficulty: Floats, starts: Ints, rule: ChunkRule) -> Floats:
    """The trailing mean at the first token of each chunk [chunks]."""
    sums = np.concatenate([[0.0], np.cumsum(difficulty)])
    since = np.maximum(starts + 1 - rule.trailing, 0)
    means: Floats = (sums[starts + 1] - sums[since]) / (starts + 1 - since)
    return means


def chunk(difficulty: Floats, rule: ChunkRule, thresholds: Sequence[float]) -> Chunks:
    """The chunks of a sequence and their tiers: tier i is for trailing means from thresholds[i - 1]
    on."""
    starts = chunk_starts(difficulty, rule)
    tiers = np.searchsorted(
        np.asarray(thresholds), opening_means(difficulty, starts, rule), side="right"
    )
    return Chunks(starts, tiers.astype(np.int64), len(difficulty))


def block_weights(
    chunks: Chunks, blocks_of: Sequence[int], blocks: int, fade: int
) -> NDArray[np.float32]:
    """How much of each block of components acts on each token [n, blocks]: 1 for those that its
    chunk's tier uses, 0 for the others, and a linear way from the one to the other over the first
    `fade` tokens of a chunk.

    blocks_of [tiers]: how many blocks a tier uses.
    """
    used = np.asarray(blocks_of)[chunks.tiers][:, None] > np.arange(blocks)  # [chunks, blocks]
    levels = used.astype(np.float32)
    weights = np.repeat(levels, chunks.lengths, axis=0)
    for j in range(fade):
        places = chunks.starts[1:] + j
        reached = (chunks.lengths[1:] > j).nonzero()[0]
        weights[places[reached]] = _faded(levels[reached], levels[reached + 1], j, fade)
    return weights


def _faded(
    old: NDArray[np.float32], new: NDArray[np.float32], place: int, fade: int
) -> NDArray[np.float32]:
    mixed: NDArray[np.float32] = old + (new - old) * np.float32((place + 1) / (fade + 1))
    return mixed


@dataclass(frozen=True)
class Placed:
    """Tier of one token and the weights of its blocks. opened: it begins a chunk."""

    tier: int
    weights: NDArray[np.float32]
    opened: bool


class ChunkStream:
    """One sequence, token by token: the same chunks, tiers and weights as `chunk` and
    `block_weights` of the whole."""

    def __init__(
        self,
        rule: ChunkRule,
        thresholds: Sequence[float],
        blocks_of: Sequence[int],
        blocks: int,
        fade: int,
        before: int | None = None,
    ) -> None:
        """before: the tier of a stretch that has gone before and is not seen here."""
        self.rule, self.thresholds, self.fade = rule, [float(t) for t in thresholds], fade
        self.levels = [(np.arange(blocks) < used).astype(np.float32) for used in blocks_of]
        self.count, self.sum = 0, 0.0
        self.recent: deque[float] = deque(maxlen=rule.trailing)
        self.tier = self.former = before

    def push(self, difficulty: float) -> Placed:
        """The next token, whose difficulty is on the grid."""
        rule, n = self.rule, self.count
        self.recent.append(difficulty)
        opened = (
            n == 0
            or n >= rule.max_len
            or (n >= rule.min_len and abs(difficulty * n - self.sum) > rule.tau * n)
        )
        if opened:
            tier = bisect_right(self.thresholds, math.fsum(self.recent) / len(self.recent))
            self.former, self.tier = tier if self.tier is None else self.tier, tier
            self.count, self.sum = 0, 0.0
        self.count += 1
        self.sum += difficulty
        assert self.tier is not None
        assert self.former is not None
        place, new = self.count - 1, self.levels[self.tier]
        fading = place < self.fade and self.former != self.tier
        return Placed(
            self.tier,
            _faded(self.levels[self.former], new, place, self.fade) if fading else new,
            opened,
        )

    def follow(self, difficulty: Floats, chunks: Chunks) -> None:
        """Take over the state at the end of a sequence that was chunked as a whole."""
        if len(difficulty) == 0:
            return
        start = int(chunks.starts[-1])
        self.count, self.sum = len(difficulty) - start, float(difficulty[start:].sum())
        self.recent.extend(difficulty[-self.rule.trailing :].tolist())
        self.tier = int(chunks.tiers[-1])
        self.former = (
            int(chunks.tiers[-2])
            if len(chunks.tiers) > 1
            else self.former
            if self.former is not None
            else self.tier
        )


def tier_shares(ranks: Sequence[int], target: float) -> Floats:
    """The share of tokens of each tier so that the mean of `ranks` is `target`: of all such shares
    the most even ones (the distribution of greatest entropy, p_i ∝ e^(λ ρ_i)).

    Raises ValueError for a target outside of the ranks.
    """
    rungs = np.asarray(ranks, np.float64)
    if not rungs[0] <= target <= rungs[-1]:
        raise ValueError(f"no mixture of the ranks {list(ranks)} has the mean {target:g}")
    scaled = (rungs - rungs[0]) / max(rungs[-1] - rungs[0], 1.0)
    wanted = (target - rungs[0]) / max(rungs[-1] - rungs[0], 1.0)

    def shares(tilt: float) -> Floats:
        powers = np.exp(tilt * scaled - max(tilt, 0.0))
        found: Floats = powers / powers.sum()
        return found

    # Where the smallest step between two ranks decides, an end of this range leaves the other with
    # e^-700 of the shares.
    high = 700.0 / float(np.diff(scaled).min(initial=1.0))
    low = -high
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float(shares(middle) @ scaled) < wanted else (low, middle)
    if wanted in (0.0, 1.0):  # the ends are reached by a single tier only
        only: Floats = (np.arange(len(rungs)) == (0 if wanted == 0.0 else len(rungs) - 1)).astype(
            np.float64
        )
        return only
    return shares((low + high) / 2)


def fit_thresholds(
    means: Floats, lengths: Ints, ranks: Sequence[int], target: float
) -> list[float]:
    """Thresholds [tiers - 1] at which chunks of these opening means [chunks] and lengths come
    nearest to the mean rank `target`.

    The wanted shares of tokens decide where the thresholds lie; where many chunks share one opening
    mean, a threshold can only lie before or behind all of them, and the choice that leaves the mean
    rank nearest to the target is taken.
    """
    order = np.argsort(means, kind="stable")
    values, weights = means[order], lengths[order].astype(np.float64)
    candidates, first = np.unique(values, return_index=True)
    # share of tokens under each candidate
    below = np.concatenate([[0.0], np.cumsum(weights)])[first] / weights.sum()
    # The first and the last threshold are those that no other text could pass.
    candidates, below = np.concatenate([[-np.inf], candidates[1:], [np.inf]]), np.append(below, 1.0)
    wanted = np.cumsum(tier_shares(ranks, target))[:-1]
    steps = np.diff(np.asarray(ranks, np.float64))
    places = np.searchsorted(below, wanted)
    near = [[i for i in (place - 1, place) if 0 <= i < len(below)] for place in places.tolist()]

    def misses(chosen: tuple[int, ...]) -> tuple[float, float]:
        # in shares of tokens; a threshold further up takes so many from the rank above
        gaps = below[list(chosen)] - wanted
        return round(abs(float(gaps @ steps)), 12), float(np.abs(gaps).sum())

    ascending = [chosen for chosen in product(*near) if list(chosen) == sorted(chosen)]
    return [float(candidates[i]) for i in min(ascending, key=misses)]
