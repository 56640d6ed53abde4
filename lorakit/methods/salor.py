"""SALOR: sparsity-aware low-rank representation (arXiv 2601.16991).

y = W' x + s · (B⊙M_B)((A⊙M_A) x) + B_r (A_r x). Two parts, either of which may be off:

`factors`: most entries of A and B become exactly zero along a ramp while training (Zhu and Gupta, arXiv 1710.01878).
`base`: entries of the frozen W are dropped before training, W' = W⊙M, and a truncated SVD of what was dropped makes up for
the loss (the paper, section 3: of the ways to mask, masking W alone has the least error bound).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import Tensor, nn

from lorakit.adapters.layer import Adapter, Target, dense_weight, in_out
from lorakit.adapters.optimizer import AdamW, ParamGroup
from lorakit.errors import Problem, RunError
from lorakit.kernels.masks import fast_masks
from lorakit.methods._base import Calibration, Method, MethodConfig, MethodPart
from lorakit.numerics.lowrank import truncated_svd
from lorakit.numerics.schedule import ramp, step_at
from lorakit.numerics.sparsity import Scope, Structure, keep_count, masks, strongest
from lorakit.spec import Spec

log = logging.getLogger("lorakit")

PARTS = ("lora_A", "lora_B")
DEFAULT_DENSITY = 0.5
# Magnitude alone wrecks a model at half: the perplexity of the 135M model rises from 6 to 79.
MAGNITUDE_BASE_DENSITY = 0.75
# Decay of the running sensitivity (AdaLoRA's beta_1, arXiv 2303.10512, section 3.2).
SENSITIVITY_DECAY = 0.85
# Up to this smaller side a layer's SVD is exact: below a second on two cores.
EXACT_SVD_LIMIT = 1024


class _Sparse(Spec):
    """Keys that both parts share."""

    density: float | None = Field(None, gt=0, le=1)
    """Share of the entries that stay; n / m for a structure n:m, else 0.5 (0.75 for a base pruned by magnitude)."""
    structure: str = "unstructured"
    """Unit of entries that is kept or dropped as one."""

    @field_validator("structure")
    @classmethod
    def _structure_is_known_and_fits(cls, text: str, others: ValidationInfo) -> str:
        share, density = Structure.parse(text).share, others.data.get("density")
        if share is not None and density is not None and not math.isclose(share, density):
            raise ValueError(f"structure {text} keeps {share:g} of the entries, density says {density:g}")
        return text

    def refuse_unused(self, key: str, used: bool, needs: str) -> None:
        """Raises ValueError for a key that was changed and would do nothing."""
        if not used and getattr(self, key) != type(self).model_fields[key].default:
            raise ValueError(f"{key} does nothing here: it needs {needs}")

    @property
    def target(self) -> float:
        """The density in the end."""
        return self.density or Structure.parse(self.structure).share or DEFAULT_DENSITY


class Factors(_Sparse):
    """Sparse A and B."""

    structure: str = "unstructured"
    """unstructured; n:m (as 2:4) of the consecutive entries of a row; group: group_size consecutive entries of a row;
    rank: whole components, by |A_i| |B_i|, which makes the adapter smaller on every device."""
    group_size: int = Field(4, ge=2)
    """Entries of a group."""
    criterion: Literal["magnitude", "sensitivity"] = "magnitude"
    """Score of an entry: its magnitude (without the gate, if another method has one), or a running mean of |entry ·
    gradient|."""
    scope: Scope = "matrix"
    """Every matrix to the same density, or all As and all Bs together."""
    shape: Literal["cubic", "linear", "one-shot"] = "cubic"
    """The way of the density from 1 at `begin` to its target at `end`; one-shot prunes all at `end`."""
    begin: float = Field(0.15, ge=0, le=1)
    """Where the ramp begins, as a fraction of the run. B starts at zero: too early, its size means nothing."""
    end: float = Field(0.7, gt=0, le=1, validate_default=True)
    """Where the ramp ends, as a fraction of the run; the masks stay from there on."""
    interval: float = Field(0.01, gt=0, le=1)
    """Fraction of the run between two changes of the masks; at least one step."""

    @field_validator("end")
    @classmethod
    def _ramp_goes_forward(cls, end: float, others: ValidationInfo) -> float:
        if end < others.data.get("begin", 0.0):
            raise ValueError(f"the ramp ends at {end:g}, before it begins at {others.data['begin']:g}")
        return end

    @model_validator(mode="after")
    def _all_is_used(self) -> Factors:
        self.refuse_unused("group_size", self.structure == "group", "structure group")
        self.refuse_unused("interval", self.shape != "one-shot", "a ramp; one-shot prunes once, at `end`")
        return self

    @property
    def form(self) -> Structure:
        return Structure.parse(self.structure, self.group_size)


class Base(_Sparse):
    """A pruned base: the layers of the transformer blocks that have an adapter."""

    structure: str = "unstructured"
    """unstructured, or n:m (as 2:4) of the consecutive inputs of an output row."""
    criterion: Literal["magnitude", "wanda", "2:4"] = "wanda"
    """Score of an entry: |W|, or Wanda's |W| · |x| (arXiv 2306.11695), which looks at training rows first and prunes each
    output row to the same density (with scope layer). `2:4` is short for magnitude with structure 2:4."""
    scope: Literal["layer", "global"] = "layer"
    """Every layer to the same density, or all together, which needs the scores of all at once."""
    calibration_rows: int = Field(128, ge=1)
    """Training rows that Wanda looks at."""
    r_res: int = Field(16, ge=0)
    """Rank of the residual pair that starts as the truncated SVD of what was dropped; 0 for none."""
    svd: Literal["auto", "exact", "randomised"] = "auto"
    """auto: exact for layers up to 1024 wide or high, randomised for larger ones."""
    residual_lr_factor: float = Field(1.0, ge=0)
    """Learning rate of the residual pair as a factor of the run's; 0 freezes it. With 0.1 it learns less than fresh
    factors of its rank would (README)."""

    @field_validator("structure")
    @classmethod
    def _no_whole_pieces(cls, text: str) -> str:
        if text in ("rank", "group"):
            raise ValueError(f"a base is pruned unstructured or n:m, not by {text}")
        return text

    @model_validator(mode="after")
    def _one_structure(self) -> Base:
        if self.criterion == "2:4" and self.structure not in ("unstructured", "2:4"):
            raise ValueError(f"criterion 2:4 and structure {self.structure} are two structures: give one of them")
        if self.criterion == "2:4" and self.density not in (None, 0.5):
            raise ValueError(f"criterion 2:4 keeps 0.5 of the entries, density says {self.density:g}")
        self.refuse_unused("calibration_rows", self.criterion == "wanda", "criterion wanda")
        self.refuse_unused("svd", self.r_res > 0, "r_res above 0")
        self.refuse_unused("residual_lr_factor", self.r_res > 0, "r_res above 0")
        return self

    @property
    def form(self) -> Structure:
        return Structure.parse("2:4" if self.criterion == "2:4" else self.structure)

    @property
    def target(self) -> float:
        if self.criterion == "magnitude" and self.density is None and self.form.share is None:
            return MAGNITUDE_BASE_DENSITY
        return super().target


class _Keys(Spec):
    """The keys of salor, by itself and in another method's `with`."""

    factors: Factors | None = Field(default_factory=lambda: Factors.model_validate({}))
    """Sparse A and B; null leaves them dense."""
    base: Base | None = None
    """The pruned base; left out, it stays whole."""

    @model_validator(mode="after")
    def _something_is_on(self) -> _Keys:
        if self.factors is None and self.base is None:
            raise ValueError("salor with neither factors nor base does nothing: give one of them, or name vanilla")
        return self

    def residual_parameters(self, target: Target) -> int:
        """Number of parameters that the residual pair of one layer trains."""
        if self.base is None or not self.base.residual_lr_factor or not target.block:
            return 0
        return self.base.r_res * (target.in_features + target.out_features)

    def problems(self, targets: Mapping[str, Target], key: str) -> list[Problem]:
        """Problems of keys that do not fit the layers; `key` is the place of these keys."""
        found = []
        if self.factors is not None and (piece := self.factors.form.width) > 1:
            for side, size in (("input of", "in_features"), ("rank of the adapter of", "rank")):
                odd = [name for name, t in targets.items() if getattr(t, size) % piece]
                if odd:
                    what = f"the {side} `{odd[0]}` is {getattr(targets[odd[0]], size)} wide: no multiple of {piece}"
                    more = f", and {len(odd) - 1} more do not fit" if len(odd) > 1 else ""
                    found.append(Problem(what + more, f"{key}.factors.structure", "unstructured, rank, or another size"))
        if self.base is None:
            return found
        pruned = {name: target for name, target in targets.items() if target.block}
        if targets and not pruned:
            what = "no layer of the transformer blocks has an adapter, and only those are pruned"
            found.append(Problem(what, f"{key}.base", "target_modules in the blocks, or no base"))
        uneven = [name for name, t in pruned.items() if t.in_features % self.base.form.width]
        if uneven:
            wide, piece = pruned[uneven[0]].in_features, self.base.form.width
            what = f"the input of `{uneven[0]}` is {wide} wide: no multiple of {piece}"
            where = "structure" if self.base.criterion != "2:4" else "criterion"
            found.append(Problem(what, f"{key}.base.{where}", "an unstructured base for this model, or exclude_modules"))
        sides = {name: (t.in_features, t.out_features) for name, t in pruned.items()}
        smallest = min(sides, key=lambda name: min(sides[name]), default="")
        if smallest and self.base.r_res > (limit := min(sides[smallest])):
            shape = " → ".join(map(str, sides[smallest]))
            what = f"r_res {self.base.r_res} is larger than a layer: `{smallest}` is {shape}"
            found.append(Problem(what, f"{key}.base.r_res", f"at most {limit}"))
        return found


class Config(_Keys, MethodConfig):
    """SALOR by itself."""

    name: Literal["salor"] = "salor"

    def misfits(self, targets: Mapping[str, Target]) -> list[Problem]:
        return [*self.problems(targets, "method"), *super().misfits(targets)]

    def parameters(self, target: Target) -> int:
        return super().parameters(target) + self.residual_parameters(target)


class Part(_Keys, MethodPart):
    """SALOR joining another method."""

    name: Literal["salor"]

    def conflicts(self, main: MethodConfig, key: str) -> list[Problem]:
        if self.factors is not None and main.dense_factors is not None:
            what = f"sparse factors can not join {main.name}: {main.dense_factors}"
            return [Problem(what, f"{key}.factors", "factors: null")]
        if self.factors is None or not main.ranks_move or self.factors.structure == "unstructured":
            return []
        why = (
            "prunes whole components already" if self.factors.structure == "rank" else "moves ranks, which tears rows of B apart"
        )
        what = f"structure {self.factors.structure} can not join {main.name}, which {why}"
        return [Problem(what, f"{key}.factors.structure", "unstructured")]

    def misfits(self, targets: Mapping[str, Target], key: str) -> list[Problem]:
        return self.problems(targets, key)

    def more_parameters(self, target: Target) -> int:
        return self.residual_parameters(target)


class Salor(Method):
    """Masks on the factors along a ramp; a pruned base with a residual pair."""

    config_class = Config
    config: Config

    def attach(self, adapters: dict[str, Adapter], model: nn.Module) -> None:
        super().attach(adapters, model)
        self.initial_ranks = {name: adapter.rank for name, adapter in adapters.items()}
        self.step = 0

    # -- the base ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prepare(self, calibration: Calibration) -> None:
        base = self.config.base
        if base is None:
            return
        pruned = {name: self.adapters[name] for name in calibration.blocks}
        norms = _input_norms(pruned, calibration, base.calibration_rows) if base.criterion == "wanda" else {}
        unseen = [name for name, norm in norms.items() if not bool(norm.any())]
        if unseen:
            log.warning("%d layers saw no token while calibrating, as `%s`: pruned by magnitude", len(unseen), unseen[0])

        def scores(name: str) -> Tensor:
            size = dense_weight(pruned[name].base).float().abs()
            score = size * norms[name] if norms and name not in unseen else size
            if not bool(score.isfinite().all()):
                raise RunError(f"`{name}` can not be pruned: its weights or its inputs are not finite", "Try precision: fp32.")
            return score

        kept: dict[str, Tensor] = {}
        if base.scope == "global":
            kept = dict(zip(pruned, masks([scores(name) for name in pruned], base.target, base.form, "global"), strict=True))
        dropped = left = 0.0
        with calibration.stage("pruning the base") as advance:
            for done, (name, adapter) in enumerate(pruned.items(), 1):
                weight = dense_weight(adapter.base)
                mask = kept[name] if kept else _layer_mask(scores(name), base, by_row=bool(norms))
                error = weight.float().masked_fill(mask, 0.0)  # [out, in]: what is dropped, W - W'
                adapter.prune_base(mask)
                dropped += float(error.square().sum())
                if base.r_res and bool(error.any()):  # a pair of zeros would never learn
                    randomised = base.svd == "randomised" or (base.svd == "auto" and min(error.shape) > EXACT_SVD_LIMIT)
                    a, b = truncated_svd(error, base.r_res, randomised, self.generator(name).initial_seed() % 2**31)
                    adapter.add_residual(a, b)
                    error -= b @ a
                left += float(error.square().sum())
                advance(done, len(pruned))
        recovered = (
            f"; the residual of rank {base.r_res} recovers {1 - left / dropped:.1%} of it" if base.r_res and dropped else ""
        )
        total = sum(float(dense_weight(a.base).float().square().sum()) for a in pruned.values()) + dropped
        log.info(
            "base pruned to density %.3g in %d layers: %.2f %% of its squared weights are dropped%s",
            self._base_densities()[0],
            len(pruned),
            100 * dropped / total,
            recovered,
        )

    # -- training ----------------------------------------------------------------------------------------------------

    def param_groups(self) -> list[ParamGroup]:
        groups = super().param_groups()
        residual = [p for adapter in self.adapters.values() for p in adapter.residual().values()]
        if residual and self.config.base is not None:
            factor = self.config.base.residual_lr_factor
            for parameter in residual:
                parameter.requires_grad_(factor > 0)
            if factor:
                # No decay: the pair stands for entries of the base, which has none.
                groups.append(ParamGroup(residual, lr_factor=factor, weight_decay=0.0))
        return groups

    def begin(self, optimizer: AdamW, total_steps: int) -> None:
        self.optimizer, self.total_steps = optimizer, total_steps
        if (factors := self.config.factors) is not None:
            self.first = step_at(factors.begin, total_steps)
            self.last = max(self.first, step_at(factors.end, total_steps))
            self.interval = step_at(factors.interval, total_steps)
            self._counted: dict[nn.Parameter, int] | None = None

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        if self.config.factors is None:
            return
        self.optimizer.mask_gradients()
        if self.config.factors.criterion == "sensitivity":
            for parameter in self._matrices():
                if parameter.grad is not None:
                    state = self.optimizer.state[parameter]
                    if state.sensitivity is None:
                        state.sensitivity = torch.zeros_like(parameter)
                    state.sensitivity.lerp_((parameter * parameter.grad).abs(), 1 - SENSITIVITY_DECAY)

    @torch.no_grad()
    def after_step(self, step: int) -> dict[str, float]:
        self.step = step
        if self.config.factors is None:
            return {}
        if self._is_due(step):
            try:
                self._prune(step)
            except ValueError as error:
                remedy = "A lower learning_rate or warmup_ratio above 0 help against divergence."
                raise RunError(
                    f"stopped after optimizer step {step}: an adapter is not finite any more: {error}", remedy
                ) from error
            self._counted = None
        return {"density": self._live_share()}

    def _is_due(self, step: int) -> bool:
        """True if the masks change after this step: along the ramp, and later only where new components are too dense."""
        factors = self.config.factors
        assert factors is not None
        on_tick = (step - self.first) % self.interval == 0
        if step <= self.last:
            return step == self.last or (factors.shape != "one-shot" and step >= self.first and on_tick)
        return (on_tick or step == self.total_steps) and self._is_too_dense()

    def _is_too_dense(self) -> bool:
        """True if components that came late have made a matrix denser than the target."""
        factors = self.config.factors
        assert factors is not None
        if factors.form.kind != "unstructured":  # no other structure can join a method that moves ranks
            return False
        live = self._live()
        sets = [[p] for p in live if p.numel()] if factors.scope == "matrix" else self._chosen_together()
        for matrices in sets:
            if sum(live[p] for p in matrices) > keep_count(factors.target, sum(p.numel() for p in matrices)):
                return True
        return False

    def _prune(self, step: int) -> None:
        """Bring the factors down to the density of this moment."""
        factors = self.config.factors
        assert factors is not None
        progress = (step - self.first) / (self.last - self.first) if self.last > self.first else 1.0
        density = ramp(progress, 1.0, factors.target, factors.shape)
        if factors.form.kind == "rank":
            self._prune_components(density)
            return
        for matrices in self._chosen_together():
            states = [self.optimizer.state[p] for p in matrices]
            gone = [
                torch.zeros_like(p, dtype=torch.bool) if s.mask is None else ~s.mask
                for p, s in zip(matrices, states, strict=True)
            ]
            # What came late has as long as the first components had before it is judged, unless the run ends.
            grace = self.first if step < self.total_steps else 0
            # One age for the whole matrix means that nothing ever arrived.
            young = None
            if any(s.age.ndim for s in states):
                young = [((s.age < grace) & (s.age.ndim > 0)).expand(p.shape) for p, s in zip(matrices, states, strict=True)]
            new = fast_masks([self._scores(p) for p in matrices], density, factors.form, factors.scope, young, gone)
            self.optimizer.mask(dict(zip(matrices, new, strict=True)))

    def _chosen_together(self) -> list[list[nn.Parameter]]:
        """Matrices whose masks are made at once: all As and all Bs, or both where every matrix has a count of its own."""
        found = [[getattr(adapter, part) for adapter in self.adapters.values() if adapter.rank] for part in PARTS]
        assert self.config.factors is not None
        if self.config.factors.scope == "matrix":
            found = [found[0] + found[1]]
        return [matrices for matrices in found if matrices]

    def _scores(self, parameter: nn.Parameter) -> Tensor:
        """Scores of the entries, which are ordered by their absolute values."""
        sensitivity = self.optimizer.state[parameter].sensitivity
        # Before the second step, B = 0 and no gradient of A: a sensitivity of zero everywhere orders nothing.
        return parameter.detach() if sensitivity is None or not bool(sensitivity.any()) else sensitivity

    def _prune_components(self, density: float) -> None:
        """Drop whole components, by |A_i| |B_i|: the matrices become smaller, and so does the work."""
        factors = self.config.factors
        assert factors is not None
        strength = {name: self._component_scores(adapter) for name, adapter in self.adapters.items()}
        if factors.scope == "global":
            parts = self._strongest_of_all(strength, density)
        else:
            parts = {name: strongest(s, keep_count(density, self.initial_ranks[name])) for name, s in strength.items()}
        for name, adapter in self.adapters.items():
            keep = parts[name].nonzero().squeeze(1)
            if len(keep) == adapter.rank:
                continue
            for part, dim in adapter.component_dims.items():
                old = getattr(adapter, part)
                self.optimizer.resize(adapter, part, dim, keep, old.narrow(dim, 0, 0))

    def _strongest_of_all(self, strength: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
        """{module: mask of its components}: the strongest of all, as long as their entries fit the density."""
        cost = {name: sum(in_out(self.adapters[name].base)) for name in strength}
        budget = keep_count(density, sum(self.initial_ranks[name] * cost[name] for name in strength))
        every = torch.cat(list(strength.values()))
        if bool(every.isnan().any()):
            raise ValueError("a score is not a number")
        order = every.sort(descending=True, stable=True).indices
        costs = torch.cat([torch.full_like(s, cost[name], dtype=torch.long) for name, s in strength.items()])
        chosen = torch.zeros_like(costs, dtype=torch.bool)
        chosen[order] = costs[order].cumsum(0) <= budget
        chosen[order[:1]] = True
        return dict(zip(strength, torch.split(chosen, [len(s) for s in strength.values()]), strict=True))

    def _component_scores(self, adapter: Adapter) -> Tensor:
        """[rank]: the size of each component's product, or the sum of its entries' sensitivities."""
        a, b = adapter.lora_A, adapter.lora_B
        of_a, of_b = self.optimizer.state[a].sensitivity, self.optimizer.state[b].sensitivity
        if of_a is not None and of_b is not None:
            return of_a.sum(1) + of_b.sum(0)
        sizes: Tensor = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=0)
        return adapter.scale * sizes

    @property
    def is_final(self) -> bool:
        return self.config.factors is None or (self.step >= self.last and not self._is_too_dense())

    # -- state and results -------------------------------------------------------------------------------------------

    def _matrices(self) -> list[nn.Parameter]:
        return [getattr(adapter, part) for adapter in self.adapters.values() for part in PARTS]

    def _live_share(self) -> float:
        """Entries that are not masked, as a share of all; of those at the start where whole components go."""
        factors = self.config.factors
        if factors is not None and factors.form.kind == "rank":
            shares = self._rank_shares()
            sizes = {name: self.initial_ranks[name] * sum(in_out(a.base)) for name, a in self.adapters.items()}
            return sum(shares[name] * size for name, size in sizes.items()) / max(1, sum(sizes.values()))
        live = self._live()
        return sum(live.values()) / max(1, sum(p.numel() for p in live))

    def _live(self) -> dict[nn.Parameter, int]:
        """{matrix: entries that are not masked}, counted again only after a change."""
        matrices = self._matrices()
        # Another method that changes ranks puts new parameters in the place of the old ones.
        if self._counted is None or any(a is not b for a, b in zip(self._counted, matrices, strict=True)):
            masks = [self.optimizer.state[p].mask for p in matrices]
            self._counted = {
                p: p.numel() if mask is None else int(mask.count_nonzero()) for p, mask in zip(matrices, masks, strict=True)
            }
        return self._counted

    def _rank_shares(self) -> dict[str, float]:
        return {name: a.rank / self.initial_ranks[name] if self.initial_ranks[name] else 0.0 for name, a in self.adapters.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]

    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.config.factors is not None and self.config.factors.form.kind == "rank":
            found["density"] = {"total": round(self._live_share(), 6), "modules": self._rank_shares()}
        if self.config.base is not None:
            total, modules = self._base_densities()
            found["base_density"] = {"total": round(total, 6), "modules": {n: round(d, 6) for n, d in modules.items()}}
        return found

    def _base_densities(self) -> tuple[float, dict[str, float]]:
        """(share of non-zeros in all pruned weights, {module: in its own})."""
        pruned = {name: dense_weight(a.base) for name, a in self.adapters.items() if a.base_mask is not None}
        live = {name: int(torch.count_nonzero(weight)) for name, weight in pruned.items()}
        total = sum(live.values()) / max(1, sum(weight.numel() for weight in pruned.values()))
        return total, {name: live[name] / weight.numel() for name, weight in pruned.items()}

    def finish(self) -> list[str]:
        if self.config.factors is None or (reached := self._live_share()) <= self.config.factors.target * 1.01:
            return []
        why = "every matrix keeps at least one piece: r is too small for it, or the matrices are"
        return [f"the factors ended at density {reached:.3g}, not {self.config.factors.target:.3g}: {why}"]


def _layer_mask(scores: Tensor, base: Base, by_row: bool) -> Tensor:
    """The mask of one layer's weight [out, in]."""
    if base.form.kind == "unstructured" and by_row:
        return strongest(scores, keep_count(base.target, scores.shape[1]))
    return masks([scores], base.target, base.form)[0]


def _input_norms(adapters: Mapping[str, Adapter], calibration: Calibration, rows: int) -> dict[str, Tensor]:
    """{module: ‖x_j‖₂ of each of its inputs [in] over the real tokens of `rows` training rows} (Wanda, eq. 1)."""
    sums = {name: torch.zeros(in_out(a.base)[0], device=a.lora_A.device) for name, a in adapters.items()}
    real: Tensor = torch.zeros(0)

    def watch(name: str) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            tokens = x[real] if x.shape[:-1] == real.shape else x.reshape(-1, x.shape[-1])
            sums[name] += tokens.float().square().sum(0)

        return add

    hooks = [adapter.register_forward_pre_hook(watch(name)) for name, adapter in adapters.items()]
    done = 0
    try:
        with calibration.stage("calibrating") as advance:
            for batch in calibration.batches(rows):
                real = batch.attention_mask.bool()
                calibration.forward(batch)
                done += len(batch.row_ids)
                advance(done, min(rows, calibration.rows))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total.sqrt() for name, total in sums.items()}


METHOD = Salor
