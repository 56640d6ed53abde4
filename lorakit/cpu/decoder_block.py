"""A Llama block (arXiv 2302.13971, section 2.2) as one operation with its own backward, for packed
rows: in bfloat16 on processors with AMX, or in float32 on those with AVX2.

    z = x + attention(rotary(norm(x) Wqkv)) Wo
    y = z + (silu(norm(z) Wgate) ⊙ norm(z) Wup) Wdown

It runs the same kernels as the modules would. One operation is faster because it touches less
memory: new memory is cold, and writing it takes most of the time of a small operation. So residuals
are added while a product or a norm's gradient is written, rotary embeddings are applied to queries
and keys in place, norms are recomputed in the backward pass, and the gradients of gate and up
overwrite them. (Recomputing silu(gate) ⊙ up too was tried: it costs as much as it saves.)
Behind the attention of the last block, only the tokens that are read are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.cpu.block_parts import (
    BackwardProducts,
    ForwardProducts,
    attend,
    attend_backward,
    go_through_once,
    put_back,
    taken,
)
from lorakit.kernels.activations import silu_mul_backward_in_c, silu_mul_in_c
from lorakit.kernels.lora_linear import LoraFactors, flat_factors
from lorakit.kernels.norms import rms_norm_backward_in_c, rms_norm_in_c
from lorakit.kernels.packed_attention import AttentionForm
from lorakit.kernels.packing import Packing
from lorakit.kernels.products import kernel_level
from lorakit.kernels.rotary import turn_in_c


class DecoderWeights(NamedTuple):
    """Frozen parts of a block: weight [outputs, in] and bias [outputs] or None of the products
    q/k/v, o, gate/up and down; norms [hidden] in float32; head_dim; the factor of attention scores.
    """

    products: tuple[tuple[Tensor, Tensor | None], ...]
    attention_norm: Tensor
    feed_forward_norm: Tensor
    eps: float
    head_dim: int
    scaling: float


# The number of layers of each product.
LAYERS = (3, 1, 2, 1)


class _DecoderBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        weights: DecoderWeights,
        packing: Packing,
        read: Tensor | None,
        dropout: float,
        scales: Sequence[float],
        *factors: Tensor | None,
    ) -> Tensor:
        product = ForwardProducts(weights.products, LAYERS, scales, factors)
        rows = x.view(-1, x.shape[-1])  # [tokens, hidden]
        normed, rstd = rms_norm_in_c(rows, weights.attention_norm, weights.eps)
        qkv = product(normed)
        both = _turned_heads(qkv, weights)
        turn_in_c(both, both, cos, sin, back=False)
        level = kernel_level(rows.dtype, "block")
        form = AttentionForm(packing, True, weights.scaling, dropout, level)
        attended, sums, of_attention = attend(form, *_heads(qkv, weights))
        middle = product(taken(attended.view(len(rows), -1), read), taken(rows, read))
        normed, middle_rstd = rms_norm_in_c(middle, weights.feed_forward_norm, weights.eps)
        gate_up = product(normed)
        gated = silu_mul_in_c(*gate_up.chunk(2, 1))
        y = product(gated, middle)
        saved = rows, cos, sin, rstd, qkv, attended, sums, middle, middle_rstd, gate_up, gated
        ctx.save_for_backward(*saved, *product.hidden, *factors)
        ctx.weights, ctx.form, ctx.of_attention = weights, form, of_attention
        ctx.calls, ctx.read = product.calls, read
        return put_back(y, read, len(rows)).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        go_through_once(ctx)
        rows, cos, sin, rstd, qkv, attended, sums, middle, middle_rstd, gate_up, gated, *others = (
            ctx.saved_tensors
        )
        weights: DecoderWeights = ctx.weights
        norms = weights.attention_norm, weights.feed_forward_norm
        product = BackwardProducts(ctx.calls, LAYERS, others)
        grad_y = taken(grads[0].contiguous().view(rows.shape), ctx.read)

        grad_gated = product(3, gated, grad_y)
        gate, up = gate_up.chunk(2, 1)
        silu_mul_backward_in_c(gate, up, grad_gated, gate, up)
        grad_gate_up = gate_up  # overwritten
        normed = rms_norm_in_c(middle, norms[1], weights.eps)[0]
        grad_normed = product(2, normed, grad_gate_up)
        rms_norm_backward_in_c(middle, norms[1], grad_normed, middle_rstd, grad_normed, grad_y)
        grad_middle = grad_normed

        by_token = attended.view(len(rows), -1)
        grad_attended = put_back(
            product(1, taken(by_token, ctx.read), grad_middle), ctx.read, len(rows)
        )
        grad_middle = put_back(grad_middle, ctx.read, len(rows))
        kept = *_heads(qkv, weights), attended, sums
        grad_qkv = attend_backward(ctx.form, ctx.of_attention, kept, grad_attended)
        both = _turned_heads(grad_qkv, weights)
        turn_in_c(both, both, cos, sin, back=True)
        normed = rms_norm_in_c(rows, norms[0], weights.eps)[0]
        grad_x = product.where_wanted(ctx.needs_input_grad[0], 0, normed, grad_qkv)
        if grad_x is not None:
            rms_norm_backward_in_c(rows, norms[0], grad_x, rstd, grad_x, grad_middle)
            grad_x = grad_x.view(grads[0].shape)
        return grad_x, None, None, None, None, None, None, None, *product.gradients


def _heads(qkv: Tensor, weights: DecoderWeights) -> tuple[Tensor, ...]:
    """Views of qkv [tokens, …]: queries [1, heads, tokens, head_dim], keys and values [1, kv
    heads, tokens, head_dim]."""
    width = weights.head_dim
    heads = weights.products[1][0].shape[1] // width
    kv_heads = (qkv.shape[1] // width - heads) // 2
    parts: tuple[Tensor, ...] = torch.split(
        qkv.view(1, len(qkv), -1, width).transpose(1, 2), [heads, kv_heads, kv_heads], 1
    )
    return parts


def _turned_heads(qkv: Tensor, weights: DecoderWeights) -> Tensor:
    """A view of queries and keys together, to which rotary embeddings are applied."""
    q, k, _ = _heads(qkv, weights)
    shape = 1, q.shape[1] + k.shape[1], *q.shape[2:]
    return q.as_strided(shape, q.stride(), q.storage_offset())


def decoder_block(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    packing: Packing,
    weights: DecoderWeights,
    layers: Sequence[LoraFactors],
    dropout: float = 0.0,
    read: Tensor | None = None,
) -> Tensor:
    """Compute the block's output for packed tokens x [1, tokens, hidden], contiguous, bfloat16 or
    float32.

    cos and sin [1, tokens, head_dim], contiguous, of the same type. layers: the adapters of q, k,
    v, o, gate, up and down, of any rank. dropout: the probability for attention weights. Attention
    is causal. read: the tokens to compute; the others' outputs are zero, None computes all.
    Gradients go to x and the factors only, and the backward pass runs only once.
    """
    scales, factors = [layer.scale for layer in layers], flat_factors(layers)
    y: Tensor = _DecoderBlock.apply(x, cos, sin, weights, packing, read, dropout, scales, *factors)  # type: ignore[no-untyped-call]
    return y
