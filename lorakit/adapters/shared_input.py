"""Joint computation of adapted layers that read the same input (q/k/v; gate/up): the first layer
called computes all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lorakit.adapters.base import PlainBase
from lorakit.kernels.joined import join_rows
from lorakit.kernels.lora_linear import JOINED_RANK, LoraFactors, lora_linears


class SharingAdapter(Protocol):
    """Interface of an adapter as it is used here."""

    base: PlainBase
    scale: float

    @property
    def rank(self) -> int:
        """The rank of the factors; `trained` may have a larger one."""

    def trained(self) -> LoraFactors:
        """A [rank, in] and B [out, rank]; their rank may exceed that of the factors."""


class SharedInput:
    """Layers that were observed to read the same input, with their weights as one matrix [outputs,
    in].

    The base weights become views of that matrix, and biases views of one vector, so nothing is
    stored twice and later loads reach both.
    """

    def __init__(self, layers: Sequence[SharingAdapter]) -> None:
        """layers: of joinable bases of one width, type and device, all with a bias or all
        without."""
        self.layers = list(layers)
        bases = [layer.base for layer in layers]
        self.weight = join_rows([base.weight for base in bases])
        biases = [base.bias for base in bases if base.bias is not None]
        self.bias = join_rows(biases) if biases else None
        self._x: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}
        self._graded = False  # True if the waiting outputs have a graph

    def __call__(self, layer: SharingAdapter, x: Tensor) -> Tensor | None:
        """The output of `layer` for x; None where the layer must be computed alone: the preceding
        calls did not follow the observed order, or the ranks are zero or too high for the joint
        product to pay."""
        number = next(i for i, own in enumerate(self.layers) if own is layer)
        if number == 0:
            self._x, self._waiting = None, {}
            if sum(own.rank for own in self.layers) > JOINED_RANK:
                return None
            factors = [own.trained() for own in self.layers]
            if not 0 < sum(len(own.a) for own in factors) <= JOINED_RANK:
                return None
            first, *others = lora_linears(x, self.weight, self.bias, factors)
            self._x, self._waiting, self._graded = (
                x,
                dict(enumerate(others, 1)),
                torch.is_grad_enabled(),
            )
            return first
        if (
            x is not self._x
            or number not in self._waiting
            or self._graded != torch.is_grad_enabled()
        ):
            return None
        y = self._waiting.pop(number)
        if not self._waiting:
            self._x = None
        return y


def can_share(layers: Sequence[SharingAdapter]) -> bool:
    """True if the weights of the layers' bases can form one matrix."""
    bases = [layer.base for layer in layers]
    if (
        len(bases) < 2
        or len({id(base.layer) for base in bases}) < len(bases)
        or not all(base.is_joinable for base in bases)
    ):
        return False
    kinds = {
        (base.weight.dtype, base.weight.device, base.weight.shape[1], base.bias is None)
        for base in bases
    }
    return len(kinds) == 1
