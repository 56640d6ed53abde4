"""A decoder's step of one token in one call: the Python side of kernels/csrc/decode.c.

`Decoder.forward` does the same with torch in all other cases; tests compare the two. The gain: no
call per operation (30 layers have some 600), weights read at the speed of memory, and float32
between the products.

A step is bound by reading the weights. Many float32 models were saved in bfloat16, so that their
weights are exact in it: of those the step reads a copy in bfloat16, half the bytes, for the same
products. Weights that are not exact in bfloat16, and the adapters' factors, stay float32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorakit.inference.kv.store import KernelView
from lorakit.inference.linear_groups import DecoderLayer, JoinedLinear
from lorakit.kernels import dispatch
from lorakit.kernels.huge_pages import Arena
from lorakit.kernels.in_c import (
    FAILS,
    FLOATS,
    THREADS,
    CStructure,
    Library,
    address_of,
    is_bf16,
)
from lorakit.kernels.levels import Level
from lorakit.kernels.tiered_linear import TierPlan

ROWS = 4096  # of a weight that are examined at a time, to save memory

_pointer, _int, _long = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


def _fields(*groups: tuple[str, Any]) -> list[tuple[str, Any]]:
    """Fields of a structure, in their order in C, from (names, type of them all)."""
    return [(name, kind) for names, kind in groups for name in names.split()]


class _Up(CStructure):
    _fields_ = _fields(("b", _pointer), ("stride", _long), ("start stop first last", _int))


class _Group(CStructure):
    _fields_ = _fields(
        ("weight a bias ups place block", _pointer),
        ("in_ out components ups_count bf16 factors_bf16", _int),
    )


class _Layer(CStructure):
    _fields_ = _fields(
        ("norm feed_forward_norm head_norm", _pointer),
        ("qkv o gate_up down", _Group),
        ("scaling", ctypes.c_float),
    )


class _Model(CStructure):
    _fields_ = _fields(
        ("norm layers", _pointer),
        ("head", _Group),
        ("layer_count hidden feed_forward heads kv_heads width most_components", _int),
        ("eps", ctypes.c_float),
    )


class _Cache(CStructure):
    _fields_ = _fields(
        ("full codes8 scales8 codes4 keys4 values4", _pointer),
        ("full_room room8 room4", _long),
        ("full_used used8 used4 slot bf16", _int),
    )


_ARGUMENTS = (*address_of(_Model, _Cache), *[FLOATS] * 5, THREADS)
_STRUCTURES = (_Up, _Group, _Layer, _Model, _Cache)
_C = Library("decode", {"decode": (FAILS, *_ARGUMENTS)}, _STRUCTURES)


class DecodeStep:
    """One token through a decoder in bfloat16 or float32 on a processor. Make one with `of`."""

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        head: JoinedLinear,
        embedding: Tensor,
        norm: Tensor,
        heads: int,
        eps: float,
    ) -> None:
        self._layers, self._head, self._embedding, self._norm = layers, head, embedding, norm
        self._heads, self._eps = heads, eps
        groups = [
            head,
            *(g for layer in layers for g in (layer.qkv, layer.o, layer.gate_up, layer.down)),
        ]
        self._most_components = max(group.ends[-1] for group in groups)
        arena = Arena()
        self._weights = {id(group): narrowed(group.weight, arena) for group in groups}
        self._kept: list[Any] = []  # objects that C has pointers to
        self._models: dict[int, _Model] = {}  # by tier

    @staticmethod
    def of(
        layers: Sequence[DecoderLayer],
        head: JoinedLinear,
        embedding: Tensor,
        norm: Tensor,
        heads: int,
        eps: float,
    ) -> DecodeStep | None:
        """A step, or None where there is no kernel for this type, device or machine.

        embedding [vocabulary, hidden]; norm [hidden]: the last one; heads: of queries.
        """
        if embedding.dtype not in (torch.bfloat16, torch.float32) or not embedding.is_cpu:
            return None
        if dispatch.implementation("decode") is Level.torch:
            return None
        return DecodeStep(layers, head, embedding, norm, heads, eps)

    def __call__(
        self, token: int, cos: Tensor, sin: Tensor, held: KernelView, plan: TierPlan | None
    ) -> Tensor:
        """Logits [1, vocabulary] of one token, whose keys and values go into the cache.

        cos and sin [head_dim]; these and the logits are float32. plan: of this token; None: the top
        tier. Raises MemoryError.
        """
        tier = len(self._head.tiers) - 1 if plan is None else plan.top
        if tier not in self._models:
            # kv heads, head_dim
            self._models[tier] = self._model(tier, *held.tensors["full"].shape[3::2])
        shares = None
        if plan is not None and not plan.uniform:
            shares = torch.cat([plan.weights.new_ones(1), plan.weights[0]]).contiguous()
        x = self._embedding[token].float()
        logits = torch.empty(1, self._head.out)
        if _C.call("decode", self._models[tier], _cache(held), x, cos, sin, shares, logits):
            raise MemoryError("no memory for a step of one token")
        return logits

    def _model(self, tier: int, kv_heads: int, width: int) -> _Model:
        layers = (_Layer * len(self._layers))(*(self._layer(layer, tier) for layer in self._layers))
        head = self._group(self._head, len(self._head.tiers) - 1)
        self._kept.append(layers)
        return _Model(
            self._at(self._norm),
            ctypes.addressof(layers),
            head,
            len(layers),
            self._embedding.shape[1],
            self._layers[0].down.tiers[0].weight.shape[1],
            self._heads,
            kv_heads,
            width,
            self._most_components,
            self._eps,
        )

    def _layer(self, layer: DecoderLayer, tier: int) -> _Layer:
        norms = (self._at(norm) for norm in (layer.norm, layer.feed_forward_norm, layer.head_norm))
        groups = (
            self._group(group, tier) for group in (layer.qkv, layer.o, layer.gate_up, layer.down)
        )
        return _Layer(*norms, *groups, layer.scaling)

    def _group(self, group: JoinedLinear, tier: int) -> _Group:
        of, count = group.tiers[tier], group.ends[tier]
        place, component = np.empty(count, np.int32), np.arange(count)
        place[component if of.order is None else of.order.numpy()] = component
        block = np.searchsorted(group.ends, component, side="right").astype(np.int32)
        ups = (_Up * len(of.ups))(*(_Up(up.b.data_ptr(), up.b.stride(0), *up[1:]) for up in of.ups))
        self._kept += [place, block, ups]
        weight = self._weights[id(group)]
        return _Group(
            weight.data_ptr(),
            of.weight[group.out :].data_ptr(),
            self._at(group.bias),
            ctypes.addressof(ups),
            _address(place),
            _address(block),
            weight.shape[1],
            group.out,
            count,
            len(ups),
            is_bf16(weight),
            is_bf16(of.weight),
        )

    def _at(self, tensor: Tensor | None) -> int | None:
        """The address of these values in float32."""
        if tensor is None:
            return None
        self._kept.append(tensor := tensor.float().contiguous())
        return tensor.data_ptr()


def narrowed(weight: Tensor, arena: Arena) -> Tensor:
    """The weight [out, in] in bfloat16, a copy from the arena, if that changes no value; else the
    weight itself."""
    rows, columns = weight.shape
    parts = (weight[start : start + ROWS] for start in range(0, rows, ROWS))
    if is_bf16(weight) or not all(torch.equal(part.bfloat16().float(), part) for part in parts):
        return weight
    return arena.empty(rows, columns, weight.new_empty(0, dtype=torch.bfloat16)).copy_(weight)


def _address(array: NDArray[np.int32]) -> int:
    return int(array.ctypes.data)


def _cache(held: KernelView) -> _Cache:
    parts = [
        held.tensors[name] for name in ("full", "codes8", "scales8", "codes4", "keys4", "values4")
    ]
    rooms = (held.tensors[name].shape[4] for name in ("full", "codes8", "codes4"))
    return _Cache(
        *(part.data_ptr() for part in parts),
        *rooms,
        held.full,
        held.int8,
        held.int4,
        held.slot,
        is_bf16(held.tensors["full"]),
    )
