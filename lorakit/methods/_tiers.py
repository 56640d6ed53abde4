"""Tiers: what a method whose tokens run at different ranks gives those that run its model.

Callers ask `method.tiers`, which is None for all other methods.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lorakit.kernels.tiered_linear import TierPlan
from lorakit.methods._config import KVPolicies


@dataclass(frozen=True)
class Token:
    """Decision of a scheduler about one token. difficulty: NaN where it was not looked at; opened:
    it begins a chunk."""

    tier: int
    difficulty: float
    opened: bool


class Schedule(NamedTuple):
    """For one forward pass. tiers [rows, n] (of padding: 0); plan: over the rows · n tokens."""

    tiers: NDArray[np.int64]
    plan: TierPlan


class Scheduler(Protocol):
    """Chooses the tier of every token of a few sequences while they are written. traces: what each
    sequence's tokens got."""

    traces: list[list[Token]]

    def prompt(self, ids: Tensor, mask: Tensor) -> Schedule:
        """Schedule of the sequences' beginnings: ids [rows, n], and a mask [rows, n] that is true
        where they are no padding."""

    def step(self, ids: Tensor, logits: Tensor) -> Schedule:
        """The next token of each: ids [rows, 1]; logits [rows, vocabulary] that it was chosen
        from."""


class Tiered(Protocol):
    """Hooks of a method with tiers."""

    def scheduler(self, cache: Any = None) -> Scheduler | None:
        """For new sequences; with a cache, the one that has scheduled what the model put into it.
        None until there are tiers."""

    def kv_policies(self) -> KVPolicies:
        """How a key-value cache is kept now, while generating and in evaluation."""

    def at_tier(self, tier: int) -> AbstractContextManager[None]:
        """Context in which every token is at this tier."""

    def recompute_context(self) -> AbstractContextManager[None]:
        """Context for recomputing a block under gradient checkpointing, made in the block's forward
        pass: within it the block computes the same once more."""

    def full_rank(self) -> AbstractContextManager[None]:
        """Context in which all components act on every token: what a merged model computes."""
