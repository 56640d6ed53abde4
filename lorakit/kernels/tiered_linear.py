"""The LoRA linear layer with a rank for every token: the components of a layer are cut into blocks,
and a token uses the first blocks only.

The low-rank product is computed for all tokens up to the highest block that any of them needs, and
masked between its two halves. Gathering the tokens of each block so that none is multiplied in vain
was tried and is slower: measured on two cores in bf16, 512 and 2 048 tokens, layers of 576 to 4
096, ranks 16 to 256, half of the tokens at each tier: 1.1 to 2.8 times the masked product for the
down half alone, 2 to 5 times for both halves (the low-rank products are bound by memory, and
gathering moves more of it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lorakit.kernels.lora_linear import lora_linear
from lorakit.kernels.packing import Packing


@dataclass(frozen=True, eq=False)
class TierPlan:
    """Which blocks of components act on which tokens of one forward pass.

    weights [tokens, blocks] in [0, 1], float32, the tokens of a batch row after row: what a block's
    components are multiplied with. top: how many blocks any token needs; uniform: every token has
    weight 1 in the first `top` blocks.
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
        """The plan of weights [tokens, blocks], which do not grow from one block to the next."""
        used = (weights > 0).any(0)
        top = int(used.sum())
        return cls(weights, top, bool((weights[:, :top] == 1).all()))

    @classmethod
    def uniform_at(
        cls, tier: int, blocks: int, tokens: int, device: torch.device | str = "cpu"
    ) -> TierPlan:
        """Every token at the same tier: its first `tier` blocks."""
        row = (torch.arange(blocks, device=device) < tier).float()
        return cls(row.expand(tokens, blocks), tier, True)

    def of_packed(self, packing: Packing) -> TierPlan:
        """The plan of the packed tokens of a padded batch, whose plan this is; kept for the next
        layer."""
        if self._packed.get("packing") is not packing:
            weights = self.weights.index_select(0, packing.padded_place)
            self._packed.update(packing=packing, plan=TierPlan(weights, self.top, self.uniform))
        plan: TierPlan = self._packed["plan"]
        return plan

    def mask(self, ends: Sequence[int], dtype: torch.dtype) -> Tensor:
        """[tokens, ends[top]]: the weight of each component of a layer whose blocks end at `ends`;
        kept for the next layer with the same blocks. Components before ends[0] always act."""
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
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    ends: Sequence[int],
    plan: TierPlan,
) -> Tensor:
    """W x + bias + scale · B (m ⊙ (A x)), m from the plan: as `lora_linear`, with a mask for each
    token.

    x [..., in], whose tokens are the plan's; a [rank, in]; b [out, rank]; ends: after how many
    components each tier ends, from tier 0 (those that always act) to the top one. Differentiable in
    x, a and b.
    """
    count = ends[plan.top]
    if count == 0:
        return linear(x, weight, bias)
    mask = None if plan.uniform else plan.mask(ends, x.dtype)
    return lora_linear(x, weight, bias, a[:count], b[:, :count], scale, mask)
