"""A whole block of a BERT (arXiv 1810.04805, section 3) as one operation with its own backward: packed rows in bfloat16 on
processors with AMX.

    z = norm(x + dropout(attention(x Wqkv) Wo))        y = norm(z + dropout(gelu(z Wi) Wd))

Its steps are the kernels that the modules would call, without autograd and the modules around each of them, and with less memory
touched (see `decoder_block`): a norm's input takes the place of the product it is the sum of, the gradient of an
activation that of the activation's input, and residuals are added where a product is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.kernels import packed_attention as attention
from lorakit.kernels.dropout import draw_seed, levels_dropped
from lorakit.kernels.elementwise import (
    activation_backward_in_c,
    activation_in_c,
    add_layer_norm_backward_in_c,
    add_layer_norm_in_c,
)
from lorakit.kernels.lora_linear import BackwardProducts, Factors, Product, flat_factors, forward_in_c, split_factors
from lorakit.kernels.packing import Packing


class Norm(NamedTuple):
    """A layer norm: weight and bias [hidden] in float32."""

    weight: Tensor
    bias: Tensor
    eps: float


class Weights(NamedTuple):
    """Frozen parts of a block. Weights [outputs, in] and biases [outputs] or None of the products q/k/v, attention's output and
    the two of the feed-forward part; head_dim; the factor of attention scores; the name of the activation's kernel."""

    products: tuple[tuple[Tensor, Tensor | None], ...]
    attention_norm: Norm
    feed_forward_norm: Norm
    head_dim: int
    scaling: float
    activation: str


class Dropouts(NamedTuple):
    """Probabilities for attention weights, attention's output and the feed-forward part's."""

    weights: float
    attention: float
    feed_forward: float


# Layers of each product.
LAYERS = (3, 1, 1, 1)


class _EncoderBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Weights,
        packing: Packing,
        dropouts: Dropouts,
        scales: Sequence[float],
        *factors: Tensor | None,
    ) -> Tensor:
        of_products, of_scales = split_factors(factors, LAYERS), iter(scales)

        def product(number: int, rows: Tensor) -> tuple[Tensor, Product]:
            own = [next(of_scales) for _ in range(LAYERS[number])]
            return forward_in_c(rows, *weights.products[number], own, of_products[number])

        rows = x.view(-1, x.shape[-1])  # [tokens, hidden]
        qkv, of_qkv = product(0, rows)
        q, k, v = qkv.view(1, len(rows), -1, weights.head_dim).transpose(1, 2).chunk(3, 1)
        form = attention.Form(packing, False, weights.scaling, dropouts.weights, 0, attention.TILES)
        attended = x.new_empty(1, packing.tokens, q.shape[1], weights.head_dim)
        attended[:, packing.real :] = 0
        sums, of_attention = attention.forward_in_c(form, q, k, v, attended)
        sum_1, of_o = product(1, attended.view(len(rows), -1))
        drops = [(draw_seed() if p else 0, *levels_dropped(p)) for p in (dropouts.attention, dropouts.feed_forward)]
        middle, statistics_1 = add_layer_norm_in_c(sum_1, rows, *weights.attention_norm, drops[0], sum_1)
        wide, of_wide = product(2, middle)
        active = activation_in_c(weights.activation, wide)
        sum_2, of_narrow = product(3, active)
        y, statistics_2 = add_layer_norm_in_c(sum_2, middle, *weights.feed_forward_norm, drops[1], sum_2)
        products = of_qkv, of_o, of_wide, of_narrow
        saved = rows, qkv, attended, sums, sum_1, statistics_1, middle, wide, active, sum_2, statistics_2
        ctx.save_for_backward(*saved, *(each.transposed for each in products), *factors)
        ctx.weights, ctx.form, ctx.of_attention, ctx.drops, ctx.spent = weights, form, of_attention, drops, False
        ctx.problems = [each.problem for each in products]
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, qkv, attended, sums, sum_1, statistics_1, middle, wide, active, sum_2, statistics_2, *others = ctx.saved_tensors
        weights: Weights = ctx.weights
        if ctx.spent:
            raise RuntimeError("this block's gradients took the place of what it had saved: it can not be gone through again")
        ctx.spent = True
        product = BackwardProducts(ctx.problems, LAYERS, others)
        grad_y = grads[0].contiguous().view(rows.shape)
        grad_sum, grad = add_layer_norm_backward_in_c(sum_2, weights.feed_forward_norm.weight, grad_y, statistics_2, ctx.drops[1])
        grad_active = product(3, active, grad)
        assert grad_active is not None
        activation_backward_in_c(weights.activation, wide, grad_active, wide)
        grad_middle = product(2, middle, wide, grad_sum)
        assert grad_middle is not None
        norm = weights.attention_norm.weight
        grad_sum, grad = add_layer_norm_backward_in_c(sum_1, norm, grad_middle, statistics_1, ctx.drops[0])
        grad_attended = product(1, attended.view(len(rows), -1), grad)
        assert grad_attended is not None
        q, k, v = qkv.view(1, len(rows), -1, weights.head_dim).transpose(1, 2).chunk(3, 1)
        results = attention.room_for_gradients(ctx.form.packing, grad_attended.view(attended.shape), k.shape[1])
        attention.backward_in_c(ctx.form, ctx.of_attention, (q, k, v, attended, sums), grad_attended, results)
        grad_qkv = results[0].as_strided(qkv.shape, qkv.stride())
        grad_x = product(0, rows, grad_qkv, grad_sum, ctx.needs_input_grad[0])
        grad_x = None if grad_x is None else grad_x.view(grads[0].shape)
        return grad_x, None, None, None, None, *product.gradients


def encoder_block(x: Tensor, packing: Packing, weights: Weights, layers: Sequence[Factors], dropouts: Dropouts) -> Tensor:
    """The block's output for packed tokens x [1, tokens, hidden] in bfloat16, contiguous.

    layers: the adapters of q, k, v, attention's output and the two layers of the feed-forward part, of any rank. Gradients go to
    x and the factors only, once.
    """
    scales, factors = [layer.scale for layer in layers], flat_factors(layers)
    y: Tensor = _EncoderBlock.apply(x, weights, packing, dropouts, scales, *factors)  # type: ignore[no-untyped-call]
    return y
