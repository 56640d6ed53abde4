"""Softmax of attention scores, with dropout of the weights, and of logits, one tile at a time.

A kernel in C makes one pass over memory where torch makes several, and computes in float32 for
every type. It takes contiguous bfloat16 and float32 tensors on the CPU; for all others, and without
a compiler, torch's operations compute the same. The functions here do not use autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.kernels.dropout import keep_mask, levels_dropped
from lorakit.kernels.in_c import (
    FLOAT,
    FLOATS,
    INT,
    INT32S,
    NOTHING,
    POINTER,
    THREADS,
    Library,
    is_bf16,
    takes,
)

LONGEST = 2**16  # most keys of one row of scores, which the kernel in C keeps on its stack

_OPTIONS = (*[INT] * 7, FLOAT, INT, THREADS)  # see `_options`
_C = Library(
    "softmax",
    {
        "softmax_forward": (NOTHING, POINTER, POINTER, INT32S, *_OPTIONS),
        "softmax_backward": (NOTHING, POINTER, POINTER, INT32S, *_OPTIONS),
        "cross_entropy_tile": (NOTHING, POINTER, *[FLOATS] * 3, *[INT] * 3, THREADS),
    },
)


def softmax_forward(
    scores: Tensor, keys: Tensor, causal: bool, p: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Compute (the weights after dropout, the weights before it) of attention scores [rows, heads,
    queries, keys_longest], without autograd.

    `scores` is overwritten with the weights before dropout; without dropout the two are one tensor.
    keys [rows] int32: the number of real keys of each row; the others get a weight of exactly 0,
    and a query without keys gets only zeros. causal: query i sees the keys up to i + keys_longest -
    queries. The seed (`draw_seed`) determines the dropout, of probability 0 <= p < 1.
    """
    if _is_for_c(scores, keys):
        dropped = torch.empty_like(scores) if p else scores
        _C.call(
            "softmax_forward",
            scores,
            dropped if p else None,
            keys,
            *_options(scores, causal, p, seed),
        )
        return dropped, scores
    unseen = ~_seen(scores, keys, causal)
    raw = scores.float().masked_fill(unseen, -torch.inf)
    exact = raw.softmax(-1).masked_fill(unseen | (raw == -torch.inf).all(-1, keepdim=True), 0)
    return (
        (exact * _drop_factor(scores, p, seed)).to(scores.dtype) if p else scores.copy_(exact)
    ), scores.copy_(exact)


def softmax_backward(
    weights: Tensor, grad: Tensor, keys: Tensor, causal: bool, p: float = 0.0, seed: int = 0
) -> Tensor:
    """Compute the gradient of the scores, which overwrites `grad`, from the weights before dropout
    and the gradient `grad` of the weights after it.

    The other arguments are those of `softmax_forward`. The result is w (g - sum(w g)), where g is
    the gradient of the weights w before dropout.
    """
    if _is_for_c(weights, keys) and takes("softmax", weights, grad):
        _C.call("softmax_backward", weights, grad, keys, *_options(weights, causal, p, seed))
        return grad
    before = grad.float() * _drop_factor(weights, p, seed) if p else grad.float()
    before = before.masked_fill(~_seen(weights, keys, causal), 0)
    exact = weights.float()
    return grad.copy_(exact * (before - (exact * before).sum(-1, keepdim=True)))


def _is_for_c(scores: Tensor, keys: Tensor) -> bool:
    return (
        0 < scores.shape[-1] <= LONGEST
        and takes("softmax", scores)
        and keys.dtype == torch.int32
        and keys.is_contiguous()
    )


def _options(scores: Tensor, causal: bool, p: float, seed: int) -> tuple[int | float, ...]:
    return *scores.shape, causal, seed, *levels_dropped(p), is_bf16(scores)


def _seen(scores: Tensor, keys: Tensor, causal: bool) -> Tensor:
    """A mask [rows, 1, 1 or queries, keys_longest], True where a query sees a key."""
    queries, longest = scores.shape[-2:]
    place = torch.arange(longest, device=scores.device)
    seen = place < keys.view(-1, 1, 1, 1)
    return (
        seen & (place <= torch.arange(longest - queries, longest, device=scores.device)[:, None])
        if causal
        else seen
    )


def _drop_factor(scores: Tensor, p: float, seed: int) -> Tensor:
    """The factors of dropout, 0 or 1 / (1 - p); float32, in the shape of `scores`."""
    mask, kept = keep_mask(scores.shape, p, torch.Generator().manual_seed(seed))
    return mask.to(scores.device).float().div_(kept)


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
