"""The plan of a pass: its input as tiers see it, and the schedulers of the caches that passes go
through."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lorakit import compat
from lorakit.errors import RunError
from lorakit.methods._tiers import Schedule
from lorakit.methods.chunkwise.scheduler import ChunkScheduler


@dataclass(frozen=True)
class PassInput:
    """Input of a pass: ids [rows, n], `kept` [rows, n], true where they are no padding, and the
    cache that it goes through, if any, with the `past` tokens that it holds."""

    ids: Tensor
    kept: Tensor
    cache: Any
    past: int

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> PassInput:
        """From a model's arguments by name."""
        ids = settings.get("input_ids")
        if ids is None:
            raise RunError(
                "chunkwise needs token ids to find chunks, and was given embeddings",
                "Pass input_ids.",
            )
        mask, cache = settings.get("attention_mask"), compat.cache_in(settings)
        kept = torch.ones_like(ids, dtype=torch.bool)
        if mask is not None and mask.ndim == 2:
            kept = mask[:, -ids.shape[1] :].bool()
        return cls(ids, kept, cache, 0 if cache is None else int(cache.get_seq_length()))

    def open_cache(self, schedule: Schedule) -> None:
        """Tell a cache that treats tiers differently which ones come, and at first how much padding
        is at the left."""
        if self.cache is not None and hasattr(self.cache, "open"):
            padding = None
            if not self.past:
                padding = (~self.kept).long().cumprod(1).sum(1).cpu().numpy()
            self.cache.open(schedule.tiers, padding)


class Schedulers:
    """Schedulers of the sequences in each key-value cache, as long as it lives."""

    def __init__(self, new: Callable[[], ChunkScheduler]) -> None:
        self._new = new
        self._of: WeakKeyDictionary[Any, ChunkScheduler] = WeakKeyDictionary()

    def of(self, cache: Any) -> ChunkScheduler | None:
        """The one that has scheduled all that is in the cache."""
        return self._of.get(cache)

    def schedule(self, read: PassInput) -> Schedule:
        """Schedule of a pass, by a new scheduler where it begins its sequences."""
        if read.past:
            return self._following(read).follow(read.ids, read.kept)
        scheduler = self._new()
        schedule = scheduler.prompt(read.ids, read.kept)
        if read.cache is not None:
            self._of[read.cache] = scheduler
            read.cache.reorder_cache = _refuse_reordering
        return schedule

    def _following(self, read: PassInput) -> ChunkScheduler:
        known = self.of(read.cache)
        if known is None:
            raise RunError(
                "the key-value cache was filled by another model", "Begin with an empty one."
            )
        if known.length != read.past:
            raise RunError(
                f"the key-value cache holds {read.past} tokens, of {known.length} that were put"
                " into it",
                "Chunks can not be taken back: generate without an assistant.",
            )
        return known


def _refuse_reordering(*_: Any) -> None:
    raise RunError(
        "chunkwise can not go on with other rows than it began with", "Generate without beams."
    )
