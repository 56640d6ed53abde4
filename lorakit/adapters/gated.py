"""Adapter with a gate for each component: y = W x + bias + s · B (c ⊙ (A x))."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from lorakit.adapters.layer import Adapter
from lorakit.kernels.lora_linear import LoraFactors


class GatedAdapter(Adapter):
    """y = W x + bias + s · B (c ⊙ (A x)) with gates c [rank], which start at `first_gate`."""

    component_dims = Adapter.component_dims | {"gate": 0}
    first_gate = 1.0

    def __init__(
        self, base: nn.Module, rank: int, scale: float, dropout: float, generator: Generator
    ) -> None:
        super().__init__(base, rank, scale, dropout, generator)
        self.gate = nn.Parameter(torch.full((rank,), self.first_gate, device=self.lora_A.device))

    def new_components(self, count: int, generator: Generator) -> dict[str, Tensor]:
        gate = torch.full((count,), self.first_gate)
        return super().new_components(count, generator) | {"gate": gate}

    def factors(self) -> tuple[Tensor, Tensor]:
        # diag(c) A gives the same as gating A x, with rank · in multiplications instead of rank ·
        # tokens.
        return self.gate[:, None] * self.lora_A, self.lora_B

    def trained(self) -> LoraFactors:
        if self.base.rank:
            return super().trained()
        return LoraFactors(self.lora_A, self.lora_B, self.scale, self.gate)
