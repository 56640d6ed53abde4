"""Softmax of logits, one tile of the vocabulary at a time.

A kernel in C makes one pass over memory where torch makes several, and computes in float32 for
every type. It takes contiguous bfloat16 and float32 tensors on the CPU; for all others, and without
a compiler, torch's operations compute the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.kernels.in_c import FLOATS, INT, NOTHING, POINTER, THREADS, Library, is_bf16, takes

_C = Library(
    "softmax",
    {
        "cross_entropy_tile": (NOTHING, POINTER, *[FLOATS] * 3, *[INT] * 3, THREADS),
    },
)


def cross_entropy_tile(logits: Tensor, maxima: Tensor, sums: Tensor) -> Tensor:
    """Process one tile of an online softmax over the vocabulary (Milakov & Gimelshein, arXiv
    1805.02867, algorithm 3), without autograd.

    logits [tokens, tile] are overwritten with exp(logit - new maximum); maxima and sums [tokens]
    float32, initially -inf and 0, are updated. Returns exp(old maximum - new maximum) [tokens], the
    factor for values accumulated with the old maxima.
    """
    if (
        takes("softmax", logits)
        and takes("softmax", maxima, sums)
        and maxima.dtype == torch.float32
    ):
        factors = torch.empty_like(maxima)
        _C.call("cross_entropy_tile", logits, maxima, sums, factors, *logits.shape, is_bf16(logits))
        return factors
    wide = logits.float()
    tops = torch.maximum(maxima, wide.amax(-1))
    # only -inf so far: exp(-inf - 0), not exp(-inf + inf)
    base = tops.masked_fill(tops == -torch.inf, 0)
    exact = wide.sub_(base[:, None]).exp_()
    factors = (maxima - base).exp_()
    sums.mul_(factors).add_(exact.sum(-1))
    maxima.copy_(tops)
    logits.copy_(exact)
    return factors
