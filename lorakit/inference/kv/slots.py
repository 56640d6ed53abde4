"""Tables of a key-value cache: the slot of every token, and the position up to which it is exact.

Tokens at full precision have slots of their row; those that were quantised have slots of their
policy (a slot of `int4` holds a block of tokens). Only numpy: keys and values are in `storage`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from lorakit.errors import RunError
from lorakit.methods import KVPolicy
from lorakit.methods._config import RECENT, SINKS

BLOCK = 32  # tokens that `int4` quantises together
FULL, INT8, INT4, WINDOW = range(4)
POLICIES: tuple[KVPolicy, ...] = get_args(KVPolicy)

GROWTH = 256  # tables and storage grow by so many tokens
# Values of `until`: of an empty slot or of padding; of a token that stays at full precision.
FREE, ALWAYS = -1, 2**62

Integers = NDArray[np.int64]
Place = tuple[Integers, Integers]


@dataclass
class Requantised:
    """Tokens of one policy that become quantised together: where they are, and where they go."""

    old: Place  # rows and slots of tokens from earlier steps
    new: Place  # rows and places in the step of its own tokens
    order: Integers  # [tokens]: puts the old, then the new into the order of rows and positions
    target: Place  # rows and slots [tokens] of int8, [blocks] of int4


@dataclass
class Step:
    """Tokens that come in together: the tables' view of them."""

    position: Integers  # [rows, tokens]; meaningless for padding
    kind: Integers  # [rows, tokens]
    until: Integers  # [rows, tokens]; FREE for padding
    before: Integers  # [rows, slots]: `until` of the tokens from earlier steps
    following: Integers  # [rows]: the first position of the next step
    quantise_at_end: bool  # no query of this step needs what this step quantises
    kept: Place  # rows and places of the new tokens that the step leaves at full precision
    slots: Integers  # and their slots
    moved: tuple[Integers, Integers, Integers] | None  # rows, old and new slots
    requantised: dict[int, Requantised] = field(default_factory=dict)


class SlotTables:
    """Slots of the tokens of all rows. kinds[tier]: the policy of the tokens run at that tier."""

    def __init__(self, policies: Sequence[KVPolicy], window: int) -> None:
        self.kinds = np.array([POLICIES.index(policy) for policy in policies])
        self.window = window
        self.length = 0  # tokens of a row, padding included
        self._quantising = [kind for kind in (INT8, INT4) if kind in self.kinds]
        self._start(0)

    def _start(self, rows: int) -> None:
        self.counts = np.zeros(rows, np.int64)  # real tokens
        # Of slots at full precision, [rows, slots].
        self.until, self.position, self.kind = (np.full((rows, 0), FREE) for _ in range(3))
        # Slots in use, [rows]; none is free among them.
        self.filled = {kind: np.zeros(rows, np.int64) for kind in (FULL, INT8, INT4)}
        # The first position that sees the quantised tokens of a slot, [rows, slots].
        self.ready = {kind: np.zeros((rows, 0), np.int64) for kind in (INT8, INT4)}

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Slots of a row: at full precision, of int8, and blocks of int4."""
        return self.until.shape[1], self.ready[INT8].shape[1], self.ready[INT4].shape[1]

    def begin(self, tiers: Integers, padding: Integers | None) -> Step:
        """Take in the tokens of a step, tiers [rows, tokens]; padding [rows] as in `KVStore.begin`.

        Raises RunError when the rows are not those from before.
        """
        rows, n = tiers.shape
        if self.length == 0:
            self._start(rows)
        elif padding is not None and padding.any():
            raise RunError("padding can only stand before the first tokens of a row")
        if rows != len(self.counts):
            raise RunError(f"the cache holds {len(self.counts)} rows, and {rows} come")
        self.length += n
        left = np.zeros(rows, np.int64) if padding is None else padding
        real = np.arange(n) >= left[:, None]
        position = self.counts[:, None] + real.cumsum(1) - 1
        self.counts = following = self.counts + real.sum(1)
        kind = np.where(position < SINKS, FULL, self.kinds[tiers])
        until = self._until(position, kind, real)
        stays = until > following[:, None]
        moved = self._make_room(stays.sum(1))
        before = self.until[:, : int(self.filled[FULL].max())].copy()
        leaves = ((until >= 0) & ~stays).any()
        left_before = ((before >= 0) & (before < following[:, None])).any()
        at_end = not leaves and not left_before
        kept = stays.nonzero()
        slots = self._take_slots(kept, position, kind, until)
        step = Step(position, kind, until, before, following, at_end, kept, slots, moved)
        if not at_end:
            step.requantised = self.requantise(step)
        return step

    def requantise(self, step: Step) -> dict[int, Requantised]:
        """Find slots for the tokens that the step quantises: {kind: those tokens}."""
        ends = step.following[:, None]
        old_leaves = (self.until >= 0) & (self.until <= ends)
        new_leaves = (step.until >= 0) & (step.until <= ends)
        found = {}
        for kind in self._quantising:
            old = (old_leaves & (self.kind == kind)).nonzero()
            new = (new_leaves & (step.kind == kind)).nonzero()
            row = np.concatenate([old[0], new[0]])
            if not len(row):
                continue
            order = np.lexsort((np.concatenate([self.position[old], step.position[new]]), row))
            each = slice(None, None, 1 if kind == INT8 else BLOCK)
            row = row[order][each]
            until = np.concatenate([self.until[old], step.until[new]])[order][each]
            found[kind] = Requantised(old, new, order, (row, self._append(kind, row, until)))
        return found

    def evict(self, step: Step) -> None:
        """Free the slots of tokens that the next position does not see at full precision."""
        self.until[self.until <= step.following[:, None]] = FREE

    def _until(self, position: Integers, kind: Integers, real: NDArray[np.bool_]) -> Integers:
        """The first position that does not see each new token at full precision, [rows, tokens].

        Sets that of waiting tokens too, where the new ones complete their block of int4.
        """
        until = np.where(kind == INT8, position + RECENT, ALWAYS)
        until = np.where(kind == WINDOW, position + self.window, until)
        until[~real] = FREE
        if INT4 in self.kinds:
            for row in range(len(until)):
                self._close_blocks(row, position[row], kind[row], until[row])
        return until

    def _close_blocks(self, row: int, position: Integers, kind: Integers, until: Integers) -> None:
        """Set `until` of the blocks of int4 that the new tokens of a row, [tokens], complete."""
        new = np.flatnonzero((kind == INT4) & (until != FREE))
        waiting = np.flatnonzero((self.kind[row] == INT4) & (self.until[row] == ALWAYS))
        in_blocks = (len(waiting) + len(new)) // BLOCK * BLOCK
        if in_blocks:
            positions = np.concatenate([np.sort(self.position[row, waiting]), position[new]])
            closing = positions[BLOCK - 1 : in_blocks : BLOCK].repeat(BLOCK) + RECENT
            # Fewer wait than a block has, so all of them are in the first.
            self.until[row, waiting] = closing[: len(waiting)]
            until[new[: in_blocks - len(waiting)]] = closing[len(waiting) :]

    def _make_room(self, incoming: Integers) -> tuple[Integers, Integers, Integers] | None:
        """Leave so many free slots [rows] below each row's last, and none elsewhere.

        Enlarges the tables, and moves tokens down into holes: (rows, old slots, new slots).
        """
        size = (self.until >= 0).sum(1) + incoming
        self.filled[FULL] = size
        if (more := int(size.max()) - self.until.shape[1]) > 0:
            tables = (self.until, self.position, self.kind)
            wider = (_wider(table, more, GROWTH, FREE) for table in tables)
            self.until, self.position, self.kind = wider
        inside = np.arange(self.until.shape[1]) < size[:, None]
        taken = self.until >= 0
        if not (outside := taken & ~inside).any():
            return None
        rows, slots = outside.nonzero()
        free = [np.flatnonzero(row) for row in ~taken & inside]
        needed = outside.sum(1)
        holes = np.concatenate([row[:n] for row, n in zip(free, needed, strict=True)])
        for table in (self.until, self.position, self.kind):
            table[rows, holes] = table[rows, slots]
        self.until[rows, slots] = FREE
        return rows, slots, holes

    def _take_slots(
        self,
        kept: Place,
        position: Integers,
        kind: Integers,
        until: Integers,
    ) -> Integers:
        """Enter the new tokens at `kept` into the tables: their slots [tokens]."""
        below = np.arange(self.until.shape[1]) < self.filled[FULL][:, None]
        rows, slots = ((self.until < 0) & below).nonzero()  # as many in a row as it keeps
        self.until[rows, slots] = until[kept]
        self.position[rows, slots] = position[kept]
        self.kind[rows, slots] = kind[kept]
        return slots

    def _append(self, kind: int, row: Integers, until: Integers) -> Integers:
        """Slots of a quantised policy, after those in use, for tokens or blocks of these rows."""
        slots = self.filled[kind][row] + np.arange(len(row)) - np.searchsorted(row, row)
        self.filled[kind] += np.bincount(row, minlength=len(self.counts))
        if (more := int(self.filled[kind].max()) - self.ready[kind].shape[1]) > 0:
            step = GROWTH if kind == INT8 else GROWTH // BLOCK
            self.ready[kind] = _wider(self.ready[kind], more, step, ALWAYS)
        self.ready[kind][row, slots] = until
        return slots


def _wider(table: Integers, more: int, step: int, fill: int) -> Integers:
    """The table with at least so many more columns, in whole steps."""
    return np.pad(table, ((0, 0), (0, -(-more // step) * step)), constant_values=fill)
