"""A key-value cache whose tokens are kept by a policy: exact, in 8 or 4 bits, or for a while only.

The policy of a token follows from the tier that it was run at. A query sees a token by its
distance to it and by nothing else, not by the pieces in which the tokens came: a prompt in one
piece and the same tokens one by one give the same. A query at position t sees the token at
position p <= t

    in full     if p < SINKS, or t - p < RECENT, or the token's policy is `full`; else
    int8        from 8 bits: symmetric, absmax / 127, a float32 scale for a key or value of a head;
    int4        from 4 bits: the tokens of this policy (sinks left out) form blocks of BLOCK in
                their order, keys with a minimum and a step per channel over the block, values with
                one per token (KIVI, arXiv 2402.02750, § 3), both float16. A block is used so once
                its last token is RECENT away;
    window      not at all once t - p >= max(window, RECENT) (StreamingLLM, arXiv 2309.17453, § 3:
                sinks and a window).

So every token has `until`, the first query position that does not see it at full precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.errors import RunError
from lorakit.inference.kv.attention import PieceAttention, TokenAttention
from lorakit.inference.kv.slots import (
    BLOCK,
    FULL,
    INT4,
    INT8,
    POLICIES,
    Integers,
    SlotTables,
    Step,
)
from lorakit.inference.kv.storage import Storage
from lorakit.methods import KVPolicy
from lorakit.methods._config import RECENT


class KernelView(NamedTuple):
    """The storage in a step of one token in one row, for a kernel that appends and attends itself.

    tensors: keys and values [2, layers, 1, kv heads, room, …] as `Storage.allocate` makes them, of
    which the first `full` slots, `int8` tokens and `int4` blocks are seen. slot: of those at full
    precision, for the new token.
    """

    tensors: dict[str, Tensor]
    slot: int
    full: int
    int8: int
    int4: int


class KVStore:
    """Keys and values of all layers, kept by the policies of their tokens, and attention over them.

    A step is `begin`, then `append` and `attend` for every layer in turn, then `end`.
    policies[tier] is the policy of the tokens that were run at that tier. window: how far tokens
    of policy `window` are seen, at least RECENT. layers: how many to allocate storage for at once;
    how many there are is known after the first step.

    Raises ValueError for an unknown policy, or `window` without a window.
    """

    def __init__(
        self,
        policies: Sequence[KVPolicy],
        window: int | None = None,
        layers: int = 1,
    ) -> None:
        if not policies or any(policy not in POLICIES for policy in policies):
            one_each = f"one for each tier, each of {', '.join(POLICIES)}"
            raise ValueError(f"policies {list(policies)}: {one_each}")
        if "window" in policies and window is None:
            raise ValueError("the policy `window` needs a window")
        self.policies = tuple(policies)
        self._tables = SlotTables(policies, max(window or 0, RECENT))
        self._storage = Storage(layers)
        self._layers_known = False  # their number: after the first step
        self._layer = -1  # the layer that was appended to last
        self._piece: tuple[Tensor, Tensor] | None = None  # its new keys and values
        self._step: Step | None = None
        self._attention: PieceAttention | TokenAttention | None = None  # of the step

    @property
    def length(self) -> int:
        """Tokens that each row has had, padding included."""
        return self._tables.length

    # -- a step ------------------------------------------------------------------------------------

    def begin(self, tiers: Integers, padding: Integers | None = None) -> None:
        """Announce n tokens a row: tiers [rows, n].

        padding [rows], with the first call only: how many tokens at the left of the row's first
        input are padding, which is never seen, not counted, and takes no bytes. Raises RunError
        when the rows are not those from before, or the last step was broken off.
        """
        self.end()
        self._step = self._tables.begin(tiers, padding)
        if self._step.moved is not None:
            self._storage.move(*self._step.moved)
        self._attention = None
        self._layer = -1

    def append(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Take in the step's keys and values of a layer, [rows, kv heads, n, head_dim], rotated.

        Raises RunError without `begin`, for layers out of order, and for a layer of another shape
        or type than the first.
        """
        step = self._step
        too_many = self._layers_known and layer >= self._storage.layers
        if step is None or layer != self._layer + 1 or too_many:
            raise RunError(f"the cache got layer {layer} after layer {self._layer}")
        if layer == 0 or not self._layers_known:
            self._check(step, layer, key, value)
            if self._layers_known and key.shape[2] == 1:
                self._attention = TokenAttention(self._tables, self._storage, step)
        self._layer = layer
        self._piece = (key, value)
        if isinstance(self._attention, TokenAttention) and self._attention.write(layer, key, value):
            return
        self._storage.write(layer, step.kept, step.slots, key, value)
        if step.requantised:
            new = torch.stack([key, value])[:, None]
            self._storage.quantise(step.requantised, slice(layer, layer + 1), new)

    def attend(self, layer: int, query: Tensor, scaling: float | None = None) -> Tensor:
        """Causal attention of the step's queries [rows, heads, n, head_dim] over all that they see,
        with grouped queries: [rows, n, heads, head_dim].

        scaling: head_dim^-1/2 by default. The result for padding is without meaning, but finite.
        Raises RunError when the layer's keys were not appended just before.
        """
        step = self._step
        if step is None or layer != self._layer or self._piece is None:
            raise RunError(f"layer {layer} attends before its keys are in the cache")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if self._attention is None:
            self._attention = PieceAttention(self._tables, self._storage, step, query)
        if isinstance(self._attention, TokenAttention):
            return self._attention(layer, query, scaling)
        return self._attention(layer, query, *self._piece, scaling)

    def hand_over(self) -> KernelView | None:
        """The storage, in place of `append` and `attend` for all layers.

        None, and nothing is changed, unless the step is of one token in one row and not the first.
        """
        step = self._step
        if step is None or not self._layers_known or self._layer >= 0:
            return None
        if step.until.shape != (1, 1) or not step.quantise_at_end:
            return None
        self._storage.fit(0, self._tables.sizes)
        self._layer = self._storage.layers - 1
        filled = (int(self._tables.filled[kind][0]) for kind in (FULL, INT8, INT4))
        return KernelView(self._storage.tensors, int(step.slots[0]), *filled)

    def end(self) -> None:
        """Close the step, if one is open: quantise and evict what the next position does not see at
        full precision.

        Raises RunError when layers are missing.
        """
        step, self._step = self._step, None
        if step is None:
            return
        last = self._storage.layers - 1
        if self._layer < 0 or (self._layers_known and self._layer != last):
            what = f"a step of the cache was broken off after layer {self._layer}"
            raise RunError(f"{what}: the cache can not be used any more")
        if not self._layers_known:
            self._storage.allocate(self._layer + 1)
            self._layers_known = True
        if step.quantise_at_end and (groups := self._tables.requantise(step)):
            self._storage.fit(self._layer, self._tables.sizes)
            self._storage.quantise(groups)
        self._tables.evict(step)
        self._piece = None

    def _check(self, step: Step, layer: int, key: Tensor, value: Tensor) -> None:
        """Raise RunError for keys and values that do not fit, and make room for them."""
        rows, n = step.until.shape
        if key.shape != value.shape or key.shape[0] != rows or key.shape[2] != n:
            shapes = f"keys {list(key.shape)} and values {list(value.shape)}"
            wanted = f"the cache needs them alike, with {rows} rows of {n} tokens"
            raise RunError(f"layer {layer} has {shapes}: {wanted}")
        if key.requires_grad:
            what = "the key-value cache is for inference: run the model under torch.no_grad()"
            raise RunError(what)
        self._storage.check(layer, key, even_width="int4" in self.policies)
        self._storage.fit(layer, self._tables.sizes)

    # -- what is held ------------------------------------------------------------------------------

    def bytes_by_policy(self) -> dict[str, int]:
        """{policy: bytes} of the keys, values and scales held, over all layers; sinks count as
        `full`."""
        if not self._storage.tensors:
            return dict.fromkeys(map(str, POLICIES), 0)
        tables, form = self._tables, self._storage.form
        width, pairs = form.head_dim, self._storage.layers * form.heads
        exact = 2 * pairs * width * form.dtype.itemsize
        taken = tables.until >= 0
        counts = {name: (taken & (tables.kind == i)).sum() for i, name in enumerate(POLICIES)}
        held: dict[str, int] = {name: int(count) * exact for name, count in counts.items()}
        held["int8"] += int(tables.filled[INT8].sum()) * 2 * pairs * (width + 4)
        block = BLOCK * width + 4 * width + 4 * BLOCK
        held["int4"] += int(tables.filled[INT4].sum()) * pairs * block
        return held

    @property
    def nbytes(self) -> int:
        """Bytes of the keys, values and scales held, over all layers; padding and free slots not
        counted."""
        return sum(self.bytes_by_policy().values())

    @property
    def nbytes_if_full(self) -> int:
        """Value that `nbytes` would have with the policy `full` for all tokens."""
        if not self._storage.tensors:
            return 0
        form = self._storage.form
        token = 2 * self._storage.layers * form.heads * form.head_dim * form.dtype.itemsize
        return int(self._tables.counts.sum()) * token
