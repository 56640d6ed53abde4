"""Examples: tokenised rows in flat arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Examples:
    """Tokenised rows in flat arrays; row i is tokens[offsets[i]:offsets[i + 1]].

    token_types: parallel to tokens, or None. row_ids: number of each row in its source. labels: one
    per row (int64 classes or float32 values), or None for language modelling. targets [tokens]:
    True for each token to be predicted from those before it in its row; None with labels. The first
    token of a row has none before it, so its mark has no effect. packs [packs + 1]: pack i is the
    rows packs[i]:packs[i + 1], which count as one row of a batch; None if every row does.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    row_ids: NDArray[np.int64]
    token_types: NDArray[np.int32] | None = None
    labels: NDArray[np.int64] | NDArray[np.float32] | None = None
    targets: NDArray[np.bool_] | None = None
    packs: NDArray[np.int64] | None = None

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

    def rows_of(self, units: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of these units, in their order."""
        if self.packs is None:
            return units
        spans = zip(self.packs[units], self.packs[units + 1], strict=True)
        return np.concatenate([np.arange(0), *(np.arange(start, end) for start, end in spans)])

    def digest(self) -> str:
        """sha256 of everything in the rows that affects training."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.offsets, self.token_types, self.labels, self.targets):
            digest.update(b"-" if array is None else array.tobytes())
        if self.packs is not None:
            digest.update(self.packs.tobytes())
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
