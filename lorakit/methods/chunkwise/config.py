"""Keys of chunkwise in a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator, model_validator

from lorakit.errors import Problem
from lorakit.methods._config import RECENT, SINKS, KVPolicies, KVPolicy, MethodConfig
from lorakit.methods.chunkwise.chunking import ChunkRule, Ladder
from lorakit.methods.chunkwise.difficulty import BASE, FEATURES
from lorakit.spec import Spec

if TYPE_CHECKING:
    from lorakit.adapters.layer import Target
    from lorakit.models.tasks import Task

EXEMPT = SINKS + RECENT


class DifficultySpec(Spec):
    """Measure of how difficult a token is."""

    source: Literal["table", "model"] = "table"
    """table: counts over the training text, the same in training, prompts and generation. model:
    surprisal and entropy of the logits that predicted the token, free while generating; a prompt
    then runs at the top tier, unless score_prompt is true."""
    score_prompt: bool = False
    """model: score a prompt by a pass of the base model, whose time counts."""
    weights: dict[str, float] = Field(default_factory=dict)
    """{feature: weight}: bigram, novelty and position of the source table; surprisal and entropy of
    the source model."""

    @model_validator(mode="after")
    def _weights_are_of_the_source(self) -> DifficultySpec:
        known = FEATURES[self.source]
        for name, weight in self.weights.items():
            if name not in known:
                raise ValueError(
                    f"the source {self.source} has no feature `{name}`, only {', '.join(known)}"
                )
            if weight < 0:
                raise ValueError(f"the weight of `{name}` is negative: {weight:g}")
        if self.weights and not any(self.weights.values()):
            raise ValueError("all weights are 0: nothing would tell tokens apart")
        if self.score_prompt and self.source != "model":
            raise ValueError(
                "score_prompt is for the source model; the source table scores prompts anyway"
            )
        return self

    @property
    def passes(self) -> list[str]:
        """Names of the passes whose logits have percentiles of their own."""
        return ["", BASE] if self.score_prompt else [""]

    def shares(self) -> dict[str, float]:
        """The weights in use; their sum is 1."""
        used = {
            name: weight
            for name, weight in (self.weights or FEATURES[self.source]).items()
            if weight
        }
        return {name: weight / sum(used.values()) for name, weight in used.items()}


class KV(Spec):
    """How the key-value cache keeps tokens."""

    policy: KVPolicy | list[KVPolicy] = "int8"
    """full, int8, int4 or window; one for all, or a list with one for each tier of the ladder."""
    window: int = Field(256, ge=1)
    """Policy window: tokens further back than this are dropped. The 4 first and the 64 last tokens
    are never touched."""


def _problems() -> tuple[list[Problem], Callable[..., None]]:
    """(a list of problems, the function that adds one: what is wrong, its key in the method's
    section, what is expected)."""
    problems: list[Problem] = []

    def found(what: str, key: str, expected: str | None = None) -> None:
        problems.append(Problem(what, f"method.{key}", expected))

    return problems, found


class Config(MethodConfig):
    """Chunkwise."""

    adopts = True

    name: Literal["chunkwise"] = "chunkwise"
    ladder: list[int] | None = None
    """Ranks of the tiers, ascending, the last one r; a layer of another rank has them in
    proportion. By default r/4, r/2, r. A first rank of 0 skips the adapter, at the highest cost in
    quality."""
    training: Literal["posthoc", "nested"] = "posthoc"
    """posthoc: train plain LoRA, then make the ladder by an SVD. nested: train prefixes."""
    nested_by: Literal["sequence", "chunk"] = "sequence"
    """nested: a tier is drawn for every sequence, or follows from its chunks."""
    rank_target: float | None = Field(None, ge=0)
    """Mean rank over tokens, met on held-out text. By default r / 2, or the nearest that the ladder
    reaches."""
    min_len: int = Field(8, ge=1)
    """Fewest tokens of a chunk."""
    max_len: int = Field(64, ge=1)
    """Most tokens of a chunk."""
    tau: float = Field(0.2, ge=0)
    """A chunk ends before a token whose difficulty (0 to 1) is further than this from the chunk's
    mean."""
    trailing: int = Field(4, ge=1)
    """Tokens whose mean difficulty chooses the tier of the chunk that opens with the last of
    them."""
    fade: int = Field(4, ge=0)
    """Tokens over which a new chunk goes from the former tier to its own."""
    difficulty: DifficultySpec = Field(default_factory=lambda: DifficultySpec.model_validate({}))
    kv: KV | None = None
    """The key-value cache: {policy, window}; int8 for all by default. Not for
    sequence-classification, which has none."""

    @field_validator("ladder")
    @classmethod
    def _ladder_goes_up(cls, ladder: list[int] | None) -> list[int] | None:
        if ladder is None:
            return None
        if not ladder:
            raise ValueError("the ladder has no rung; give ranks as [4, 8, 16]")
        if ladder[0] < 0 or any(low >= high for low, high in pairwise(ladder)):
            raise ValueError(
                "the ranks of a ladder go up from 0 or more, each above the one before: not"
                f" {ladder}"
            )
        if ladder == [0]:
            raise ValueError("a ladder of rank 0 alone is the base model")
        return ladder

    def conflicts(self, task: Task) -> list[Problem]:
        return [
            *super().conflicts(task),
            *self._conflicts_of_chunks(),
            *self._conflicts_of_task(task),
            *self._conflicts_of_parts(),
        ]

    def _conflicts_of_chunks(self) -> list[Problem]:
        """Problems of the ladder and of the lengths of chunks."""
        problems, found = _problems()
        rungs = self.rungs
        if rungs[-1] != self.r:
            found(
                f"the ladder ends at {rungs[-1]}, the adapters have rank r = {self.r}",
                "ladder",
                f"{self.r} as its last rank",
            )
        elif self.rank_target is not None and not rungs[0] <= self.rank_target <= rungs[-1]:
            what = f"no mixture of the ranks {rungs} has the mean {self.rank_target:g}"
            found(what, "rank_target", f"between {rungs[0]} and {rungs[-1]}")
        if self.min_len > self.max_len:
            found(
                f"min_len {self.min_len} is above max_len {self.max_len}",
                "min_len",
                f"at most {self.max_len}",
            )
        elif self.fade > self.min_len:
            what = (
                f"a fade of {self.fade} tokens does not fit into a chunk of min_len {self.min_len}"
            )
            found(what, "fade", f"at most {self.min_len}")
        return problems

    def _conflicts_of_task(self, task: Task) -> list[Problem]:
        """Problems of keys that need a model that predicts tokens, or a pass of the base."""
        problems, found = _problems()
        if self.nested_by == "chunk" and self.training != "nested":
            found("nested_by: chunk does nothing without training: nested", "nested_by")
        elif self.nested_by == "chunk" and self.difficulty.source == "model":
            found(
                "nested_by: chunk would need a pass of the base model at every step",
                "nested_by",
                "method.difficulty.source: table",
            )
        if not task.predicts_tokens and self.difficulty.source == "model":
            found(
                f"the task {task.name} predicts no tokens whose surprisal could be known",
                "difficulty.source",
                "method.difficulty.source: table",
            )
        if self.kv is not None and not task.predicts_tokens:
            found(f"the task {task.name} has no key-value cache", "kv", "no kv here")
        elif self.kv is not None:
            policies, rungs = self.kv.policy, self.rungs
            if isinstance(policies, list) and len(policies) != len(rungs):
                what = f"{len(policies)} policies for the {len(rungs)} tiers of the ladder {rungs}"
                found(what, "kv.policy", "one for all, or one for each tier")
            if "window" in self.cache.by_tier and self.kv.window < EXEMPT:
                what = (
                    f"a window of {self.kv.window} tokens is smaller than those that are never"
                    " touched: the 4 first and 64 last"
                )
                found(what, "kv.window", f"at least {EXEMPT}")
        return problems

    def _conflicts_of_parts(self) -> list[Problem]:
        """Problems of methods that join this one."""
        problems, found = _problems()
        for i, part in enumerate(self.with_):
            if getattr(part, "factors", None) is not None:
                what = (
                    "the ladder's components are sums of all entries: sparse factors would not"
                    " stay so"
                )
                found(
                    what, f"with.{i}.factors", "factors: null, which leaves salor its pruned base"
                )
        return problems

    def untrained_conflicts(self) -> list[Problem]:
        if self.training == "posthoc":
            return []
        what = "nothing is trained here: the ladder is made of what there is"
        return [Problem(what, "method.training", "posthoc")]

    def misfits(self, targets: Mapping[str, Target]) -> list[Problem]:
        outside = [name for name, target in targets.items() if not target.block]
        if not outside:
            return super().misfits(targets)
        what = (
            f"`{outside[0]}` is not in the transformer blocks: it may read other tokens than those"
            " that have tiers"
        )
        return [
            *super().misfits(targets),
            Problem(what, "method.target_modules", "layers of the blocks, as all-linear"),
        ]

    @property
    def not_compiled(self) -> str | None:
        return (
            None
            if self.training == "posthoc"
            else "training: nested gives every pass a plan of its own to compile for"
        )

    @property
    def rungs(self) -> list[int]:
        """The ladder's ranks."""
        return self.ladder or sorted({max(1, self.r // 4), max(1, self.r // 2), self.r})

    @property
    def cache(self) -> KVPolicies:
        kv = self.kv or KV.model_validate({})
        policies = kv.policy if isinstance(kv.policy, list) else [kv.policy] * len(self.rungs)
        return KVPolicies(tuple(policies), kv.window, "method.kv.policy")

    @property
    def target(self) -> float:
        """The mean rank to meet."""
        return (
            min(max(self.r / 2, self.rungs[0]), self.rungs[-1])
            if self.rank_target is None
            else self.rank_target
        )

    @property
    def steps(self) -> list[int]:
        """The ranks at which a block of components ends: the ladder's without 0."""
        return [rank for rank in self.rungs if rank]

    @property
    def blocks_of(self) -> list[int]:
        """How many blocks each tier uses."""
        return [sum(step <= rank for step in self.steps) for rank in self.rungs]

    @property
    def form(self) -> Ladder:
        """Chunks and tiers, as the scheduler makes them."""
        rule = ChunkRule(self.min_len, self.max_len, self.tau, self.trailing)
        return Ladder(rule, self.fade, self.blocks_of, len(self.steps))
