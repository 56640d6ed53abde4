"""LoRA linear layers as one operation with its own backward: one layer, or several that read the
same input.

Autograd's graph of `F.linear(x, W) + s * F.linear(F.linear(x, A), B)` allocates each product with
`out` columns twice and casts the adapter's factors on every use. Here the low-rank product is added
into the dense one, forward and backward, and x is saved once (LoRA: arXiv 2106.09685, eq. 3).
Layers that read the same input (q/k/v; gate/up) are computed by one dense product, one product with
all As and one with a block-diagonal B: for small ranks its zeros cost less than another pass over
the outputs.

bfloat16 on processors with AMX, float32 on those with AVX2 or AVX-512: each pass is one call into C
(`products`) for any number of tokens. Measured on two cores, forward and backward, with the time of
torch's products in parentheses, by AMX: 795 tokens, rank 8, 384 to 1 536: 1.8 ms (2.9); 1 614
tokens, rank 16, 576 to 2 · 1 536: 9.2 ms (10.6).

Elsewhere torch's products are used. There the bias is a column of B, since oneDNN would first copy
it into the output (a third of the dense product's time, measured at 832 tokens, 384 to 1 536).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from lorakit.kernels import products
from lorakit.kernels.joined import joined
from lorakit.kernels.stored import StoredWeight, Weight, opened

# Largest total number of components for which B is block-diagonal.
JOINED_RANK = 64


class LoraFactors(NamedTuple):
    """The factors of one layer's adapter: a [rank, in] and b [out, rank] in float32 (or wider),
    and the scale of their product. gate [rank], of a's type, multiplies a's rows."""

    a: Tensor
    b: Tensor
    scale: float
    gate: Tensor | None = None


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        stored: StoredWeight | None,
        bias: Tensor | None,
        scales: Sequence[float],
        mask: Tensor | None,
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])  # [tokens, in]
        downs, ups = factors[::2], factors[1::2]
        a = (downs[0] if len(downs) == 1 else torch.cat(downs)).to(x.dtype)  # [components, in]
        ranks, outs = [len(down) for down in downs], [len(up) for up in ups]
        components = len(a)
        hidden = rows.new_empty(len(rows), components + (bias is not None))
        torch.mm(rows, a.T, out=hidden[:, :components])
        if mask is not None:
            hidden[:, :components] *= mask
        b = _up_matrix(ups, scales, bias, x.dtype)  # [outputs, components (+ 1)]
        if bias is not None:
            hidden[:, components] = 1
        # Not a view of another tensor: some models change a layer's output in place.
        y = x.new_empty(*x.shape[:-1], len(weight))
        flat = y.view(-1, len(weight))  # [tokens, outputs]
        torch.mm(rows, weight.T, out=flat).addmm_(hidden, b.T)
        kept = weight if stored is None else None
        ctx.save_for_backward(rows, kept, a, b[:, :components], hidden[:, :components], mask)
        ctx.stored = stored
        ctx.scales, ctx.shape, ctx.dtype, ctx.ranks, ctx.outs = (
            scales,
            x.shape,
            downs[0].dtype,
            ranks,
            outs,
        )
        return (y,) if len(outs) == 1 else torch.split(y, outs, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, hidden, mask = ctx.saved_tensors
        grad_y = joined(grads).reshape(len(rows), -1)  # [tokens, outputs]
        grad_hidden = grad_y @ b  # [tokens, components]
        if mask is not None:
            grad_hidden *= mask
        grad_x = None
        if ctx.needs_input_grad[0]:
            if ctx.stored is not None:
                weight = ctx.stored.dense()
            grad_x = (grad_y @ weight).addmm_(grad_hidden, a).view(ctx.shape)
        # Gradients of the factors are summed over tokens in the compute type and stored in the
        # factors' float32.
        grad_a = (grad_hidden.T @ rows).to(ctx.dtype).split(ctx.ranks)
        grad_b = (grad_y.T @ hidden).to(ctx.dtype)
        grad_factors: list[Tensor] = []
        ends = zip(accumulate(ctx.outs), accumulate(ctx.ranks), strict=True)
        for down, out, rank, scale, (last, end) in zip(
            grad_a, ctx.outs, ctx.ranks, ctx.scales, ends, strict=True
        ):
            grad_factors += [down, grad_b[last - out : last, end - rank : end] * scale]
        return grad_x, None, None, None, None, None, *grad_factors


def _up_matrix(
    ups: Sequence[Tensor], scales: Sequence[float], bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Make a matrix [outputs, components (+ 1)] with the scaled Bs on its diagonal and the bias as
    its last column."""
    if len(ups) == 1 and bias is None:
        return (ups[0] * scales[0]).to(dtype)
    components = sum(up.shape[1] for up in ups)
    shape = sum(len(up) for up in ups), components + (bias is not None)
    b = (
        ups[0].new_zeros(shape, dtype=dtype)
        if len(ups) > 1
        else ups[0].new_empty(shape, dtype=dtype)
    )
    row = column = 0
    for up, scale in zip(ups, scales, strict=True):
        torch.mul(up, scale, out=b[row : row + len(up), column : column + up.shape[1]])
        row, column = row + len(up), column + up.shape[1]
    if bias is not None:
        b[:, components] = bias
    return b


def flat_factors(layers: Sequence[LoraFactors]) -> list[Tensor | None]:
    """Flatten the factors, layer by layer, into the list that `forward_in_c` and autograd take."""
    return [factor for layer in layers for factor in (layer.a, layer.b, layer.gate)]


def lora_linears(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    layers: Sequence[LoraFactors],
    mask: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Compute W x + bias + scale · B (A x) for each layer, with frozen W; with a mask [tokens,
    components], scale · B (mask ⊙ (A x)).

    x [..., in]; weight [outputs, in], dense or stored, and bias [outputs] are those of all layers,
    concatenated, in x's dtype, to which the factors are cast. Returns [..., out] for each layer.
    Gradients go to x and the factors only. The layers must have at least one component in total.
    Within torch.compile plain products are used, which it can trace.
    """
    matrix, stored = opened(weight)
    if torch.compiler.is_compiling():
        return _by_plain_products(x, matrix, bias, layers, mask)
    scales = [layer.scale for layer in layers]
    factors = flat_factors(layers)
    y: tuple[Tensor, ...]
    if products.takes(x, matrix, [bias, mask], factors, len(layers)):
        y = products.LoraLinears.apply(x, matrix, stored, bias, scales, mask, *factors)  # type: ignore[no-untyped-call]
        return y
    pairs = [
        pair for a, b, _, gate in layers for pair in (a if gate is None else gate[:, None] * a, b)
    ]
    y = _LoraLinears.apply(x, matrix, stored, bias, scales, mask, *pairs)  # type: ignore[no-untyped-call]
    return y


def _by_plain_products(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layers: Sequence[LoraFactors],
    mask: Tensor | None,
) -> tuple[Tensor, ...]:
    """`lora_linears` by the formula, operation by operation."""
    bases = torch.split(linear(x, weight, bias), [len(layer.b) for layer in layers], -1)
    masks = (
        [None] * len(layers)
        if mask is None
        else torch.split(mask, [len(layer.a) for layer in layers], -1)
    )
    results = []
    for base, own_mask, (a, b, scale, gate) in zip(bases, masks, layers, strict=True):
        hidden = linear(x, (a if gate is None else gate[:, None] * a).to(x.dtype))
        if own_mask is not None:
            hidden = hidden * own_mask.view(hidden.shape)
        results.append(base + linear(hidden, (b * scale).to(x.dtype)))
    return tuple(results)


def lora_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    mask: Tensor | None = None,
) -> Tensor:
    """`lora_linears` of one layer: weight [out, in], a [rank, in], b [out, rank], mask [tokens,
    rank]."""
    return lora_linears(x, weight, bias, [LoraFactors(a, b, scale)], mask)[0]
