"""Dropout with a fast random mask, on the CPU.

torch draws one 32-bit Mersenne number per element, on one core: a quarter of a step of a small
encoder. The kernel in C (csrc/dropout.c) draws one seed per call from torch's generator, computes
the mask from the seed and the elements' indices, and recomputes it in the backward pass, so no mask
is saved and the result does not depend on the number of threads. The implementation in torch draws
one 64-bit number for four elements, with a 16-bit threshold for each. The masks of the two differ,
but have the same distribution.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import dropout

from lorakit.kernels.in_c import (
    FLOAT,
    INT,
    NOTHING,
    POINTER,
    THREADS,
    Library,
    is_bf16,
    takes,
)

LEVELS = 2**16
ROW = 4096  # elements that share a key where the kernel in C knows no rows

# (seed, the number of 65536 levels that are dropped, the factor for elements that are kept)
Drop = tuple[int, int, float]

_C = Library("dropout", {"dropout": (NOTHING, *[POINTER] * 2, *[INT] * 4, FLOAT, INT, THREADS)})


def draw_seed() -> int:
    """Draw a seed of 63 bits from torch's CPU generator."""
    return int(torch.empty((), dtype=torch.int64).random_())


def levels_dropped(p: float) -> tuple[int, float]:
    """(the number of 65536 levels that are dropped, the factor for elements that are kept) for a
    probability 0 <= p < 1."""
    dropped = min(round(p * LEVELS), LEVELS - 1)
    return dropped, LEVELS / (LEVELS - dropped)


def draw_drop(p: float) -> Drop:
    """Arguments of a kernel for dropout with probability 0 <= p < 1; draws a seed if p > 0."""
    return draw_seed() if p else 0, *levels_dropped(p)


def keep_mask(
    shape: torch.Size, p: float, generator: torch.Generator | None = None
) -> tuple[Tensor, float]:
    """Draw (mask of `shape`, True where kept; the probability of keeping, with p rounded to
    1/65536).

    The generator defaults to torch's CPU generator.
    """
    count = shape.numel()
    draws = torch.empty(-(-count // 4), dtype=torch.int64).random_(
        -(2**63), None, generator=generator
    )
    dropped, factor = levels_dropped(p)
    mask: Tensor = draws.view(torch.int16)[:count].view(shape) >= dropped - LEVELS // 2
    return mask, 1 / factor


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


class _NativeDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        ctx.seed, ctx.p = draw_seed(), p
        return _apply_mask(x, ctx.seed, p)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _apply_mask(grads[0].contiguous(), ctx.seed, ctx.p), None


def _apply_mask(x: Tensor, seed: int, p: float) -> Tensor:
    y = torch.empty_like(x)
    _C.call("dropout", x, y, x.numel(), ROW, seed, *levels_dropped(p), is_bf16(x))
    return y


def fast_dropout(x: Tensor, p: float) -> Tensor:
    """Zero entries of x with probability 0 <= p < 1 and scale the others by 1 / (1 - p), for x on
    the CPU.

    p is rounded to 1/65536. torch.manual_seed determines the mask.
    """
    if not p:
        return x
    if torch.compiler.is_compiling():  # torch.compile fuses its own
        return dropout(x, p)
    y: Tensor = (_NativeDropout if takes("dropout", x) else _Dropout).apply(x, p)  # type: ignore[no-untyped-call]
    return y


class FastDropout(nn.Dropout):
    """nn.Dropout with the fast mask on the CPU, and torch's own kernel on other devices."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.device.type == "cpu" and self.p < 1:
            return fast_dropout(input, self.p)
        return super().forward(input)


def use_fast_dropout(model: nn.Module) -> list[str]:
    """Replace the model's nn.Dropout modules (not their subclasses, which may do more). Returns
    their names."""
    replaced = []
    for prefix, parent in list(model.named_modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Dropout:
                setattr(parent, name, FastDropout(child.p).train(child.training))
                replaced.append(f"{prefix}.{name}".lstrip("."))
    return replaced
