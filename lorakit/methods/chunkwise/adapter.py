"""The adapter of chunkwise: components of every token by the plan of the pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import dropout, linear

from lorakit.adapters.layer import Adapter
from lorakit.errors import RunError
from lorakit.kernels.packing import current as current_packing
from lorakit.kernels.tiered_linear import TierPlan, tiered_linear


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
        weight, ends = self.base.operand, self.tier_ends()
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
