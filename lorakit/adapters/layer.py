"""The adapter layer: a frozen linear layer plus a low-rank update, with forward, delta and merge
written once.

A method changes what its factors are (gates) by subclassing and overriding `factors`; everything
that is computed from the factors is here, so forward, `delta` and `merge` can not drift apart. So
is the pruned base: a frozen weight that lost entries, and a residual pair that makes up for them,
whatever the method of the factors.
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
from lorakit.kernels.lora_linear import Factors, lora_linears
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
    """Rows of A at initialisation [rank, in], as PEFT draws them: Kaiming uniform with a = √5,
    U(−1/√in, 1/√in)."""
    rows = torch.empty(rank, in_features).uniform_(-1.0, 1.0, generator=generator)
    return rows.mul_(1.0 / math.sqrt(in_features))


compat.check_apply()  # before a class stands in for the method


class Adapter(nn.Module):
    """y = W x + bias + s · B (A x), W frozen (LoRA, arXiv 2106.09685).

    lora_A [rank, in] starts Kaiming uniform and lora_B [out, rank] zero, both float32, so that B·A
    changes nothing at first. `scale` is s, and stays when the rank moves. A rank of 0 is legal.

    `component_dims` is {parameter: its dimension that counts components}: all that resizes with the
    rank.

    With a pruned base, y = W' x + bias + s · B (A x) + B_r (A_r x): `base_mask` is the bitmap of
    W', and residual_A [r_res, in], residual_B [out, r_res] (B_r, no scale) are there if
    `add_residual` was called. Both pairs are applied as one (`effective`).

    `shared`: the layers that it is computed with, where they were found to read the same input
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
    def weight(self) -> Tensor:
        """The base layer's: some models look at it (T5 at its type)."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's."""
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        return bias

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def max_rank(self) -> int:
        """min(in, out): more components than that add nothing."""
        return min(in_out(self.base))

    def components(self) -> dict[str, nn.Parameter]:
        """{name: parameter} of all that is trained here."""
        return {name: getattr(self, name) for name in self.component_dims}

    def new_components(self, count: int, generator: Generator) -> dict[str, Tensor]:
        """Values of `count` new components, as at initialisation, by the names of
        `component_dims`."""
        in_features, out_features = in_out(self.base)
        rows = initial_rows(count, in_features, generator)
        return {"lora_A": rows, "lora_B": torch.zeros(out_features, count)}

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank] as they act, everything but the scale folded in;
        differentiable."""
        return self.lora_A, self.lora_B

    def effective(self) -> tuple[Tensor, Tensor]:
        """All that is added to the base, as one pair for the scale s: the residual as A_r and B_r /
        s, and the factors.

        A [r_res + rank, in] and B [out, r_res + rank]; differentiable.
        """
        a, b = self.factors()
        if self.residual_A is None or self.residual_B is None:
            return a, b
        return torch.cat([self.residual_A, a]), torch.cat([self.residual_B / self.scale, b], 1)

    def trained(self) -> Factors:
        """`effective` as training passes take it, with gates apart."""
        return Factors(*self.effective(), self.scale)

    def ladder(self) -> tuple[Tensor, Tensor, list[int]]:
        """`effective` for those who run a part of it: (A [c, in], B [out, c], the scale within B;
        after how many components each tier ends). Tier 0 is the residual alone, the last one is
        all.
        """
        a, b = self.effective()
        return a.detach(), b.detach() * self.scale, self.tier_ends()

    def tier_ends(self) -> list[int]:
        """After how many of the components of `effective` each tier ends: none of the factors', or
        all of them, unless a method has tiers between."""
        always = 0 if self.residual_A is None else len(self.residual_A)
        return [always, always + self.rank]

    @property
    def is_plain(self) -> bool:
        """True if the next pass is W x + bias and the product of `trained`, nothing else; for
        classes with a forward of their own to say."""
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
            # Dropout is of the adapter's input; the residual is a part of the base, which has none.
            a, b = self.factors()
            update = linear(linear(dropout(x, self.dropout), a.to(x.dtype)), b.to(x.dtype))
            return self._without_factors(x) + self.scale * update
        # what reads the same input is joined there by itself, if it pays
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
        """Get ready to be run without gradients: see `kernels.inference`. Ends with `train()` and
        with new tensors."""
        a, b = self.effective()
        self._frozen = None
        if len(a):
            self._frozen = freeze(dense_weight(self.base), self.bias, a, b, self.scale)

    @property
    def multiply_adds(self) -> int:
        """Of the low-rank products, for one token: what is left of them once frozen."""
        if self._frozen is not None:
            return self._frozen.multiply_adds
        return sum(factor.numel() for factor in self.effective())

    def _apply(self, *arguments: Any, **settings: Any) -> Adapter:
        """As nn.Module's; what was worked out for another device or type is dropped."""
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
        """The dense update [out, in] in float32: what is added to the base as it is kept, W or the
        pruned W'."""
        a, b = self.effective()
        return self.scale * (b.float() @ a.float())

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Add the update into the base weight, in float32 and then in the base's dtype; returns the
        base layer."""
        self._frozen = None
        weight = dense_weight(self.base)
        weight.copy_(weight.float() + self.delta())
        return self.base

    # -- a pruned base -----------------------------------------------------------------------------

    @torch.no_grad()
    def prune_base(self, mask: Tensor) -> None:
        """W becomes W' = W ⊙ mask [out, in], in place; entries that are not kept are exactly
        zero."""
        weight = dense_weight(self.base)
        self._frozen = None
        weight.masked_fill_(~mask.to(weight.device), 0.0)
        self.base_mask = pack_bits(mask)

    def add_residual(self, a: Tensor, b: Tensor) -> None:
        """A pair A_r [r_res, in], B_r [out, r_res] beside the factors, kept in float32. A former
        one is replaced."""
        device = self.lora_A.device
        self._frozen = None
        trained = self.residual_A is None or self.residual_A.requires_grad
        # Contiguous, as they will be when they are loaded: sums over gradients depend on the order
        # in memory.
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
        """{name: tensor} of all that this adapter is, beside the base's own weight: what is
        saved."""
        kept = {name: p.detach() for name, p in {**self.components(), **self.residual()}.items()}
        return kept if self.base_mask is None else kept | {"base_mask": self.base_mask}

    def as_plain(self) -> dict[str, Tensor]:
        """`own_tensors` of a plain adapter that acts as this one."""
        own = self.own_tensors()
        kept = {
            name: own[name] for name in ("residual_A", "residual_B", "base_mask") if name in own
        }
        a, b = self.factors()
        return kept | {"lora_A": a.detach(), "lora_B": b.detach()}

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `own_tensors` gave, of whatever rank; a base mask is applied to the base.

        Raises ValueError when a tensor is missing, is unknown or does not fit the layer.
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
        """The size along `dim` of a saved tensor, whose other dimensions must be those of
        `here`."""
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
    """A linear layer that gets an adapter: its sizes and the adapter's initial rank. block: it is a
    layer of the transformer blocks, and not an embedding, a head or what else a recipe may name."""

    in_features: int
    out_features: int
    rank: int
    block: bool
