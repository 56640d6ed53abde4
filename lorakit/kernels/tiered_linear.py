"""LoRA linear layer with a rank for each token: the components of a layer are divided into blocks,
and a token uses only the first blocks.

The low-rank product is computed for all tokens up to the highest block that any of them needs, and
masked between A and B. Gathering the tokens of each block, to avoid useless products, was tried and
is slower. Measured on two cores in bf16, with 512 and 2 048 tokens, layers of 576 to 4 096, ranks
16 to 256, half of the tokens at each tier: 1.1 to 2.8 times the time of the masked product for A
alone, 2 to 5 times for A and B (the low-rank products are bound by memory bandwidth, and gathering
moves more memory).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorakit.kernels.lora_linear import lora_linear
from lorakit.kernels.packing import Packing
from lorakit.kernels.stored import Weight, linear


@dataclass(frozen=True, eq=False)
class TierPlan:
    """Assignment of blocks of components to the tokens of one forward pass.

    weights [tokens, blocks] in [0, 1], float32, the tokens of a batch row by row: the factors of
    each block's components. top: the largest number of blocks that a token needs; uniform: every
    token has weight 1 in the first `top` blocks.
    """

    weights: Tensor
    top: int
    uniform: bool
    _masks: dict[tuple[tuple[int, ...], torch.dtype], Tensor] = field(
        default_factory=dict, repr=False
    )
    _packed: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, weights: Tensor) -> TierPlan:
        """Make the plan of weights [tokens, blocks], which must not grow from one block to the
        next."""
        used = (weights > 0).any(0)
        top = int(used.sum())
        return cls(weights, top, bool((weights[:, :top] == 1).all()))

    @classmethod
    def uniform_at(
        cls, tier: int, blocks: int, tokens: int, device: torch.device | str = "cpu"
    ) -> TierPlan:
        """Make the plan in which every token is at the same tier and uses the first `tier`
        blocks."""
        row = (torch.arange(blocks, device=device) < tier).float()
        return cls(row.expand(tokens, blocks), tier, True)

    def of_packed(self, packing: Packing) -> TierPlan:
        """Convert this plan of a padded batch to its packed tokens; the result is cached for the
        next layer."""
        if self._packed.get("packing") is not packing:
            weights = self.weights.index_select(0, packing.padded_place)
            self._packed.update(packing=packing, plan=TierPlan(weights, self.top, self.uniform))
        plan: TierPlan = self._packed["plan"]
        return plan

    def mask(self, ends: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The weight of each component [tokens, ends[top]] of a layer whose blocks end at `ends`;
        cached for the next layer with the same blocks. Components before ends[0] always act."""
        key = (tuple(ends[: self.top + 1]), dtype)
        if key not in self._masks:
            sizes = torch.tensor(
                [end - start for start, end in zip(key[0], key[0][1:], strict=False)],
                device=self.weights.device,
            )
            mask = self.weights[:, : self.top].repeat_interleave(sizes, 1)
            always = mask.new_ones(len(mask), ends[0])
            self._masks[key] = torch.cat([always, mask], 1).to(dtype)
        return self._masks[key]


def tiered_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    ends: Sequence[int],
    plan: TierPlan,
) -> Tensor:
    """Compute W x + bias + scale · B (m ⊙ (A x)), where m is the plan's mask of each token; see
    `lora_linear`.

    x [..., in], with the plan's tokens; a [rank, in]; b [out, rank]; ends: the number of components
    up to the end of each tier, from tier 0 (those that always act) to the top one. Differentiable
    in x, a and b.
    """
    count = ends[plan.top]
    if count == 0:
        return linear(x, weight, bias)
    mask = None if plan.uniform else plan.mask(ends, x.dtype)
    return lora_linear(x, weight, bias, a[:count], b[:, :count], scale, mask)
