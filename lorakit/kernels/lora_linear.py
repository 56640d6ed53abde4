"""LoRA linear layers as one operation with its own backward: one layer, or several that read the same input.

Autograd's graph of `F.linear(x, W) + s * F.linear(F.linear(x, A), B)` allocates each product of width `out` twice and casts the
adapter's factors on every use. Here the low-rank product is added into the dense one, forward and backward, and x is saved once
(LoRA: arXiv 2106.09685, eq. 3). Layers that read the same input (q/k/v; gate/up) are one dense product, one down product and one
up product with B block-diagonal: for small ranks its zeros cost less than passing over the outputs again.

bfloat16 on processors with AMX: each pass is one call in C (csrc/linear.c), whatever the number of tokens. Measured on two cores,
forward and backward: 795 tokens, rank 8, 384 to 1 536, 1.8 ms (as below: 2.9); 1 614 tokens, rank 16, 576 to 2 · 1 536, 9.2
(10.6).

Elsewhere, by torch's products. The bias is a column of B there: oneDNN would copy it into the output first (a third of the dense
product's time, measured at 832 tokens, 384 to 1 536).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from lorakit.kernels import native

# Components of all layers together up to which B is block-diagonal.
JOINED_RANK = 64
FEWEST_TOKENS = 16  # for which it pays to pack a frozen weight
MOST_LAYERS, TILE = 8, 32  # of csrc/linear.c: layers of one product, and what widths and tokens are a multiple of


class Factors(NamedTuple):
    """The adapter of one layer: a [rank, in] and b [out, rank] in float32 (or wider), and the scale of their product.
    gate [rank], of a's type, multiplies a's rows."""

    a: Tensor
    b: Tensor
    scale: float
    gate: Tensor | None = None


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scales: Sequence[float], mask: Tensor | None, *factors: Tensor
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
        # Not a view of another tensor: some models change what they get in place.
        y = x.new_empty(*x.shape[:-1], len(weight))
        flat = y.view(-1, len(weight))  # [tokens, outputs]
        torch.mm(rows, weight.T, out=flat).addmm_(hidden, b.T)
        ctx.save_for_backward(rows, weight, a, b[:, :components], hidden[:, :components], mask)
        ctx.scales, ctx.shape, ctx.dtype, ctx.ranks, ctx.outs = scales, x.shape, downs[0].dtype, ranks, outs
        return (y,) if len(outs) == 1 else torch.split(y, outs, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, hidden, mask = ctx.saved_tensors
        grad_y = _joined(grads).reshape(len(rows), -1)  # [tokens, outputs]
        grad_hidden = grad_y @ b  # [tokens, components]
        if mask is not None:
            grad_hidden *= mask
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_y @ weight).addmm_(grad_hidden, a).view(ctx.shape)
        # Gradients of the factors are summed over tokens in the compute type and kept in the factors' own, float32.
        grad_a = (grad_hidden.T @ rows).to(ctx.dtype).split(ctx.ranks)
        grad_b = (grad_y.T @ hidden).to(ctx.dtype)
        grad_factors: list[Tensor] = []
        ends = zip(accumulate(ctx.outs), accumulate(ctx.ranks), strict=True)
        for down, out, rank, scale, (last, end) in zip(grad_a, ctx.outs, ctx.ranks, ctx.scales, ends, strict=True):
            grad_factors += [down, grad_b[last - out : last, end - rank : end] * scale]
        return grad_x, None, None, None, None, *grad_factors


def _up_matrix(ups: Sequence[Tensor], scales: Sequence[float], bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The scaled Bs as a block-diagonal matrix, and the bias as its last column: [outputs, components (+ 1)]."""
    if len(ups) == 1 and bias is None:
        return (ups[0] * scales[0]).to(dtype)
    components = sum(up.shape[1] for up in ups)
    shape = sum(len(up) for up in ups), components + (bias is not None)
    b = ups[0].new_zeros(shape, dtype=dtype) if len(ups) > 1 else ups[0].new_empty(shape, dtype=dtype)
    row = column = 0
    for up, scale in zip(ups, scales, strict=True):
        torch.mul(up, scale, out=b[row : row + len(up), column : column + up.shape[1]])
        row, column = row + len(up), column + up.shape[1]
    if bias is not None:
        b[:, components] = bias
    return b


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors [..., out_i] as one [..., outputs]: a view where they are neighbours in one already."""
    if len(parts) == 1:
        return parts[0].contiguous()
    first, width = parts[0], sum(part.shape[-1] for part in parts)
    start = first.storage_offset()
    for part in parts:
        if (
            part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            or part.storage_offset() != start
            or part.ndim < 2
            or part.stride() != first.stride()
            or part.stride(-1) != 1
            or part.stride(-2) != width
        ):
            return torch.cat(list(parts), -1)
        start += part.shape[-1]
    return first.as_strided((*first.shape[:-1], width), first.stride(), first.storage_offset())


# -- in C ------------------------------------------------------------------------------------------------------------


class _Problem(ctypes.Structure):
    """`Problem` of csrc/linear.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "in", "out", "components", "layers", "threads")),
        *((name, ctypes.c_int64) for name in ("x_stride", "y_stride", "weight_stride", "weight_is_transposed")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "mask")),
        *((name, ctypes.c_int64 * MOST_LAYERS) for name in ("ranks", "outs")),
        *((name, ctypes.c_void_p * MOST_LAYERS) for name in ("a", "b", "gates")),
        ("scales", ctypes.c_double * MOST_LAYERS),
    )


class Product(NamedTuple):
    """A product in C, as its backward pass needs it. The weight and the bias that the problem points to must be kept."""

    problem: _Problem
    rows: Tensor  # x [tokens, in]
    transposed: Tensor  # the hidden values [components + 32, tokens], in bfloat16


def forward_in_c(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scales: Sequence[float],
    factors: Sequence[Tensor | None],
    mask: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Product]:
    """`lora_linears` of rows [tokens, in] without autograd: (y [tokens, outputs], what `backward_in_c` needs).

    factors: of each layer a, b and the gate, or None. residual [tokens, outputs] is added to y.
    """
    problem = _problem(rows, weight, bias, scales, mask, factors)
    y = rows.new_empty(len(rows), len(weight))
    transposed = rows.new_empty(problem.components + TILE, -(-len(rows) // TILE) * TILE)
    _call("lora_forward", problem, rows, y, transposed, residual)
    return y, Product(problem, rows, transposed)


def backward_in_c(
    product: Product,
    grad_y: Tensor,
    factors: Sequence[Tensor | None],
    wants_x: bool,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """(the gradient of x [tokens, in] where it is wanted, those of the factors) from that of y, whose rows are contiguous.

    residual [tokens, in], contiguous, is added to the first.

    factors and mask: of the forward pass, or equal ones. With gradient checkpointing they were made anew, and the first are gone.
    """
    _point_to(product.problem, mask, factors)
    downs, ups, gates = factors[::3], factors[1::3], factors[2::3]
    ranks, sizes = [0 if a is None else len(a) for a in downs], [0 if b is None else b.numel() for b in ups]
    rows = product.rows
    grad_x = rows.new_empty(rows.shape) if wants_x else None
    of_all = [rows.new_empty(size, dtype=torch.float32) for size in (sum(ranks) * rows.shape[1], sum(sizes), sum(ranks))]
    _call("lora_backward", product.problem, rows, grad_y, product.transposed, residual, grad_x, *of_all)
    grad_a, grad_b, grad_gates = of_all
    parts = grad_a.view(-1, rows.shape[1]), grad_b, grad_gates
    of_layers = zip(
        *(torch.split(part, lengths) for part, lengths in zip(parts, (ranks, sizes, ranks), strict=True)), strict=True
    )
    grad_factors: list[Tensor | None] = []
    for (of_a, of_b, of_gate), up, gate in zip(of_layers, ups, gates, strict=True):
        grad_factors += [of_a, of_b if up is None else of_b.view(up.shape), None if gate is None else of_gate]
    return grad_x, grad_factors


def split_factors(factors: Sequence[Tensor | None], layers: Sequence[int]) -> list[list[Tensor | None]]:
    """The factors of several products in turn, of so many layers each, as `forward_in_c` takes them."""
    rest = iter(factors)
    return [[next(rest) for _ in range(3 * count)] for count in layers]


def flat_factors(layers: Sequence[Factors]) -> list[Tensor | None]:
    """The tensors of all layers in turn, as `forward_in_c` and autograd take them."""
    return [factor for layer in layers for factor in (layer.a, layer.b, layer.gate)]


class BackwardProducts:
    """The products of a whole block in its backward pass. gradients: those of the factors, of all products in turn."""

    def __init__(self, problems: Sequence[_Problem], layers: Sequence[int], kept: Sequence[Tensor]) -> None:
        """layers: of each product; kept: the hidden values of each, and then the factors of all."""
        self.problems, self.transposed = problems, kept[: len(problems)]
        self.factors = split_factors(kept[len(problems) :], layers)
        self._found: list[list[Tensor | None]] = [[] for _ in problems]

    def __call__(
        self, number: int, rows: Tensor, grad_y: Tensor, residual: Tensor | None = None, wants_x: bool = True
    ) -> Tensor | None:
        """The gradient of rows [tokens, in], plus the residual, where it is wanted."""
        product = Product(self.problems[number], rows, self.transposed[number])
        grad_x, self._found[number] = backward_in_c(product, grad_y, self.factors[number], wants_x, residual=residual)
        return grad_x

    @property
    def gradients(self) -> list[Tensor | None]:
        return [gradient for of_product in self._found for gradient in of_product]


class _NativeLoraLinears(torch.autograd.Function):
    """factors: of each layer a, b and the gate, or None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scales: Sequence[float],
        mask: Tensor | None,
        *factors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        flat, product = forward_in_c(_rows(x), weight, bias, scales, factors, mask)
        ctx.save_for_backward(product.rows, product.transposed, weight, mask, *factors)
        ctx.problem, ctx.shape = product.problem, x.shape
        y = flat.resize_(*x.shape[:-1], len(weight))  # not a view of another tensor: some models change what they get in place
        outs = list(product.problem.outs[: product.problem.layers])
        return (y,) if len(outs) == 1 else torch.split(y, outs, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, transposed, _, mask, *factors = ctx.saved_tensors
        product = Product(ctx.problem, rows, transposed)
        grad_x, grad_factors = backward_in_c(product, _joined(grads), factors, ctx.needs_input_grad[0], mask)
        return None if grad_x is None else grad_x.view(ctx.shape), None, None, None, None, *grad_factors


def _problem(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scales: Sequence[float] = (),
    mask: Tensor | None = None,
    factors: Sequence[Tensor | None] = (),
) -> _Problem:
    downs, ups = factors[::3], factors[1::3]
    is_transposed = int(weight.stride(1) != 1)
    tokens, width = rows.shape
    ranks, outs = ([0 if x is None else len(x) for x in each] for each in (downs, ups))
    problem = _Problem(
        *(tokens, width, len(weight), sum(ranks), len(downs), torch.get_num_threads()),
        *(rows.stride(0), len(weight), weight.stride(is_transposed), is_transposed),
        *(None if x is None else x.data_ptr() for x in (weight, bias)),
        ranks=(ctypes.c_int64 * MOST_LAYERS)(*ranks),
        outs=(ctypes.c_int64 * MOST_LAYERS)(*outs),
        scales=(ctypes.c_double * MOST_LAYERS)(*scales),
    )
    _point_to(problem, mask, factors)
    return problem


def _point_to(problem: _Problem, mask: Tensor | None, factors: Sequence[Tensor | None]) -> None:
    problem.mask = None if mask is None else mask.data_ptr()
    for number, places in enumerate((problem.a, problem.b, problem.gates)):
        for layer, x in enumerate(factors[number::3]):
            places[layer] = None if x is None else x.data_ptr()


def _rows(x: Tensor) -> Tensor:
    """[tokens, width], rows contiguous."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _call(name: str, problem: _Problem, *tensors: Tensor | None) -> None:
    library = native.load("linear")
    assert library is not None
    if library[name](ctypes.byref(problem), *(None if x is None else ctypes.c_void_p(x.data_ptr()) for x in tensors)):
        raise MemoryError("no memory for the product of a linear layer")


def _are_for_c(
    x: Tensor, weight: Tensor, others: Sequence[Tensor | None], factors: Sequence[Tensor | None] = (), layers: int = 0
) -> bool:
    """True if the kernels in C are there and take these; others: a bias, a mask."""
    in_type = all(y is None or (y.dtype == torch.bfloat16 and y.device.type == "cpu") for y in (x, weight, *others))
    if not in_type or x.shape[-1] % TILE or len(weight) % TILE or x.numel() == 0 or layers > MOST_LAYERS:
        return False
    if 1 not in weight.stride() or any(y is not None and not y.is_contiguous() for y in (*others, *factors)):
        return False
    return all(y is None or y.dtype == torch.float32 for y in factors) and native.load_with_tiles("linear") is not None


class _NativeFrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = _rows(x)
        y = x.new_empty(*x.shape[:-1], len(weight))
        _call("lora_forward", _problem(rows, weight, bias), rows, y, None, None)
        ctx.save_for_backward(weight)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        grad_y = grads[0].contiguous()
        grad_x = grad_y.new_empty(*grad_y.shape[:-1], weight.shape[1])
        _call("lora_backward", _problem(_rows(grad_x), weight, None), None, grad_y, None, None, grad_x, None, None, None)
        return grad_x, None, None


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W x + bias, frozen, for x [..., in]; torch's own product where there are no tiles or they do not pay."""
    if torch.compiler.is_compiling() or x.numel() < FEWEST_TOKENS * x.shape[-1] or not _are_for_c(x, weight, [bias]):
        return linear(x, weight, bias)
    y: Tensor = _NativeFrozenLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


# --------------------------------------------------------------------------------------------------------------------


def lora_linears(
    x: Tensor, weight: Tensor, bias: Tensor | None, layers: Sequence[Factors], mask: Tensor | None = None
) -> tuple[Tensor, ...]:
    """For each layer, W x + bias + scale · B (A x), for frozen W; with a mask [tokens, components], B (mask ⊙ (A x)).

    x [..., in]; weight [outputs, in] and bias [outputs] hold those of all layers, one after the other, in x's dtype. The
    factors are cast to it. Returns [..., out] of each layer. Gradients go to x and the factors only; the components of all layers
    together must be more than 0. Within torch.compile, plain products, which it can look into.
    """
    if torch.compiler.is_compiling():
        return _by_plain_products(x, weight, bias, layers, mask)
    scales = [layer.scale for layer in layers]
    factors = flat_factors(layers)
    y: tuple[Tensor, ...]
    if _are_for_c(x, weight, [bias, mask], factors, len(layers)):
        y = _NativeLoraLinears.apply(x, weight, bias, scales, mask, *factors)  # type: ignore[no-untyped-call]
        return y
    pairs = [pair for a, b, _, gate in layers for pair in (a if gate is None else gate[:, None] * a, b)]
    y = _LoraLinears.apply(x, weight, bias, scales, mask, *pairs)  # type: ignore[no-untyped-call]
    return y


def _by_plain_products(
    x: Tensor, weight: Tensor, bias: Tensor | None, layers: Sequence[Factors], mask: Tensor | None
) -> tuple[Tensor, ...]:
    """`lora_linears` as the formula has it."""
    bases = torch.split(linear(x, weight, bias), [len(layer.b) for layer in layers], -1)
    masks = [None] * len(layers) if mask is None else torch.split(mask, [len(layer.a) for layer in layers], -1)
    results = []
    for base, own_mask, (a, b, scale, gate) in zip(bases, masks, layers, strict=True):
        hidden = linear(x, (a if gate is None else gate[:, None] * a).to(x.dtype))
        if own_mask is not None:
            hidden = hidden * own_mask.view(hidden.shape)
        results.append(base + linear(hidden, (b * scale).to(x.dtype)))
    return tuple(results)


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, mask: Tensor | None = None
) -> Tensor:
    """`lora_linears` of one layer: weight [out, in], a [rank, in], b [out, rank], mask [tokens, rank]."""
    return lora_linears(x, weight, bias, [Factors(a, b, scale)], mask)[0]
