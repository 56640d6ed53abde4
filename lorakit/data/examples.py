"""Examples: tokenised rows in flat arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.data.store import let_go

ARRAYS = ("tokens", "offsets", "row_ids", "token_types", "labels", "targets", "packs")
# Those that training depends on, in the order in which they are hashed.
DIGESTED = ("tokens", "offsets", "token_types", "labels", "targets", "packs")
BLOCK_TOKENS = 4_000_000  # tokens that are looked at, or hashed, at once


@dataclass(frozen=True)
class Known:
    """The digest of exactly these arrays, for examples whose hashing takes seconds."""

    sha256: str
    arrays: tuple[NDArray[Any] | None, ...]


@dataclass(frozen=True)
class Examples:
    """Tokenised rows in flat arrays; row i is tokens[offsets[i]:offsets[i + 1]].

    token_types: parallel to tokens, or None. row_ids: number of each row in its source. labels: one
    per row (int64 classes or float32 values), or None for language modelling. targets [tokens]:
    True for each token to be predicted from those before it in its row; None with labels. The first
    token of a row has none before it, so its mark has no effect. packs [packs + 1]: pack i is the
    rows packs[i]:packs[i + 1], which count as one row of a batch; None if every row does.

    The arrays may be mapped files (lorakit/data/store.py), larger than memory: code that needs all
    tokens goes by `blocks`.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    row_ids: NDArray[np.int64]
    token_types: NDArray[np.int32] | None = None
    labels: NDArray[np.int64] | NDArray[np.float32] | None = None
    targets: NDArray[np.bool_] | None = None
    packs: NDArray[np.int64] | None = None
    known: Known | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row [rows]; cached, since every step needs them."""
        return np.diff(self.offsets)

    @cached_property
    def unit_lengths(self) -> NDArray[np.int64]:
        """Tokens of each unit of a batch [units]: a pack, or a row where there are no packs."""
        return self.lengths if self.packs is None else np.diff(self.offsets[self.packs])

    @property
    def token_count(self) -> int:
        return len(self.tokens)

    @property
    def has_packs(self) -> bool:
        return self.packs is not None

    def where(self, row_ids: Sequence[int]) -> str:
        """These rows in words, by their numbers in the source: "row 3", "rows 3 and 5"."""
        names = [str(number) for number in dict.fromkeys(sorted(row_ids))]
        if len(names) == 1:
            return f"row {names[0]}"
        return f"rows {', '.join(names[:-1])} and {names[-1]}"

    def count_targets(self, rows: NDArray[np.int64]) -> int:
        """The number of targets of the loss in these rows, as `Batch.targets` counts them."""
        if self.targets is None:
            return len(rows)
        spans = zip(self.offsets[rows] + 1, self.offsets[rows + 1], strict=True)
        return sum(int(self.targets[start:end].sum()) for start, end in spans)

    def rows_of(self, units: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of these units, in their order."""
        if self.packs is None:
            return units
        spans = zip(self.packs[units], self.packs[units + 1], strict=True)
        return np.concatenate([np.arange(0), *(np.arange(start, end) for start, end in spans)])

    def blocks(self, tokens: int = BLOCK_TOKENS) -> Iterator[tuple[int, Examples]]:
        """(first row, the rows from there on), block by block, without packs: about so many tokens,
        at least one row. Pages of mapped files are let go after each block."""
        start = 0
        while start < len(self):
            end = int(np.searchsorted(self.offsets, int(self.offsets[start]) + tokens, "right")) - 1
            end = max(end, start + 1)
            span = slice(int(self.offsets[start]), int(self.offsets[end]))
            yield (
                start,
                Examples(
                    tokens=self.tokens[span],
                    offsets=self.offsets[start : end + 1] - span.start,
                    row_ids=self.row_ids[start:end],
                    token_types=None if self.token_types is None else self.token_types[span],
                    labels=None if self.labels is None else self.labels[start:end],
                    targets=None if self.targets is None else self.targets[span],
                ),
            )
            self.let_go()
            start = end

    def let_go(self) -> None:
        """Let go of the pages of mapped files."""
        for name in ARRAYS:
            let_go(getattr(self, name))

    def digest(self) -> str:
        """sha256 of everything in the rows that affects training."""
        arrays = tuple(getattr(self, name) for name in DIGESTED)
        if self.known is not None and all(
            one is other for one, other in zip(arrays, self.known.arrays, strict=True)
        ):
            return self.known.sha256
        digest = hashlib.sha256()
        for name, array in zip(DIGESTED, arrays, strict=True):
            if array is not None:
                hash_array(digest, array)
            elif name != "packs":
                digest.update(b"-")
        return digest.hexdigest()

    def select(self, rows: NDArray[np.int64]) -> Examples:
        """The examples of these rows alone, in this order, without packs."""
        spans = zip(self.offsets[rows], self.offsets[rows + 1], strict=True)
        places = np.concatenate([np.arange(0), *(np.arange(start, end) for start, end in spans)])
        return Examples(
            tokens=self.tokens[places],
            offsets=np.concatenate([[0], np.cumsum(self.lengths[rows])]),
            row_ids=self.row_ids[rows],
            token_types=None if self.token_types is None else self.token_types[places],
            labels=None if self.labels is None else self.labels[rows],
            targets=None if self.targets is None else self.targets[places],
        )


def hash_array(digest: Any, array: NDArray[Any]) -> None:
    """Add the bytes of an array to a hash; pages of a mapped file are let go along the way."""
    for start in range(0, len(array), BLOCK_TOKENS):
        digest.update(np.ascontiguousarray(array[start : start + BLOCK_TOKENS]).data)
        let_go(array)
