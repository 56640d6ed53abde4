"""Base of all methods' Configs: the keys that every method has. Imports no torch, so that recipes
can be checked without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from lorakit.errors import Problem
from lorakit.spec import Spec

if TYPE_CHECKING:
    from lorakit.adapters.layer import Target
    from lorakit.models.tasks import Task

KVPolicy = Literal["full", "int8", "int4", "window"]
# First and last tokens of a sequence that a cache never touches.
SINKS, RECENT = 4, 64


@dataclass(frozen=True)
class KVPolicies:
    """How a key-value cache keeps the tokens of each tier; window: `window` drops tokens beyond it;
    key: the recipe's key that says so."""

    by_tier: tuple[KVPolicy, ...] = ("full",)
    window: int | None = None
    key: str = ""

    @property
    def exact(self) -> bool:
        """True if nothing is lost."""
        return set(self.by_tier) == {"full"}


class MethodPart(Spec):
    """A method's own keys where it joins another one, in that one's `with:`."""

    name: str
    """The method that joins."""

    def conflicts(self, main: MethodConfig, key: str) -> list[Problem]:
        """Why it can not join `main`; `key` is its place in the recipe. Needs no model."""
        return []

    def misfits(self, targets: Mapping[str, Target], key: str) -> list[Problem]:
        """Problems of keys that do not fit the layers {module name: target}; `key` is the part's
        place in the recipe."""
        return []

    def more_parameters(self, target: Target) -> int:
        """Parameters that it trains in one layer beside the adapter's own."""
        return 0


class MethodConfig(Spec):
    """The keys that every method has: LoRA's own, with PEFT's names and meanings."""

    ranks_move: ClassVar[bool] = False
    """True if components come and go while training."""
    called_elsewhere: ClassVar[Mapping[str, str]] = {}
    """{what other tools call this method, or one that it comes near to: how that one differs, "" if
    it does not}."""
    keys_called_elsewhere: ClassVar[Mapping[str, tuple[str, str]]] = {}
    """{what other tools call a key, in lower case: (the key here, how its value differs, "" if it
    does not)}."""
    adopts: ClassVar[bool] = False
    """True for the one method that `lorakit convert` makes of another one's trained adapters."""
    dense_factors: ClassVar[str | None] = None
    """Why no part may make entries of A and B zero; None where one may."""

    name: str
    """The method."""
    r: int = Field(8, ge=1)
    """Initial rank of every adapter."""
    lora_alpha: float = Field(16.0, gt=0)
    """Scale of the update: s = lora_alpha / r, fixed while ranks move."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    target_modules: str | list[str] = "all-linear"
    """`all-linear` (every linear layer of the transformer blocks), a list of module names, or one
    regular expression."""
    exclude_modules: str | list[str] = Field(default_factory=list)
    """Modules to leave out, written as in target_modules."""
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    """{module name or regular expression: rank} for modules whose rank differs from r; 0 starts a
    module without one."""
    with_: Sequence[MethodPart] = Field(default_factory=list, alias="with")
    """Methods that join this one, each a mapping with its name and its own keys."""

    @field_validator("rank_pattern")
    @classmethod
    def _ranks_are_not_negative(cls, ranks: dict[str, int]) -> dict[str, int]:
        for pattern, rank in ranks.items():
            if rank < 0:
                raise ValueError(f"the rank of `{pattern}` is negative: {rank}")
        return ranks

    def conflicts(self, task: Task) -> list[Problem]:
        """Problems of keys that can not work together, or not for the task `task`, found without a
        model."""
        problems, joined = [], [self.name]
        for i, part in enumerate(self.with_):
            if part.name in joined:
                problems.append(
                    Problem(f"`{part.name}` is there twice", f"method.with.{i}", "each method once")
                )
            joined.append(part.name)
            problems += part.conflicts(self, f"method.with.{i}")
        return problems

    @property
    def not_compiled(self) -> str | None:
        """Why torch.compile can not make the blocks' training passes; None where it can."""
        return None

    @property
    def cache(self) -> KVPolicies:
        """How a key-value cache is kept while generating."""
        return KVPolicies()

    def untrained_conflicts(self) -> list[Problem]:
        """Problems of keys that need training, where trained adapters are adopted instead."""
        return []

    def misfits(self, targets: Mapping[str, Target]) -> list[Problem]:
        """Problems of keys that do not fit the layers {module name: target} that were matched."""
        return [
            problem
            for i, part in enumerate(self.with_)
            for problem in part.misfits(targets, f"method.with.{i}")
        ]

    def parameters(self, target: Target) -> int:
        """Parameters that are trained in one layer, at its initial rank."""
        own = target.rank * (target.in_features + target.out_features)
        return own + sum(part.more_parameters(target) for part in self.with_)
