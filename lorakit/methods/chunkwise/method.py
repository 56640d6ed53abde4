"""Chunkwise: a rank for every stretch of tokens, and a policy of the key-value cache with it.

A sequence is cut into chunks of like difficulty, and each is run at one tier of a ladder of ranks
ρ_1 < … < ρ_k = r: with the first ρ of an adapter's components. After training (`posthoc`) the
components are those of the SVD of B A, so that every prefix is the best approximation of its rank
(Eckart and Young, 1936); `nested` training makes prefixes work by sampling them (DyLoRA, Valipour
et al., arXiv 2210.07558, section 3). The chunks are ours.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor, nn
from torch.nn.functional import dropout, linear

from lorakit import compat
from lorakit.adapters.layer import Adapter
from lorakit.errors import RunError
from lorakit.kernels.packing import current as current_packing
from lorakit.kernels.tiered_linear import TierPlan, tiered_linear
from lorakit.methods._base import Calibration, Method
from lorakit.methods._config import KVPolicies, KVPolicy, MethodConfig
from lorakit.methods._tiers import Schedule, Scheduler, Tiered
from lorakit.methods.chunkwise.chunking import chunk_starts, fit_thresholds, opening_means
from lorakit.methods.chunkwise.config import Config
from lorakit.methods.chunkwise.difficulty import (
    BASE,
    BigramTable,
    Difficulty,
    Percentiles,
    Values,
    table_features,
)
from lorakit.methods.chunkwise.scheduler import (
    ChunkScheduler,
    Tables,
    UniformScheduler,
    predicted,
    rows_of,
)
from lorakit.numerics.lowrank import balanced_product

log = logging.getLogger("lorakit")

# Training tokens that the bigram table is counted on, and held-out tokens that percentiles and
# thresholds are fitted to, where that needs no model and where it does.
COUNTED, CALIBRATED, CALIBRATED_BY_MODEL = 1_000_000, 250_000, 16_384


@dataclass
class Current:
    """Plan of the tiers in the pass that runs now; None: all components act on all tokens."""

    plan: TierPlan | None = None


class TieredAdapter(Adapter):
    """y = W x + bias + s · B (m ⊙ (A x)), m of each token from the plan of the pass; None is plain
    LoRA."""

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        scale: float,
        dropout: float,
        generator: Generator,
        steps: Sequence[int],
        current: Current,
    ) -> None:
        """steps: the ladder's ranks without 0, of which this layer's rank takes the same fractions,
        rounded up."""
        super().__init__(base, rank, scale, dropout, generator)
        self.steps, self.current = list(steps), current

    def tier_ends(self) -> list[int]:
        always = self.base.rank
        return [always, *(always + -(-self.rank * step // self.steps[-1]) for step in self.steps)]

    @property
    def is_plain(self) -> bool:
        return self.current.plan is None and super().is_plain

    def forward(self, x: Tensor) -> Tensor:
        plan = self.current.plan
        if plan is None:
            return super().forward(x)
        if (packing := current_packing()) is not None:
            plan = plan.of_packed(packing)
        if len(plan.weights) != x.numel() // x.shape[-1]:
            raise RunError(
                f"{x.numel() // x.shape[-1]} tokens reach a layer of a batch of"
                f" {len(plan.weights)}: this architecture moves tokens about, and chunkwise can not"
                " follow",
                "Leave such layers (experts) out with method.exclude_modules.",
            )
        weight, ends = self.base.weight, self.tier_ends()
        frozen = self._frozen
        if frozen is not None and x.dtype == frozen.a.dtype and not torch.is_grad_enabled():
            return tiered_linear(x, weight, self.bias, frozen.a, frozen.b, 1.0, ends, plan)
        if not (self.dropout and self.training):
            return tiered_linear(x, weight, self.bias, *self.effective(), self.scale, ends, plan)
        # As in the plain layer: dropout is of the adapter's input, and the base has none.
        a, b = self.factors()
        own = [end - ends[0] for end in ends]
        count = own[plan.top]
        hidden = linear(dropout(x, self.dropout), a[:count].to(x.dtype)) * plan.mask(
            own, x.dtype
        ).view(*x.shape[:-1], count)
        return self.base(x) + self.scale * linear(hidden, b[:, :count].to(x.dtype))


class Chunkwise(Method):
    """The ladder, the tables, and the plan of every pass through the model."""

    config: Config

    def __init__(self, config: MethodConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        self.current = Current()
        self.fixed: int | None = None  # blocks that every token uses, whatever its difficulty
        self.tables: Tables | None = None
        self.batches_seen = 0
        self.sampled: TierPlan | None = None
        self.schedulers: WeakKeyDictionary[Any, ChunkScheduler] = WeakKeyDictionary()

    # -- building ----------------------------------------------------------------------------------

    def make_adapter(self, name: str, linear: nn.Module, rank: int) -> Adapter:
        scale, rate = self.scale(rank), self.config.lora_dropout
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
        self.batches_seen += 1
        rng = np.random.default_rng((self.seed, self.batches_seen))
        used = np.asarray(self.config.blocks_of)[rng.integers(0, len(self.config.rungs), len(mask))]
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

    # -- calibration -------------------------------------------------------------------------------

    def _calibrated(self, calibration: Calibration) -> Tables:
        spec, config = self.config.difficulty, self.config
        by_table = spec.source == "table"
        table = self._counted(calibration) if by_table else None
        features: dict[str, list[dict[str, Values]]] = {name: [] for name in spec.passes}
        left = limit = CALIBRATED if by_table else CALIBRATED_BY_MODEL
        with calibration.stage("calibrating on held-out text") as advance:
            for batch in calibration.held_out():
                for name in spec.passes:
                    if table is not None:
                        found = [
                            table_features(table, ids)
                            for ids in rows_of(batch.input_ids, batch.attention_mask.bool())
                        ]
                    else:
                        with self._at(0) if name == BASE else self.full_rank():
                            found = self._scored(batch.input_ids, batch.attention_mask)
                    features[name] += found
                left -= int(batch.lengths.sum())
                advance(min(limit, limit - left), limit)
                if left <= 0:
                    break
        by_pass, fitted = {}, {}
        for name, rows in features.items():
            percentiles = {
                f: Percentiles.of(np.concatenate([row[f] for row in rows])) for f in spec.shares()
            }
            difficulty = Difficulty(percentiles, spec.shares())
            all_means, all_lengths = [], []
            for row in rows:
                values = difficulty(row)
                starts = chunk_starts(values, config.form.rule)
                all_means.append(opening_means(values, starts, config.form.rule))
                all_lengths.append(np.diff(starts, append=len(values)))
            means, lengths = np.concatenate(all_means), np.concatenate(all_lengths)
            thresholds = fit_thresholds(means, lengths, config.rungs, config.target)
            by_pass[name] = difficulty, thresholds
            fitted[name] = np.searchsorted(thresholds, means, side="right"), lengths
        tiers, lengths = fitted[""]
        shares = np.bincount(tiers, lengths, len(config.rungs)) / lengths.sum()
        return Tables(
            table, by_pass, shares.tolist(), float(shares @ config.rungs), float(lengths.mean())
        )

    def _counted(self, calibration: Calibration) -> BigramTable:
        embeddings = self.model.get_input_embeddings()  # type: ignore[operator]
        sequences: list[NDArray[np.int64]] = []
        left = COUNTED
        with calibration.stage("counting bigrams") as advance:
            for batch in calibration.batches(calibration.rows):
                sequences += rows_of(batch.input_ids, batch.attention_mask.bool())
                left -= int(batch.lengths.sum())
                advance(len(sequences), calibration.rows)
                if left <= 0:
                    break
        return BigramTable.count(sequences, int(embeddings.weight.shape[0]))

    def _scored(self, ids: Tensor, mask: Tensor) -> list[dict[str, Values]]:
        """The features of the source `model` of each row, from one pass."""
        kept = mask.bool()
        places = (
            {"position_ids": (kept.long().cumsum(1) - 1).clamp(min=0)}
            if self.takes_positions
            else {}
        )
        mode = self.model.training
        self.model.eval()
        with torch.no_grad():
            logits = self.model(
                input_ids=ids, attention_mask=mask, use_cache=False, **places
            ).logits
        self.model.train(mode)
        # Nothing predicted the first token: it is as surprising as one drawn from all.
        unknown = np.float32(np.log(logits.shape[-1]))
        found = []
        for row, own in enumerate(kept):
            tokens = ids[row, own]
            parts = [part.cpu().numpy() for part in predicted(logits[row, own][:-1], tokens[1:])]
            surprisal, entropy = (
                np.concatenate([[unknown], part])[: len(tokens)].astype(np.float32)
                for part in parts
            )
            found.append({"surprisal": surprisal, "entropy": entropy})
        return found

    # -- running -----------------------------------------------------------------------------------

    @property
    def tiers(self) -> Tiered:
        return self

    def scheduler(self, cache: Any = None) -> Scheduler | None:
        if cache is not None:
            return self.schedulers.get(cache)
        if self.fixed is not None:
            # Of a ladder that begins above 0, no tier has nothing: its first one stands in for the
            # cache's policy.
            tier = (
                self.config.blocks_of.index(self.fixed)
                if self.fixed in self.config.blocks_of
                else 0
            )
            return UniformScheduler(tier, self.fixed, len(self.config.steps))
        return self._new_scheduler() if self.tables is not None else None

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
        self.current.plan = self._plan(module, settings)
        self.planner = module
        return arguments, settings

    def _after(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if module is self.planner:
            self.current.plan = self.planner = None

    def _plan(self, module: nn.Module, settings: dict[str, Any]) -> TierPlan | None:
        """The plan of a pass with these arguments. Where it would go through a cache that the model
        makes itself, and that would come back as one of which nothing is known, the cache is made
        here."""
        blocks = len(self.config.steps)
        if self.fixed == blocks or (
            self.tables is None and self.fixed is None and not module.training
        ):
            return None
        if module.training and self.fixed is None:
            return self.sampled
        ids = settings.get("input_ids")
        if ids is None:
            raise RunError(
                "chunkwise needs token ids to find chunks, and was given embeddings",
                "Pass input_ids.",
            )
        mask, cached = settings.get("attention_mask"), self._goes_through_a_cache(settings)
        cache, name = compat.cache_in(settings), compat.cache_name(module) if cached else ""
        kept = torch.ones_like(ids, dtype=torch.bool)
        if mask is not None and mask.ndim == 2:
            kept = mask[:, -ids.shape[1] :].bool()
        past = 0 if cache is None else int(cache.get_seq_length())
        uniform = self.scheduler() if self.fixed is not None else None
        if uniform is not None:
            schedule = uniform.prompt(ids, kept)
            _open(cache, schedule, kept, past)
            return schedule.plan
        if cache is None and cached:
            cache = settings[name] = compat.new_cache(self.model.config)
        if past == 0:
            scheduler = self._new_scheduler()
            schedule = scheduler.prompt(ids, kept)
            if cache is not None:
                self.schedulers[cache] = scheduler
                cache.reorder_cache = _refuse_reordering
        else:
            known = self.schedulers.get(cache)
            if known is None:
                raise RunError(
                    "the key-value cache was filled by another model", "Begin with an empty one."
                )
            if known.length != past:
                what = (
                    f"the key-value cache holds {past} tokens, of {known.length} that were put"
                    " into it"
                )
                raise RunError(what, "Chunks can not be taken back: generate without an assistant.")
            schedule = known.follow(ids, kept)
        _open(cache, schedule, kept, past)
        return schedule.plan

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
            scheduler = self.schedulers.get(cache)
            if scheduler is not None:
                scheduler.logits = output.logits[:, -1].detach()

    # -- what is left ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"batches_seen": self.batches_seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches_seen = state["batches_seen"]

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


def _open(cache: Any, schedule: Schedule, kept: Tensor, past: int) -> None:
    """Tell a cache that treats tiers differently which ones come, and at first how much padding is
    at the left."""
    if cache is not None and hasattr(cache, "open"):
        cache.open(schedule.tiers, None if past else (~kept).long().cumprod(1).sum(1).cpu().numpy())


def _refuse_reordering(*_: Any) -> None:
    raise RunError(
        "chunkwise can not go on with other rows than it began with", "Generate without beams."
    )


METHOD = Chunkwise
