"""Frozen linear layers whose weight is stored in few bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init
from transformers.pytorch_utils import Conv1D

from lorakit.kernels.stored import StoredWeight, linear


class QuantisedLinear(nn.Module):
    """y = W x + bias, with W stored in few bits.

    transposed: True for a layer that was GPT-2's Conv1D, which keeps its weight as [in, out].
    """

    def __init__(self, stored: StoredWeight, bias: Tensor | None, transposed: bool) -> None:
        super().__init__()
        self.stored = stored
        self.bias = None if bias is None else nn.Parameter(bias.detach(), False)
        self.transposed = transposed
        self.out_features, self.in_features = stored.shape

    @property
    def weight(self) -> Tensor:
        """The dequantised weight as the former layer kept it, for models that read it themselves;
        a copy."""
        dense = self.stored.dense()
        return dense.T if self.transposed else dense

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.stored, self.bias)

    @torch.no_grad()
    def as_dense(self, update: Tensor | None = None) -> nn.Module:
        """The dense layer in the type of the products. update [out, in] is added in float32, before
        the sum is rounded to that type."""
        dtype = self.stored.dtype
        with dequantised_to(self, torch.float32):
            weight = self.stored.dense()
        if update is not None:
            weight = weight + update
        weight = weight.to(dtype)
        sizes = self.in_features, self.out_features
        layer: nn.Module
        if self.transposed:
            layer = Conv1D(sizes[1], sizes[0])  # type: ignore[no-untyped-call]
            weight = weight.T.contiguous()
        else:
            has_bias = self.bias is not None
            layer = skip_init(nn.Linear, *sizes, bias=has_bias)  # type: ignore[no-untyped-call]
        layer.weight = nn.Parameter(weight, False)
        layer.register_parameter("bias", self.bias)
        return layer


def count_parameters(model: nn.Module) -> int:
    """Number of the model's parameters, quantised weights among them."""
    stored = sum(weight.shape.numel() for weight in _stored(model))
    return stored + sum(parameter.numel() for parameter in model.parameters())


def set_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Let products with quantised weights of the model be computed in the type."""
    for weight in _stored(model):
        weight.dtype = dtype


@contextmanager
def dequantised_to(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Context in which quantised weights of the model, or of one layer, are dequantised to the
    type."""
    before = [weight.dtype for weight in _stored(model)]
    set_dtype(model, dtype)
    try:
        yield
    finally:
        for weight, own in zip(_stored(model), before, strict=True):
            weight.dtype = own


def _stored(model: nn.Module) -> list[StoredWeight]:
    return [module for module in model.modules() if isinstance(module, StoredWeight)]
