"""The adapter layer: a frozen linear layer plus a low-rank update, with forward, delta and merge
written once.

A method changes the factors (for example with gates) by overriding `factors` in a subclass.
Everything computed from the factors is here, so forward, `delta` and `merge` can not drift apart.
`lorakit.adapters.base` has the forms of the frozen weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import dropout, linear

from lorakit import compat
from lorakit.adapters.base import (
    TENSOR_NAMES,
    PlainBase,
    base_of,
    in_out,
    load_base,
    size_along,
)
from lorakit.adapters.shared_input import SharedInput
from lorakit.kernels.inference import FrozenLayer, freeze
from lorakit.kernels.lora_linear import LoraFactors, lora_linears


def initial_rows(rank: int, in_features: int, generator: Generator) -> Tensor:
    """Draw the initial rows of A [rank, in] as PEFT does: Kaiming uniform with a = √5, U(−1/√in,
    1/√in)."""
    rows = torch.empty(rank, in_features).uniform_(-1.0, 1.0, generator=generator)
    return rows.mul_(1.0 / math.sqrt(in_features))


compat.check_apply()  # before the class overrides `_apply`


class Adapter(nn.Module):
    """y = W x + bias + s · B (A x), W frozen (LoRA, arXiv 2106.09685).

    lora_A [rank, in] starts Kaiming uniform and lora_B [out, rank] zero, both float32, so B·A is
    zero at first. `scale` is s, which stays when the rank changes. A rank of 0 is legal.

    `component_dims` is {parameter: its dimension that counts components}, for all parameters that
    are resized with the rank.

    `base` is the frozen layer, in one of the variants of `lorakit.adapters.base`. If it has a pair
    in addition to W (B_r A_r of a pruned base, without scale), that pair and the factors are
    applied as one (`effective`).

    `shared`: the layers that are computed together with this one because they read the same input
    (lorakit.cpu.speed_up).
    """

    component_dims: ClassVar[dict[str, int]] = {"lora_A": 0, "lora_B": 1}

    def __init__(
        self, base: nn.Module, rank: int, scale: float, dropout: float, generator: Generator
    ) -> None:
        super().__init__()
        in_features, out_features = in_out(base)
        self.base: PlainBase = base_of(base)
        device = self.base.operand.device
        self.lora_A = nn.Parameter(initial_rows(rank, in_features, generator).to(device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=device))
        self.scale = scale
        self.dropout = dropout
        self.shared: SharedInput | None = None
        self._frozen: FrozenLayer | None = None

    @property
    def frozen(self) -> FrozenLayer | None:
        """The layer and its adapter as one, if `freeze` was called; else None."""
        return self._frozen

    @property
    def weight(self) -> Tensor:
        """The frozen layer's stored weight, which some models inspect (T5 checks its type)."""
        weight: Tensor = self.base.layer.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen layer's bias."""
        return self.base.bias

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def max_rank(self) -> int:
        """The largest useful rank, min(in, out)."""
        return min(in_out(self.base))

    def components(self) -> dict[str, nn.Parameter]:
        """{name: parameter} of the factors."""
        return {name: getattr(self, name) for name in self.component_dims}

    def parts(self) -> dict[str, nn.Parameter]:
        """{name: parameter} of all that may be trained here: the factors, and what the base
        trains."""
        return {**self.components(), **self.base.components()}

    def new_components(self, count: int, generator: Generator) -> dict[str, Tensor]:
        """Draw the initial values of `count` new components, by the names of `component_dims`."""
        in_features, out_features = in_out(self.base)
        rows = initial_rows(count, in_features, generator)
        return {"lora_A": rows, "lora_B": torch.zeros(out_features, count)}

    def factors(self) -> tuple[Tensor, Tensor]:
        """The effective A [rank, in] and B [out, rank], with everything but the scale folded in;
        differentiable."""
        return self.lora_A, self.lora_B

    def effective(self) -> tuple[Tensor, Tensor]:
        """All that is added to W x, as one pair for the scale s: the base's pair, as A_r and
        B_r / s, and the factors.

        A [r_res + rank, in] and B [out, r_res + rank]; differentiable.
        """
        a, b = self.factors()
        if (pair := self.base.pair()) is None:
            return a, b
        return torch.cat([pair[0], a]), torch.cat([pair[1] / self.scale, b], 1)

    def trained(self) -> LoraFactors:
        """`effective` as training passes take it, with gates kept separate."""
        return LoraFactors(*self.effective(), self.scale)

    def ladder(self) -> tuple[Tensor, Tensor, list[int]]:
        """`effective` for those who run a part of it: (A [c, in], B [out, c], the scale within B;
        after how many components each tier ends). Tier 0 is the base's pair alone, the last
        one is all.
        """
        a, b = self.effective()
        return a.detach(), b.detach() * self.scale, self.tier_ends()

    def tier_ends(self) -> list[int]:
        """The number of components of `effective` up to the end of each tier. There are two tiers,
        without and with all components of the factors, unless a method adds tiers between them."""
        always = self.base.rank
        return [always, always + self.rank]

    @property
    def is_plain(self) -> bool:
        """True if the next pass computes exactly W x + bias plus the product of `trained`. A class
        with its own forward overrides this."""
        return (self._frozen is None or torch.is_grad_enabled()) and not (
            self.dropout and self.training and self.rank
        )

    def forward(self, x: Tensor) -> Tensor:
        if (
            self._frozen is not None
            and x.dtype == self._frozen.a.dtype
            and not torch.is_grad_enabled()
        ):
            return self._frozen(x)
        if self.dropout and self.training and self.rank:
            # Dropout is of the factors' input; the base has none.
            a, b = self.factors()
            update = linear(linear(dropout(x, self.dropout), a.to(x.dtype)), b.to(x.dtype))
            return self.base(x) + self.scale * update
        # torch.compile joins layers that read the same input by itself, if that pays
        compiling = torch.compiler.is_compiling()
        if (
            self.shared is not None
            and not compiling
            and (joint := self.shared(self, x)) is not None
        ):
            return joint
        factors = self.trained()
        if len(factors.a) == 0:
            return self.base(x)
        return lora_linears(x, self.base.operand, self.bias, [factors])[0]

    def freeze(self) -> None:
        """Prepare for passes without gradients (see `kernels.inference`), until `train()` is
        called or tensors are replaced."""
        a, b = self.effective()
        self._frozen = None
        if len(a):
            self._frozen = freeze(self.base.operand, self.bias, a, b, self.scale)

    @property
    def multiply_adds(self) -> int:
        """The multiply-adds of the low-rank products for one token; fewer once frozen."""
        if self._frozen is not None:
            return self._frozen.multiply_adds
        return sum(factor.numel() for factor in self.effective())

    def _apply(self, *arguments: Any, **settings: Any) -> Adapter:
        """Override nn.Module's `_apply` to drop values computed for the former device or type."""
        self._frozen = self.shared = None
        super()._apply(*arguments, **settings)  # type: ignore[no-untyped-call]
        return self

    def train(self, mode: bool = True) -> Adapter:
        if mode:
            self._frozen = None
        super().train(mode)
        return self

    def delta(self) -> Tensor:
        """The dense update [out, in] in float32: what is added to the base's weight, W or the
        pruned W'."""
        a, b = self.effective()
        return self.scale * (b.float() @ a.float())

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Add the update into the base's weight; returns the layer that was frozen."""
        self._frozen = None
        return self.base.merge(self.delta())

    def set_base(self, base: PlainBase) -> None:
        """Keep the frozen layer as another variant of it from now on."""
        self._frozen = None
        self.base = base

    @torch.no_grad()
    def start_from(self, a: Tensor, b: Tensor) -> None:
        """Begin with B A of these factors, A [r, in] and B [out, r] for the own scale, as the first
        r components; the others add nothing. In place."""
        self._frozen = None
        self.lora_A[: len(a)] = a.to(self.lora_A)
        self.lora_B.zero_()
        self.lora_B[:, : len(a)] = b.to(self.lora_B)

    @torch.no_grad()
    def start_rows(self, rows: Tensor) -> None:
        """Let the first rows of A begin as rows [at most r, in], and add nothing yet. In place."""
        self._frozen = None
        self.lora_A[: len(rows)] = rows.to(self.lora_A)

    # -- saving and loading ------------------------------------------------------------------------

    def own_tensors(self) -> dict[str, Tensor]:
        """{name: tensor} of everything to save: all tensors of the adapter except the base's
        weight."""
        return {n: p.detach() for n, p in self.components().items()} | self.base.own_tensors()

    def as_plain(self) -> dict[str, Tensor]:
        """`own_tensors` of the plain adapter that computes the same."""
        a, b = self.factors()
        return self.base.own_tensors() | {"lora_A": a.detach(), "lora_B": b.detach()}

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `own_tensors` gave, of whatever rank.

        Raises ValueError if a tensor is missing, is unknown or does not fit the layer.
        """
        if unknown := sorted(tensors.keys() - self.component_dims.keys() - TENSOR_NAMES):
            raise ValueError(f"{', '.join(unknown)} is not a part of it")
        ranks = {
            size_along(tensors, name, dim, list(getattr(self, name).shape))
            for name, dim in self.component_dims.items()
        }
        if len(ranks) != 1:
            raise ValueError(f"its tensors disagree about the rank: {sorted(ranks)}")
        of_base = {name: tensor for name, tensor in tensors.items() if name in TENSOR_NAMES}
        self.set_base(load_base(self.base, of_base))
        for name, parameter in self.components().items():
            setattr(
                self,
                name,
                nn.Parameter(tensors[name].to(parameter.device, parameter.dtype, copy=True)),
            )


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """{module name: adapter} in the model's own order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}


def adapter_parameters(adapters: Sequence[Adapter]) -> list[nn.Parameter]:
    """The trainable parameters of the adapters, without their frozen bases."""
    return [parameter for adapter in adapters for parameter in adapter.components().values()]


@dataclass(frozen=True)
class Target:
    """A linear layer that gets an adapter: its sizes and the adapter's initial rank. block: True
    for a layer of the transformer blocks, False for others that a recipe names, such as a head."""

    in_features: int
    out_features: int
    rank: int
    block: bool
