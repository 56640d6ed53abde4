"""Attention over packed rows, with its own backward, in two ways.

Short rows: kernels in C (csrc/attention.c), which read queries, keys and values where they stand. Their products are too small
for oneDNN: measured on two cores in bf16, 32 rows of 8 to 50 tokens, 12 heads of 32, with dropout, forward and backward took 7 to
9 ms by plain products and 3.2 by these kernels; 10 rows of 128, 9 heads of 64, 6.0 and 6.1.

Else plain products over groups of rows of like length: each group's queries, keys and values are gathered to [rows, heads,
longest, head_dim]; what is done to the scores is one operation (lorakit.kernels.elementwise). Long rows are done a block of
queries at a time, which sees no later keys where the attention is causal; their weights are computed again in the backward pass
instead of being kept (as in Dao et al., arXiv 2205.14135, algorithm 4, with all keys of a block of queries at once).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorakit.kernels import native
from lorakit.kernels.dropout import draw_seed
from lorakit.kernels.elementwise import softmax_backward, softmax_forward
from lorakit.kernels.packing import AttentionGroup, Packing

# Mean number of tokens in the row of a token up to which the kernels in C are faster.
SHORT = 192
# Queries of a block, and the keys up to which weights are kept.
QUERIES = KEPT_KEYS = 256


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, causal: bool, scaling: float, dropout: float = 0.0
) -> Tensor:
    """Scaled dot-product attention (Vaswani et al., arXiv 1706.03762, § 3.2.1) of every token to those of its own row.

    query [1, heads, tokens, head_dim]; key and value [1, kv heads, tokens, head_dim], heads a multiple of kv heads. causal: to
    those up to itself. dropout: of the weights. Returns [1, tokens, heads, head_dim]; what fillers get means nothing.
    """
    short = native.load("attention") if packing.mean_length <= SHORT and _is_short_form(query, key, value) else None
    way = _Products if short is None else _ShortAttention
    y: Tensor = way.apply(query, key, value, packing, causal, scaling, dropout)  # type: ignore[no-untyped-call]
    return y


def _is_short_form(*tensors: Tensor) -> bool:
    """Whether the kernels in C read these [1, heads, tokens, head_dim]."""
    return all(
        x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float32) and x.stride(3) == 1 and x.shape[3] % 16 == 0
        for x in tensors
    )


class _Problem(ctypes.Structure):
    """`Problem` of csrc/attention.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "heads", "kv_heads", "width", "bf16", "causal", "threads", "seed")),
        *((f"{name}_{what}", ctypes.c_int64) for name in "qkv" for what in ("token", "head")),
        *((name, ctypes.c_double) for name in ("scaling", "dropout")),
        ("firsts", ctypes.c_void_p),
    )


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, packing: Packing, causal: bool, scaling: float, dropout: float
    ) -> Tensor:
        heads, width = query.shape[1], query.shape[3]
        y, sums = query.new_empty(1, packing.tokens, heads, width), query.new_empty(packing.tokens, heads, dtype=torch.float32)
        y[:, packing.real :] = 0
        strides = [stride for x in (query, key, value) for stride in (x.stride(2), x.stride(1))]
        sizes = packing.rows, heads, key.shape[1], width, query.dtype == torch.bfloat16, causal
        seed = draw_seed() if dropout else 0
        ctx.problem = _Problem(*sizes, torch.get_num_threads(), seed, *strides, scaling, dropout, packing.firsts.data_ptr())
        _call("attention_forward", ctx.problem, query, key, value, y, sums)
        ctx.save_for_backward(query, key, value, y, sums)
        ctx.packing = packing
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, y, sums = ctx.saved_tensors
        results = [torch.empty(1, x.shape[2], x.shape[1], x.shape[3], dtype=x.dtype) for x in (query, key, value)]
        for result in results:
            result[:, ctx.packing.real :] = 0
        _call("attention_backward", ctx.problem, query, key, value, y, grads[0].contiguous(), sums, *results)
        grad_query, grad_key, grad_value = (result.transpose(1, 2) for result in results)
        return grad_query, grad_key, grad_value, None, None, None, None


def _call(name: str, problem: _Problem, *tensors: Tensor) -> None:
    library = native.load("attention")
    assert library is not None
    if library[name](ctypes.byref(problem), *(ctypes.c_void_p(x.data_ptr()) for x in tensors)):
        raise MemoryError("no memory for the attention of the longest row")


class Softmax(NamedTuple):
    """The weights of a block of queries, before dropout and after it, and the seed of the latter."""

    weights: Tensor
    dropped: Tensor
    seed: int


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, packing: Packing, causal: bool, scaling: float, dropout: float
    ) -> Tensor:
        heads = query.shape[1]
        gathered, softmaxes, results = [], [], []
        for number, group in enumerate(packing.groups):
            q, k, v = (_to_group(x, packing, number) for x in (query * scaling, key, value))
            y = torch.empty_like(q)
            for first, last, seen in _blocks(group, causal):
                seed = draw_seed() if dropout else 0
                softmax = _softmax(q[:, :, first:last], k[:, :, :seen], group, causal, dropout, seed)
                weights = softmax.dropped.view(*k.shape[:2], -1, seen)
                y[:, :, first:last] = (weights @ v[:, :, :seen]).view(*q.shape[:2], last - first, -1)
                softmaxes.append(softmax if group.longest <= KEPT_KEYS else seed)
            gathered += [q, k, v]
            results.append(y.view(-1, y.shape[-1]))
        ctx.save_for_backward(*gathered)
        ctx.packing, ctx.softmaxes, ctx.causal, ctx.scaling, ctx.dropout = packing, softmaxes, causal, scaling, dropout
        return _to_tokens(results, packing, heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        packing: Packing = ctx.packing
        saved, softmaxes = iter(ctx.saved_tensors), iter(ctx.softmaxes)
        grad_y = grads[0].transpose(1, 2)  # [1, heads, tokens, head_dim]
        parts: tuple[list[Tensor], ...] = ([], [], [])
        heads, kv_heads = grad_y.shape[1], 0
        for number, group in enumerate(packing.groups):
            q, k, v = next(saved), next(saved), next(saved)
            g, kv_heads = _to_group(grad_y, packing, number), k.shape[1]
            grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
            for first, last, seen in _blocks(group, ctx.causal):
                softmax = next(softmaxes)
                if not isinstance(softmax, Softmax):
                    softmax = _softmax(q[:, :, first:last], k[:, :, :seen], group, ctx.causal, ctx.dropout, softmax)
                q_block, g_block = (_by_kv_head(x[:, :, first:last], kv_heads) for x in (q, g))
                weights = softmax.dropped.view(*k.shape[:2], -1, seen)
                grad_v[:, :, :seen] += weights.transpose(2, 3) @ g_block
                grad_weights = (g_block @ v[:, :, :seen].transpose(2, 3)).view(softmax.dropped.shape)
                keys = group.seen(seen)
                grad_scores = softmax_backward(softmax.weights, grad_weights, keys, ctx.causal, ctx.dropout, softmax.seed)
                grad_scores = grad_scores.view(weights.shape)
                grad_q[:, :, first:last] = (grad_scores @ k[:, :, :seen]).view(*q.shape[:2], last - first, -1)
                grad_k[:, :, :seen] += grad_scores.transpose(2, 3) @ q_block
            for part, grad in zip(parts, (grad_q.mul_(ctx.scaling), grad_k, grad_v), strict=True):
                part.append(grad.view(-1, grad.shape[-1]))
        grad_query, grad_key, grad_value = (
            _to_tokens(part, packing, n).transpose(1, 2) for part, n in zip(parts, (heads, kv_heads, kv_heads), strict=True)
        )
        return grad_query, grad_key, grad_value, None, None, None, None


def _blocks(group: AttentionGroup, causal: bool) -> Iterator[tuple[int, int, int]]:
    """(first query, last query, keys that they see) of each block."""
    for first in range(0, group.longest, QUERIES):
        last = min(first + QUERIES, group.longest)
        yield first, last, last if causal else group.longest


def _softmax(q: Tensor, k: Tensor, group: AttentionGroup, causal: bool, dropout: float, seed: int) -> Softmax:
    """q [rows, heads, queries, head_dim], k [rows, kv heads, keys, head_dim]; weights [rows, heads, queries, keys]."""
    scores = _by_kv_head(q, k.shape[1]) @ k.transpose(2, 3)  # [rows, kv heads, queries of all their heads, keys]
    dropped, weights = softmax_forward(scores.view(*q.shape[:3], k.shape[2]), group.seen(k.shape[2]), causal, dropout, seed)
    return Softmax(weights, dropped, seed)


def _by_kv_head(x: Tensor, kv_heads: int) -> Tensor:
    """[rows, heads, queries, head_dim] with the queries of all heads that share keys in a row: larger products."""
    return x.reshape(x.shape[0], kv_heads, -1, x.shape[3])


def _to_group(x: Tensor, packing: Packing, number: int) -> Tensor:
    """[1, heads, tokens, head_dim] → [rows of the group, heads, longest, head_dim]; tokens lie outside of heads in memory."""
    group, heads = packing.groups[number], x.shape[1]
    by_token = x[0].transpose(0, 1).reshape(-1, x.shape[3])  # [tokens · heads, head_dim]
    return by_token.index_select(0, packing.head_index(number, heads)).view(len(group.keys), heads, group.longest, -1)


def _to_tokens(parts: list[Tensor], packing: Packing, heads: int) -> Tensor:
    """What `_to_group` took apart, of all groups: [1, tokens, heads, head_dim], zero for fillers."""
    joined = torch.cat(parts) if len(parts) > 1 else parts[0]
    x = joined.index_select(0, packing.token_index(heads)).view(1, packing.tokens, heads, -1)
    x[:, packing.real :] = 0
    return x
