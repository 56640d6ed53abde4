"""The adapter layer: a frozen linear layer plus a low-rank update, with forward, delta and merge
written once.

A method changes the factors (for example with gates) by overriding `factors` in a subclass.
Everything computed from the factors is here, so forward, `delta` and `merge` can not drift apart.
The pruned base is here too, for any method: a frozen weight without some of its entries, and a
residual pair that compensates for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import dropout, linear
from transformers.pytorch_utils import Conv1D

from lorakit import compat
from lorakit.adapters.shared_input import SharedInput
from lorakit.kernels.inference import FrozenLayer, freeze
from lorakit.kernels.lora_linear import LoraFactors, lora_linears
from lorakit.numerics.sparsity import pack_bits, unpack_bits

Linear = nn.Linear | Conv1D


def in_out(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer; GPT-2's Conv1D keeps its weight as [in, out]."""
    rows, columns = layer.weight.shape  # type: ignore[misc]
    return (int(rows), int(columns)) if isinstance(layer, Conv1D) else (int(columns), int(rows))


def dense_weight(layer: nn.Module) -> Tensor:
    """The layer's weight as [out, in], a view."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(layer, Conv1D) else weight


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

    With a pruned base, y = W' x + bias + s · B (A x) + B_r (A_r x): `base_mask` is the bitmap of
    W', and residual_A [r_res, in] and residual_B [out, r_res] (B_r, without scale) exist once
    `add_residual` was called. Both pairs are applied as one (`effective`).

    `shared`: the layers that are computed together with this one because they read the same input
    (lorakit.cpu.speed_up).
    """

    component_dims: ClassVar[dict[str, int]] = {"lora_A": 0, "lora_B": 1}

    def __init__(
        self, base: nn.Module, rank: int, scale: float, dropout: float, generator: Generator
    ) -> None:
        super().__init__()
        in_features, out_features = in_out(base)
        device = dense_weight(base).device
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(initial_rows(rank, in_features, generator).to(device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=device))
        self.scale = scale
        self.dropout = dropout
        self.base_mask: Tensor | None = None
        self.residual_A: nn.Parameter | None = None
        self.residual_B: nn.Parameter | None = None
        self.shared: SharedInput | None = None
        self._frozen: FrozenLayer | None = None

    @property
    def frozen(self) -> FrozenLayer | None:
        """The layer and its adapter as one, where `freeze` made it."""
        return self._frozen

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, which some models inspect (T5 checks its type)."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        return bias

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def max_rank(self) -> int:
        """The largest useful rank, min(in, out)."""
        return min(in_out(self.base))

    def components(self) -> dict[str, nn.Parameter]:
        """{name: parameter} of the adapter's trained parameters."""
        return {name: getattr(self, name) for name in self.component_dims}

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
        """The residual and the factors as one pair with the scale s: A_r above A, and B_r / s
        beside B.

        A [r_res + rank, in] and B [out, r_res + rank]; differentiable.
        """
        a, b = self.factors()
        if self.residual_A is None or self.residual_B is None:
            return a, b
        return torch.cat([self.residual_A, a]), torch.cat([self.residual_B / self.scale, b], 1)

    def trained(self) -> LoraFactors:
        """`effective` as training passes take it, with gates apart."""
        return LoraFactors(*self.effective(), self.scale)

    def ladder(self) -> tuple[Tensor, Tensor, list[int]]:
        """`effective` for callers that use only some of its components: (A [c, in], B [out, c]
        with the scale folded in, the number of components up to the end of each tier). Tier 0 is
        the residual alone, the last tier everything.
        """
        a, b = self.effective()
        return a.detach(), b.detach() * self.scale, self.tier_ends()

    def tier_ends(self) -> list[int]:
        """The number of components of `effective` up to the end of each tier. There are two tiers,
        without and with all components of the factors, unless a method adds tiers between them."""
        always = 0 if self.residual_A is None else len(self.residual_A)
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
            # Dropout applies to the adapter's input only; the residual belongs to the base.
            a, b = self.factors()
            update = linear(linear(dropout(x, self.dropout), a.to(x.dtype)), b.to(x.dtype))
            return self._without_factors(x) + self.scale * update
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
            y: Tensor = self.base(x)
            return y
        return lora_linears(x, dense_weight(self.base), self.bias, [factors])[0]

    def freeze(self) -> None:
        """Prepare for passes without gradients (see `kernels.inference`), until `train()` is
        called or tensors are replaced."""
        a, b = self.effective()
        self._frozen = None
        if len(a):
            self._frozen = freeze(dense_weight(self.base), self.bias, a, b, self.scale)

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

    def _without_factors(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self.residual_A is None or self.residual_B is None:
            return y
        return y + linear(linear(x, self.residual_A.to(x.dtype)), self.residual_B.to(x.dtype))

    def delta(self) -> Tensor:
        """The dense update [out, in] in float32, relative to the stored base: W or the pruned
        W'."""
        a, b = self.effective()
        return self.scale * (b.float() @ a.float())

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Add the update to the base weight in float32, then cast to the base's dtype. Returns the
        base layer."""
        self._frozen = None
        weight = dense_weight(self.base)
        weight.copy_(weight.float() + self.delta())
        return self.base

    # -- a pruned base -----------------------------------------------------------------------------

    @torch.no_grad()
    def prune_base(self, mask: Tensor) -> None:
        """Prune W to W' = W ⊙ mask [out, in], in place; pruned entries are exactly zero."""
        weight = dense_weight(self.base)
        self._frozen = None
        weight.masked_fill_(~mask.to(weight.device), 0.0)
        self.base_mask = pack_bits(mask)

    def add_residual(self, a: Tensor, b: Tensor) -> None:
        """Add the residual pair A_r [r_res, in], B_r [out, r_res], stored in float32; it replaces
        a former one."""
        device = self.lora_A.device
        self._frozen = None
        trained = self.residual_A is None or self.residual_A.requires_grad
        # Contiguous, as after loading: sums over gradients depend on the memory layout.
        pair = (
            x.to(device, torch.float32).clone(memory_format=torch.contiguous_format) for x in (a, b)
        )
        self.residual_A, self.residual_B = (nn.Parameter(x, trained) for x in pair)

    def residual(self) -> dict[str, nn.Parameter]:
        """{name: parameter} of the residual pair; {} without one."""
        pair = {"residual_A": self.residual_A, "residual_B": self.residual_B}
        return {name: parameter for name, parameter in pair.items() if parameter is not None}

    # -- saving and loading ------------------------------------------------------------------------

    def own_tensors(self) -> dict[str, Tensor]:
        """{name: tensor} of everything to save: all tensors of the adapter except the base's
        weight."""
        kept = {name: p.detach() for name, p in {**self.components(), **self.residual()}.items()}
        return kept if self.base_mask is None else kept | {"base_mask": self.base_mask}

    def as_plain(self) -> dict[str, Tensor]:
        """`own_tensors` of the plain adapter that computes the same."""
        own = self.own_tensors()
        kept = {
            name: own[name] for name in ("residual_A", "residual_B", "base_mask") if name in own
        }
        a, b = self.factors()
        return kept | {"lora_A": a.detach(), "lora_B": b.detach()}

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Load tensors of `own_tensors`, of any rank; a base mask is applied to the base.

        Raises ValueError if a tensor is missing, is unknown or does not fit the layer.
        """
        known = {*self.component_dims, "residual_A", "residual_B", "base_mask"}
        if unknown := sorted(tensors.keys() - known):
            raise ValueError(f"{', '.join(unknown)} is not a part of it")
        ranks = set()
        for name, dim in self.component_dims.items():
            ranks.add(self._rank_of(tensors, name, dim, list(getattr(self, name).shape)))
        if len(ranks) != 1:
            raise ValueError(f"its tensors disagree about the rank: {sorted(ranks)}")
        in_features, out_features = in_out(self.base)
        if "residual_A" in tensors or "residual_B" in tensors:
            sizes = {
                self._rank_of(tensors, "residual_A", 0, [0, in_features]),
                self._rank_of(tensors, "residual_B", 1, [out_features, 0]),
            }
            if len(sizes) != 1:
                raise ValueError(f"its residual disagrees about the rank: {sorted(sizes)}")
        mask = None
        if "base_mask" in tensors:
            mask = unpack_bits(tensors["base_mask"], in_features * out_features)
        self._frozen = None
        for name, parameter in self.components().items():
            setattr(
                self,
                name,
                nn.Parameter(tensors[name].to(parameter.device, parameter.dtype, copy=True)),
            )
        if "residual_A" in tensors:
            self.add_residual(tensors["residual_A"], tensors["residual_B"])
        if mask is not None:
            self.prune_base(mask.view(out_features, in_features))

    @staticmethod
    def _rank_of(tensors: dict[str, Tensor], name: str, dim: int, here: list[int]) -> int:
        """The size along `dim` of a saved tensor, whose other sizes must equal those of `here`."""
        if name not in tensors:
            raise ValueError(f"{name} is missing")
        saved = list(tensors[name].shape)
        if len(saved) != len(here) or any(
            s != h for i, (s, h) in enumerate(zip(saved, here, strict=True)) if i != dim
        ):
            raise ValueError(
                f"{name} has shape {saved}, the layer needs"
                f" {[*here[:dim], 'rank', *here[dim + 1 :]]}"
            )
        return saved[dim]


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
