"""Chunkwise: a rank for every stretch of tokens, and a policy of the key-value cache with it.

A sequence is cut into chunks of like difficulty, and each is run at one tier of a ladder of ranks
ρ_1 < … < ρ_k = r: with the first ρ of an adapter's components. After training (`posthoc`) the
components are those of the SVD of B A, so that every prefix is the best approximation of its rank
(Eckart and Young, 1936); `nested` training makes prefixes work by sampling them (DyLoRA, Valipour
et al., arXiv 2210.07558, section 3). The chunks are ours.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorakit import compat
from lorakit.adapters.layer import Adapter
from lorakit.errors import RunError
from lorakit.kernels.tiered_linear import TierPlan
from lorakit.methods._base import Calibration, Method
from lorakit.methods._config import KVPolicies, KVPolicy, MethodConfig
from lorakit.methods._tiers import Scheduler, Tiered
from lorakit.methods.chunkwise.adapter import Current, TieredAdapter
from lorakit.methods.chunkwise.calibration import calibrate, features_by_model
from lorakit.methods.chunkwise.config import Config
from lorakit.methods.chunkwise.difficulty import BASE, Values
from lorakit.methods.chunkwise.plan import PassInput, Schedulers
from lorakit.methods.chunkwise.scheduler import ChunkScheduler, Tables, UniformScheduler
from lorakit.numerics.lowrank import balanced_product

log = logging.getLogger("lorakit")


class Chunkwise(Method):
    """The ladder, the tables, and the plan of every pass through the model."""

    config: Config

    def __init__(self, config: MethodConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        self.current = Current()
        self.fixed: int | None = None  # blocks that every token uses, whatever its difficulty
        self.tables: Tables | None = None
        self.sampled: TierPlan | None = None
        self.schedulers = Schedulers(self._new_scheduler)

    # -- building ----------------------------------------------------------------------------------

    def make_adapter(self, name: str, linear: nn.Module, rank: int) -> Adapter:
        scale, rate = self.scale(name, rank), self.config.lora_dropout
        return TieredAdapter(
            linear, rank, scale, rate, self.generator(name), self.config.steps, self.current
        )

    def attach(self, adapters: dict[str, Adapter], model: nn.Module) -> None:
        super().attach(adapters, model)
        self.model = model
        self.takes_positions = "position_ids" in signature(model.forward).parameters
        # Both, since what stands on the body (a loss on a few positions, a class head) may go past
        # the whole model, and some models (OPT) past their body: the outer one of those that run
        # makes the plan.
        for module in {id(m): m for m in (model, getattr(model, "base_model", model))}.values():
            module.register_forward_pre_hook(self._before, with_kwargs=True)
            module.register_forward_hook(self._after, always_call=True)
        model.register_forward_hook(self._after_model, with_kwargs=True)
        self.planner: nn.Module | None = None

    @property
    def prompts_at_top(self) -> bool:
        """True if a prompt is not looked at."""
        return self.config.difficulty.source == "model" and not self.config.difficulty.score_prompt

    @property
    def writes(self) -> bool:
        """True if the model writes tokens, and so has a key-value cache."""
        return self.model.get_output_embeddings() is not None  # type: ignore[operator]

    def prepare(self, calibration: Calibration) -> None:
        if self.config.nested_by == "chunk":
            self.tables = self._calibrated(calibration)

    # -- training ----------------------------------------------------------------------------------

    def before_forward(self, batch: Any) -> None:
        self.sampled = None
        if self.config.training == "posthoc":
            return
        mask = batch.attention_mask.bool()
        if self.config.nested_by == "chunk":
            self.sampled = self._new_scheduler().prompt(batch.input_ids, mask).plan
            return
        # By the place of a row in its step, so that a step is the same however it is cut and dealt.
        places = np.arange(len(mask)) if batch.places is None else batch.places.cpu().numpy()
        rng = np.random.default_rng((self.seed, batch.step))
        drawn = rng.integers(0, len(self.config.rungs), int(places.max()) + 1)[places]
        used = np.asarray(self.config.blocks_of)[drawn]
        # [rows, blocks]
        weights = torch.from_numpy(used)[:, None] > torch.arange(len(self.config.steps))
        self.sampled = TierPlan.of(
            weights.to(mask.device).float()[:, None, :].expand(*mask.shape, -1).flatten(0, 1)
        )

    def conclude(self, calibration: Calibration) -> bool:
        if self.config.training == "posthoc":
            with calibration.stage("making the ladder") as advance, torch.no_grad():
                for done, adapter in enumerate(self.adapters.values(), 1):
                    a, b = balanced_product(*adapter.factors())
                    adapter.lora_A.copy_(a)
                    adapter.lora_B.copy_(b)
                    advance(done, len(self.adapters))
        self.tables = self._calibrated(calibration)
        self._warn(self.tables)
        return True

    def _warn(self, tables: Tables) -> None:
        if self.prompts_at_top:
            log.warning(
                "evaluation reads whole texts, which the source `model` without score_prompt runs"
                " at the top tier: it says nothing of the tiers that new tokens get"
            )
        if self.config.rungs[0] == 0:
            log.warning(
                "the ladder has a rank of 0: what is skipped there costs the most quality of all"
                " tiers"
            )
        if abs(tables.mean_rank - self.config.target) > 0.05 * self.config.r:
            message = (
                "the mean rank on held-out text is %.1f instead of %g: too few chunks, or too much"
                " alike, to come nearer"
            )
            log.warning(message, tables.mean_rank, self.config.target)

    def _calibrated(self, calibration: Calibration) -> Tables:
        def features(name: str, ids: Tensor, mask: Tensor) -> list[dict[str, Values]]:
            with self._at(0) if name == BASE else self.full_rank():
                return self._scored(ids, mask)

        embeddings = self.model.get_input_embeddings()  # type: ignore[operator]
        return calibrate(self.config, calibration, len(embeddings.weight), features)

    def _scored(self, ids: Tensor, mask: Tensor) -> list[dict[str, Values]]:
        return features_by_model(self.model, ids, mask, self.takes_positions)

    # -- running -----------------------------------------------------------------------------------

    @property
    def tiers(self) -> Tiered:
        return self

    def scheduler(self, cache: Any = None) -> Scheduler | None:
        if cache is not None:
            return self.schedulers.of(cache)
        if self.fixed is not None:
            return self._uniform(self.fixed)
        return self._new_scheduler() if self.tables is not None else None

    def _uniform(self, blocks: int) -> UniformScheduler:
        # Of a ladder that begins above 0, no tier has nothing: its first one stands in for the
        # cache's policy.
        known = self.config.blocks_of
        tier = known.index(blocks) if blocks in known else 0
        return UniformScheduler(tier, blocks, len(self.config.steps))

    def _new_scheduler(self) -> ChunkScheduler:
        assert self.tables is not None
        return ChunkScheduler(self.config.form, self.tables, self._score_by_base)

    def _score_by_base(self, ids: Tensor, mask: Tensor) -> list[dict[str, Values]]:
        with self._at(0):
            return self._scored(ids, mask)

    def kv_policies(self) -> KVPolicies:
        if not self.writes:
            return KVPolicies()
        if self.tables is None or self.fixed is not None:
            exact: list[KVPolicy] = ["full" for _ in self.config.rungs]
            return KVPolicies(tuple(exact))
        return self.config.cache

    def recompute_context(self) -> AbstractContextManager[None]:
        return self._with_plan(self.current.plan)

    @contextmanager
    def _with_plan(self, plan: TierPlan | None) -> Iterator[None]:
        before, self.current.plan = self.current.plan, plan
        try:
            yield
        finally:
            self.current.plan = before

    @contextmanager
    def _at(self, blocks: int) -> Iterator[None]:
        """Within it every token uses so many blocks."""
        before, self.fixed = self.fixed, blocks
        try:
            yield
        finally:
            self.fixed = before

    def at_tier(self, tier: int) -> AbstractContextManager[None]:
        return self._at(self.config.blocks_of[tier])

    def full_rank(self) -> AbstractContextManager[None]:
        return self._at(len(self.config.steps))

    def _before(
        self, module: nn.Module, arguments: tuple[Any, ...], settings: dict[str, Any]
    ) -> Any:
        """Makes the plan of a pass from its input, unless a module around this one has made it."""
        if self.planner is not None:
            return None
        if "input_ids" not in settings and arguments:
            settings, arguments = {**settings, "input_ids": arguments[0]}, arguments[1:]
            if arguments:
                raise RunError(
                    "chunkwise takes a model's arguments by name, but for the token ids",
                    "Name them.",
                )
        self.current.plan, settings = self._planned(module, settings)
        self.planner = module
        return arguments, settings

    def _after(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if module is self.planner:
            self.current.plan = self.planner = None

    def _planned(
        self, module: nn.Module, settings: dict[str, Any]
    ) -> tuple[TierPlan | None, dict[str, Any]]:
        """The plan of a pass with these arguments, and the arguments to make it with. Where it
        would go through a cache that the model makes itself, and that would come back as one of
        which nothing is known, they have a new one."""
        if self.fixed is None and module.training:
            return self.sampled, settings
        if self.fixed == len(self.config.steps) or (self.fixed is None and self.tables is None):
            return None, settings
        read, cached = PassInput.of(settings), self._goes_through_a_cache(settings)
        name = compat.cache_name(module) if cached else ""
        if self.fixed is not None:
            schedule = self._uniform(self.fixed).prompt(read.ids, read.kept)
        else:
            if cached and read.cache is None:
                settings = settings | {name: compat.new_cache(self.model.config)}
                read = PassInput.of(settings)
            schedule = self.schedulers.schedule(read)
        read.open_cache(schedule)
        return schedule.plan, settings

    def _goes_through_a_cache(self, settings: dict[str, Any]) -> bool:
        """True if a pass of a model that writes reads or makes a cache, whose name among the
        arguments must then be known."""
        wanted = settings.get("use_cache")
        return self.writes and bool(
            getattr(self.model.config, "use_cache", False) if wanted is None else wanted
        )

    def _after_model(
        self, module: nn.Module, arguments: tuple[Any, ...], settings: dict[str, Any], output: Any
    ) -> None:
        """Keeps the logits that the next token will be chosen from."""
        if (
            self.config.difficulty.source == "model"
            and (cache := compat.cache_of(output)) is not None
        ):
            scheduler = self.schedulers.of(cache)
            if scheduler is not None:
                scheduler.logits = output.logits[:, -1].detach()

    # -- what is left ------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.tables is None else self.tables.tensors()

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.tables = self._tables_of(tensors) if tensors else None

    def _tables_of(self, tensors: dict[str, Tensor]) -> Tables:
        spec = self.config.difficulty
        return Tables.of(tensors, spec.shares(), spec.passes, spec.source == "table")

    def summary(self) -> dict[str, Any]:
        if self.tables is None:
            return {}
        tables, config = self.tables, self.config
        tiers = [
            {"rank": rank, "share": round(share, 6), "kv": policy if self.writes else None}
            for rank, share, policy in zip(
                config.rungs, tables.shares, config.cache.by_tier, strict=True
            )
        ]
        return {
            "tiers": tiers,
            "mean_rank": round(tables.mean_rank, 4),
            # What nothing is known of before the first logits.
            **({"prompt_rank": config.rungs[-1]} if self.prompts_at_top else {}),
            "mean_chunk_length": round(tables.mean_length, 3),
            "table_bytes": tables.nbytes,
        }


METHOD = Chunkwise
