"""Norms over the last dimension: RMS norm, layer norm, and layer norm of a sum with dropout.

A kernel in C makes one pass over memory where torch makes several, and computes in float32 for
every type. It takes contiguous bfloat16 and float32 tensors on the CPU; for all others, and without
a compiler, torch's operations compute the same. A kernel can not be differentiated twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lorakit.kernels.dropout import Drop, draw_drop, fast_dropout
from lorakit.kernels.in_c import (
    FLOAT,
    FLOATS,
    INT,
    NOTHING,
    POINTER,
    THREADS,
    Library,
    is_bf16,
    takes,
)

_SIZES, _DROP = (INT, INT), (INT, INT, FLOAT)  # (rows, width of a row); `Drop`
_END = (INT, THREADS)
_STATISTICS = (FLOATS, FLOATS)  # mean and 1 / deviation of each row
_C = Library(
    "norms",
    {
        "rms_norm": (NOTHING, POINTER, FLOATS, POINTER, FLOATS, *_SIZES, FLOAT, *_END),
        "rms_norm_backward": (NOTHING, POINTER, FLOATS, *[POINTER] * 3, FLOATS, *_SIZES, *_END),
        "layer_norm": (
            NOTHING,
            POINTER,
            FLOATS,
            FLOATS,
            POINTER,
            *_STATISTICS,
            *_SIZES,
            FLOAT,
            *_END,
        ),
        "layer_norm_backward": (
            NOTHING,
            POINTER,
            FLOATS,
            *[POINTER] * 2,
            *_STATISTICS,
            *_SIZES,
            *_END,
        ),
        "add_layer_norm": (
            *(NOTHING, POINTER, POINTER, FLOATS, FLOATS, POINTER, POINTER, *_STATISTICS),
            *(*_SIZES, FLOAT, *_DROP, *_END),
        ),
        "add_layer_norm_backward": (
            *(NOTHING, POINTER, FLOATS, *[POINTER] * 3, *_STATISTICS, *_SIZES, *_DROP, *_END),
        ),
    },
)


def rms_norm_in_c(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute (`rms_norm` of x, 1 / the root mean square of each row) without autograd; x is
    contiguous, the weight float32."""
    y, rstd = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    _C.call("rms_norm", x, weight, y, rstd, rstd.numel(), x.shape[-1], eps, is_bf16(x))
    return y, rstd


def rms_norm_backward_in_c(
    x: Tensor,
    weight: Tensor,
    grad_y: Tensor,
    rstd: Tensor,
    grad_x: Tensor,
    residual: Tensor | None = None,
) -> None:
    """Fill grad_x, which may be grad_y, with the gradient of x plus the residual; all tensors are
    contiguous."""
    _C.call(
        "rms_norm_backward",
        x,
        weight,
        grad_y,
        residual,
        grad_x,
        rstd,
        rstd.numel(),
        x.shape[-1],
        is_bf16(x),
    )


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = rms_norm_in_c(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, weight, rstd = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        rms_norm_backward_in_c(x, weight, grads[0].contiguous(), rstd, grad_x)
        return grad_x, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * (x / sqrt(mean(x²) + eps)) over the last dimension (Zhang & Sennrich, arXiv
    1910.07467, eq. 4).

    x [..., width], weight [width]. As in transformers' Llama, x is normalised in float32, cast to
    its type and then multiplied by the weight.
    """
    if weight.dtype == x.dtype and takes("norms", x, weight) and not _trained(weight):
        y: Tensor = _RmsNorm.apply(x, weight.float(), eps)  # type: ignore[no-untyped-call]
        return y
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        y, statistics = torch.empty_like(x), torch.empty(2, *x.shape[:-1])
        rows, width = statistics[0].numel(), x.shape[-1]
        _C.call(
            "layer_norm",
            x,
            weight,
            bias,
            y,
            statistics[0],
            statistics[1],
            rows,
            width,
            eps,
            is_bf16(x),
        )
        ctx.save_for_backward(x, weight, statistics)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight, (mean, rstd) = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        grad_y = grads[0].contiguous()
        _C.call(
            "layer_norm_backward",
            x,
            weight,
            grad_y,
            grad_x,
            mean,
            rstd,
            mean.numel(),
            x.shape[-1],
            is_bf16(x),
        )
        return grad_x, None, None, None


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """weight * (x - mean) / sqrt(variance + eps) + bias over the last dimension (Ba et al., arXiv
    1607.06450, eq. 4).

    x [..., width], weight and bias [width] or None; weight and bias may be float32 where x is not.
    """
    if weight is None or _trained(weight, bias) or not takes("norms", x):
        return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    shift = None if bias is None else bias.float()
    y: Tensor = _LayerNorm.apply(x, weight.float(), shift, eps)  # type: ignore[no-untyped-call]
    return y


def add_layer_norm_in_c(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    drop: Drop,
    z: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute (`add_layer_norm`, mean and 1 / deviation of each row [2, rows]) of contiguous
    tensors, without autograd; fills z, which may be x, with the sum that is normalised. Weight and
    bias are float32."""
    y, statistics = torch.empty_like(x), x.new_empty(2, *x.shape[:-1], dtype=torch.float32)
    options = statistics[0].numel(), x.shape[-1], eps, *drop, is_bf16(x)
    _C.call(
        "add_layer_norm", x, residual, weight, bias, z, y, statistics[0], statistics[1], *options
    )
    return y, statistics


def add_layer_norm_backward_in_c(
    z: Tensor, weight: Tensor, grad_y: Tensor, statistics: Tensor, drop: Drop
) -> tuple[Tensor, Tensor]:
    """Compute (the gradient of the residual, the gradient of x); the two are one tensor without
    dropout."""
    grad_z = torch.empty_like(z)
    grad_x = torch.empty_like(z) if drop[1] else grad_z
    (mean, rstd), options = statistics, (z.numel() // z.shape[-1], z.shape[-1], *drop, is_bf16(z))
    _C.call("add_layer_norm_backward", z, weight, grad_y, grad_z, grad_x, mean, rstd, *options)
    return grad_z, grad_x


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        p: float,
    ) -> Tensor:
        z, ctx.drop = torch.empty_like(x), draw_drop(p)
        y, statistics = add_layer_norm_in_c(x, residual, weight, bias, eps, ctx.drop, z)
        ctx.save_for_backward(z, weight, statistics)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, statistics = ctx.saved_tensors
        grad_z, grad_x = add_layer_norm_backward_in_c(
            z, weight, grads[0].contiguous(), statistics, ctx.drop
        )
        return grad_x, grad_z, None, None, None, None


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, p: float = 0.0
) -> Tensor:
    """Compute `layer_norm` of residual + dropout(x), both [..., width]; p is the dropout
    probability."""
    if x.shape != residual.shape or _trained(weight, bias) or not takes("norms", x, residual):
        return layer_norm(residual + fast_dropout(x, p), weight, bias, eps)
    shift = None if bias is None else bias.float()
    y: Tensor = _AddLayerNorm.apply(x, residual, weight.float(), shift, eps, p)  # type: ignore[no-untyped-call]
    return y


def _trained(*parameters: Tensor | None) -> bool:
    """True if any of them needs a gradient, which the kernels do not compute."""
    return torch.is_grad_enabled() and any(
        parameter is not None and parameter.requires_grad for parameter in parameters
    )
