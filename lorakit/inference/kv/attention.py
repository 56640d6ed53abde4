"""Attention over a key-value cache: of a piece of a prompt, and of one token a row.

Both are made once a step and then called for every layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lorakit.inference.kv.slots import (
    ALWAYS,
    BLOCK,
    FREE,
    FULL,
    INT4,
    INT8,
    Integers,
    SlotTables,
    Step,
)
from lorakit.inference.kv.storage import Storage, index

QUERIES = 256  # of a long piece that are attended from at once

Flags = NDArray[np.bool_]


def _additive(visible: Flags, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A mask [rows, 1, queries, keys]: 0 where visible [rows, queries, keys], else -inf."""
    hidden = torch.from_numpy(~visible).to(device)[:, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


def _selection(values: Integers, device: torch.device) -> slice | Tensor:
    """An index of ascending values: a slice where they have no gap, which makes it a view."""
    if len(values) == 0:
        return slice(0)
    start, stop = int(values[0]), int(values[-1]) + 1
    return slice(start, stop) if stop - start == len(values) else index(values, device)


# -- a piece of several tokens a row ---------------------------------------------------------------


@dataclass
class QueryBlock:
    """Some queries of a piece and the keys that they need."""

    queries: slice
    kept: slice | Tensor  # slots at full precision
    piece: slice | Tensor  # places in the piece
    int8: int  # the first so many tokens of int8
    int4: int  # and blocks of int4
    mask: Tensor  # [rows, 1, queries, keys], 0 where seen and -inf elsewhere


class PieceAttention:
    """Causal attention of a step of several tokens a row, in blocks of queries."""

    def __init__(self, tables: SlotTables, storage: Storage, step: Step, query: Tensor) -> None:
        self.storage = storage
        self.blocks: list[QueryBlock] = []
        real = step.until != FREE
        first_ever = real.all() and not (step.before >= 0).any()
        if not (step.quantise_at_end and first_ever):
            n = real.shape[1]
            for start in range(0, n, QUERIES):
                queries = slice(start, min(start + QUERIES, n))
                self.blocks.append(_query_block(tables, step, queries, query))

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
    ) -> Tensor:
        """[rows, n, heads, head_dim] of queries [rows, heads, n, head_dim].

        key and value: the piece's own.
        """
        attention = partial(scaled_dot_product_attention, enable_gqa=True)
        if not self.blocks:
            out = attention(query, key, value, is_causal=True, scale=scaling)
            return out.transpose(1, 2)
        last = self.blocks[-1]
        all8 = self.storage.dequantised8(layer, last.int8)
        all4 = all8.new_empty(*all8.shape[:3], last.int4 * BLOCK, all8.shape[-1])
        self.storage.dequantise4(layer, all4)
        full, piece = self.storage.tensors["full"][:, layer], torch.stack([key, value])
        sources = (full, piece, all8.to(key.dtype), all4.to(key.dtype))
        outs = []
        for block in self.blocks:
            picks = (block.kept, block.piece, slice(block.int8), slice(block.int4 * BLOCK))
            seen = [part[:, :, :, pick] for part, pick in zip(sources, picks, strict=True)]
            keys, values = torch.cat(seen, 3)
            part = query[:, :, block.queries]
            outs.append(attention(part, keys, values, attn_mask=block.mask, scale=scaling))
        return torch.cat(outs, 2).transpose(1, 2)


def _query_block(tables: SlotTables, step: Step, queries: slice, like: Tensor) -> QueryBlock:
    """The keys that some queries need, and the mask that says which query sees which of them."""
    own = step.until[:, queries] != FREE
    position = step.position[:, queries]
    first = np.where(own, position, ALWAYS).min(1)[:, None]
    last = np.where(own, position, FREE).max(1)[:, None]
    kept = np.flatnonzero((step.before > first).any(0))
    in_piece = (step.until[:, : queries.stop] > first).any(0)
    in_piece[queries.start :] = True
    piece = np.flatnonzero(in_piece)
    int8, int4 = (int((tables.ready[kind] <= last).sum(1).max()) for kind in (INT8, INT4))
    at = position[:, :, None]
    seen = [
        at < step.before[:, None, kept],
        (step.position[:, None, piece] <= at) & (at < step.until[:, None, piece]),
        tables.ready[INT8][:, None, :int8] <= at,
        (tables.ready[INT4][:, None, :int4] <= at).repeat(BLOCK, 2),
    ]
    # Padding sees itself: a query that sees nothing at all would give NaN.
    itself = piece == np.arange(queries.start, queries.stop)[:, None]
    seen[1] = np.where(own[:, :, None], seen[1], itself)
    for i in (0, 2, 3):
        seen[i] = seen[i] & own[:, :, None]
    device = like.device
    mask = _additive(np.concatenate(seen, 2), device, like.dtype)
    slots, places = _selection(kept, device), _selection(piece, device)
    return QueryBlock(queries, slots, places, int8, int4, mask)


# -- one token a row -------------------------------------------------------------------------------


class LayerViews(NamedTuple):
    """A layer's parts of the storage: views."""

    # [rows, kv heads, 1, head_dim]: for the new token, unless its slots differ between rows
    key_slot: Tensor | None
    value_slot: Tensor | None
    full: Tensor  # [2, rows, kv heads, slots, head_dim]
    codes8: Tensor  # [2, rows, kv heads, tokens, head_dim]
    key_scales: Tensor  # [rows · kv heads, 1, tokens]
    value_scales: Tensor


@dataclass
class Products:
    """Buffers in float32 for the products of one layer after the other, and views of them."""

    keys: Tensor  # [rows · kv heads, head_dim, keys], transposed
    values: Tensor  # [rows · kv heads, keys, head_dim]
    full: Tensor  # [2, rows, kv heads, slots, head_dim]: where tokens at full precision go
    codes8: Tensor  # [2, rows, kv heads, tokens, head_dim]: codes of int8
    int4: Tensor  # [2, rows, kv heads, tokens, head_dim]
    query: Tensor  # [rows · kv heads, groups, head_dim]
    scores: Tensor  # [rows · kv heads, groups, keys]
    scores8: Tensor  # of codes of int8
    weights: Tensor
    weights8: Tensor


class TokenAttention:
    """Attention of a step of one token a row, which is written and then attends, layer by layer."""

    def __init__(self, tables: SlotTables, storage: Storage, step: Step) -> None:
        self.storage = storage
        counts = [tables.filled[kind] for kind in (FULL, INT8, INT4)]
        full, self.int8, self.int4 = (int(count.max()) for count in counts)
        self.mask: Tensor | None = None  # [rows, 1, 1, keys], where the rows differ
        if any((count != count[0]).any() for count in counts):
            self.mask = self._mask_of(counts)
        self.layers = self._views(step.slots, full)
        self.products: Products | None = None

    def _mask_of(self, counts: list[Integers]) -> Tensor:
        """A mask of the keys that each row has."""
        there = [np.arange(int(count.max())) < count[:, None] for count in counts]
        each = (1, 1, BLOCK)  # tokens of a slot
        visible = [slots.repeat(n, 1) for slots, n in zip(there, each, strict=True)]
        form = self.storage.form
        dtype = torch.float32 if self.int8 or self.int4 else form.dtype
        return _additive(np.concatenate(visible, 1)[:, None], form.device, dtype)

    def _views(self, slots: Integers, full: int) -> list[LayerViews]:
        held = self.storage.tensors
        slot = slots[0]
        places: Any = [(None, None)] * self.storage.layers
        if (slots == slot).all():
            one = held["full"][:, :, :, :, slot : slot + 1]
            places = zip(*(part.unbind() for part in one), strict=True)
        scales = held["scales8"][..., : self.int8].flatten(2, 3)[:, :, :, None]
        parts = (
            held["full"][:, :, :, :, :full].unbind(1),
            held["codes8"][:, :, :, :, : self.int8].unbind(1),
            *map(Tensor.unbind, scales),
        )
        return [LayerViews(*place, *views) for place, *views in zip(places, *parts, strict=True)]

    def write(self, layer: int, key: Tensor, value: Tensor) -> bool:
        """Put the new token into its slot; False, and nothing is done, where slots differ."""
        views = self.layers[layer]
        if views.key_slot is None or views.value_slot is None:
            return False
        views.key_slot.copy_(key)
        views.value_slot.copy_(value)
        return True

    def __call__(self, layer: int, query: Tensor, scaling: float) -> Tensor:
        """[rows, 1, heads, head_dim] of queries [rows, heads, 1, head_dim].

        The queries that share a head's keys are rows of one product.
        """
        views = self.layers[layer]
        rows, heads, _, width = query.shape
        kv_heads = views.full.shape[2]
        if self.int8 or self.int4:
            out = self._mixed(layer, views, query, scaling).to(query.dtype)
            return out.view(rows, 1, heads, width)
        query = query.reshape(rows, kv_heads, heads // kv_heads, width)
        key, value = views.full
        out = scaled_dot_product_attention(query, key, value, attn_mask=self.mask, scale=scaling)
        return out.reshape(rows, 1, heads, width)

    def _mixed(self, layer: int, views: LayerViews, query: Tensor, scaling: float) -> Tensor:
        """Attention over quantised tokens too, [rows · kv heads, groups, head_dim] in float32.

        8-bit codes are multiplied as they are, and the scores and weights with their scales, which
        is less work than scaling the codes. In float32 small products are several times faster
        than in bfloat16.
        """
        if self.products is None:
            self.products = self._allocate(views, query.shape[1] // views.full.shape[2])
        products = self.products
        products.query.copy_(query.reshape(products.query.shape))
        products.full.copy_(views.full)
        products.codes8.copy_(views.codes8)
        if products.int4.numel():
            self.storage.dequantise4(layer, products.int4)
        scores = products.scores
        torch.baddbmm(scores, products.query, products.keys, beta=0, alpha=scaling, out=scores)
        products.scores8.mul_(views.key_scales)
        if self.mask is not None:
            scores.view(len(self.mask), -1, *scores.shape[1:]).add_(self.mask)
        torch.softmax(scores, -1, out=products.weights)
        products.weights8.mul_(views.value_scales)
        return torch.bmm(products.weights, products.values)

    def _allocate(self, views: LayerViews, groups: int) -> Products:
        _, rows, heads, full, width = views.full.shape
        pairs, end = rows * heads, full + self.int8
        keys = end + self.int4 * BLOCK
        each = (2 * keys * width, groups * width, groups * keys, groups * keys)
        sizes = [pairs * size for size in each]
        parts = torch.split(self.storage.scratch(sum(sizes)), sizes)
        states = parts[0].view(2, rows, heads, keys, width)
        key, value = states.flatten(1, 2)
        scores, weights = (part.view(pairs, groups, keys) for part in parts[2:])
        return Products(
            keys=key.mT,
            values=value,
            full=states[:, :, :, :full],
            codes8=states[:, :, :, full:end],
            int4=states[:, :, :, end:],
            query=parts[1].view(pairs, groups, width),
            scores=scores,
            scores8=scores[:, :, full:end],
            weights=weights,
            weights8=weights[:, :, full:end],
        )
