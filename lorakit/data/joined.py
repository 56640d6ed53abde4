"""Joined: the examples of several data sets as if they were those of one, without a copy of their
tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.data.examples import Examples
from lorakit.data.mixture import Mixture


@dataclass(frozen=True)
class Joined:
    """The rows of all parts, one part after another: row i of part p is row firsts[p] + i here, and
    its units (a pack, or a row where a part has no packs) follow one another likewise. The
    attributes are those of Examples.

    names: of the data sets, for messages and metrics. weights: of the sets in an epoch, or None for
    every unit once. row_ids: unique over all sets; `where` turns them into a set's name and the row
    number in its source.
    """

    parts: tuple[Examples, ...]
    names: tuple[str, ...]
    weights: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @cached_property
    def firsts(self) -> NDArray[np.int64]:
        """The first row of each part, and the number of rows [parts + 1]."""
        return np.cumsum([0, *map(len, self.parts)])

    @cached_property
    def mixture(self) -> Mixture:
        return Mixture(tuple(len(part.unit_lengths) for part in self.parts), self.weights)

    @property
    def token_count(self) -> int:
        return sum(part.token_count for part in self.parts)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row [rows]."""
        return np.concatenate([part.lengths for part in self.parts])

    @cached_property
    def unit_lengths(self) -> NDArray[np.int64]:
        """Tokens of each unit of a batch [units]."""
        return np.concatenate([part.unit_lengths for part in self.parts])

    @property
    def has_packs(self) -> bool:
        return any(part.has_packs for part in self.parts)

    @cached_property
    def labels(self) -> NDArray[np.int64] | NDArray[np.float32] | None:
        found: list[NDArray[Any]] = [p.labels for p in self.parts if p.labels is not None]
        return np.concatenate(found) if found else None

    @cached_property
    def row_ids(self) -> NDArray[np.int64]:
        pairs = zip(self.parts, self._before, strict=True)
        return np.concatenate([part.row_ids + before for part, before in pairs])

    @cached_property
    def _before(self) -> NDArray[np.int64]:
        """Numbers added to the row ids of each part, so that those of all parts differ."""
        largest = [int(part.row_ids.max(initial=0)) for part in self.parts]
        return np.cumsum([0, *largest[:-1]])

    def where(self, row_ids: Sequence[int]) -> str:
        """These rows in words: "row 3 of a.jsonl, rows 2 and 5 of b.jsonl"."""
        ids = np.asarray(sorted(row_ids), np.int64)
        number = np.searchsorted(self._before, ids, side="left") - 1
        parts = []
        for part in np.unique(number).tolist():
            found = self.parts[part].where((ids[number == part] - self._before[part]).tolist())
            parts.append(f"{found} of {self.names[part]}")
        return ", ".join(parts)

    def count_targets(self, rows: NDArray[np.int64]) -> int:
        """The number of targets of the loss in these rows."""
        numbers = _part_of(rows, self.firsts)
        pairs = zip(self.parts, range(len(self.parts)), strict=True)
        return sum(p.count_targets(rows[numbers == i] - self.firsts[i]) for p, i in pairs)

    def rows_of(self, units: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of these units, in their order."""
        if not self.has_packs:
            return units
        firsts = np.cumsum([0, *self.mixture.sizes])
        found = [np.arange(0)]
        for unit, part in zip(units, _part_of(units, firsts), strict=True):
            found.append(self.firsts[part] + self.parts[part].rows_of(unit[None] - firsts[part]))
        return np.concatenate(found)

    def drawn(self, seed: int, epoch: int, shuffled: bool) -> NDArray[np.int64]:
        """The units of an epoch, set after set: see `Mixture.drawn`."""
        return self.mixture.drawn(seed, epoch, shuffled)

    def let_go(self) -> None:
        """Let go of the pages of mapped files."""
        for part in self.parts:
            part.let_go()

    def digest(self) -> str:
        """sha256 of everything in the rows that affects training."""
        return hashlib.sha256(" ".join(part.digest() for part in self.parts).encode()).hexdigest()

    def select(self, rows: NDArray[np.int64]) -> Examples:
        """The examples of these rows alone, in this order, without packs. Their tokens are
        copied."""
        numbers = _part_of(rows, self.firsts)
        order = np.argsort(numbers, kind="stable")
        found = [
            part.select(rows[order][numbers[order] == number] - self.firsts[number])
            for number, part in enumerate(self.parts)
            if (numbers == number).any()
        ] or [self.parts[0].select(rows)]
        return _concatenated(found, self.row_ids[rows[order]]).select(np.argsort(order))


AnyExamples = Examples | Joined
Draw = Callable[[int, int, bool], NDArray[np.int64]]
"""(seed, epoch, whether shuffled) to the units of that epoch."""


def joined(
    parts: Sequence[Examples], names: Sequence[str], weights: Sequence[float] | None = None
) -> AnyExamples:
    """The examples of all parts as those of one set; those of a single part as they are."""
    if len(parts) == 1:
        return parts[0]
    return Joined(tuple(parts), tuple(names), None if weights is None else tuple(weights))


def parts_of(examples: AnyExamples) -> tuple[Examples, ...]:
    """The examples of each set."""
    return examples.parts if isinstance(examples, Joined) else (examples,)


@dataclass(frozen=True)
class SetFigures:
    """A data set among others. rows: pieces and packs count as one each; share_of_tokens: of an
    epoch's tokens, by the mean length of the set's rows."""

    name: str
    rows: int
    tokens: int
    rows_per_epoch: int
    share_of_rows: float
    share_of_tokens: float
    passes_per_epoch: float


def set_figures(train: AnyExamples) -> list[SetFigures]:
    """Figures of each data set; none where there is only one."""
    if not isinstance(train, Joined):
        return []
    shares, sizes = np.array(train.mixture.shares), np.array(train.mixture.sizes)
    tokens = np.array([part.token_count for part in train.parts])
    read = tokens * shares / sizes
    return [
        SetFigures(name, *counts, *map(float, fractions))
        for name, counts, fractions in zip(
            train.names,
            zip(sizes.tolist(), tokens.tolist(), shares.tolist(), strict=True),
            zip(shares / shares.sum(), read / read.sum(), shares / sizes, strict=True),
            strict=True,
        )
    ]


def draw_of(examples: AnyExamples) -> Draw | None:
    """The draw of an epoch's units; None where every epoch has all of them."""
    return examples.drawn if isinstance(examples, Joined) else None


def _part_of(numbers: NDArray[np.int64], firsts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The part that each row, or unit, is in. firsts [parts + 1]: rising."""
    return np.searchsorted(firsts, numbers, side="right") - 1


def _concatenated(parts: Sequence[Examples], row_ids: NDArray[np.int64]) -> Examples:
    """The rows of all parts in arrays of their own, without packs."""

    def flat(of: Callable[[Examples], NDArray[Any] | None]) -> NDArray[Any] | None:
        arrays = [array for part in parts if (array := of(part)) is not None]
        return np.concatenate(arrays) if arrays else None

    ends = np.cumsum([0, *(len(part.tokens) for part in parts)])
    offsets = [part.offsets[1:] + end for part, end in zip(parts, ends[:-1], strict=True)]
    return Examples(
        tokens=np.concatenate([part.tokens for part in parts]),
        offsets=np.concatenate([np.zeros(1, np.int64), *offsets]),
        row_ids=row_ids,
        token_types=flat(lambda part: part.token_types),
        labels=flat(lambda part: part.labels),
        targets=flat(lambda part: part.targets),
    )
