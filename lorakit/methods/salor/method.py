"""SALOR: sparsity-aware low-rank representation (arXiv 2601.16991).

y = W' x + s · (B⊙M_B)((A⊙M_A) x) + B_r (A_r x). Two parts, either of which may be off:

`factors`, in this file: most entries of A and B become exactly zero along a ramp while training
(Zhu and Gupta, arXiv 1710.01878). `base`, in `prune.py`: entries of the frozen W are dropped before
training, W' = W⊙M, and a truncated SVD of what was dropped makes up for the loss (the paper,
section 3: of the ways to mask, masking W alone has the least error bound).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.base import in_out
from lorakit.adapters.layer import Adapter
from lorakit.adapters.optimizer import AdamW, ParamGroup
from lorakit.errors import RunError
from lorakit.kernels.masks import fast_masks
from lorakit.methods._base import Calibration, Method
from lorakit.methods.salor.config import Config
from lorakit.methods.salor.prune import base_densities, prune_bases
from lorakit.numerics.schedule import ramp, step_at
from lorakit.numerics.sparsity import keep_count, strongest

PARTS = ("lora_A", "lora_B")
# Decay of the running sensitivity (AdaLoRA's beta_1, arXiv 2303.10512, section 3.2).
SENSITIVITY_DECAY = 0.85


class Salor(Method):
    """Masks on the factors along a ramp; a pruned base with a residual pair."""

    config: Config

    def attach(self, adapters: dict[str, Adapter], model: nn.Module) -> None:
        super().attach(adapters, model)
        self.initial_ranks = {name: adapter.rank for name, adapter in adapters.items()}
        self.arrived = False  # the ramp has ended

    def prepare(self, calibration: Calibration) -> None:
        if self.config.base is not None:
            pruned = {name: self.adapters[name] for name in calibration.blocks}
            prune_bases(pruned, self.config.base, calibration, self._svd_seed)

    def _svd_seed(self, name: str) -> int:
        return self.generator(name).initial_seed() % 2**31

    # -- training ----------------------------------------------------------------------------------

    def param_groups(self) -> list[ParamGroup]:
        groups = super().param_groups()
        bases = [adapter.base for adapter in self.adapters.values()]
        residual = [p for base in bases for p in base.components().values()]
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
                    state.sensitivity.lerp_(
                        (parameter * parameter.grad).abs(), 1 - SENSITIVITY_DECAY
                    )

    @torch.no_grad()
    def after_step(self, step: int) -> dict[str, float]:
        if self.config.factors is None:
            return {}
        due = self._is_due(step)
        self.arrived |= step >= self.last
        if due:
            try:
                self._prune(step)
            except ValueError as error:
                remedy = "A lower learning_rate or a longer warm-up help against divergence."
                raise RunError(
                    f"stopped after optimizer step {step}: an adapter is not finite any more:"
                    f" {error}",
                    remedy,
                ) from error
            self._counted = None
        return {"density": self._live_share()}

    def _is_due(self, step: int) -> bool:
        """True if the masks change after this step: along the ramp, and later only where new
        components are too dense."""
        factors = self.config.factors
        assert factors is not None
        on_tick = (step - self.first) % self.interval == 0
        if step <= self.last and not self.arrived:
            return step == self.last or (
                factors.shape != "one-shot" and step >= self.first and on_tick
            )
        return (on_tick or step == self.total_steps) and self._is_too_dense()

    def _is_too_dense(self) -> bool:
        """True if components that came late have made a matrix denser than the target."""
        factors = self.config.factors
        assert factors is not None
        # no other structure can join a method that moves ranks
        if factors.form.kind != "unstructured":
            return False
        live = self._live()
        sets = (
            [[p] for p in live if p.numel()]
            if factors.scope == "matrix"
            else self._chosen_together()
        )
        for matrices in sets:
            if sum(live[p] for p in matrices) > keep_count(
                factors.target, sum(p.numel() for p in matrices)
            ):
                return True
        return False

    def _prune(self, step: int) -> None:
        """Bring the factors down to the density of this moment."""
        factors = self.config.factors
        assert factors is not None
        length = self.last - self.first
        progress = 1.0 if self.arrived or not length else (step - self.first) / length
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
            # What came late has as long as the first components had before it is judged, unless the
            # run ends.
            grace = self.first if step < self.total_steps else 0
            # One age for the whole matrix means that nothing ever arrived.
            young = None
            if any(s.age.ndim for s in states):
                young = [
                    ((s.age < grace) & (s.age.ndim > 0)).expand(p.shape)
                    for p, s in zip(matrices, states, strict=True)
                ]
            new = fast_masks(
                [self._scores(p) for p in matrices],
                density,
                factors.form,
                factors.scope,
                young,
                gone,
            )
            self.optimizer.mask(dict(zip(matrices, new, strict=True)))

    def _chosen_together(self) -> list[list[nn.Parameter]]:
        """Matrices whose masks are made at once: all As and all Bs, or both where every matrix has
        a count of its own."""
        found = [
            [getattr(adapter, part) for adapter in self.adapters.values() if adapter.rank]
            for part in PARTS
        ]
        assert self.config.factors is not None
        if self.config.factors.scope == "matrix":
            found = [found[0] + found[1]]
        return [matrices for matrices in found if matrices]

    def _scores(self, parameter: nn.Parameter) -> Tensor:
        """Scores of the entries, which are ordered by their absolute values."""
        sensitivity = self.optimizer.state[parameter].sensitivity
        # Before the second step, B = 0 and no gradient of A: a sensitivity of zero everywhere
        # orders nothing.
        return (
            parameter.detach()
            if sensitivity is None or not bool(sensitivity.any())
            else sensitivity
        )

    def _prune_components(self, density: float) -> None:
        """Drop whole components, by |A_i| |B_i|: the matrices become smaller, and so does the
        work."""
        factors = self.config.factors
        assert factors is not None
        strength = {
            name: self._component_scores(adapter) for name, adapter in self.adapters.items()
        }
        if factors.scope == "global":
            parts = self._strongest_of_all(strength, density)
        else:
            parts = {
                name: strongest(s, keep_count(density, self.initial_ranks[name]))
                for name, s in strength.items()
            }
        for name, adapter in self.adapters.items():
            keep = parts[name].nonzero().squeeze(1)
            if len(keep) == adapter.rank:
                continue
            for part, dim in adapter.component_dims.items():
                old = getattr(adapter, part)
                self.optimizer.resize(adapter, part, dim, keep, old.narrow(dim, 0, 0))

    def _strongest_of_all(
        self, strength: Mapping[str, Tensor], density: float
    ) -> dict[str, Tensor]:
        """{module: mask of its components}: the strongest of all, as long as their entries fit the
        density."""
        cost = {name: sum(in_out(self.adapters[name].base)) for name in strength}
        budget = keep_count(
            density, sum(self.initial_ranks[name] * cost[name] for name in strength)
        )
        every = torch.cat(list(strength.values()))
        if bool(every.isnan().any()):
            raise ValueError("a score is not a number")
        order = every.sort(descending=True, stable=True).indices
        costs = torch.cat(
            [torch.full_like(s, cost[name], dtype=torch.long) for name, s in strength.items()]
        )
        chosen = torch.zeros_like(costs, dtype=torch.bool)
        chosen[order] = costs[order].cumsum(0) <= budget
        chosen[order[:1]] = True
        return dict(
            zip(strength, torch.split(chosen, [len(s) for s in strength.values()]), strict=True)
        )

    def _component_scores(self, adapter: Adapter) -> Tensor:
        """[rank]: the size of each component's product, or the sum of its entries'
        sensitivities."""
        a, b = adapter.lora_A, adapter.lora_B
        of_a, of_b = self.optimizer.state[a].sensitivity, self.optimizer.state[b].sensitivity
        if of_a is not None and of_b is not None:
            return of_a.sum(1) + of_b.sum(0)
        sizes: Tensor = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=0)
        return adapter.scale * sizes

    @property
    def is_final(self) -> bool:
        return self.config.factors is None or (self.arrived and not self._is_too_dense())

    # -- state and results -------------------------------------------------------------------------

    def _matrices(self) -> list[nn.Parameter]:
        return [getattr(adapter, part) for adapter in self.adapters.values() for part in PARTS]

    def _live_share(self) -> float:
        """Entries that are not masked, as a share of all; of those at the start where whole
        components go."""
        factors = self.config.factors
        if factors is not None and factors.form.kind == "rank":
            shares = self._rank_shares()
            sizes = {
                name: self.initial_ranks[name] * sum(in_out(a.base))
                for name, a in self.adapters.items()
            }
            return sum(shares[name] * size for name, size in sizes.items()) / max(
                1, sum(sizes.values())
            )
        live = self._live()
        return sum(live.values()) / max(1, sum(p.numel() for p in live))

    def _live(self) -> dict[nn.Parameter, int]:
        """{matrix: entries that are not masked}, counted again only after a change."""
        matrices = self._matrices()
        # Another method that changes ranks puts new parameters in the place of the old ones.
        if self._counted is None or any(
            a is not b for a, b in zip(self._counted, matrices, strict=True)
        ):
            masks = [self.optimizer.state[p].mask for p in matrices]
            self._counted = {
                p: p.numel() if mask is None else int(mask.count_nonzero())
                for p, mask in zip(matrices, masks, strict=True)
            }
        return self._counted

    def _rank_shares(self) -> dict[str, float]:
        return {
            name: a.rank / self.initial_ranks[name] if self.initial_ranks[name] else 0.0
            for name, a in self.adapters.items()
        }

    def state_dict(self) -> dict[str, Any]:
        return {"arrived": self.arrived}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.arrived = state["arrived"]

    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.config.factors is not None and self.config.factors.form.kind == "rank":
            found["density"] = {
                "total": round(self._live_share(), 6),
                "modules": self._rank_shares(),
            }
        if self.config.base is not None:
            total, modules = base_densities(self.adapters)
            found["base_density"] = {
                "total": round(total, 6),
                "modules": {n: round(d, 6) for n, d in modules.items()},
            }
        return found

    def finish(self) -> list[str]:
        if (
            self.config.factors is None
            or (reached := self._live_share()) <= self.config.factors.target * 1.01
        ):
            return []
        why = "every matrix keeps at least one piece: r is too small for it, or the matrices are"
        return [
            f"the factors ended at density {reached:.3g}, not {self.config.factors.target:.3g}:"
            f" {why}"
        ]


METHOD = Salor
