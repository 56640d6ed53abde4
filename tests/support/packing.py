"""Packed rows, their inputs, and the attention of a plain loop over rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorakit.kernels import packed_attention
from lorakit.kernels.packing import (
    Packing,
)

RAGGED = (7, 2, 12, 1)


def packing_of(lengths: Sequence[int], extra: int = 0) -> Packing:
    """extra: how much wider the padded batch is than its longest row."""
    return Packing(lengths, max(lengths) + extra)


def rows_of(x: Tensor, packing: Packing) -> list[Tensor]:
    """[1, tokens, …] taken apart: [length, …] of each row, in packed order."""
    return list(x[0, : packing.real].split(packing.lengths))


def inputs(
    packing: Packing,
    heads: int,
    kv_heads: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    spread: float = 1.0,
) -> list[Tensor]:
    """Query, key and value [1, (kv) heads, tokens, width] as models hand them over, tokens outside
    of heads in memory. Fillers hold anything that is finite."""
    rng = torch.Generator().manual_seed(seed)
    made = []
    for count in (heads, kv_heads, kv_heads):
        x = torch.randn(1, packing.tokens, count, width, generator=rng) * spread
        x[:, packing.real :] *= 100
        made.append(x.to(dtype).transpose(1, 2).requires_grad_())
    return made


def reference(
    tensors: Sequence[Tensor],
    lengths: Sequence[int],
    causal: bool,
    scaling: float,
    factors: Sequence[Tensor] | None = None,
) -> Tensor:
    """softmax(scaling · q kᵀ) v of every row by itself, in float64: [1, real tokens, heads, width].
    factors: what dropout multiplies the weights of each row with, [heads, queries, keys]."""
    query, key, value = (x.double() for x in tensors)
    groups = query.shape[1] // key.shape[1]
    made, start = [], 0
    for row, length in enumerate(lengths):
        own = slice(start, start + length)
        q, k, v = (
            query[0, :, own],
            *(x[0, :, own].repeat_interleave(groups, 0) for x in (key, value)),
        )
        scores = scaling * (q @ k.transpose(1, 2))
        if causal:
            scores = scores.masked_fill(
                torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf
            )
        weights = scores.softmax(-1)
        made.append(((weights if factors is None else weights * factors[row]) @ v).transpose(0, 1))
        start += length
    return torch.cat(made)[None]


def upstream_of(y: Tensor) -> Tensor:
    """[1, real tokens, heads, width], whose sum is not one of many zeros."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)


def check(
    packing: Packing,
    tensors: list[Tensor],
    causal: bool,
    scaling: float,
    allowed: float,
    factors: Sequence[Tensor] | None = None,
    dropout: float = 0.0,
) -> None:
    """Forward and all gradients within `allowed`, as a share of the norm; gradients of fillers are
    zero."""
    y = packed_attention.packed_attention(*tensors, packing, causal, scaling, dropout)
    assert y.shape == (1, packing.tokens, tensors[0].shape[1], tensors[0].shape[3])
    assert y.dtype == tensors[0].dtype
    exact = reference(tensors, packing.lengths, causal, scaling, factors)
    upstream = upstream_of(exact)
    ours = [
        y[:, : packing.real],
        *torch.autograd.grad((y[:, : packing.real] * upstream.to(y.dtype)).sum(), tensors),
    ]
    theirs = [exact, *torch.autograd.grad((exact * upstream.to(y.dtype).double()).sum(), tensors)]
    for name, mine, right in zip(["y", "query", "key", "value"], ours, theirs, strict=True):
        assert mine.isfinite().all(), name
        mine, right = mine.detach().double(), right.detach().double()
        # a row of one token has no gradient to be relative to
        error = float((mine - right).norm() / right.norm().clamp(min=1.0))
        assert error <= allowed, (name, error)
        if name != "y":
            assert not mine[:, :, packing.real :].any(), f"{name}: a gradient for fillers"


def dropout_factors(
    packing: Packing, query: Tensor, key: Tensor, causal: bool, scaling: float, p: float, seed: int
) -> list[Tensor]:
    """What each weight is multiplied with, [heads, queries, keys] of each row: read off with values
    that are one-hot by place."""
    width, lengths = query.shape[3], packing.lengths
    place = torch.cat(
        [*map(torch.arange, lengths), torch.zeros(packing.tokens - packing.real, dtype=torch.int64)]
    )
    parts: list[list[Tensor]] = [[] for _ in lengths]
    for start in range(0, max(lengths), width):
        value = torch.zeros(1, packing.tokens, width, dtype=query.dtype)
        here = (place >= start) & (place < start + width)
        value[0, here, place[here] - start] = 1
        value = (
            value[:, None]
            .expand(1, key.shape[1], -1, -1)
            .transpose(1, 2)
            .contiguous()
            .transpose(1, 2)
        )
        torch.manual_seed(seed)
        dropped = packed_attention.packed_attention(query, key, value, packing, causal, scaling, p)
        exact = packed_attention.packed_attention(query, key, value, packing, causal, scaling)
        for found, one, other in zip(
            parts, rows_of(dropped, packing), rows_of(exact, packing), strict=True
        ):
            found.append(torch.where(other == 0, 0, one / other).transpose(0, 1))
    return [
        torch.cat(found, -1)[..., :length].detach()
        for found, length in zip(parts, lengths, strict=True)
    ]
