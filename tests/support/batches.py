"""Batches of random tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorakit.data.batches import IGNORED, Batch

WORDS, WINDOW = 48, 20


def batch_of(
    lengths: Sequence[int], task: str, seed: int = 0, pad: int = 0, first_target: int = 1
) -> Batch:
    """Random words in rows of these lengths. first_target: rows of causal-lm up to this long have
    no target."""
    rng = torch.Generator().manual_seed(seed)
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(3, WORDS, real.shape, generator=rng).masked_fill(~real, pad)
    labels = torch.randint(2, (len(lengths),), generator=rng)
    if task == "causal-lm":
        labels = ids.masked_fill(~real | (torch.arange(max(lengths)) < first_target), IGNORED)
    return Batch(ids, real.long(), torch.tensor(lengths), labels, list(range(len(lengths))))
