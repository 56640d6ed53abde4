"""L1RA: L1-regularised rank assignment under a fixed budget (Singh et al., arXiv 2509.04884).

y = W x + s · B (c ⊙ (A x)). The gates c start at 1; an L1 penalty closes those that the loss does
not hold open. At every rank update closed components go into a pool, and the pool is handed to the
adapters that use all of theirs. Budget, cost by parameters and the pool that is never lost are
ours; section 3 of the paper has the rest.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.base import in_out
from lorakit.adapters.gated import GatedAdapter
from lorakit.adapters.layer import Adapter, adapter_parameters
from lorakit.adapters.optimizer import AdamW, ParamGroup
from lorakit.compat import foreach
from lorakit.methods._base import Method, RankState
from lorakit.methods._config import MethodConfig
from lorakit.methods.l1ra.config import Config
from lorakit.numerics.budget import plan_ranks
from lorakit.numerics.schedule import ramp, step_at

log = logging.getLogger("lorakit")


class L1RA(Method):
    """Gates, the L1 step, and rank updates under the budget."""

    config: Config

    def __init__(self, config: MethodConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        self.newcomers = self.generator("new components")

    def make_adapter(self, name: str, linear: nn.Module, rank: int) -> Adapter:
        dropout = self.config.lora_dropout
        return GatedAdapter(linear, rank, self.scale(name, rank), dropout, self.generator(name))

    def attach(self, adapters: dict[str, Adapter], model: nn.Module) -> None:
        super().attach(adapters, model)
        by_params = self.config.budget.unit == "params"
        self.unit_costs = {
            name: sum(in_out(a.base)) if by_params else 1 for name, a in adapters.items()
        }
        self.initial_cost = self._cost()
        self.budget = round(self.config.budget.start * self.initial_cost)
        self.moved = False

    @property
    def gates(self) -> dict[str, nn.Parameter]:
        return {name: a.gate for name, a in self.adapters.items() if isinstance(a, GatedAdapter)}

    def param_groups(self) -> list[ParamGroup]:
        gates = list(self.gates.values())
        factors = [
            p
            for p in adapter_parameters(list(self.adapters.values()))
            if all(p is not g for g in gates)
        ]
        return [
            ParamGroup(factors),
            ParamGroup(gates, lr=self.config.eta_c, weight_decay=0.0, clipped=False),
        ]

    def begin(self, optimizer: AdamW, total_steps: int) -> None:
        self.optimizer = optimizer
        self.total_steps = total_steps
        self.interval = step_at(self.config.rank_update_ratio, total_steps)
        strength = self.config.l1_strength(total_steps)
        self.shrinkage = self.config.eta_c * strength
        self.strength = strength
        if strength >= 1:
            # Adam moves a gate by eta_c a step at the most, the penalty by eta_c · lambda: all
            # gates close alike.
            log.warning(
                "lambda is %.2g: in %d steps no gradient can hold a gate open; %s",
                strength,
                total_steps,
                self._remedy(),
            )

    def _remedy(self) -> str:
        """Remedy for a penalty that is stronger than any gradient; the same before the first step
        and after the last."""
        if self.config.l1ra_lambda is not None:
            return "lower l1ra_lambda below 1"
        return f"raise eta_c above {self.shrinkage:.2g}, or train for more steps"

    @torch.no_grad()
    def after_step(self, step: int) -> dict[str, float]:
        gates: list[Tensor] = [gate for gate in self.gates.values() if gate.numel()]
        if gates:
            if self.config.l1_step == "proximal":
                foreach.sub_(gates, self.shrinkage)
                foreach.clamp_min_(gates, 0.0)
            else:
                foreach.sub_(gates, [self.shrinkage * gate.sign() for gate in gates])
            foreach.clamp_max_(gates, 1.0)
        if step % self.interval == 0:
            self._update_ranks(step)
        state = self.rank_state()
        return {"rank_total": sum(state.ranks.values()), "pool": state.pool, "budget": state.budget}

    def _update_ranks(self, step: int) -> None:
        """Prune, meet the budget of this moment, hand out the pool (paper, section 3.2)."""
        budget = self.config.budget
        # The budget arrives one interval before the end, so that what is left can still adapt to
        # the last cut.
        arrival = max(1, self.total_steps // self.interval - 1) * self.interval
        wanted = round(
            ramp(step / arrival, budget.start, budget.end, budget.shape) * self.initial_cost
        )
        # Never back: an extended run is less far on its ramp than it was.
        nearer = max if budget.end > budget.start else min
        self.budget = nearer(self.budget, wanted)
        plan = plan_ranks(
            {name: gate.abs().tolist() for name, gate in self.gates.items()},
            self.unit_costs,
            {name: adapter.max_rank for name, adapter in self.adapters.items()},
            self.budget,
            prune_threshold=self.config.prune_threshold,
            # Components that arrive in the last interval would end untrained and falsify the rank
            # table.
            reassign=self.config.reassign and step + self.interval < self.total_steps,
            exclude_pruned=self.config.exclude_pruned,
        )
        self.moved |= plan.changes({name: adapter.rank for name, adapter in self.adapters.items()})
        for name, adapter in self.adapters.items():
            keep, count = torch.tensor(plan.keep[name], dtype=torch.long), plan.add.get(name, 0)
            if len(keep) == adapter.rank and not count:
                continue
            new = adapter.new_components(count, self.newcomers)
            for part, dim in adapter.component_dims.items():
                self.optimizer.resize(adapter, part, dim, keep, new[part])

    def finish(self) -> list[str]:
        if self.moved:
            return []
        never = "no rank ever moved: no gate fell below prune_threshold."
        if self.strength >= 1:
            # A larger penalty would close all gates at once, not those that the loss does not need.
            return [
                f"{never} No gradient could hold a gate open, so all closed alike:"
                f" {self._remedy()}."
            ]
        if self.config.l1ra_lambda is not None:
            return [f"{never} A larger l1ra_lambda, below 1, prunes more; so does a larger eta_c."]
        most = self.config.eta_c * self.total_steps
        return [
            f"{never} A larger l1_share prunes more, up to {most:.2g} in {self.total_steps} steps;"
            " beyond it raise eta_c too."
        ]

    def _cost(self) -> int:
        return sum(adapter.rank * self.unit_costs[name] for name, adapter in self.adapters.items())

    def rank_state(self) -> RankState:
        cost = self._cost()
        return RankState(
            {name: a.rank for name, a in self.adapters.items()},
            cost,
            self.budget - cost,
            self.budget,
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "budget": self.budget,
            "initial_cost": self.initial_cost,
            "moved": self.moved,
            "newcomers": bytes(self.newcomers.get_state().tolist()).hex(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.budget, self.initial_cost, self.moved = (
            state["budget"],
            state["initial_cost"],
            state["moved"],
        )
        self.newcomers.set_state(
            torch.tensor(list(bytes.fromhex(state["newcomers"])), dtype=torch.uint8)
        )

    def summary(self) -> dict[str, Any]:
        gates = {
            name: [round(value, 6) for value in gate.tolist()] for name, gate in self.gates.items()
        }
        return {
            "budget": self.budget,
            "budget_unit": self.config.budget.unit,
            "pool": self.budget - self._cost(),
            "gates": gates,
        }


METHOD = L1RA
