"""Rotary position embeddings of packed tokens in one pass over memory, forward and backward, where
transformers makes six (RoFormer, arXiv 2104.09864, eq. 34, in the form that pairs the two halves of
a head).

A model of transformers calls `apply_rotary_pos_emb` of its own module. That function is replaced by
one that uses the kernel where it can, and else calls the original.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorakit.kernels.in_c import INT, NOTHING, POINTER, THREADS, Library, is_bf16, takes
from lorakit.kernels.optimisation import Optimisation, Unsupported, attempt

log = logging.getLogger("lorakit")

NAME = "apply_rotary_pos_emb"

_C = Library("rotary", {"rotary": (NOTHING, *[POINTER] * 4, *[INT] * 9, THREADS)})


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        grad = grads[0] if grads[0].stride(3) == 1 else grads[0].contiguous()
        return _turned(grad, cos, sin, back=True), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """Rotate x [1, heads, tokens, width], the last dimension contiguous; returns the same shape,
    with tokens outside heads in memory."""
    _, heads, tokens, width = x.shape
    y = x.new_empty(1, tokens, heads, width).transpose(1, 2)
    turn_in_c(x, y, cos, sin, back)
    return y


def turn_in_c(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, back: bool) -> None:
    """Fill y, which may be x, with x rotated, or rotated backwards: [1, heads, tokens, width], the
    last dimension contiguous. cos and sin [1, tokens, width], contiguous."""
    _, heads, tokens, width = x.shape
    strides = x.stride(2), x.stride(1), y.stride(2), y.stride(1)
    _C.call("rotary", x, y, cos, sin, tokens, heads, width // 2, *strides, back, is_bf16(x))


def _fits(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    return (
        x.ndim == 4
        and len(x) == 1
        and x.stride(3) == 1
        and x.shape[3] % 2 == 0
        and cos.shape == sin.shape == (1, x.shape[2], x.shape[3])
        and takes("rotary", cos, sin, x[:, :0])
        and not (cos.requires_grad or sin.requires_grad)
    )


def faster(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """One pass in place of transformers' function, which it falls back on."""

    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if (
            torch.compiler.is_compiling()
            or args
            or kwargs
            or not (_fits(q, cos, sin) and _fits(k, cos, sin))
        ):
            return theirs(q, k, cos, sin, *args, **kwargs)
        return _Rotary.apply(q, cos, sin), _Rotary.apply(k, cos, sin)  # type: ignore[no-untyped-call]

    apply_rotary_pos_emb.theirs = theirs  # type: ignore[attr-defined]
    return apply_rotary_pos_emb


class FastRotary(Optimisation):
    """Replacement of the rotary function in one of transformers' modules. It is verified, since
    some models rotate pairs of neighbours instead of halves, or only a part of a head."""

    trouble = "its rotary embeddings take other arguments"

    def __init__(self, module: ModuleType, theirs: Callable[..., Any]) -> None:
        self.module, self.theirs = module, theirs

    def install(self) -> None:
        setattr(self.module, NAME, faster(self.theirs))

    def verify(self) -> None:
        rng = torch.Generator().manual_seed(0)
        q, k = (torch.randn(1, heads, 3, 8, generator=rng) for heads in (2, 1))
        cos, sin = (torch.randn(1, 3, 8, generator=rng) for _ in range(2))
        if not _fits(q, cos, sin):
            raise Unsupported("there is no kernel")
        try:
            expected = self.theirs(q, k, cos, sin)
        except (TypeError, RuntimeError, ValueError) as error:
            raise Unsupported(self.trouble) from error
        pairs = zip(getattr(self.module, NAME)(q, k, cos, sin), expected, strict=True)
        if not all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in pairs):
            raise Unsupported("its rotary embeddings are others")

    def undo(self) -> None:
        setattr(self.module, NAME, self.theirs)


def use_fast_rotary(model: nn.Module) -> None:
    """Replace the rotary function in the modules that define the model's classes, wherever the
    kernel gives the same results."""
    for name in {type(module).__module__ for module in model.modules()}:
        theirs = getattr(sys.modules[name], NAME, None)
        if theirs is None or hasattr(theirs, "theirs"):
            continue
        if reason := attempt(FastRotary(sys.modules[name], theirs)):
            log.debug("%s.%s stays: %s", name, NAME, reason)


def turns_halves(attention: nn.Module) -> bool:
    """True if `use_fast_rotary` found that the module's class rotates the halves of heads as the
    kernel does."""
    return hasattr(getattr(sys.modules[type(attention).__module__], NAME, None), "theirs")
