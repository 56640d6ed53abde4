"""Quantisation of keys and values: integer codes, and the scales or minima and steps to decode
them."""

from __future__ import annotations

import torch
from torch import Tensor


def quantise_int8(states: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise keys or values to (codes int8 [..., head_dim], scales float32 [..., 1]), symmetric,
    with the largest magnitude at ±127."""
    states = states.float()
    scales = states.abs().amax(-1, keepdim=True).div_(127)
    scales.clamp_(min=torch.finfo(torch.float32).tiny)  # all-zero states get zero codes, not 0 / 0
    return (states / scales).round_().to(torch.int8), scales


def quantise_int4(states: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Quantise states to (codes uint8 [..., tokens, head_dim / 2], the minimum and the step along
    `dim` float16 [2, ...], with `dim` of size 1).

    states [..., tokens, head_dim]. A byte holds channel c in its low half and channel
    c + head_dim / 2 in its high half.
    """
    states = states.float()
    low, high = (bound.clamp(-65504, 65504) for bound in states.aminmax(dim=dim, keepdim=True))
    ranges = torch.stack([low, (high - low) / 15]).to(torch.float16)
    low, step = ranges.float()
    codes = ((states - low) / torch.where(step > 0, step, 1)).round_().clamp_(0, 15).to(torch.uint8)
    first, second = codes.chunk(2, -1)
    return first | second << 4, ranges
