"""How hard a token is, in [0, 1], from what is known when it is there: a weighted mean of
percentiles of a few features.

Features of the source `table` need the tokens alone: bigram surprisal (Witten-Bell smoothing; Chen
and Goodman, 1999, section 2), the novelty of the recent bigrams, and the position. Those of the
source `model` come with the logits that predicted the token: its surprisal, and the entropy of the
distribution. Percentiles are against held-out text.

All values are float32 that were worked out once, so that a whole sequence and one token at a time
give the same bits.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorakit.methods.chunkwise.chunking import GRID, Floats, Ints, on_grid

Values = NDArray[np.float32]
# The recent bigrams whose novelty counts, and the quantiles that stand for a feature's
# distribution.
RECENT_BIGRAMS, QUANTILES = 8, 257
BASE = "base."  # names the pass of the base model, and stands before what it gave
FEATURES = {
    "table": {"bigram": 1.0, "novelty": 0.5, "position": 0.5},
    "model": {"surprisal": 0.5, "entropy": 0.5},
}
"""{source: {feature: its weight unless the recipe says otherwise}}"""


@dataclass(frozen=True)
class BigramTable:
    """Surprisals in nats. keys [bigrams] are previous · vocabulary + token, ascending, surprisals
    [bigrams] theirs; unigrams [vocabulary] −log p(token); backoffs [vocabulary] what an unseen
    bigram adds to it, by its first token."""

    keys: Ints
    surprisals: Values
    unigrams: Values
    backoffs: Values

    @classmethod
    def count(cls, sequences: Iterable[Ints], vocabulary: int) -> BigramTable:
        """From sequences of token ids; bigrams do not reach from one to the next."""
        parts = [np.asarray(ids, np.int64) for ids in sequences]
        tokens = np.concatenate([*parts, np.empty(0, np.int64)])
        pairs = np.concatenate(
            [*(ids[:-1] * vocabulary + ids[1:] for ids in parts), np.empty(0, np.int64)]
        )
        keys, counts = np.unique(pairs, return_counts=True)
        unigrams = (np.bincount(tokens, minlength=vocabulary) + 1.0) / (len(tokens) + vocabulary)
        firsts = keys // vocabulary
        seen = np.bincount(firsts, counts, vocabulary)
        # T(v): distinct successors
        kinds = np.maximum(np.bincount(firsts, minlength=vocabulary), 1)
        probabilities = (counts + kinds[firsts] * unigrams[keys % vocabulary]) / (seen + kinds)[
            firsts
        ]
        return cls(
            keys,
            (-np.log(probabilities)).astype(np.float32),
            (-np.log(unigrams)).astype(np.float32),
            np.log((seen + kinds) / kinds).astype(np.float32),
        )

    def look_up(self, ids: Ints) -> Values:
        """Surprisal [n] of each token after the one before; the first has its unigram's."""
        unseen: Values = self.unigrams[ids]
        if len(ids) < 2:
            return unseen
        pairs = ids[:-1] * len(self.unigrams) + ids[1:]
        found: Values = unseen.copy()
        found[1:] += self.backoffs[ids[:-1]]
        if len(self.keys):
            places = np.minimum(np.searchsorted(self.keys, pairs), len(self.keys) - 1)
            known = self.keys[places] == pairs
            found[1:][known] = self.surprisals[places[known]]
        return found


def novelty(ids: Ints) -> Values:
    """[n]: how many of the last 8 bigrams had not occurred in the sequence before; the first token
    counts as new."""
    pairs = np.concatenate([[-1], ids[:-1]]) * (int(ids.max(initial=0)) + 1) + ids
    new = np.zeros(len(ids), np.float32)
    new[np.unique(pairs, return_index=True)[1]] = 1
    sums = np.concatenate([np.zeros(RECENT_BIGRAMS), np.cumsum(new)])
    recent: Values = (sums[RECENT_BIGRAMS:] - sums[:-RECENT_BIGRAMS]).astype(np.float32)
    return recent


def position(n: int) -> Values:
    """[n]: minus the place in the sequence: what comes early has little before it to be predicted
    from."""
    return -np.arange(n, dtype=np.float32)


@dataclass(frozen=True)
class Percentiles:
    """A feature's distribution, by its quantiles [257], ascending."""

    quantiles: Values

    @classmethod
    def of(cls, values: Values) -> Percentiles:
        """Of the values [n] of a feature on held-out text."""
        return cls(
            np.quantile(values, np.linspace(0, 1, QUANTILES), method="nearest").astype(np.float32)
        )

    def __call__(self, values: Values) -> Floats:
        """The percentile [n] of each value, in [0, 1]; the middle one where many are alike."""
        sides = [np.searchsorted(self.quantiles, values, side=side) for side in ("left", "right")]
        middle: Floats = (sides[0] + sides[1]) / (2.0 * QUANTILES)
        return middle


@dataclass(frozen=True)
class Difficulty:
    """Features become one number. percentiles and weights by feature; the weights sum to 1."""

    percentiles: Mapping[str, Percentiles]
    weights: Mapping[str, float]

    def __call__(self, features: Mapping[str, Values]) -> Floats:
        """[n], on the grid of `chunking`, from features [n] each."""
        first, *others = [
            self.percentiles[name](features[name]) * weight for name, weight in self.weights.items()
        ]
        for part in others:
            first = first + part
        return on_grid(first)

    def stream(self) -> DifficultyStream:
        return DifficultyStream(self)


class DifficultyStream:
    """The same for one token at a time, in plain Python: arrays of one element cost more than the
    work."""

    def __init__(self, difficulty: Difficulty) -> None:
        grids = {
            name: percentiles.quantiles.tolist()
            for name, percentiles in difficulty.percentiles.items()
        }
        self.parts = [(name, grids[name], weight) for name, weight in difficulty.weights.items()]

    def __call__(self, features: Mapping[str, float]) -> float:
        total = 0.0
        for name, grid, weight in self.parts:
            value = features[name]
            total += (
                (bisect_left(grid, value) + bisect_right(grid, value)) / (2.0 * QUANTILES) * weight
            )
        return round(total * GRID) / GRID


def table_features(table: BigramTable, ids: Ints) -> dict[str, Values]:
    """The features [n] of the source `table` for a sequence of token ids [n]."""
    return {"bigram": table.look_up(ids), "novelty": novelty(ids), "position": position(len(ids))}


class TableStream:
    """The features of the source `table`, one token at a time."""

    def __init__(self, table: BigramTable, ids: Sequence[int] = ()) -> None:
        """ids: what the sequence begins with."""
        self.table = table
        self.previous: int | None = None
        self.seen: set[tuple[int | None, int]] = set()
        self.recent: deque[int] = deque(maxlen=RECENT_BIGRAMS)
        self.length = 0
        for token in ids:
            self._remember(token)

    def push(self, token: int) -> dict[str, float]:
        """The features of the next token."""
        table, previous = self.table, self.previous
        surprisal = table.unigrams[token]
        if previous is not None:
            key = previous * len(table.unigrams) + token
            place = int(table.keys.searchsorted(key))
            known = place < len(table.keys) and table.keys[place] == key
            surprisal = table.surprisals[place] if known else surprisal + table.backoffs[previous]
        self._remember(token)
        return {
            "bigram": float(surprisal),
            "novelty": float(sum(self.recent)),
            "position": -float(self.length - 1),
        }

    def _remember(self, token: int) -> None:
        pair = (self.previous, token)
        self.recent.append(pair not in self.seen)
        self.seen.add(pair)
        self.previous = token
        self.length += 1
