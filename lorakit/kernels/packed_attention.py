"""Attention over packed rows, with its own backward. The implementation depends on the processor,
the type and a row's length.

bfloat16 on processors with AMX: AMX kernels in C (csrc/attention_tiles.c), for rows of every
length. Measured on two cores, forward and backward, with the time of the other implementations in
parentheses: 7 rows of 100 to 350 tokens, 9 heads of 64 with 3 key-value heads, causal: 2.6 ms (16);
32 rows of 8 to 60 tokens, 12 heads of 32, with dropout: 1.8 ms (4.4); one row of 4096 tokens, heads
as in the first: 53 ms (225).

Otherwise, short rows: kernels in C (csrc/attention.c), which read queries, keys and values in
place. Their products are too small for oneDNN. Measured on two cores in bf16, forward and backward,
plain products against these kernels: 32 rows of 8 to 50 tokens, 12 heads of 32, with dropout: 7 to
9 ms against 3.2; 10 rows of 128 tokens, 9 heads of 64: 6.0 ms against 6.1.

Otherwise, long rows: plain products over groups of rows of similar length. Each group's queries,
keys and values are gathered to [rows, heads, longest, head_dim], and one operation
(lorakit.kernels.softmax) turns scores into weights. This is done for one block of queries at a
time, without later keys if attention is causal. The weights of rows of several blocks are
recomputed in the backward pass instead of being saved (as in Dao et al., arXiv 2205.14135,
algorithm 4, but with all keys of a block of queries at once).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorakit.kernels import dispatch
from lorakit.kernels.dropout import draw_seed
from lorakit.kernels.in_c import FAILS, FLOATS, POINTER, CStructure, Library, address_of
from lorakit.kernels.levels import Level
from lorakit.kernels.packing import AttentionGroup, Packing
from lorakit.kernels.softmax import softmax_backward, softmax_forward

# Longest row, in tokens, for which the kernels in C without AMX are faster than plain products.
SHORT = 112
# Queries of a block, and the largest number of keys for which weights are saved.
QUERIES = KEPT_KEYS = 256


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
    y: Tensor = _PackedAttention.apply(query, key, value, packing, causal, scaling, dropout)  # type: ignore[no-untyped-call]
    return y


class AttentionForm(NamedTuple):
    """Settings of one attention. long: the number of rows, the longest ones, computed by plain
    products; level: the level of the implementation for the other rows."""

    packing: Packing
    causal: bool
    scaling: float
    dropout: float
    long: int
    level: Level


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        packing: Packing,
        causal: bool,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        level = _level(query, key, value)
        limit = {Level.torch: -1, Level.amx: packing.longest}.get(level, SHORT)
        long = sum(length > limit for length in packing.lengths)
        form = AttentionForm(packing, causal, scaling, dropout, long, level)
        y = query.new_empty(1, packing.tokens, query.shape[1], query.shape[3])
        y[:, packing.real :] = 0
        ctx.form, ctx.needed = form, any(ctx.needs_input_grad)
        saved: list[Tensor] = []
        if form.long:
            saved += _long_forward(ctx, form, query, key, value, y)
        ctx.gathered = len(saved)
        if long < packing.rows:
            sums, ctx.call = forward_in_c(form, query, key, value, y)
            saved += [query, key, value, y, sums]
        ctx.save_for_backward(*saved)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        form: AttentionForm = ctx.form
        saved = ctx.saved_tensors
        gathered, kept = saved[: ctx.gathered], saved[ctx.gathered :]
        grad_y = grads[0].contiguous()
        results = room_for_gradients(form.packing, grad_y, (gathered or kept)[1].shape[1])
        if gathered:
            _long_backward(ctx, form, gathered, grad_y, results)
        if kept:
            backward_in_c(form, ctx.call, kept, grad_y, results)
        grad_query, grad_key, grad_value = (result.transpose(1, 2) for result in results)
        return grad_query, grad_key, grad_value, None, None, None, None


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
    """Fills y [1, tokens, heads, head_dim] for all rows but the long ones, fillers aside; returns
    what `backward_in_c` needs: (the logarithms of the softmaxes' sums, the call, which points to
    `form.packing`)."""
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
_SHORT_ROWS = Library("attention", _FUNCTIONS, [AttentionCall])
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
        packing.rows - form.long,
        heads,
        kv_heads,
        width,
        query.dtype == torch.bfloat16,
        form.causal,
    )
    seed = draw_seed() if form.dropout else 0
    firsts = packing.firsts[form.long :].data_ptr()
    grad_token = (heads + 2 * kv_heads) * width
    return AttentionCall(
        *sizes,
        torch.get_num_threads(),
        seed,
        *strides,
        grad_token,
        form.scaling,
        form.dropout,
        firsts,
    )


def _run(level: Level, name: str, call: AttentionCall, *tensors: Tensor) -> None:
    library = _TILES if level is Level.amx else _SHORT_ROWS
    if library.call(name, call, *tensors):
        raise MemoryError("no memory for the attention of the longest row")


# -- long rows -------------------------------------------------------------------------------------


class Softmax(NamedTuple):
    """The weights of a block of queries, before and after dropout, and the dropout's seed."""

    weights: Tensor
    dropped: Tensor
    seed: int


def _long_forward(
    ctx: Any, form: AttentionForm, query: Tensor, key: Tensor, value: Tensor, y: Tensor
) -> list[Tensor]:
    """Fill y [1, tokens, heads, head_dim] for the long rows. Returns the tensors that the backward
    pass needs in addition to `ctx.softmaxes`."""
    gathered, softmaxes, results = [], [], []
    for group in form.packing.groups(form.long):
        q, k, v = (_to_group(x, group) for x in (query, key, value))
        q *= form.scaling
        y_group = torch.empty_like(q)
        for first, last, seen in _blocks(group, form.causal):
            seed = draw_seed() if form.dropout else 0
            softmax = _softmax(q[:, :, first:last], k[:, :, :seen], group, form, seed)
            weights = softmax.dropped.view(*k.shape[:2], -1, seen)
            y_group[:, :, first:last] = (weights @ v[:, :, :seen]).view(
                *q.shape[:2], last - first, -1
            )
            if ctx.needed:
                softmaxes.append(softmax if group.longest <= KEPT_KEYS else seed)
        gathered += [q, k, v]
        results.append(y_group)
    _to_tokens(results, form, y)
    ctx.softmaxes = softmaxes
    return gathered if ctx.needed else []


def _long_backward(
    ctx: Any,
    form: AttentionForm,
    gathered: tuple[Tensor, ...],
    grad_y: Tensor,
    results: tuple[Tensor, ...],
) -> None:
    """Fill the gradients of queries, keys and values [1, tokens, …, head_dim] for the long
    rows."""
    saved, softmaxes = iter(gathered), iter(ctx.softmaxes)
    parts: tuple[list[Tensor], ...] = ([], [], [])
    for group in form.packing.groups(form.long):
        q, k, v = next(saved), next(saved), next(saved)
        g, kv_heads = _to_group(grad_y.transpose(1, 2), group), k.shape[1]
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for first, last, seen in _blocks(group, form.causal):
            softmax = next(softmaxes)
            if not isinstance(softmax, Softmax):
                softmax = _softmax(q[:, :, first:last], k[:, :, :seen], group, form, softmax)
            q_block, g_block = (_by_kv_head(x[:, :, first:last], kv_heads) for x in (q, g))
            weights = softmax.dropped.view(*k.shape[:2], -1, seen)
            grad_v[:, :, :seen] += weights.transpose(2, 3) @ g_block
            grad_weights = (g_block @ v[:, :, :seen].transpose(2, 3)).view(softmax.dropped.shape)
            keys = group.seen(seen)
            grad_scores = softmax_backward(
                softmax.weights, grad_weights, keys, form.causal, form.dropout, softmax.seed
            )
            grad_scores = grad_scores.view(weights.shape)
            grad_q[:, :, first:last] = (grad_scores @ k[:, :, :seen]).view(
                *q.shape[:2], last - first, -1
            )
            grad_k[:, :, :seen] += grad_scores.transpose(2, 3) @ q_block
        for part, grad in zip(parts, (grad_q.mul_(form.scaling), grad_k, grad_v), strict=True):
            part.append(grad)
    for part, result in zip(parts, results, strict=True):
        _to_tokens(part, form, result)


def _blocks(group: AttentionGroup, causal: bool) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end of the queries, number of keys that they see) of each block."""
    for first in range(0, group.longest, QUERIES):
        last = min(first + QUERIES, group.longest)
        yield first, last, last if causal else group.longest


def _softmax(
    q: Tensor, k: Tensor, group: AttentionGroup, form: AttentionForm, seed: int
) -> Softmax:
    """Compute weights [rows, heads, queries, keys] of q [rows, heads, queries, head_dim] and k
    [rows, kv heads, keys, head_dim]."""
    # [rows, kv heads, queries of all their heads, keys]
    scores = _by_kv_head(q, k.shape[1]) @ k.transpose(2, 3)
    keys = group.seen(k.shape[2])
    dropped, weights = softmax_forward(
        scores.view(*q.shape[:3], k.shape[2]), keys, form.causal, form.dropout, seed
    )
    return Softmax(weights, dropped, seed)


def _by_kv_head(x: Tensor, kv_heads: int) -> Tensor:
    """Reshape [rows, heads, queries, head_dim] so that the queries of all heads that share keys
    are consecutive, for larger products."""
    return x.reshape(x.shape[0], kv_heads, -1, x.shape[3])


def _to_group(x: Tensor, group: AttentionGroup) -> Tensor:
    """Gather [1, heads, tokens, head_dim], with tokens outside heads in memory, into [rows of the
    group, heads, longest, head_dim]."""
    heads = x.shape[1]
    by_token = x[0].transpose(0, 1).reshape(-1, x.shape[3])  # [tokens · heads, head_dim]
    return by_token.index_select(0, group.head_index(heads)).view(
        len(group.keys), heads, group.longest, -1
    )


def _to_tokens(parts: list[Tensor], form: AttentionForm, result: Tensor) -> None:
    """Inverse of `_to_group`: write the parts of all groups into result [1, tokens, heads,
    head_dim]."""
    heads, width = result.shape[2:]
    index = form.packing.token_index(form.long, heads)
    rows = torch.cat([part.view(-1, width) for part in parts]).index_select(0, index)
    result[0, : len(index) // heads] = rows.view(-1, heads, width)
