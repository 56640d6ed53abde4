"""A BERT block (arXiv 1810.04805, section 3) as one operation with its own backward, for packed
rows: in bfloat16 on processors with AMX, or in float32 on those with AVX2.

    z = norm(x + dropout(attention(x Wqkv) Wo))        y = norm(z + dropout(gelu(z Wi) Wd))

It runs the same kernels as the modules would, without autograd and modules around each, and
touches less memory (see `decoder_block`): the sum that a norm reads overwrites the product it
contains, the gradient of an activation's input overwrites that input, and residuals are added while
a product is written. Behind the attention of the last block, only the tokens that are read are
computed.
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
from lorakit.kernels.activations import activation_backward_in_c, activation_in_c
from lorakit.kernels.dropout import draw_drop
from lorakit.kernels.lora_linear import LoraFactors, flat_factors
from lorakit.kernels.norms import add_layer_norm_backward_in_c, add_layer_norm_in_c
from lorakit.kernels.packed_attention import AttentionForm
from lorakit.kernels.packing import Packing
from lorakit.kernels.products import kernel_level


class Norm(NamedTuple):
    """A layer norm: weight and bias [hidden] in float32."""

    weight: Tensor
    bias: Tensor
    eps: float


class EncoderWeights(NamedTuple):
    """Frozen parts of a block: weight [outputs, in] and bias [outputs] or None of the products
    q/k/v, attention's output and the two of the feed-forward part; head_dim; the factor of
    attention scores; the name of the activation's kernel."""

    products: tuple[tuple[Tensor, Tensor | None], ...]
    attention_norm: Norm
    feed_forward_norm: Norm
    head_dim: int
    scaling: float
    activation: str


class Dropouts(NamedTuple):
    """Dropout probabilities for attention weights, attention's output and the feed-forward part's
    output."""

    weights: float
    attention: float
    feed_forward: float


# The number of layers of each product.
LAYERS = (3, 1, 1, 1)


class _EncoderBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: EncoderWeights,
        packing: Packing,
        read: Tensor | None,
        dropouts: Dropouts,
        scales: Sequence[float],
        *factors: Tensor | None,
    ) -> Tensor:
        product = ForwardProducts(weights.products, LAYERS, scales, factors)
        rows = x.view(-1, x.shape[-1])  # [tokens, hidden]
        qkv = product(rows)
        level = kernel_level(rows.dtype, "block")
        form = AttentionForm(packing, False, weights.scaling, dropouts.weights, level)
        attended, sums, of_attention = attend(form, *_heads(qkv, weights))
        sum_1 = product(taken(attended.view(len(rows), -1), read))
        drops = [draw_drop(p) for p in (dropouts.attention, dropouts.feed_forward)]
        norms = weights.attention_norm, weights.feed_forward_norm
        middle, statistics_1 = add_layer_norm_in_c(
            sum_1, taken(rows, read), *norms[0], drops[0], sum_1
        )
        wide = product(middle)
        active = activation_in_c(weights.activation, wide)
        sum_2 = product(active)
        y, statistics_2 = add_layer_norm_in_c(sum_2, middle, *norms[1], drops[1], sum_2)
        saved = (
            rows,
            qkv,
            attended,
            sums,
            sum_1,
            statistics_1,
            middle,
            wide,
            active,
            sum_2,
            statistics_2,
        )
        ctx.save_for_backward(*saved, *product.hidden, *factors)
        ctx.weights, ctx.form, ctx.of_attention, ctx.drops = weights, form, of_attention, drops
        ctx.calls, ctx.read = product.calls, read
        return put_back(y, read, len(rows)).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        go_through_once(ctx)
        (
            rows,
            qkv,
            attended,
            sums,
            sum_1,
            statistics_1,
            middle,
            wide,
            active,
            sum_2,
            statistics_2,
            *others,
        ) = ctx.saved_tensors
        weights: EncoderWeights = ctx.weights
        norms = weights.attention_norm.weight, weights.feed_forward_norm.weight
        product = BackwardProducts(ctx.calls, LAYERS, others)
        grad_y = taken(grads[0].contiguous().view(rows.shape), ctx.read)

        grad_sum, grad_narrow = add_layer_norm_backward_in_c(
            sum_2, norms[1], grad_y, statistics_2, ctx.drops[1]
        )
        grad_active = product(3, active, grad_narrow)
        activation_backward_in_c(weights.activation, wide, grad_active, wide)
        grad_wide = wide  # overwritten
        grad_middle = product(2, middle, grad_wide, grad_sum)

        grad_sum, grad_output = add_layer_norm_backward_in_c(
            sum_1, norms[0], grad_middle, statistics_1, ctx.drops[0]
        )
        by_token = attended.view(len(rows), -1)
        grad_attended = put_back(
            product(1, taken(by_token, ctx.read), grad_output), ctx.read, len(rows)
        )
        grad_sum = put_back(grad_sum, ctx.read, len(rows))
        kept = *_heads(qkv, weights), attended, sums
        grad_qkv = attend_backward(ctx.form, ctx.of_attention, kept, grad_attended)
        grad_x = product.where_wanted(ctx.needs_input_grad[0], 0, rows, grad_qkv, grad_sum)
        grad_x = None if grad_x is None else grad_x.view(grads[0].shape)
        return grad_x, None, None, None, None, None, *product.gradients


def _heads(qkv: Tensor, weights: EncoderWeights) -> tuple[Tensor, ...]:
    """Views of qkv [tokens, …]: queries, keys and values [1, heads, tokens, head_dim]."""
    return qkv.view(1, len(qkv), -1, weights.head_dim).transpose(1, 2).chunk(3, 1)


def encoder_block(
    x: Tensor,
    packing: Packing,
    weights: EncoderWeights,
    layers: Sequence[LoraFactors],
    dropouts: Dropouts,
    read: Tensor | None = None,
) -> Tensor:
    """Compute the block's output for packed tokens x [1, tokens, hidden], contiguous, bfloat16 or
    float32.

    layers: the adapters of q, k, v, attention's output and the two layers of the feed-forward part,
    of any rank. read: the tokens to compute; the others' outputs are zero, None computes all.
    Gradients go to x and the factors only, and the backward pass runs only once.
    """
    scales, factors = [layer.scale for layer in layers], flat_factors(layers)
    y: Tensor = _EncoderBlock.apply(x, weights, packing, read, dropouts, scales, *factors)  # type: ignore[no-untyped-call]
    return y
