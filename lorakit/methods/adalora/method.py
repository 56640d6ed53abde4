"""AdaLoRA: rank allocation by importance (Zhang et al., arXiv 2303.10512).

y = W x + s · P (λ ⊙ (Q x)), with Q [rank, in] as lora_A, P [out, rank] as lora_B and λ [rank] as
gate: a triplet (P_i, λ_i, Q_i) stands for a singular value and its two vectors. λ starts at zero; Q
starts as A does in every method, P random and as large. The loss gets γ (‖PᵀP − I‖² + ‖QQᵀ − I‖²)
for every adapter (eq. 4), and triplets are ranked by a smoothed sensitivity of their entries (eqs.
7 to 11). Between `begin` and `end` a budget falls (eq. 12), and λ of the triplets that it has no
room for is set to zero; they may come back. At `end` those without room leave for good.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

from lorakit.adapters.base import in_out
from lorakit.adapters.gated import GatedAdapter
from lorakit.adapters.layer import Adapter
from lorakit.adapters.optimizer import AdamW
from lorakit.compat import foreach
from lorakit.methods._base import Method, RankState
from lorakit.methods.adalora.config import Config
from lorakit.numerics.lowrank import balanced_product
from lorakit.numerics.schedule import ramp, step_at
from lorakit.numerics.sparsity import strongest

# The paper starts with so many times the budget that it ends with (section 3.3).
FIRST_BUDGET = 1.5


class TripletAdapter(GatedAdapter):
    """The update P diag(λ) Q: λ starts at zero, P and Q do not."""

    first_gate = 0.0

    def __init__(
        self, base: nn.Module, rank: int, scale: float, dropout: float, generator: Generator
    ) -> None:
        super().__init__(base, rank, scale, dropout, generator)
        with torch.no_grad():
            self.lora_B.copy_(self._columns(rank, generator))

    def new_components(self, count: int, generator: Generator) -> dict[str, Tensor]:
        new = super().new_components(count, generator)
        return new | {"lora_B": self._columns(count, generator)}

    @torch.no_grad()
    def start_from(self, a: Tensor, b: Tensor) -> None:
        """The singular value decomposition of B A: P and Q orthonormal. Other triplets keep theirs,
        with λ = 0."""
        self._frozen = None
        right, left = balanced_product(a, b)  # √σ on each side
        values = torch.linalg.vector_norm(right, dim=1) * torch.linalg.vector_norm(left, dim=0)
        self.gate.zero_()
        for i in values.nonzero().flatten().tolist():
            self.gate[i] = values[i]
            self.lora_A[i] = (right[i] / right[i].norm()).to(self.lora_A)
            self.lora_B[:, i] = (left[:, i] / left[:, i].norm()).to(self.lora_B)

    def _columns(self, count: int, generator: Generator) -> Tensor:
        """Columns of P [out, count], Gaussian, with a squared length of 1/3, as rows of A have."""
        out = in_out(self.base)[1]
        return torch.randn(out, count, generator=generator).div_((3 * out) ** 0.5)


class AdaLoRA(Method):
    """The penalty, the importance of every triplet, and the budget."""

    config: Config

    def make_adapter(self, name: str, linear: nn.Module, rank: int) -> Adapter:
        dropout = self.config.lora_dropout
        return TripletAdapter(linear, rank, self.scale(name, rank), dropout, self.generator(name))

    def attach(self, adapters: dict[str, Adapter], model: nn.Module) -> None:
        super().attach(adapters, model)
        self.initial_total = sum(adapter.rank for adapter in adapters.values())
        # Triplets with room in the budget, while those without are still held; None before and
        # after.
        self.allocated: dict[str, int] | None = None
        self.arrived = False

    @property
    def triplets(self) -> dict[str, TripletAdapter]:
        return {name: a for name, a in self.adapters.items() if isinstance(a, TripletAdapter)}

    def begin(self, optimizer: AdamW, total_steps: int) -> None:
        self.optimizer = optimizer
        self.first = step_at(self.config.begin, total_steps)
        self.last = max(self.first, step_at(self.config.end, total_steps))
        self.interval = step_at(self.config.interval, total_steps)

    def budget(self, step: int) -> int:
        """Total rank that there is room for after this step (eq. 12)."""
        wanted = self.config.target_r
        end = round(
            self.initial_total / FIRST_BUDGET if wanted is None else wanted * len(self.adapters)
        )
        progress = (step - self.first) / (self.last - self.first) if self.last > self.first else 1.0
        return int(ramp(progress, self.initial_total, end, "cubic"))

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        self.penalty = self._penalise()
        if not self.arrived:
            self._observe()

    def _penalise(self) -> float:
        """Adds the gradient of γ Σ (‖PᵀP − I‖² + ‖QQᵀ − I‖²) to those of P and Q; returns the
        sum."""
        weight, squares = 4 * self.config.orth_reg_weight, []
        for adapter in self.adapters.values():
            q, p = adapter.lora_A, adapter.lora_B
            if p.grad is None or q.grad is None or not adapter.rank:
                continue
            of_q, of_p = q @ q.T, p.T @ p
            for gram in (of_q, of_p):
                gram.diagonal().sub_(1.0)
            q.grad.add_(of_q @ q, alpha=weight)
            p.grad.add_(p @ of_p, alpha=weight)
            squares.append(of_q.square().sum() + of_p.square().sum())
        return float(torch.stack(squares).sum()) if squares else 0.0

    def _observe(self) -> None:
        """Sensitivity and uncertainty of every entry after these gradients (eqs. 8, 9 and 10)."""
        found = [p for a in self.adapters.values() for p in a.components().values() if p.numel()]
        parameters = [p for p in found if p.grad is not None]
        if not parameters:
            return
        states = [self.optimizer.state[p] for p in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if state.sensitivity is None or state.uncertainty is None:
                state.sensitivity = torch.zeros_like(parameter)
                state.uncertainty = torch.zeros_like(parameter)
        sensitivities = [state.sensitivity for state in states]
        now = foreach.mul(parameters, [p.grad for p in parameters])
        foreach.abs_(now)
        foreach.lerp_(sensitivities, now, 1 - self.config.beta1)
        foreach.sub_(now, sensitivities)
        foreach.abs_(now)
        foreach.lerp_([state.uncertainty for state in states], now, 1 - self.config.beta2)

    def importance(self, adapter: TripletAdapter) -> Tensor:
        """Importance [rank] of the triplets (eq. 7): that of λ_i, and the means of P_i's and
        Q_i's."""
        value, left = self._entries(adapter.gate), self._entries(adapter.lora_B)
        return value + left.mean(0) + self._entries(adapter.lora_A).mean(1)

    def _entries(self, parameter: nn.Parameter) -> Tensor:
        """Importance of every entry (eq. 11); zero for what never had a gradient."""
        state = self.optimizer.state[parameter]
        if state.sensitivity is None or state.uncertainty is None:
            return torch.zeros_like(parameter)
        return state.sensitivity * state.uncertainty

    @torch.no_grad()
    def after_step(self, step: int) -> dict[str, float]:
        if not self.arrived and step >= self.last:
            self._drop(self._with_room(step))
        elif self.first < step < self.last and step % self.interval == 0:
            live = self._with_room(step)
            for name, adapter in self.triplets.items():
                adapter.gate.masked_fill_(~live[name], 0.0)
            self.allocated = {name: int(kept.count_nonzero()) for name, kept in live.items()}
        state = self.rank_state()
        return {"rank_total": state.cost, "orthogonality": self.penalty}

    def _with_room(self, step: int) -> dict[str, Tensor]:
        """{module: mask [rank] of the triplets that the budget of this step has room for}."""
        scores = {name: self.importance(adapter) for name, adapter in self.triplets.items()}
        chosen = strongest(torch.cat(list(scores.values())), self.budget(step))
        parts = torch.split(chosen, [len(score) for score in scores.values()])
        return dict(zip(scores, parts, strict=True))

    def _drop(self, live: Mapping[str, Tensor]) -> None:
        """Take the triplets without room away: the matrices become smaller, and so does the
        work."""
        for name, adapter in self.triplets.items():
            keep = live[name].nonzero().squeeze(1)
            if len(keep) < adapter.rank:
                for part, dim in adapter.component_dims.items():
                    nothing = getattr(adapter, part).narrow(dim, 0, 0)
                    self.optimizer.resize(adapter, part, dim, keep, nothing)
            for parameter in adapter.components().values():
                state = self.optimizer.state[parameter]
                state.sensitivity = state.uncertainty = None
        self.allocated, self.arrived = None, True

    @property
    def is_final(self) -> bool:
        return self.arrived

    def rank_state(self) -> RankState:
        if self.allocated is None:
            return super().rank_state()
        total = sum(self.allocated.values())
        return RankState(self.allocated, total, 0, total)

    def state_dict(self) -> dict[str, Any]:
        return {"allocated": self.allocated, "arrived": self.arrived}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.allocated, self.arrived = state["allocated"], state["arrived"]


METHOD = AdaLoRA
