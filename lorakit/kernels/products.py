"""Linear layers computed in C: several LoRA layers that read the same input, or one frozen layer.

bfloat16 takes AMX (csrc/linear_tiles.c), float32 vectors of AVX2 or AVX-512 (csrc/linear.c).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from lorakit.kernels import dispatch
from lorakit.kernels.in_c import FAILS, FLOATS, POINTER, CStructure, Library, address_of
from lorakit.kernels.joined import joined
from lorakit.kernels.levels import Level

FEWEST_TOKENS = 16  # for which packing a frozen weight pays
MOST_LAYERS = 8  # of one product
# csrc/linear_tiles.c: in, out, and the padded components and tokens are multiples of this
TILE = 32
# csrc/linear.c: in and out are multiples of the first; so much room is behind hidden values
VECTOR, ROOM = 16, 64
FEWEST_OUTPUTS = 12  # of a layer, for csrc/linear.c


class Dequantised(Protocol):
    """A weight that is stored in another form (`lorakit.kernels.stored`)."""

    def dense(self) -> Tensor:
        """The weight [out, in], contiguous."""


class LinearCall(CStructure):
    """`LinearCall` of csrc/linear.h."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("tokens", "in", "out", "components", "layers", "threads")
        ),
        *(
            (name, ctypes.c_int64)
            for name in ("x_stride", "y_stride", "weight_stride", "weight_is_transposed")
        ),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "mask")),
        *((name, ctypes.c_int64 * MOST_LAYERS) for name in ("ranks", "outs")),
        *((name, ctypes.c_void_p * MOST_LAYERS) for name in ("a", "b", "gates")),
        ("scales", ctypes.c_double * MOST_LAYERS),
    )


def _functions(values: type[POINTER]) -> dict[str, tuple[Any, ...]]:
    return {
        "lora_forward": (FAILS, *address_of(LinearCall), *[values] * 4),
        "lora_backward": (FAILS, *address_of(LinearCall), *[values] * 5, *[FLOATS] * 3),
    }


_TILES = Library("linear_tiles", _functions(POINTER), [LinearCall])
_VECTORS = Library("linear", _functions(FLOATS), [LinearCall])


class Product(NamedTuple):
    """A product in C, as its backward pass needs it. The weight and the bias that the call
    points to must be kept."""

    call: LinearCall
    rows: Tensor  # x [tokens, in]
    # the hidden values: bfloat16 [components + 32, tokens], or float32 [tokens · components + 64]
    hidden: Tensor


def kernel_level(dtype: torch.dtype, operation: str = "lora_linear") -> Level:
    """The level of the kernels in C for products of tensors of this type, or for another operation
    that consists of such products; torch if there are none."""
    if dtype == torch.float32:
        return dispatch.implementation(operation, Level.avx512)
    level = dispatch.implementation(operation)
    return level if dtype == torch.bfloat16 and level is Level.amx else Level.torch


def multiple(dtype: torch.dtype) -> int:
    """The number that all sizes of a product of this type must be multiples of."""
    return VECTOR if dtype == torch.float32 else TILE


def forward_in_c(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scales: Sequence[float],
    factors: Sequence[Tensor | None],
    mask: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Product]:
    """Compute `lora_linears` of rows [tokens, in] without autograd. Returns (y [tokens, outputs],
    the record for `backward_in_c`).

    factors: a, b and the gate of each layer, any of them None. residual [tokens, outputs] is added
    to y.
    """
    call = _call_of(rows, weight, bias, scales, mask, factors)
    y = rows.new_empty(len(rows), len(weight))
    hidden = _room_for_hidden(rows, call.components)
    _run("lora_forward", call, rows, y, hidden, residual)
    return y, Product(call, rows, hidden)


def _room_for_hidden(rows: Tensor, components: int) -> Tensor:
    if rows.dtype == torch.float32:
        return rows.new_empty(len(rows) * components + ROOM)
    return rows.new_empty(components + TILE, -(-len(rows) // TILE) * TILE)


def backward_in_c(
    product: Product,
    grad_y: Tensor,
    factors: Sequence[Tensor | None],
    wants_x: bool,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Compute (the gradient of x [tokens, in] or None if not wanted, the gradients of the factors)
    from the gradient of y, whose rows are contiguous.

    residual [tokens, in], contiguous, is added to the gradient of x.

    factors and mask: those of the forward pass, or equal ones: with gradient checkpointing they are
    recomputed and the first ones are freed.
    """
    _point_to(product.call, mask, factors)
    downs, ups, gates = factors[::3], factors[1::3], factors[2::3]
    ranks, sizes = (
        [0 if a is None else len(a) for a in downs],
        [0 if b is None else b.numel() for b in ups],
    )
    rows = product.rows
    grad_x = rows.new_empty(rows.shape) if wants_x else None
    of_all = [
        rows.new_empty(size, dtype=torch.float32)
        for size in (sum(ranks) * rows.shape[1], sum(sizes), sum(ranks))
    ]
    _run(
        "lora_backward",
        product.call,
        rows,
        grad_y,
        product.hidden,
        residual,
        grad_x,
        *of_all,
    )
    grad_a, grad_b, grad_gates = of_all
    parts = grad_a.view(-1, rows.shape[1]), grad_b, grad_gates
    of_layers = zip(
        *(
            torch.split(part, lengths)
            for part, lengths in zip(parts, (ranks, sizes, ranks), strict=True)
        ),
        strict=True,
    )
    grad_factors: list[Tensor | None] = []
    for (of_a, of_b, of_gate), up, gate in zip(of_layers, ups, gates, strict=True):
        grad_factors += [
            of_a,
            of_b if up is None else of_b.view(up.shape),
            None if gate is None else of_gate,
        ]
    return grad_x, grad_factors


class LoraLinears(torch.autograd.Function):
    """`lora_linears` in C, with autograd. factors: a, b and the gate of each layer, any of them
    None. stored: gives the weight again for the backward pass; None keeps the weight itself."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        stored: Dequantised | None,
        bias: Tensor | None,
        scales: Sequence[float],
        mask: Tensor | None,
        *factors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        flat, product = forward_in_c(_rows(x), weight, bias, scales, factors, mask)
        kept = weight if stored is None else None
        ctx.save_for_backward(product.rows, product.hidden, kept, mask, *factors)
        ctx.call, ctx.shape, ctx.stored = product.call, x.shape, stored
        # not a view of another tensor: some models change a layer's output in place
        y = flat.resize_(*x.shape[:-1], len(weight))
        outs = list(product.call.outs[: product.call.layers])
        return (y,) if len(outs) == 1 else torch.split(y, outs, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, hidden, weight, mask, *factors = ctx.saved_tensors
        if weight is None:
            weight = ctx.stored.dense()
            ctx.call.weight = weight.data_ptr()
        product = Product(ctx.call, rows, hidden)
        grad_x, grad_factors = backward_in_c(
            product, joined(grads), factors, ctx.needs_input_grad[0], mask
        )
        return (
            None if grad_x is None else grad_x.view(ctx.shape),
            None,
            None,
            None,
            None,
            None,
            *grad_factors,
        )


def _call_of(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scales: Sequence[float] = (),
    mask: Tensor | None = None,
    factors: Sequence[Tensor | None] = (),
) -> LinearCall:
    downs, ups = factors[::3], factors[1::3]
    is_transposed = int(weight.stride(1) != 1)
    tokens, width = rows.shape
    ranks, outs = ([0 if x is None else len(x) for x in each] for each in (downs, ups))
    call = LinearCall(
        *(tokens, width, len(weight), sum(ranks), len(downs), torch.get_num_threads()),
        *(rows.stride(0), len(weight), weight.stride(is_transposed), is_transposed),
        *(None if x is None else x.data_ptr() for x in (weight, bias)),
        ranks=(ctypes.c_int64 * MOST_LAYERS)(*ranks),
        outs=(ctypes.c_int64 * MOST_LAYERS)(*outs),
        scales=(ctypes.c_double * MOST_LAYERS)(*scales),
    )
    _point_to(call, mask, factors)
    return call


def _point_to(call: LinearCall, mask: Tensor | None, factors: Sequence[Tensor | None]) -> None:
    call.mask = None if mask is None else mask.data_ptr()
    for number, places in enumerate((call.a, call.b, call.gates)):
        for layer, x in enumerate(factors[number::3]):
            places[layer] = None if x is None else x.data_ptr()


def _rows(x: Tensor) -> Tensor:
    """Reshape x to [tokens, width] with contiguous rows."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _run(name: str, call: LinearCall, *tensors: Tensor | None) -> None:
    dtype = next(x.dtype for x in tensors if x is not None)
    library = _VECTORS if dtype == torch.float32 else _TILES
    if library.call(name, call, *tensors):
        raise MemoryError("no memory for the product of a linear layer")


def takes(
    x: Tensor,
    weight: Tensor,
    others: Sequence[Tensor | None],
    factors: Sequence[Tensor | None] = (),
    layers: int = 0,
) -> bool:
    """True if the kernels in C are available and take these tensors; others: a bias, a mask."""
    dtype = x.dtype
    given = [y for y in (x, weight, *others) if y is not None]
    if any(y.device.type != "cpu" for y in given) or any(y.dtype != dtype for y in given):
        return False
    if layers > MOST_LAYERS or x.numel() == 0 or 1 not in weight.stride():
        return False
    if any(y is not None and not y.is_contiguous() for y in (*others, *factors)):
        return False
    if any(y is not None and y.dtype != torch.float32 for y in factors):
        return False
    fits = not any(size % multiple(dtype) for size in weight.shape) and not any(
        y is not None and len(y) < FEWEST_OUTPUTS for y in factors[1::3]
    )
    return fits and kernel_level(dtype) is not Level.torch


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = _rows(x)
        y = x.new_empty(*x.shape[:-1], len(weight))
        _run("lora_forward", _call_of(rows, weight, bias), rows, y, None, None)
        ctx.save_for_backward(weight)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        grad_y = grads[0].contiguous()
        grad_x = grad_y.new_empty(*grad_y.shape[:-1], weight.shape[1])
        _run(
            "lora_backward",
            _call_of(_rows(grad_x), weight, None),
            None,
            grad_y,
            None,
            None,
            grad_x,
            None,
            None,
            None,
        )
        return grad_x, None, None


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute W x + bias with frozen weights, for x [..., in]; by torch's own product where there
    is no kernel or it does not pay."""
    if (
        torch.compiler.is_compiling()
        or x.numel() < FEWEST_TOKENS * x.shape[-1]
        or not takes(x, weight, [bias])
    ):
        return linear(x, weight, bias)
    y: Tensor = _FrozenLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y
