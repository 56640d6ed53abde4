"""Layers of a decoder that read the same input, as one product.

The adapters' A are stacked below the weights, so that one product gives the base's outputs and the
low-rank ones. Components come tier after tier, so that a tier is a prefix of the rows. The layers'
own weights become views of the joined one: nothing is stored twice.

One token is a vector, and its product is `torch.mv`: measured on two cores in bf16, over weights
that are in no cache, oneDNN's matrix-vector product took 0.6 to 0.85 of the time of the matrix
product that `linear` runs for one row. Whether oneDNN's or torch's own is faster for a weight
differs by up to 2 times either way between shapes and machines, and is measured as the decoder is
built; for the small B, torch's own is (4 to 16 against 20 to 25 µs). From four tokens on, and for a
prompt, oneDNN's matrix product won at every shape; at two, neither clearly did.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lorakit.adapters.layer import Adapter
from lorakit.kernels.huge_pages import Arena
from lorakit.kernels.joined import join_rows
from lorakit.kernels.optimisation import Unsupported
from lorakit.kernels.tiered_linear import TierPlan

REPEATS = 4

Matvec = Callable[[Tensor, Tensor], Tensor]


class Up(NamedTuple):
    """The B of one layer in a group: outputs [start, stop) get b [stop - start, last - first] times
    components [first, last)."""

    b: Tensor
    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True)
class Tier:
    """The part of a group that one tier needs.

    weight [out + components, in]: the first rows of the group's. order [components]: puts those of
    each layer side by side, or None where they are already.
    """

    weight: Tensor
    order: Tensor | None
    ups: list[Up]


class JoinedLinear:
    """Linear layers that read the same input, as one: W x + bias + B (m ⊙ (A x)), the scale within
    B.

    The layers' own weights become views of the group's, [out + components, in]. weight [out, in]:
    those of the layers. ends: after how many components of the group each tier ends.
    """

    def __init__(self, layers: Sequence[nn.Module], blocks: int, arena: Arena) -> None:
        bases = [_base(layer) for layer in layers]
        ladders = [_ladder(layer, blocks) for layer in layers]
        like = bases[0].weight
        if any(
            base.weight.dtype != like.dtype or base.weight.device != like.device for base in bases
        ):
            raise Unsupported("layers that read the same input differ in type or device")
        stops = np.cumsum([0, *(len(base.weight) for base in bases)]).tolist()
        self.out: int = stops[-1]
        self.ends = [sum(ends) for ends in zip(*(ends for _, _, ends in ladders), strict=True)]
        self.bias = None
        if any(base.bias is not None for base in bases):
            self.bias = torch.cat(
                [
                    like.new_zeros(len(b.weight)) if b.bias is None else b.bias.detach()
                    for b in bases
                ]
            )
        self.product: Matvec = _torch_mv  # with one vector: see choose_matvec
        # Block after block, and in each the components of each layer.
        pieces: list[tuple[int, int, int]] = []  # layer, first and last of its components
        for block in range(len(self.ends)):
            for number, (_, _, ends) in enumerate(ladders):
                pieces.append((number, ends[block - 1] if block else 0, ends[block]))
        downs = [ladders[number][0][first:last].to(like) for number, first, last in pieces]
        weight = arena.empty(self.out + self.ends[-1], like.shape[1], like)
        join_rows([base.weight for base in bases], downs, out=weight)
        self.weight = weight[: self.out]
        owner = np.repeat(
            [number for number, _, _ in pieces], [last - first for _, first, last in pieces]
        )
        full = [arena.empty(len(b), b.shape[1], like).copy_(b) for _, b, _ in ladders]
        self.tiers = []
        for tier, count in enumerate(self.ends):
            order = np.argsort(owner[:count], kind="stable")
            ranks = [ends[tier] for _, _, ends in ladders]
            firsts = np.cumsum([0, *ranks]).tolist()
            spans = zip(full, ranks, pairwise(stops), pairwise(firsts), strict=True)
            ups = [
                Up(b[:, :rank], *outs, *components) for b, rank, outs, components in spans if rank
            ]
            sorted_already = bool((order == np.arange(count)).all())
            index = None if sorted_already else torch.from_numpy(order).to(like.device)
            self.tiers.append(Tier(weight[: self.out + count], index, ups))

    def __call__(self, x: Tensor, plan: TierPlan | None) -> Tensor:
        """x [tokens, in], or [in] for one token; returns [tokens, out] or [out]."""
        tier = self.tiers[-1 if plan is None else plan.top]
        one = x.dim() == 1
        y = self.product(tier.weight, x) if one else linear(x, tier.weight)
        if not tier.ups:
            return y if self.bias is None else y.add_(self.bias)
        base, low = y[..., : self.out], y[..., self.out :]
        if self.bias is not None:
            base.add_(self.bias)
        if plan is not None and not plan.uniform:
            # For many tokens too: gathering those of each block loses (see kernels.tiered_linear).
            low = low * plan.mask(self.ends, x.dtype).view(low.shape)
        if tier.order is not None:
            low = low.index_select(-1, tier.order)
        for b, start, stop, first, last in tier.ups:
            part = low[..., first:last]
            base[..., start:stop].add_(torch.mv(b, part) if one else linear(part, b))
        return base


@dataclass(frozen=True)
class DecoderLayer:
    """A block of the decoder. head_norm [heads + kv heads, head_dim]: weights of the norms of
    queries and keys."""

    norm: Tensor
    qkv: JoinedLinear
    head_norm: Tensor | None
    scaling: float
    o: JoinedLinear
    feed_forward_norm: Tensor
    gate_up: JoinedLinear
    down: JoinedLinear


def _base(layer: nn.Module) -> nn.Linear:
    """The linear layer itself, under an adapter or not."""
    base = layer.base.layer if isinstance(layer, Adapter) else layer
    if type(base) is not nn.Linear:
        raise Unsupported(f"a {type(base).__name__} is where a linear layer is expected")
    return base


def _ladder(layer: nn.Module, blocks: int) -> tuple[Tensor, Tensor, list[int]]:
    """Result of `Adapter.ladder`; for a layer without an adapter, no components at every tier."""
    if isinstance(layer, Adapter):
        return layer.ladder()
    weight = _base(layer).weight
    return weight.new_zeros(0, weight.shape[1]), weight.new_zeros(len(weight), 0), [0] * blocks


# -- matrix-vector products ------------------------------------------------------------------------


def _switch_onednn(on: bool) -> None:
    """Turn oneDNN on or off, without the 20 µs of `torch.backends.mkldnn.flags`."""
    torch.backends.mkldnn.enabled = on  # type: ignore[assignment]


def _torch_mv(matrix: Tensor, vector: Tensor) -> Tensor:
    return torch.mv(matrix, vector)


def _onednn_mv(matrix: Tensor, vector: Tensor) -> Tensor:
    """Product by oneDNN, which is off before and after."""
    _switch_onednn(True)
    y = torch.mv(matrix, vector)
    _switch_onednn(False)
    return y


@contextmanager
def small_products(like: Tensor, tokens: int) -> Iterator[None]:
    """Context for one token in half precision on a processor: oneDNN is off, except in products
    that turn it on."""
    before: Any = torch.backends.mkldnn.enabled
    if tokens > 1 or not _has_choice(like):
        yield
        return
    _switch_onednn(False)
    try:
        yield
    finally:
        _switch_onednn(before)


def _has_choice(like: Tensor) -> bool:
    """True if oneDNN and torch each have a product of their own."""
    half = like.dtype in (torch.bfloat16, torch.float16)
    return half and like.device.type == "cpu" and bool(torch.backends.mkldnn.enabled)


def choose_matvec(groups: Sequence[JoinedLinear]) -> None:
    """Choose the faster matrix-vector product for groups that differ in their ranks alone.

    All of them are multiplied in turn, so that none is still in a cache. The best of a few turns
    counts, as other work on the machine only ever adds time.
    """
    weights = [group.tiers[-1].weight for group in groups]
    if not _has_choice(weights[0]):
        return
    vector = torch.ones_like(weights[0][0])
    best: dict[Matvec, float] = dict.fromkeys((_torch_mv, _onednn_mv), float("inf"))
    with small_products(vector, 1):
        for _ in range(REPEATS):
            for product in best:
                start = time.perf_counter()
                for weight in weights:
                    product(weight, vector)
                best[product] = min(best[product], time.perf_counter() - start)
    for group in groups:
        group.product = min(best, key=best.__getitem__)
