"""Activations of feed-forward layers: GELU, SiLU and the gated SiLU.

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

from lorakit.kernels.in_c import INT, NOTHING, POINTER, THREADS, Library, is_bf16, takes

_ONE = (NOTHING, *[POINTER] * 2, *[INT] * 2, THREADS)  # functions of one tensor
_ONE_BACKWARD = (NOTHING, *[POINTER] * 3, *[INT] * 2, THREADS)
_NAMES = ("gelu", "gelu_tanh", "silu")
_C = Library(
    "activations",
    dict.fromkeys(_NAMES, _ONE)
    | {f"{name}_backward": _ONE_BACKWARD for name in _NAMES}
    | {
        "silu_mul": (NOTHING, *[POINTER] * 3, *[INT] * 5, THREADS),
        "silu_mul_backward": (NOTHING, *[POINTER] * 5, *[INT] * 6, THREADS),
    },
)


def activation_in_c(name: str, x: Tensor) -> Tensor:
    """Compute the activation of that name in csrc/activations.c, without autograd; x is
    contiguous."""
    y = torch.empty_like(x)
    _C.call(name, x, y, x.numel(), is_bf16(x))
    return y


def activation_backward_in_c(name: str, x: Tensor, grad_y: Tensor, grad_x: Tensor) -> None:
    """Fill grad_x, which may be x or grad_y, with the gradient of x."""
    _C.call(f"{name}_backward", x, grad_y, grad_x, x.numel(), is_bf16(x))


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.name = name
        return activation_in_c(name, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        activation_backward_in_c(ctx.name, x, grads[0].contiguous(), grad_x)
        return grad_x, None


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """x Φ(x), or its tanh form with approximate="tanh" (Hendrycks & Gimpel, arXiv 1606.08415,
    section 2). Any shape."""
    if not takes("activations", x):
        return functional.gelu(x, approximate=approximate)
    y: Tensor = _Activation.apply(x, "gelu_tanh" if approximate == "tanh" else "gelu")  # type: ignore[no-untyped-call]
    return y


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x)) (Hendrycks & Gimpel, arXiv 1606.08415, section 2). Any shape."""
    if not takes("activations", x):
        return functional.silu(x)
    y: Tensor = _Activation.apply(x, "silu")  # type: ignore[no-untyped-call]
    return y


def silu_mul_in_c(gate: Tensor, up: Tensor) -> Tensor:
    """Compute `silu_mul` of two tensors [rows, width] with contiguous rows, without autograd."""
    y = gate.new_empty(gate.shape)
    _C.call("silu_mul", gate, up, y, *gate.shape, gate.stride(0), up.stride(0), is_bf16(gate))
    return y


def silu_mul_backward_in_c(
    gate: Tensor, up: Tensor, grad_y: Tensor, grad_gate: Tensor, grad_up: Tensor
) -> None:
    """Fill grad_gate and grad_up [rows, width], which have equal strides and may be gate and up
    themselves."""
    strides = (gate.stride(0), up.stride(0), grad_gate.stride(0))
    _C.call(
        "silu_mul_backward",
        gate,
        up,
        grad_y,
        grad_gate,
        grad_up,
        *gate.shape,
        *strides,
        is_bf16(gate),
    )


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu_mul_in_c(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_y = grads[0].contiguous()
        # Side by side in memory: where one product computed gate and up, its backward pass reads
        # the two gradients as one tensor.
        grad_gate, grad_up = grad_y.new_empty(len(grad_y), 2 * grad_y.shape[1]).chunk(2, 1)
        silu_mul_backward_in_c(gate, up, grad_y, grad_gate, grad_up)
        return grad_gate, grad_up


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both [..., width] (Shazeer, arXiv 2002.05202, eq. 6). They may be halves of
    one tensor [..., 2 width]."""
    rows = [_rows(x) for x in (gate, up)] if gate.shape == up.shape else [None, None]
    if rows[0] is None or rows[1] is None or not takes("activations", rows[0][:0], rows[1][:0]):
        return functional.silu(gate) * up
    y: Tensor = _SiluMul.apply(rows[0], rows[1])  # type: ignore[no-untyped-call]
    return y.view(gate.shape)


def _rows(x: Tensor) -> Tensor | None:
    """View x [..., width] as [rows, width] with contiguous rows; None where no such view
    exists."""
    if x.dim() == 0 or x.numel() == 0 or x.stride(-1) != 1:
        return None
    try:
        return x.view(-1, x.shape[-1])
    except RuntimeError:
        return None
