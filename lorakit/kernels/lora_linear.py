"""The LoRA linear layer as one operation with its own backward.

Autograd's graph of `F.linear(x, W) + s * F.linear(F.linear(x, A), B)` allocates each product of width `out` twice and
casts the adapter's factors on every use. Here the low-rank product is added into the dense one in place, forward and
backward, and x is saved once (LoRA: arXiv 2106.09685, eq. 3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, mask: Tensor | None
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # [tokens, in]
        a_low, b_low = a.to(x.dtype), (b * scale).to(x.dtype)
        hidden = rows @ a_low.T  # [tokens, rank]
        if mask is not None:
            hidden *= mask
        y = linear(rows, weight, bias).addmm_(hidden, b_low.T)  # [tokens, out]
        ctx.save_for_backward(rows, weight, a_low, b_low, hidden, mask)
        ctx.scale, ctx.shape, ctx.dtypes = scale, x.shape, (a.dtype, b.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a_low, b_low, hidden, mask = ctx.saved_tensors
        grad_y = grads[0].reshape(-1, grads[0].shape[-1])  # [tokens, out]
        grad_hidden = grad_y @ b_low  # [tokens, rank]
        if mask is not None:
            grad_hidden *= mask
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_y @ weight).addmm_(grad_hidden, a_low).view(ctx.shape)
        # Gradients of the factors are summed over tokens in the compute type and kept in the factors' own, float32.
        grad_a = (grad_hidden.T @ rows).to(ctx.dtypes[0]) if ctx.needs_input_grad[3] else None
        grad_b = (grad_y.T @ hidden).to(ctx.dtypes[1]).mul_(ctx.scale) if ctx.needs_input_grad[4] else None
        return grad_x, None, None, grad_a, grad_b, None, None


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, mask: Tensor | None = None
) -> Tensor:
    """W x + bias + scale · B (A x), for a frozen W; with a mask [tokens, rank], W x + bias + scale · B (mask ⊙ (A x)).

    x [..., in] and weight [out, in], bias [out] share one dtype; a [rank, in] and b [out, rank] are float32 (or
    wider) and are cast to it. Returns [..., out] in x's dtype. Gradients go to x, a and b only; rank must be > 0.
    """
    y: Tensor = _LoraLinear.apply(x, weight, bias, a, b, scale, mask)  # type: ignore[no-untyped-call]
    return y
