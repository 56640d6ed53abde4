"""Base of all methods' Configs: the keys that every method has. Imports no torch, so that recipes
can be checked without."""

from __future__ import annotations

import math
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

    def changes_base(self, key: str) -> list[str]:
        """Its keys in the recipe that change the base's weights; `key` is the part's place."""
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
    is_plain: ClassVar[bool] = False
    """True for the one method whose adapters are plain LoRA and nothing else, as imported ones."""
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
    use_rslora: bool = False
    """Scale the update by lora_alpha / √r instead (rsLoRA, arXiv 2312.03732), so that a larger r
    does not make it smaller."""
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
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    """{module name or regular expression: lora_alpha} for modules whose lora_alpha differs."""
    init_lora_weights: Literal["kaiming", "eva", "qera"] = "kaiming"
    """Start of A and B. kaiming: A random, B zero. eva: A as the leading directions of what each
    layer reads (arXiv 2410.07170), B zero. qera: both as what makes up best for what a quantised
    base lost (arXiv 2410.06040). The last two look at training rows first."""
    init_from: str | None = None
    """Adapter to start from instead of zero: a run folder, or an adapter's folder of lorakit or
    PEFT."""
    with_: Sequence[MethodPart] = Field(default_factory=list, alias="with")
    """Methods that join this one, each a mapping with its name and its own keys."""

    @field_validator("rank_pattern")
    @classmethod
    def _ranks_are_not_negative(cls, ranks: dict[str, int]) -> dict[str, int]:
        for pattern, rank in ranks.items():
            if rank < 0:
                raise ValueError(f"the rank of `{pattern}` is negative: {rank}")
        return ranks

    @field_validator("alpha_pattern")
    @classmethod
    def _alphas_are_positive(cls, alphas: dict[str, float]) -> dict[str, float]:
        for pattern, alpha in alphas.items():
            if alpha <= 0:
                raise ValueError(f"the lora_alpha of `{pattern}` is not above 0: {alpha:g}")
        return alphas

    def conflicts(self, task: Task) -> list[Problem]:
        """Problems of keys that can not work together, or not for the task `task`, found without a
        model."""
        problems, joined = list[Problem](), [self.name]
        if self.init_from is not None and self.init_lora_weights != "kaiming":
            what = f"init_lora_weights {self.init_lora_weights} and init_from are two starts"
            problems.append(Problem(what, "method.init_lora_weights", "one of the two"))
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
    def changes_base(self) -> list[str]:
        """The recipe's keys that change the base's weights, which a quantised base does not let."""
        return [
            key
            for i, part in enumerate(self.with_)
            for key in part.changes_base(f"method.with.{i}")
        ]

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

    def scale(self, alpha: float, rank: int) -> float:
        """s of an adapter with this lora_alpha and initial rank, with r in place of a rank of 0 (it
        may grow)."""
        return alpha / self.divisor(rank or self.r)

    def divisor(self, rank: int) -> float:
        """lora_alpha / s at this rank."""
        return math.sqrt(rank) if self.use_rslora else rank

    def parameters(self, target: Target) -> int:
        """Parameters that are trained in one layer, at its initial rank."""
        own = target.rank * (target.in_features + target.out_features)
        return own + sum(part.more_parameters(target) for part in self.with_)
