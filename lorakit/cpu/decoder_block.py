"""A whole block of a Llama (arXiv 2302.13971, section 2.2) as one operation with its own backward: packed rows in bfloat16 on
processors with AMX.

    z = x + attention(rotary(norm(x) Wqkv)) Wo        y = z + (silu(norm(z) Wgate) ⊙ norm(z) Wup) Wdown

Its steps are the kernels that the modules would call. What is gained by having them in one place is memory that is not touched:
new memory is cold, and writing it costs a small operation most of its time. So residuals are added where a product is written and
where a norm's gradient is, rotary embeddings turn queries and keys in place, norms are computed again for the backward pass, and
the gradients of gate and up take their places. (Computing silu(gate) ⊙ up again as well was tried: it costs what it saves.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.kernels import packed_attention as attention
from lorakit.kernels.elementwise import rms_norm_backward_in_c, rms_norm_in_c, silu_mul_backward_in_c, silu_mul_in_c
from lorakit.kernels.lora_linear import BackwardProducts, Factors, Product, flat_factors, forward_in_c, split_factors
from lorakit.kernels.packing import Packing
from lorakit.kernels.rotary import turn_in_c


class Weights(NamedTuple):
    """Frozen parts of a block. Weights [outputs, in] and biases [outputs] or None of the products q/k/v, o, gate/up and down;
    norms [hidden] in float32; head_dim; the factor of attention scores."""

    products: tuple[tuple[Tensor, Tensor | None], ...]
    attention_norm: Tensor
    feed_forward_norm: Tensor
    eps: float
    head_dim: int
    scaling: float


# Layers of each product.
LAYERS = (3, 1, 2, 1)


class _DecoderBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        weights: Weights,
        packing: Packing,
        dropout: float,
        scales: Sequence[float],
        *factors: Tensor | None,
    ) -> Tensor:
        of_products, of_scales = split_factors(factors, LAYERS), iter(scales)

        def product(number: int, rows: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Product]:
            own = [next(of_scales) for _ in range(LAYERS[number])]
            return forward_in_c(rows, *weights.products[number], own, of_products[number], residual=residual)

        rows = x.view(-1, x.shape[-1])  # [tokens, hidden]
        normed, rstd = rms_norm_in_c(rows, weights.attention_norm, weights.eps)
        qkv, of_qkv = product(0, normed)
        q, k, v = _heads(qkv, weights)
        both = _turned_heads(qkv, weights)
        turn_in_c(both, both, cos, sin, back=False)
        form = attention.Form(packing, True, weights.scaling, dropout, 0, attention.TILES)
        attended = x.new_empty(1, packing.tokens, q.shape[1], weights.head_dim)
        attended[:, packing.real :] = 0
        sums, of_attention = attention.forward_in_c(form, q, k, v, attended)
        middle, of_o = product(1, attended.view(len(rows), -1), rows)
        normed, middle_rstd = rms_norm_in_c(middle, weights.feed_forward_norm, weights.eps)
        gate_up, of_gate_up = product(2, normed)
        gated = silu_mul_in_c(*gate_up.chunk(2, 1))
        y, of_down = product(3, gated, middle)
        transposed = of_qkv.transposed, of_o.transposed, of_gate_up.transposed, of_down.transposed
        ctx.save_for_backward(
            rows, cos, sin, rstd, qkv, attended, sums, middle, middle_rstd, gate_up, gated, *transposed, *factors
        )
        ctx.weights, ctx.form, ctx.of_attention, ctx.spent = weights, form, of_attention, False
        ctx.problems = [each.problem for each in (of_qkv, of_o, of_gate_up, of_down)]
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, cos, sin, rstd, qkv, attended, sums, middle, middle_rstd, gate_up, gated, *others = ctx.saved_tensors
        weights: Weights = ctx.weights
        if ctx.spent:
            raise RuntimeError("this block's gradients took the place of what it had saved: it can not be gone through again")
        ctx.spent = True
        product = BackwardProducts(ctx.problems, LAYERS, others)
        grad_y = grads[0].contiguous().view(rows.shape)
        gate, up = gate_up.chunk(2, 1)
        grad = product(3, gated, grad_y)
        assert grad is not None
        silu_mul_backward_in_c(gate, up, grad, gate, up)
        grad = product(2, rms_norm_in_c(middle, weights.feed_forward_norm, weights.eps)[0], gate_up)
        assert grad is not None
        rms_norm_backward_in_c(middle, weights.feed_forward_norm, grad, middle_rstd, grad, grad_y)
        grad_middle = grad  # [tokens, hidden]
        grad = product(1, attended.view(len(rows), -1), grad_middle)
        assert grad is not None
        q, k, v = _heads(qkv, weights)
        results = attention.room_for_gradients(ctx.form.packing, grad.view(attended.shape), k.shape[1])
        attention.backward_in_c(ctx.form, ctx.of_attention, (q, k, v, attended, sums), grad, results)
        grad_qkv = results[0].as_strided(qkv.shape, qkv.stride())
        both = _turned_heads(grad_qkv, weights)
        turn_in_c(both, both, cos, sin, back=True)
        wants_x = ctx.needs_input_grad[0]
        grad = product(0, rms_norm_in_c(rows, weights.attention_norm, weights.eps)[0], grad_qkv, wants_x=wants_x)
        if grad is not None:
            rms_norm_backward_in_c(rows, weights.attention_norm, grad, rstd, grad, grad_middle)
            grad = grad.view(grads[0].shape)
        return grad, None, None, None, None, None, None, *product.gradients


def _heads(qkv: Tensor, weights: Weights) -> tuple[Tensor, ...]:
    """Queries [1, heads, tokens, head_dim], and keys and values [1, kv heads, tokens, head_dim] of qkv [tokens, …]: views."""
    width = weights.head_dim
    heads = weights.products[1][0].shape[1] // width
    kv_heads = (qkv.shape[1] // width - heads) // 2
    parts: tuple[Tensor, ...] = torch.split(qkv.view(1, len(qkv), -1, width).transpose(1, 2), [heads, kv_heads, kv_heads], 1)
    return parts


def _turned_heads(qkv: Tensor, weights: Weights) -> Tensor:
    """Queries and keys together."""
    q, k, _ = _heads(qkv, weights)
    shape = 1, q.shape[1] + k.shape[1], *q.shape[2:]
    return q.as_strided(shape, q.stride(), q.storage_offset())


def decoder_block(
    x: Tensor, cos: Tensor, sin: Tensor, packing: Packing, weights: Weights, layers: Sequence[Factors], dropout: float = 0.0
) -> Tensor:
    """The block's output for packed tokens x [1, tokens, hidden] in bfloat16, contiguous.

    cos and sin [1, tokens, head_dim], as x. layers: the adapters of q, k, v, o, gate, up and down, of any rank. dropout: of
    attention weights. Gradients go to x and the factors only, once. Attention is causal.
    """
    scales, factors = [layer.scale for layer in layers], flat_factors(layers)
    y: Tensor = _DecoderBlock.apply(x, cos, sin, weights, packing, dropout, scales, *factors)  # type: ignore[no-untyped-call]
    return y
