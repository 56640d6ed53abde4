"""Examples: tokenised rows, and the batches they make.

An optimizer step holds exactly the rows of a seeded order, so the position in the data is the step number and nothing
else. Inside a step, rows of like length share a micro-batch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class Examples:
    """Tokenised rows in flat arrays; row i is tokens[offsets[i]:offsets[i + 1]].

    token_types: as tokens, or None. labels: one a row (int64 classes or float32 values), or None for language
    modelling, where the targets are the tokens from first_target[i] on. row_ids: number of the row in its source.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    row_ids: NDArray[np.int64]
    token_types: NDArray[np.int32] | None = None
    labels: NDArray[np.int64] | NDArray[np.float32] | None = None
    first_target: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    def digest(self) -> str:
        """sha256 of all that training sees of the rows."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.offsets, self.token_types, self.labels, self.first_target):
            digest.update(b"-" if array is None else array.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right to the longest. Padding is told by length, never by token id.

    input_ids, attention_mask and (if the model wants them) token_type_ids [rows, longest]; lengths [rows]; labels
    [rows], or [rows, longest] with -100 where there is no target; row_ids of the source.
    """

    input_ids: Tensor
    attention_mask: Tensor
    lengths: Tensor
    labels: Tensor
    row_ids: list[int]
    token_type_ids: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Real tokens, without padding."""
        return int(self.lengths.sum())

    @property
    def targets(self) -> int:
        """Targets of the loss: rows, or target tokens. The first token of a row is never a target."""
        return int((self.labels[:, 1:] != IGNORED).sum()) if self.labels.ndim == 2 else len(self.row_ids)

    def to(self, device: torch.device) -> Batch:
        moved: dict[str, Any] = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


def steps_per_epoch(rows: int, rows_per_step: int) -> int:
    """Optimizer steps over all rows; the last one may hold fewer."""
    return -(-rows // rows_per_step)


def step_rows(rows: int, rows_per_step: int, step: int, seed: int) -> NDArray[np.int64]:
    """The rows of optimizer step `step` (the first is 1): the seeded order of its epoch, cut into steps."""
    epoch, index = divmod(step - 1, steps_per_epoch(rows, rows_per_step))
    order = np.random.default_rng((seed, epoch)).permutation(rows)
    return order[index * rows_per_step : (index + 1) * rows_per_step]


def micro_batches(lengths: NDArray[np.int64], rows: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """Cut the rows of a step into micro-batches of at most `size` rows of like length, longest first."""
    by_length = rows[np.argsort(-lengths[rows], kind="stable")]
    return [by_length[start : start + size] for start in range(0, len(by_length), size)]


def collate(examples: Examples, rows: NDArray[np.int64], pad_id: int) -> Batch:
    """The batch of these rows."""
    lengths = examples.lengths[rows]
    shape = (len(rows), int(lengths.max()))
    ids = np.full(shape, pad_id, np.int64)
    types = None if examples.token_types is None else np.zeros(shape, np.int64)
    targets = np.full(shape, IGNORED, np.int64)
    for place, row in enumerate(rows):
        start, end = examples.offsets[row], examples.offsets[row + 1]
        ids[place, : end - start] = examples.tokens[start:end]
        if types is not None and examples.token_types is not None:
            types[place, : end - start] = examples.token_types[start:end]
        if examples.first_target is not None:
            first = examples.first_target[row]
            targets[place, first : end - start] = examples.tokens[start + first : end]
    return Batch(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy((np.arange(shape[1]) < lengths[:, None]).astype(np.int64)),
        lengths=torch.from_numpy(lengths),
        labels=torch.from_numpy(targets if examples.labels is None else examples.labels[rows]),
        row_ids=[int(examples.row_ids[row]) for row in rows],
        token_type_ids=None if types is None else torch.from_numpy(types),
    )
