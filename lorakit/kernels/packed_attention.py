"""Attention over packed rows, with its own backward. The implementation depends on the processor
and the type.

bfloat16 on processors with AMX: AMX kernels in C (csrc/attention_tiles.c). Measured on two cores,
forward and backward, with the time of plain products in parentheses: 7 rows of 100 to 350 tokens, 9
heads of 64 with 3 key-value heads, causal: 2.6 ms (16); one row of 4096 tokens, the same heads: 53
ms (225).

Otherwise: vector kernels in C (csrc/attention.c), which compute in float32 for both types. Measured
in float32 on one core with AVX2, whose products of large matrices reach 57 GFLOP/s, forward and
backward, with the time of torch's attention in parentheses: 8 rows of 100 to 350 tokens, heads
as above: 43 ms (98), or 43 GFLOP/s; the row of 4096 tokens: 1.2 s (1.7), or 55 GFLOP/s; 32 rows of
about 26 tokens, 12 heads of 32, with dropout: 11 ms (48), mostly for reading and writing memory.

Both read queries, keys and values in place and take rows of every length. They work on blocks of
queries and keys, and recompute the weights in the backward pass (Dao et al., arXiv 2205.14135).

For other types and head sizes, on other devices, and without a compiler: torch's attention, one
row after another.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lorakit.kernels import dispatch
from lorakit.kernels.dropout import draw_seed
from lorakit.kernels.in_c import FAILS, FLOATS, POINTER, CStructure, Library, address_of
from lorakit.kernels.levels import Level
from lorakit.kernels.packing import Packing


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    causal: bool,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention (Vaswani et al., arXiv 1706.03762, § 3.2.1) of every token to
    those of its own row.

    query [1, heads, tokens, head_dim]; key and value [1, kv heads, tokens, head_dim], heads a
    multiple of kv heads. causal: a token attends only to tokens up to itself. dropout: probability
    for the weights. Returns [1, tokens, heads, head_dim]; the values of fillers are meaningless.

    Raises ValueError for other shapes.
    """
    heads, kv_heads, width = query.shape[1], key.shape[1], query.shape[3]
    expected = [(1, heads, packing.tokens, width), *[(1, kv_heads, packing.tokens, width)] * 2]
    if [tuple(x.shape) for x in (query, key, value)] != expected or heads % kv_heads:
        shapes = ", ".join(str(list(x.shape)) for x in (query, key, value))
        raise ValueError(
            f"attention over {packing.tokens} packed tokens takes heads of one width, not {shapes}"
        )
    form = AttentionForm(packing, causal, scaling, dropout, _level(query, key, value))
    if form.level is Level.torch:
        return _row_by_row(query, key, value, form)
    y: Tensor = _PackedAttention.apply(query, key, value, form)  # type: ignore[no-untyped-call]
    return y


class AttentionForm(NamedTuple):
    """Settings of one attention. level: the level of its kernels in C, torch without them."""

    packing: Packing
    causal: bool
    scaling: float
    dropout: float
    level: Level


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, form: AttentionForm) -> Tensor:
        packing = form.packing
        y = query.new_empty(1, packing.tokens, query.shape[1], query.shape[3])
        y[:, packing.real :] = 0
        sums, ctx.call = forward_in_c(form, query, key, value, y)
        ctx.form = form
        ctx.save_for_backward(query, key, value, y, sums)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        form: AttentionForm = ctx.form
        kept = ctx.saved_tensors
        grad_y = grads[0].contiguous()
        results = room_for_gradients(form.packing, grad_y, kept[1].shape[1])
        backward_in_c(form, ctx.call, kept, grad_y, results)
        grad_query, grad_key, grad_value = (result.transpose(1, 2) for result in results)
        return grad_query, grad_key, grad_value, None


def room_for_gradients(packing: Packing, grad_y: Tensor, kv_heads: int) -> tuple[Tensor, ...]:
    """Allocate the gradients of queries, keys and values [1, tokens, …, head_dim], zero for
    fillers. They are side by side in memory: where one product computed queries, keys and values,
    its backward pass reads their gradients as one tensor."""
    heads, width = grad_y.shape[2:]
    joined = grad_y.new_empty(1, packing.tokens, heads + 2 * kv_heads, width)
    joined[:, packing.real :] = 0
    parts: tuple[Tensor, ...] = torch.split(joined, [heads, kv_heads, kv_heads], 2)
    return parts


# -- kernels in C ----------------------------------------------------------------------------------


def forward_in_c(
    form: AttentionForm, query: Tensor, key: Tensor, value: Tensor, y: Tensor
) -> tuple[Tensor, AttentionCall]:
    """Fills y [1, tokens, heads, head_dim], fillers aside; returns what `backward_in_c` needs: (the
    logarithms of the softmaxes' sums, the call, which points to `form.packing`)."""
    sums = query.new_empty(form.packing.tokens, query.shape[1], dtype=torch.float32)
    call = _call_of(form, query, key, value)
    _run(form.level, "attention_forward", call, query, key, value, y, sums)
    return sums, call


def backward_in_c(
    form: AttentionForm,
    call: AttentionCall,
    kept: Sequence[Tensor],
    grad_y: Tensor,
    results: Sequence[Tensor],
) -> None:
    """Fill the gradients `results`, allocated by `room_for_gradients`, from kept: queries, keys,
    values, y and sums."""
    query, key, value, y, sums = kept
    _run(form.level, "attention_backward", call, query, key, value, y, grad_y, sums, *results)


class AttentionCall(CStructure):
    """`AttentionCall` of csrc/attention.h."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("rows", "heads", "kv_heads", "width", "bf16", "causal", "threads", "seed")
        ),
        *((f"{name}_{what}", ctypes.c_int64) for name in "qkv" for what in ("token", "head")),
        ("grad_token", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("scaling", "dropout")),
        ("firsts", ctypes.c_void_p),
    )


_FUNCTIONS = {
    "attention_forward": (FAILS, *address_of(AttentionCall), *[POINTER] * 4, FLOATS),
    "attention_backward": (
        FAILS,
        *address_of(AttentionCall),
        *[POINTER] * 5,
        FLOATS,
        *[POINTER] * 3,
    ),
}
_VECTORS = Library("attention", _FUNCTIONS, [AttentionCall])
_TILES = Library("attention_tiles", _FUNCTIONS, [AttentionCall])


def _level(*tensors: Tensor) -> Level:
    """The level of the implementation for these tensors [1, heads, tokens, head_dim]."""
    dtype, width = tensors[0].dtype, tensors[0].shape[3]
    fit = all(x.is_cpu and x.dtype == dtype and x.stride(3) == 1 for x in tensors)
    if not fit or dtype not in (torch.bfloat16, torch.float32) or width % 16:
        return Level.torch
    by_tiles = dtype == torch.bfloat16 and width % 32 == 0
    return dispatch.implementation("attention", Level.amx if by_tiles else Level.avx512)


def _call_of(form: AttentionForm, query: Tensor, key: Tensor, value: Tensor) -> AttentionCall:
    packing, heads, kv_heads, width = form.packing, query.shape[1], key.shape[1], query.shape[3]
    strides = [stride for x in (query, key, value) for stride in (x.stride(2), x.stride(1))]
    sizes = (
        packing.rows,
        heads,
        kv_heads,
        width,
        query.dtype == torch.bfloat16,
        form.causal,
    )
    seed = draw_seed() if form.dropout else 0
    grad_token = (heads + 2 * kv_heads) * width
    return AttentionCall(
        *sizes,
        torch.get_num_threads(),
        seed,
        *strides,
        grad_token,
        form.scaling,
        form.dropout,
        packing.firsts.data_ptr(),
    )


def _run(level: Level, name: str, call: AttentionCall, *tensors: Tensor) -> None:
    library = _TILES if level is Level.amx else _VECTORS
    if library.call(name, call, *tensors):
        raise MemoryError(f"no memory for the attention of {call.rows} rows")


# -- torch -----------------------------------------------------------------------------------------


def _row_by_row(query: Tensor, key: Tensor, value: Tensor, form: AttentionForm) -> Tensor:
    """`packed_attention` by torch, for one row after another."""
    packing, shared = form.packing, query.shape[1] != key.shape[1]
    parts = [
        scaled_dot_product_attention(
            q,
            k,
            v,
            dropout_p=form.dropout,
            is_causal=form.causal,
            scale=form.scaling,
            enable_gqa=shared,
        )
        for q, k, v in zip(*(_rows_of(x, packing) for x in (query, key, value)), strict=True)
    ]
    fillers = query.new_zeros(1, query.shape[1], packing.tokens - packing.real, query.shape[3])
    return torch.cat([*parts, fillers], 2).transpose(1, 2)


def _rows_of(x: Tensor, packing: Packing) -> tuple[Tensor, ...]:
    """[1, heads, tokens, head_dim] → [1, heads, length, head_dim] of each row."""
    rows: tuple[Tensor, ...] = torch.split(x[:, :, : packing.real], packing.lengths, 2)
    return rows
