"""A key-value cache whose tokens are kept by a policy: at full precision, in 8 or 4 bits, or for a while only.

The policy of a token follows from the tier that it was run at. What a query sees depends on its distance to a token and
on nothing else, not on the pieces the tokens came in: a prompt in one piece and the same tokens one by one give the same.
A query at position t sees the token at position p <= t

    at full precision    if p < SINKS, or t - p < RECENT, or the token's policy is `full`; else
    int8                 from 8 bits: symmetric, absmax / 127, one float32 scale for a key or value of a head;
    int4                 from 4 bits: the tokens of this policy (sinks left out) form blocks of BLOCK in their order, keys
                         with a minimum and a step per channel over the block, values with one per token (KIVI, arXiv
                         2402.02750, § 3), both float16. A block is used so once its last token is RECENT away;
    window               not at all once t - p >= max(window, RECENT) (StreamingLLM, arXiv 2309.17453, § 3: sinks and a window).

So every token has `until`, the first query position that does not see it at full precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lorakit.errors import RunError
from lorakit.kernels.quantise import quantise_int4, quantise_int8
from lorakit.methods import KVPolicy
from lorakit.methods._base import RECENT, SINKS

BLOCK = 32
FULL, INT8, INT4, WINDOW = range(4)
POLICIES: tuple[KVPolicy, ...] = get_args(KVPolicy)

SLOTS = 256  # storage grows by so many tokens
QUERIES = 256  # of a long piece that are attended from at once
FREE, ALWAYS = -1, 2**62  # values of `until`: an empty slot (or padding), a token that stays at full precision

Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]


def _index(values: Integers, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)


def _range(values: Integers, device: torch.device) -> slice | Tensor:
    """An index of ascending values: a slice where they have no gap, which makes it a view."""
    if len(values) == 0:
        return slice(0)
    start, stop = int(values[0]), int(values[-1]) + 1
    return slice(start, stop) if stop - start == len(values) else _index(values, device)


@dataclass
class _Group:
    """Tokens that become quantised together: where they are, in the storage or in the piece, and where they go."""

    old: tuple[Integers, Integers]  # rows and slots of those from before
    new: tuple[Integers, Integers]  # rows and places in the piece
    order: Integers  # [tokens]: puts the old, then the new into the order of rows and positions
    target: tuple[Integers, Integers]  # rows and slots [tokens] of int8, [blocks] of int4


@dataclass
class _Block:
    """Some queries of a piece and the keys that they need."""

    queries: slice
    kept: slice | Tensor  # slots at full precision
    piece: slice | Tensor  # places in the piece
    int8: int  # the first so many tokens of int8
    int4: int  # and blocks of int4
    mask: Tensor  # [rows, 1, queries, keys], 0 where seen and -inf elsewhere


@dataclass
class _Step:
    """State of a step that all layers share."""

    position: Integers  # [rows, tokens]; meaningless for padding
    kind: Integers  # [rows, tokens]
    until: Integers  # [rows, tokens]; FREE for padding
    before: Integers  # [rows, slots]: `until` of the tokens from before
    following: Integers  # [rows]: the first position of the next step
    late: bool  # no query of this step needs what this step quantises
    kept: tuple[Integers, Integers]  # rows and places of the new tokens that the step leaves at full precision
    slots: Integers  # and their slots
    groups: dict[int, _Group] = field(default_factory=dict)
    blocks: list[_Block] | None = None
    layers: list[_Layer] | None = None
    mask: Tensor | None = None  # [rows, 1, 1, keys], with `layers`: 0 and -inf
    products: _Products | None = None


class _Layer(NamedTuple):
    """A layer's parts of the storage in a step of one token a row: views."""

    key_slot: Tensor | None  # [rows, kv heads, 1, head_dim]: for the new token, unless its slots differ between rows
    value_slot: Tensor | None
    full: Tensor  # [2, rows, kv heads, slots, head_dim]
    codes8: Tensor  # [2, rows, kv heads, tokens, head_dim]
    key_scales: Tensor  # [rows · kv heads, 1, tokens]
    value_scales: Tensor


class HandedOver(NamedTuple):
    """The storage in a step of one token in one row, for a kernel that appends and attends by itself.

    tensors: keys and values [2, layers, 1, kv heads, room, …] as `_allocate` makes them, of which the first `full` slots, `int8`
    tokens and `int4` blocks are seen. slot: of those at full precision, for the new token.
    """

    tensors: dict[str, Tensor]
    slot: int
    full: int
    int8: int
    int4: int


@dataclass
class _Products:
    """Buffers for one layer's products in a step of one token a row, float32, and views of them."""

    keys: Tensor  # [rows · kv heads, head_dim, keys], transposed
    values: Tensor  # [rows · kv heads, keys, head_dim]
    full: Tensor  # [2, rows, kv heads, slots, head_dim]: where keys and values at full precision go
    codes8: Tensor  # [2, rows, kv heads, tokens, head_dim]: codes of int8
    int4: Tensor  # [2, rows, kv heads, tokens, head_dim]
    query: Tensor  # [rows · kv heads, groups, head_dim]
    scores: Tensor  # [rows · kv heads, groups, keys]
    scores8: Tensor  # of codes of int8
    weights: Tensor
    weights8: Tensor


class KVStore:
    """Keys and values of all layers, kept by the policies of their tokens, and attention over them.

    A step is `begin`, then `append` and `attend` for every layer in turn, then `end`. policies[tier] is the policy of the
    tokens that were run at that tier. window: how far tokens of policy `window` are seen, at least RECENT. layers: how
    many layers to allocate storage for at once; how many there are is known after the first step.

    Raises ValueError for an unknown policy, or `window` without a window.
    """

    def __init__(self, policies: Sequence[KVPolicy], window: int | None = None, layers: int = 1) -> None:
        if not policies or any(policy not in POLICIES for policy in policies):
            raise ValueError(f"policies {list(policies)}: one for each tier, each of {', '.join(POLICIES)}")
        if "window" in policies and window is None:
            raise ValueError("the policy `window` needs a window")
        self.policies = tuple(policies)
        self.window = max(window or 0, RECENT)
        self.length = 0
        self._kinds = np.array([POLICIES.index(policy) for policy in policies])
        self._compressing = [kind for kind in (INT8, INT4) if kind in self._kinds]
        self._layers = layers
        self._settled = False  # the number of layers is known
        self._layer = -1  # the layer that was appended to last
        self._piece: tuple[Tensor, ...] = ()  # its keys and values
        self._held: dict[str, Tensor] = {}  # each [2, layers, rows, kv heads, slots, …]; see _allocate
        self._sizes = (0, 0, 0)  # slots there is storage for: full, int8, and blocks of int4
        self._step: _Step | None = None
        self._scratch = torch.empty(0)

    # -- a step ----------------------------------------------------------------------------------------------------

    def begin(self, tiers: Integers, padding: Integers | None = None) -> None:
        """Announce n tokens a row: tiers [rows, n]. padding [rows], with the first call only: how many tokens at the left of
        the row's first input are padding, which is never seen, not counted, and takes no bytes.

        Raises RunError when the rows are not those from before, or the last step was broken off.
        """
        self.end()
        rows, n = tiers.shape
        if self.length == 0:
            self._counts = np.zeros(rows, np.int64)  # real tokens
            self._until, self._position, self._kind = (np.full((rows, 0), FREE) for _ in range(3))  # of slots [rows, slots]
            self._filled = {
                kind: np.zeros(rows, np.int64) for kind in (FULL, INT8, INT4)
            }  # slots in use; none is free among them
            self._ready = {kind: np.zeros((rows, 0), np.int64) for kind in (INT8, INT4)}  # `until` of quantised slots
        elif padding is not None and padding.any():
            raise RunError("padding can only stand before the first tokens of a row")
        if rows != len(self._counts):
            raise RunError(f"the cache holds {len(self._counts)} rows, and {rows} come")
        self.length += n
        real = np.arange(n) >= (np.zeros(rows, np.int64) if padding is None else padding)[:, None]
        position = self._counts[:, None] + real.cumsum(1) - 1
        self._counts = following = self._counts + real.sum(1)
        kind = np.where(position < SINKS, FULL, self._kinds[tiers])
        until = np.where(kind == INT8, position + RECENT, ALWAYS)
        until = np.where(kind == WINDOW, position + self.window, until)
        until[~real] = FREE
        if INT4 in self._kinds:
            self._close_blocks(position, kind, until)
        stays = until > following[:, None]
        self._make_room(stays.sum(1))
        before = self._until[:, : int(self._filled[FULL].max())].copy()
        late = not ((until >= 0) & ~stays).any() and not ((before >= 0) & (before < following[:, None])).any()
        kept = stays.nonzero()
        slots = self._take_slots(kept, position, kind, until)
        self._step = _Step(position, kind, until, before, following, late, kept, slots)
        if not late:
            self._step.groups = self._groups(self._step)
        self._layer = -1

    def append(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Take in the step's keys and values of a layer, [rows, kv heads, n, head_dim], rotary embedding already applied.

        Raises RunError without `begin`, for layers out of order, and for a layer of another shape or type than the first.
        """
        step = self._step
        if step is None or layer != self._layer + 1 or (self._settled and layer >= self._layers):
            raise RunError(f"the cache got layer {layer} after layer {self._layer}")
        if layer == 0 or not self._settled:
            self._check(step, layer, key, value)
            if self._settled and key.shape[2] == 1:
                step.layers = self._open_layers(step)
        self._layer = layer
        self._piece = (key, value)
        if step.layers is not None:
            views = step.layers[layer]
            if views.key_slot is not None and views.value_slot is not None:
                views.key_slot.copy_(key)
                views.value_slot.copy_(value)
                return
        rows, places = (_index(values, key.device) for values in step.kept)
        slots = _index(step.slots, key.device)
        for held, states in zip(self._held["full"][:, layer], (key, value), strict=True):
            held[rows, :, slots] = states[rows, :, places]
        if step.groups:
            self._quantise(step.groups, slice(layer, layer + 1), torch.stack([key, value])[:, None])

    def attend(self, layer: int, query: Tensor, scaling: float | None = None) -> Tensor:
        """Causal attention of the step's queries [rows, heads, n, head_dim] over all that they see, with grouped queries:
        [rows, n, heads, head_dim]. scaling: head_dim^-1/2 by default. What padding gets is without meaning, but finite.

        Raises RunError when the layer's keys were not appended just before.
        """
        step = self._step
        if step is None or layer != self._layer:
            raise RunError(f"layer {layer} attends before its keys are in the cache")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if step.layers is not None:
            return self._attend_one(step, layer, query, scaling)
        key, value = self._piece
        if step.blocks is None:
            step.blocks = self._blocks(step, query)
        if not step.blocks:
            out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
            return out.transpose(1, 2)
        last = step.blocks[-1]
        all8 = self._dequantised8(layer, last.int8)
        all4 = all8.new_empty(*all8.shape[:3], last.int4 * BLOCK, all8.shape[-1])
        self._dequantised4(layer, all4)
        sources = (self._held["full"][:, layer], torch.stack([key, value]), all8.to(key.dtype), all4.to(key.dtype))
        outs = []
        for block in step.blocks:
            picks = (block.kept, block.piece, slice(block.int8), slice(block.int4 * BLOCK))
            keys, values = torch.cat([source[:, :, :, pick] for source, pick in zip(sources, picks, strict=True)], 3)
            part = query[:, :, block.queries]
            outs.append(scaled_dot_product_attention(part, keys, values, attn_mask=block.mask, scale=scaling, enable_gqa=True))
        return torch.cat(outs, 2).transpose(1, 2)

    def hand_over(self) -> HandedOver | None:
        """In place of `append` and `attend` for all layers; None, and nothing is changed, where that is not possible: unless the
        step is of one token in one row, and not the first."""
        step = self._step
        if step is None or not self._settled or step.until.shape != (1, 1) or not step.late or self._layer >= 0:
            return None
        self._fit(0)
        self._layer = self._layers - 1
        return HandedOver(self._held, int(step.slots[0]), *(int(self._filled[kind][0]) for kind in (FULL, INT8, INT4)))

    def end(self) -> None:
        """Close the step, if one is open: quantise and evict what the next position does not see at full precision.

        Raises RunError when layers are missing.
        """
        step, self._step = self._step, None
        if step is None:
            return
        if self._layer < 0 or (self._settled and self._layer != self._layers - 1):
            raise RunError(f"a step of the cache was broken off after layer {self._layer}: the cache can not be used any more")
        if not self._settled:
            self._allocate(self._layer + 1)
            self._settled = True
        if step.late:
            step.groups = self._groups(step)
            if step.groups:
                self._fit(self._layer)
                self._quantise(step.groups, slice(None), None)
        self._until[self._until <= step.following[:, None]] = FREE
        self._piece = ()

    # -- what is held ----------------------------------------------------------------------------------------------

    def bytes_by_policy(self) -> dict[str, int]:
        """{policy: bytes} of the keys, values and scales held, over all layers; sinks count as `full`."""
        if not self._held:
            return dict.fromkeys(map(str, POLICIES), 0)
        _, heads, width, dtype = self._like
        taken = self._until >= 0
        pairs = self._layers * heads  # of a layer and a head
        held: dict[str, int] = {
            name: int((taken & (self._kind == code)).sum()) * 2 * pairs * width * dtype.itemsize
            for code, name in enumerate(POLICIES)
        }
        held["int8"] += int(self._filled[INT8].sum()) * 2 * pairs * (width + 4)
        held["int4"] += int(self._filled[INT4].sum()) * pairs * (BLOCK * width + 4 * width + 4 * BLOCK)
        return held

    @property
    def nbytes(self) -> int:
        """Bytes of the keys, values and scales held, over all layers; padding and free slots not counted."""
        return sum(self.bytes_by_policy().values())

    @property
    def nbytes_if_full(self) -> int:
        """Value that `nbytes` would have with the policy `full` for all tokens."""
        if not self._held:
            return 0
        _, heads, width, dtype = self._like
        return int(self._counts.sum()) * 2 * self._layers * heads * width * dtype.itemsize

    # -- which token is where ----------------------------------------------------------------------------------------

    def _close_blocks(self, position: Integers, kind: Integers, until: Integers) -> None:
        """Set `until`, of slots and of the new tokens [rows, n], for the blocks of int4 that the new tokens complete."""
        for row in range(len(until)):
            new = np.flatnonzero((kind[row] == INT4) & (until[row] != FREE))
            waiting = np.flatnonzero((self._kind[row] == INT4) & (self._until[row] == ALWAYS))
            whole = (len(waiting) + len(new)) // BLOCK * BLOCK
            if whole:
                positions = np.concatenate([np.sort(self._position[row, waiting]), position[row, new]])
                closing = positions[BLOCK - 1 : whole : BLOCK].repeat(BLOCK) + RECENT
                self._until[row, waiting] = closing[: len(waiting)]  # less than a block: all of the same
                until[row, new[: whole - len(waiting)]] = closing[len(waiting) :]

    def _make_room(self, incoming: Integers) -> None:
        """Leave so many free slots [rows] below each row's last: enlarge the tables, move tokens down into holes."""
        size = (self._until >= 0).sum(1) + incoming
        self._filled[FULL] = size
        if (more := int(size.max()) - self._until.shape[1]) > 0:
            wider = ((0, 0), (0, -(-more // SLOTS) * SLOTS))
            self._until, self._position, self._kind = (
                np.pad(table, wider, constant_values=FREE) for table in (self._until, self._position, self._kind)
            )
        inside = np.arange(self._until.shape[1]) < size[:, None]
        taken = self._until >= 0
        if not (high := taken & ~inside).any():
            return
        rows, slots = high.nonzero()
        free = [np.flatnonzero(~taken[row] & inside[row])[: high[row].sum()] for row in range(len(size))]
        holes = np.concatenate(free)
        for table in (self._until, self._position, self._kind):
            table[rows, holes] = table[rows, slots]
        self._until[rows, slots] = FREE
        full = self._held["full"]
        r, s, h = (_index(values, full.device) for values in (rows, slots, holes))
        full[:, :, r, :, h] = full[:, :, r, :, s]

    def _take_slots(self, kept: tuple[Integers, Integers], position: Integers, kind: Integers, until: Integers) -> Integers:
        """Enter the new tokens at `kept`, rows and places, into the tables: their slots [tokens]."""
        free = (self._until < 0) & (np.arange(self._until.shape[1]) < self._filled[FULL][:, None])
        rows, slots = free.nonzero()  # as many in a row as it keeps
        self._until[rows, slots], self._position[rows, slots], self._kind[rows, slots] = until[kept], position[kept], kind[kept]
        return slots

    def _groups(self, step: _Step) -> dict[int, _Group]:
        """Groups of tokens that the step quantises, {kind: group}, with slots found for them."""
        ends = step.following[:, None]
        dies, dies_new = (self._until >= 0) & (self._until <= ends), (step.until >= 0) & (step.until <= ends)
        groups = {}
        for kind in self._compressing:
            old, new = (dies & (self._kind == kind)).nonzero(), (dies_new & (step.kind == kind)).nonzero()
            row = np.concatenate([old[0], new[0]])
            if not len(row):
                continue
            order = np.lexsort((np.concatenate([self._position[old], step.position[new]]), row))
            each = slice(None, None, 1 if kind == INT8 else BLOCK)
            row = row[order][each]
            until = np.concatenate([self._until[old], step.until[new]])[order][each]
            slots = self._filled[kind][row] + np.arange(len(row)) - np.searchsorted(row, row)
            self._filled[kind] += np.bincount(row, minlength=len(ends))
            if (more := int(self._filled[kind].max()) - self._ready[kind].shape[1]) > 0:
                step_size = SLOTS if kind == INT8 else SLOTS // BLOCK
                wider = ((0, 0), (0, -(-more // step_size) * step_size))
                self._ready[kind] = np.pad(self._ready[kind], wider, constant_values=ALWAYS)
            self._ready[kind][row, slots] = until
            groups[kind] = _Group(old, new, order, (row, slots))
        return groups

    # -- the storage -------------------------------------------------------------------------------------------------

    def _check(self, step: _Step, layer: int, key: Tensor, value: Tensor) -> None:
        """Raise RunError for keys and values that do not fit, and see that there is storage for them."""
        if key.shape != value.shape or key.shape[0] != len(step.until) or key.shape[2] != step.until.shape[1]:
            raise RunError(
                f"layer {layer} has keys {list(key.shape)} and values {list(value.shape)}: the cache needs them alike, "
                f"with {len(step.until)} rows of {step.until.shape[1]} tokens"
            )
        if key.requires_grad:
            raise RunError("the key-value cache is for inference: run the model under torch.no_grad()")
        like = (key.device, key.shape[1], key.shape[3], key.dtype)
        if not self._held:
            if INT4 in self._kinds and key.shape[3] % 2:
                raise RunError(f"the policy `int4` needs an even head_dim, and it is {key.shape[3]}")
            self._like = like
        elif like != self._like:
            raise RunError(f"layer {layer} has keys of another kind than those before: {like} and {self._like}")
        self._fit(layer)

    def _fit(self, layer: int) -> None:
        """See that there is storage for a layer, and as much as the tables say."""
        sizes = (self._until.shape[1], self._ready[INT8].shape[1], self._ready[INT4].shape[1])
        if not self._held or sizes != self._sizes or layer >= self._layers:
            self._sizes = sizes
            self._allocate(self._layers if layer < self._layers else 2 * self._layers)

    def _allocate(self, layers: int) -> None:
        """Storage for so many layers and `_sizes` slots, with what is held copied; zeros elsewhere, since a masked NaN
        would still spoil a sum."""
        device, heads, width, dtype = self._like
        full, int8, int4 = self._sizes
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "full": ((full, width), dtype),
            "codes8": ((int8, width), torch.int8),
            "scales8": ((int8,), torch.float32),
            "codes4": ((int4, BLOCK, width // 2), torch.uint8),
            "keys4": ((int4, 1, width), torch.float16),
            "values4": ((int4, BLOCK, 1), torch.float16),
        }
        for name, (shape, kind) in shapes.items():
            old = self._held.get(name)
            if old is not None and old.shape[1] == layers and old.shape[4] == shape[0]:
                continue
            with torch.inference_mode(False):  # else it could not be written to outside inference mode
                self._held[name] = new = torch.zeros(2, layers, len(self._counts), heads, *shape, dtype=kind, device=device)
            if old is not None:
                shared = min(old.shape[1], layers)
                new[:, :shared, :, :, : old.shape[4]] = old[:, :shared]
        self._layers = layers

    def _quantise(self, groups: dict[int, _Group], layers: slice, piece: Tensor | None) -> None:
        """Quantise the groups, of some layers; piece [2, layers, rows, kv heads, n, head_dim] holds their new tokens."""
        held = {name: tensor[:, layers] for name, tensor in self._held.items()}
        device = held["full"].device
        for kind, group in groups.items():
            if kind == INT8 and piece is None and len(group.order) == 1:  # decoding a row: views cost less than indices
                ((row,), (slot,)), (_, (target,)) = group.old, group.target
                codes, scales = quantise_int8(held["full"][:, :, row, :, slot])
                held["codes8"][:, :, row, :, target].copy_(codes)
                held["scales8"][:, :, row, :, target].copy_(scales[..., 0])
                continue
            rows, slots = (_index(values, device) for values in group.old)
            states = held["full"][:, :, rows, :, slots]  # [tokens, 2, layers, kv heads, head_dim]
            if piece is not None:
                rows, places = (_index(values, device) for values in group.new)
                states = torch.cat([states, piece[:, :, rows, :, places]])
            states = states[_index(group.order, device)]
            rows, slots = (_index(values, device) for values in group.target)
            if kind == INT8:
                codes, scales = quantise_int8(states)
                held["codes8"][:, :, rows, :, slots] = codes
                held["scales8"][:, :, rows, :, slots] = scales[..., 0]
            else:
                keys, values = states.view(-1, BLOCK, *states.shape[1:]).movedim(1, 4).unbind(1)
                for i, (name, part, dim) in enumerate((("keys4", keys, -2), ("values4", values, -1))):
                    codes, ranges = quantise_int4(part, dim)  # [blocks, layers, kv heads, BLOCK, head_dim / 2]
                    held["codes4"][i][:, rows, :, slots] = codes
                    held[name][:, :, rows, :, slots] = ranges.transpose(0, 1)

    def _dequantised8(self, layer: int, tokens: int) -> Tensor:
        """Keys and values of the first so many tokens of int8, float32 [2, rows, kv heads, tokens, head_dim]."""
        scales = self._held["scales8"][:, layer, :, :, :tokens, None]
        return self._held["codes8"][:, layer, :, :, :tokens].float().mul_(scales)

    def _dequantised4(self, layer: int, out: Tensor) -> None:
        """Fill `out`, float32 [2, rows, kv heads, blocks · BLOCK, head_dim], with keys and values of the first blocks."""
        out = out.view(*out.shape[:3], -1, BLOCK, out.shape[-1])
        blocks = out.shape[3]
        codes = self._held["codes4"][:, layer, :, :, :blocks]
        first, second = out.chunk(2, -1)
        first.copy_(codes & 15)
        second.copy_(codes >> 4)
        for states, name in zip(out, ("keys4", "values4"), strict=True):
            low, step = self._held[name][:, layer, :, :, :blocks].float()
            torch.addcmul(low, states, step, out=states)

    # -- attention -------------------------------------------------------------------------------------------------

    def _blocks(self, step: _Step, query: Tensor) -> list[_Block]:
        """A piece cut into blocks of queries; none where plain causal attention within the piece is the same."""
        real = step.until != FREE
        if step.late and real.all() and not (step.before >= 0).any():
            return []
        blocks = []
        n = real.shape[1]
        for start in range(0, n, QUERIES):
            queries = slice(start, min(start + QUERIES, n))
            own = real[:, queries]
            position = step.position[:, queries]
            first = np.where(own, position, ALWAYS).min(1)[:, None]
            last = np.where(own, position, FREE).max(1)[:, None]
            places = np.arange(queries.stop)
            kept = np.flatnonzero((step.before > first).any(0))
            piece = np.flatnonzero((step.until[:, : queries.stop] > first).any(0) | (places >= start))
            int8, int4 = (int((self._ready[kind] <= last).sum(1).max()) for kind in (INT8, INT4))
            at = position[:, :, None]
            seen = [
                at < step.before[:, None, kept],
                (step.position[:, None, piece] <= at) & (at < step.until[:, None, piece]),
                self._ready[INT8][:, None, :int8] <= at,
                (self._ready[INT4][:, None, :int4] <= at).repeat(BLOCK, 2),
            ]
            # Padding sees itself: a query that sees nothing at all would give NaN.
            seen[1] = np.where(own[:, :, None], seen[1], piece == np.arange(start, queries.stop)[:, None])
            for i in (0, 2, 3):
                seen[i] = seen[i] & own[:, :, None]
            mask = self._mask(np.concatenate(seen, 2), query.device, query.dtype)
            blocks.append(_Block(queries, _range(kept, query.device), _range(piece, query.device), int8, int4, mask))
        return blocks

    @staticmethod
    def _mask(visible: Flags, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[rows, 1, queries, keys]: 0 where visible [rows, queries, keys], else -inf."""
        hidden = torch.from_numpy(~visible).to(device)[:, None]
        return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))

    def _open_layers(self, step: _Step) -> list[_Layer]:
        """The views of a step of one token a row, made for all layers at once; sets the step's mask, if the rows differ."""
        held = self._held
        counts = [self._filled[kind] for kind in (FULL, INT8, INT4)]
        full, int8, int4 = (int(count.max()) for count in counts)
        if len(self._counts) > 1 and any((count != count[0]).any() for count in counts):
            sizes = zip(counts, (full, int8, int4), (1, 1, BLOCK), strict=True)
            visible = np.concatenate([(np.arange(size) < count[:, None]).repeat(r, 1) for count, size, r in sizes], 1)
            step.mask = self._mask(visible[:, None], held["full"].device, torch.float32 if int8 or int4 else self._like[3])
        slot = step.slots[0]
        slots: Any = [(None, None)] * self._layers
        if (step.slots == slot).all():
            slots = zip(*(part.unbind() for part in held["full"][:, :, :, :, slot : slot + 1]), strict=True)
        scales = held["scales8"][..., :int8].flatten(2, 3)[:, :, :, None]
        parts = (
            held["full"][:, :, :, :, :full].unbind(1),
            held["codes8"][:, :, :, :, :int8].unbind(1),
            *map(Tensor.unbind, scales),
        )
        return [_Layer(*slot, *views) for slot, *views in zip(slots, *parts, strict=True)]

    def _open_products(self, views: _Layer, groups: int) -> _Products:
        _, rows, heads, full, width = views.full.shape
        end = full + views.codes8.shape[3]
        keys = end + int(self._filled[INT4].max()) * BLOCK
        sizes = [rows * heads * size for size in (2 * keys * width, groups * width, groups * keys, groups * keys)]
        if self._scratch.numel() < sum(sizes):
            with torch.inference_mode(False):  # as for the storage
                self._scratch = torch.empty(sum(sizes) * 5 // 4, device=views.full.device)
        states, query, scores, weights = torch.split(self._scratch[: sum(sizes)], sizes)
        states = states.view(2, rows, heads, keys, width)
        key, value = states.flatten(1, 2)
        scores, weights = scores.view(rows * heads, groups, keys), weights.view(rows * heads, groups, keys)
        return _Products(
            keys=key.mT,
            values=value,
            full=states[:, :, :, :full],
            codes8=states[:, :, :, full:end],
            int4=states[:, :, :, end:],
            query=query.view(rows * heads, groups, width),
            scores=scores,
            scores8=scores[:, :, full:end],
            weights=weights,
            weights8=weights[:, :, full:end],
        )

    def _attend_one(self, step: _Step, layer: int, query: Tensor, scaling: float) -> Tensor:
        """Attention of one token a row: the queries that share a head's keys are taken for rows of one product.

        8-bit codes are multiplied as they are, and the scores and weights with their scales, which is less work than
        scaling the codes. In float32: its small products are several times faster than those in bfloat16.
        """
        assert step.layers is not None
        views = step.layers[layer]
        rows, heads, _, width = query.shape
        kv_heads = views.full.shape[2]
        if not (views.codes8.shape[3] or self._filled[INT4].any()):
            query = query.reshape(rows, kv_heads, heads // kv_heads, width)
            key, value = views.full
            out = scaled_dot_product_attention(query, key, value, attn_mask=step.mask, scale=scaling)
            return out.reshape(rows, 1, heads, width)
        if step.products is None:
            step.products = self._open_products(views, heads // kv_heads)
        products = step.products
        products.query.copy_(query.reshape(products.query.shape))
        products.full.copy_(views.full)
        products.codes8.copy_(views.codes8)
        if products.int4.numel():
            self._dequantised4(layer, products.int4)
        torch.baddbmm(products.scores, products.query, products.keys, beta=0, alpha=scaling, out=products.scores)
        products.scores8.mul_(views.key_scales)
        if step.mask is not None:
            products.scores.view(rows, -1, *products.scores.shape[1:]).add_(step.mask)
        torch.softmax(products.scores, -1, out=products.weights)
        products.weights8.mul_(views.value_scales)
        return torch.bmm(products.weights, products.values).to(query.dtype).view(rows, 1, heads, width)
