"""Forward passes of generation: a batch of sequences in progress, its cache and its tiers."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lorakit import compat
from lorakit.inference.decoder import Decoder
from lorakit.inference.kv.policy_cache import PolicyCache
from lorakit.inference.kv.store import KVStore
from lorakit.methods import KVPolicies, Scheduler, Tiered, Token


class Forward(Protocol):
    """Forward passes of one batch of sequences."""

    def start(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits [rows, vocabulary] after the prompts ids [rows, n], padded on the left.

        mask [rows, n] is true for tokens.
        """

    def step(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Logits after one more token each, ids [rows, 1], chosen from `logits`."""

    @property
    def traces(self) -> list[list[Token]]:
        """Trace of each sequence, with a Token for each of its tokens; [] without tiers."""

    @property
    def kv_bytes(self) -> tuple[int, int]:
        """Bytes of keys and values as they are kept, and in the model's own type."""


class NativeForward:
    """Forward passes of lorakit's `Decoder`, over a KVStore."""

    def __init__(self, decoder: Decoder, scheduler: Scheduler | None, kv: KVPolicies) -> None:
        self.decoder, self.scheduler = decoder, scheduler
        self.store = KVStore(kv.by_tier, kv.window, len(decoder.layers))

    def start(self, ids: Tensor, mask: Tensor) -> Tensor:
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        self.next = positions[:, -1:] + 1
        schedule = self.scheduler.prompt(ids, mask) if self.scheduler else None
        self.store.begin(self._tiers(schedule, ids), (~mask).sum(1).cpu().numpy())
        return self._run(ids, positions, schedule)

    def step(self, ids: Tensor, logits: Tensor) -> Tensor:
        schedule = self.scheduler.step(ids, logits) if self.scheduler else None
        self.store.begin(self._tiers(schedule, ids))
        positions, self.next = self.next, self.next + 1
        return self._run(ids, positions, schedule)

    def _tiers(self, schedule: Any, ids: Tensor) -> Any:
        """[rows, n]: without a scheduler the top tier, whose policy is the last."""
        if schedule:
            return schedule.tiers
        return np.full(tuple(ids.shape), len(self.store.policies) - 1)

    def _run(self, ids: Tensor, positions: Tensor, schedule: Any) -> Tensor:
        plan = schedule.plan if schedule else None
        logits: Tensor = self.decoder.forward(ids, positions, self.store, plan)
        self.store.end()
        return logits

    @property
    def traces(self) -> list[list[Token]]:
        return self.scheduler.traces if self.scheduler else []

    @property
    def kv_bytes(self) -> tuple[int, int]:
        return self.store.nbytes, self.store.nbytes_if_full


class HFForward:
    """Forward passes of the transformers model, in which the method's hooks do the scheduling."""

    def __init__(self, model: Any, tiers: Tiered | None, kv: KVPolicies) -> None:
        self.model, self.tiers = model, tiers
        self.cache: Any
        if kv.exact:  # any architecture's own cache will do
            self.cache = compat.new_cache(model.config)
        else:
            self.cache = PolicyCache(model.config, kv.by_tier, kv.window)

    def start(self, ids: Tensor, mask: Tensor) -> Tensor:
        self.mask = mask.long()
        return self._run(ids, (self.mask.cumsum(1) - 1).clamp(min=0))

    def step(self, ids: Tensor, logits: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), 1)], 1)
        return self._run(ids, self.mask.sum(1, keepdim=True) - 1)

    def _run(self, ids: Tensor, positions: Tensor) -> Tensor:
        output = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **compat.cache_argument(self.model, self.cache),
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    @property
    def traces(self) -> list[list[Token]]:
        scheduler = self.tiers.scheduler(self.cache) if self.tiers else None
        return scheduler.traces if scheduler else []

    @property
    def kv_bytes(self) -> tuple[int, int]:
        if isinstance(self.cache, PolicyCache):
            return self.cache.store.nbytes, self.cache.store.nbytes_if_full
        held = compat.cache_bytes(self.cache)
        return held, held
