"""Tensors of a key-value cache: keys and values of all layers, exact and quantised, in slots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lorakit.errors import RunError
from lorakit.inference.kv.slots import BLOCK, INT8, Integers, Place, Requantised
from lorakit.kernels.quantise import quantise_int4, quantise_int8


class KeyForm(NamedTuple):
    """Everything in which the keys of all layers agree, but for their tokens."""

    device: torch.device
    rows: int
    heads: int
    head_dim: int
    dtype: torch.dtype


def index(values: Integers, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)


class Storage:
    """Keys and values in slots: tensors [2, layers, rows, kv heads, slots, …] (see `allocate`)."""

    form: KeyForm

    def __init__(self, layers: int) -> None:
        """layers: how many to allocate for at first."""
        self.layers = layers
        self.tensors: dict[str, Tensor] = {}
        self._sizes = (0, 0, 0)
        self._scratch = torch.empty(0)

    def check(self, layer: int, key: Tensor, even_width: bool) -> None:
        """Raise RunError for keys of another form than the first, or of an odd width."""
        form = KeyForm(key.device, key.shape[0], key.shape[1], key.shape[3], key.dtype)
        if not self.tensors:
            if even_width and form.head_dim % 2:
                what = f"the policy `int4` needs an even head_dim, and it is {form.head_dim}"
                raise RunError(what)
            self.form = form
        elif form != self.form:
            what = f"layer {layer} has keys of another kind than those before"
            raise RunError(f"{what}: {tuple(form)} and {tuple(self.form)}")

    def fit(self, layer: int, sizes: tuple[int, int, int]) -> None:
        """Make room for a layer and for so many slots of each policy (`SlotTables.sizes`)."""
        if not self.tensors or sizes != self._sizes or layer >= self.layers:
            self._sizes = sizes
            self.allocate(self.layers if layer < self.layers else 2 * self.layers)

    def allocate(self, layers: int) -> None:
        """Make room for so many layers, and copy what is held.

        The rest is zero: a masked NaN would still spoil a sum.
        """
        full, int8, int4 = self._sizes
        width = self.form.head_dim
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "full": ((full, width), self.form.dtype),
            "codes8": ((int8, width), torch.int8),
            "scales8": ((int8,), torch.float32),
            "codes4": ((int4, BLOCK, width // 2), torch.uint8),
            "keys4": ((int4, 1, width), torch.float16),
            "values4": ((int4, BLOCK, 1), torch.float16),
        }
        for name, (shape, dtype) in shapes.items():
            old = self.tensors.get(name)
            if old is not None and old.shape[1] == layers and old.shape[4] == shape[0]:
                continue
            new = self._zeros((2, layers, self.form.rows, self.form.heads, *shape), dtype)
            if old is not None:
                shared = min(old.shape[1], layers)
                new[:, :shared, :, :, : old.shape[4]] = old[:, :shared]
            self.tensors[name] = new
        self.layers = layers

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        # A tensor made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            return torch.zeros(shape, dtype=dtype, device=self.form.device)

    def scratch(self, size: int) -> Tensor:
        """Uninitialised float32 memory that is used again by every step."""
        if self._scratch.numel() < size:
            with torch.inference_mode(False):
                self._scratch = torch.empty(size * 5 // 4, device=self.form.device)
        return self._scratch[:size]

    # -- tokens at full precision --------------------------------------------------------------

    def move(self, rows: Integers, old: Integers, new: Integers) -> None:
        """Copy tokens of all layers from their old slots into new ones."""
        full = self.tensors["full"]
        r, s, h = (index(values, full.device) for values in (rows, old, new))
        full[:, :, r, :, h] = full[:, :, r, :, s]

    def write(self, layer: int, kept: Place, slots: Integers, key: Tensor, value: Tensor) -> None:
        """Put the step's tokens at `kept` (rows, places) of a layer into these slots."""
        rows, places = (index(values, key.device) for values in kept)
        slot = index(slots, key.device)
        for held, states in zip(self.tensors["full"][:, layer], (key, value), strict=True):
            held[rows, :, slot] = states[rows, :, places]

    # -- quantised tokens ----------------------------------------------------------------------

    def quantise(
        self,
        groups: Mapping[int, Requantised],
        layers: slice = slice(None),
        new: Tensor | None = None,
    ) -> None:
        """Quantise tokens of some layers.

        new [2, layers, rows, kv heads, tokens, head_dim]: the step's own keys and values, or None
        where those that it quantises are all in their slots.
        """
        held = {name: tensor[:, layers] for name, tensor in self.tensors.items()}
        for kind, group in groups.items():
            if kind == INT8 and new is None and len(group.order) == 1:
                _quantise_one(held, group)
                continue
            states = _gathered(held["full"], group, new)
            rows, slots = (index(values, states.device) for values in group.target)
            if kind == INT8:
                codes, scales = quantise_int8(states)
                held["codes8"][:, :, rows, :, slots] = codes
                held["scales8"][:, :, rows, :, slots] = scales[..., 0]
            else:
                _quantise_blocks(held, states, rows, slots)

    def dequantised8(self, layer: int, tokens: int) -> Tensor:
        """Keys and values of the first tokens of int8.

        float32 [2, rows, kv heads, tokens, head_dim].
        """
        scales = self.tensors["scales8"][:, layer, :, :, :tokens, None]
        return self.tensors["codes8"][:, layer, :, :, :tokens].float().mul_(scales)

    def dequantise4(self, layer: int, out: Tensor) -> None:
        """Fill `out` with keys and values of the first blocks.

        float32 [2, rows, kv heads, blocks · BLOCK, head_dim].
        """
        out = out.view(*out.shape[:3], -1, BLOCK, out.shape[-1])
        blocks = out.shape[3]
        codes = self.tensors["codes4"][:, layer, :, :, :blocks]
        first, second = out.chunk(2, -1)
        first.copy_(codes & 15)
        second.copy_(codes >> 4)
        for states, name in zip(out, ("keys4", "values4"), strict=True):
            low, step = self.tensors[name][:, layer, :, :, :blocks].float()
            torch.addcmul(low, states, step, out=states)


def _quantise_one(held: Mapping[str, Tensor], group: Requantised) -> None:
    """One token from its slot to int8, as in decoding a row: views cost less than indices."""
    ((row,), (slot,)), (_, (target,)) = group.old, group.target
    codes, scales = quantise_int8(held["full"][:, :, row, :, slot])
    held["codes8"][:, :, row, :, target].copy_(codes)
    held["scales8"][:, :, row, :, target].copy_(scales[..., 0])


def _gathered(full: Tensor, group: Requantised, new: Tensor | None) -> Tensor:
    """Keys and values of a group's tokens in order, [tokens, 2, layers, kv heads, head_dim]."""
    rows, slots = (index(values, full.device) for values in group.old)
    states = full[:, :, rows, :, slots]
    if new is not None:
        rows, places = (index(values, full.device) for values in group.new)
        states = torch.cat([states, new[:, :, rows, :, places]])
    return states[index(group.order, full.device)]


def _quantise_blocks(
    held: Mapping[str, Tensor],
    states: Tensor,
    rows: Tensor,
    slots: Tensor,
) -> None:
    """Blocks of int4: keys with a range per channel over the block, values with one per token."""
    keys, values = states.view(-1, BLOCK, *states.shape[1:]).movedim(1, 4).unbind(1)
    parts = (("keys4", keys, -2), ("values4", values, -1))
    for i, (name, part, dim) in enumerate(parts):
        # codes [blocks, layers, kv heads, BLOCK, head_dim / 2]
        codes, ranges = quantise_int4(part, dim)
        held["codes4"][i][:, rows, :, slots] = codes
        held[name][:, :, rows, :, slots] = ranges.transpose(0, 1)
