"""Variants of the frozen layer under an adapter: the plain layer, a pruned one with a residual, or
one in few bits.

An adapter asks its base for everything that depends on the form of the frozen weight. A new form is
a new class here, listed in `VARIANTS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from lorakit.adapters.quantised import QuantisedLinear
from lorakit.kernels.stored import Weight
from lorakit.numerics.sparsity import pack_bits, unpack_bits

Linear = nn.Linear | Conv1D | QuantisedLinear


def in_out(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer or a base; GPT-2's Conv1D keeps its weight as [in, out]."""
    layer = layer.layer if isinstance(layer, PlainBase) else layer
    if isinstance(layer, QuantisedLinear):
        return layer.in_features, layer.out_features
    rows, columns = layer.weight.shape  # type: ignore[misc]
    return (int(rows), int(columns)) if isinstance(layer, Conv1D) else (int(columns), int(rows))


def dense_weight(layer: nn.Module) -> Tensor:
    """The layer's weight as [out, in]: a view, or a copy if it is stored in few bits."""
    if isinstance(layer, QuantisedLinear):
        return layer.stored.dense()
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(layer, Conv1D) else weight


class PlainBase(nn.Module):
    """y = W x + bias: the unchanged frozen layer."""

    tensor_names: ClassVar[tuple[str, ...]] = ()
    """Names of all that `own_tensors` may hold."""
    told_by_weight: ClassVar[tuple[str, ...]] = ()
    """The names among them whose content the weight itself determines."""

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)

    @property
    def weight(self) -> Tensor:
        """The dense weight [out, in]; a view if it is stored dense."""
        return dense_weight(self.layer)

    @property
    def operand(self) -> Weight:
        """The weight [out, in] as products take it."""
        return self.weight

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.layer.bias  # type: ignore[assignment]
        return bias

    @property
    def is_changed(self) -> bool:
        """True if the weight differs from the model's own, so that it must be exported too."""
        return False

    @property
    def is_joinable(self) -> bool:
        """True if kernels may read the stored weight and make it part of a joined one."""
        return type(self.layer) is nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """Compute y without the adapter's factors."""
        y: Tensor = self.layer(x)
        return y

    def pair(self) -> tuple[Tensor, Tensor] | None:
        """A [r, in] and B [out, r] of the term that is added to W x, without a scale;
        differentiable. None if there is no such term."""
        return None

    @property
    def rank(self) -> int:
        """The number of components of `pair`."""
        pair = self.pair()
        return 0 if pair is None else len(pair[0])

    def components(self) -> dict[str, nn.Parameter]:
        """{name: parameter} of the base's trainable parameters."""
        return {}

    def own_tensors(self) -> dict[str, Tensor]:
        """{name: tensor} of everything to save: all tensors of the base except the layer's own
        weight."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load tensors of `own_tensors`; tensors that are not given stay unchanged.

        Raises ValueError, before anything is changed, if a tensor does not fit the layer.
        """

    @torch.no_grad()
    def merge(self, update: Tensor) -> nn.Module:
        """Add the dense update [out, in] in float32, then cast to the weight's dtype. Returns the
        layer."""
        weight = self.weight
        weight.copy_(weight.float() + update)
        return self.layer


class PrunedBase(PlainBase):
    """y = W' x + bias + B_r (A_r x): pruned entries of the weight are exactly zero, and a residual
    compensates for them.

    `base_mask` is the bitmap of W' = W ⊙ mask; None if the weight was loaded without it, as its
    zeros determine it. residual_A [r_res, in] and residual_B [out, r_res] are float32; None without
    a residual.
    """

    tensor_names = ("residual_A", "residual_B", "base_mask")
    told_by_weight = ("base_mask",)

    def __init__(
        self,
        layer: nn.Module,
        mask: Tensor | None = None,
        residual: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """mask [out, in]: True for entries that stay; applied in place."""
        super().__init__(layer)
        self.base_mask: Tensor | None = None
        self.residual_A: nn.Parameter | None = None
        self.residual_B: nn.Parameter | None = None
        if mask is not None:
            self._prune(mask)
        if residual is not None:
            self._set_residual(*residual)

    @property
    def is_changed(self) -> bool:
        return self.base_mask is not None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if (pair := self.pair()) is None:
            return y
        a, b = pair
        return y + linear(linear(x, a.to(x.dtype)), b.to(x.dtype))

    def pair(self) -> tuple[Tensor, Tensor] | None:
        if self.residual_A is None or self.residual_B is None:
            return None
        return self.residual_A, self.residual_B

    def components(self) -> dict[str, nn.Parameter]:
        pair = {"residual_A": self.residual_A, "residual_B": self.residual_B}
        return {name: parameter for name, parameter in pair.items() if parameter is not None}

    def own_tensors(self) -> dict[str, Tensor]:
        kept = {name: p.detach() for name, p in self.components().items()}
        return kept if self.base_mask is None else kept | {"base_mask": self.base_mask}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        in_features, out_features = in_out(self.layer)
        mask, has_residual = None, "residual_A" in tensors or "residual_B" in tensors
        if has_residual:
            sizes = {
                size_along(tensors, "residual_A", 0, [0, in_features]),
                size_along(tensors, "residual_B", 1, [out_features, 0]),
            }
            if len(sizes) != 1:
                raise ValueError(f"its residual disagrees about the rank: {sorted(sizes)}")
        if "base_mask" in tensors:
            mask = unpack_bits(tensors["base_mask"], in_features * out_features)
        if has_residual:
            self._set_residual(tensors["residual_A"], tensors["residual_B"])
        if mask is not None:
            self._prune(mask.view(out_features, in_features))

    @torch.no_grad()
    def _prune(self, mask: Tensor) -> None:
        weight = self.weight
        weight.masked_fill_(~mask.to(weight.device), 0.0)
        self.base_mask = pack_bits(mask)

    def _set_residual(self, a: Tensor, b: Tensor) -> None:
        device = self.weight.device
        trained = self.residual_A is None or self.residual_A.requires_grad
        # Contiguous, as after loading: sums over gradients depend on the memory layout.
        pair = (
            x.to(device, torch.float32).clone(memory_format=torch.contiguous_format) for x in (a, b)
        )
        self.residual_A, self.residual_B = (nn.Parameter(x, trained) for x in pair)


class QuantisedBase(PlainBase):
    """y = W x + bias, with W stored in few bits: it is dequantised for each product."""

    layer: QuantisedLinear

    @property
    def operand(self) -> Weight:
        return self.layer.stored

    def merge(self, update: Tensor) -> nn.Module:
        """Add the dense update [out, in] to the dequantised weight; returns a dense layer."""
        return self.layer.as_dense(update)


VARIANTS: tuple[type[PlainBase], ...] = (PlainBase, PrunedBase)
TENSOR_NAMES = frozenset(name for kind in VARIANTS for name in kind.tensor_names)


def base_of(layer: nn.Module) -> PlainBase:
    """The base of a frozen layer as it is."""
    return QuantisedBase(layer) if isinstance(layer, QuantisedLinear) else PlainBase(layer)


def load_base(base: PlainBase, tensors: Mapping[str, Tensor]) -> PlainBase:
    """Convert the base to the variant that these `own_tensors` belong to, and load them. Raises as
    `load`."""
    if not tensors:
        return base
    if isinstance(base, QuantisedBase):
        raise ValueError("its base was pruned, and a quantised one can not be")
    kind = next(kind for kind in VARIANTS if tensors.keys() <= set(kind.tensor_names))
    found = base if type(base) is kind else kind(base.layer)
    found.load(tensors)
    return found


def size_along(tensors: Mapping[str, Tensor], name: str, dim: int, here: list[int]) -> int:
    """The size along `dim` of a saved tensor, whose other sizes must equal those of `here`."""
    if name not in tensors:
        raise ValueError(f"{name} is missing")
    saved = list(tensors[name].shape)
    if len(saved) != len(here) or any(
        s != h for i, (s, h) in enumerate(zip(saved, here, strict=True)) if i != dim
    ):
        raise ValueError(
            f"{name} has shape {saved}, the layer needs {[*here[:dim], 'rank', *here[dim + 1 :]]}"
        )
    return saved[dim]
