"""Dropout whose random mask does not cost more than the layer it follows, on processors.

torch draws one 32-bit Mersenne number an element, on one core: a quarter of a step of a small encoder. Here one
64-bit number serves four elements, each with a 16-bit threshold.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LEVELS = 2**16


def keep_mask(shape: torch.Size, p: float) -> tuple[Tensor, float]:
    """(mask of `shape`, True where kept; the probability to be kept, p rounded to 1/65536). From torch's CPU generator."""
    count = shape.numel()
    draws = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    dropped = round(p * LEVELS)
    mask: Tensor = draws.view(torch.int16)[:count].view(shape) >= dropped - LEVELS // 2
    return mask, 1.0 - dropped / LEVELS


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        mask, kept = keep_mask(x.shape, p)
        factor = mask.to(x.dtype).div_(kept)
        ctx.save_for_backward(factor)
        return x * factor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return grads[0] * factor, None


def fast_dropout(x: Tensor, p: float) -> Tensor:
    """x with entries zeroed with probability p and the others scaled by 1 / (1 - p), for x on the CPU; 0 <= p < 1."""
    y: Tensor = _Dropout.apply(x, p) if p else x  # type: ignore[no-untyped-call]
    return y


class FastDropout(nn.Dropout):
    """nn.Dropout that takes the fast mask on the CPU and torch's own kernel elsewhere."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.device.type == "cpu" and self.p < 1:
            return fast_dropout(input, self.p)
        return super().forward(input)


def use_fast_dropout(model: nn.Module) -> None:
    """Replace the model's nn.Dropout modules (not their subclasses, which may do more)."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Dropout:
                setattr(parent, name, FastDropout(child.p).train(child.training))
