"""The adapter layer: a frozen linear layer plus a low-rank update, with forward, delta and merge written once.

A method changes what its factors are (gates, masks) by subclassing and overriding `factors`; everything that is
computed from the factors is here, so forward, `delta` and `merge` can not drift apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import dropout, linear
from transformers.pytorch_utils import Conv1D

from lorakit.kernels.lora_linear import lora_linear

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


def initial_rows(rank: int, width: int, generator: Generator) -> Tensor:
    """Rows of A at initialisation [rank, in], as PEFT draws them: Kaiming uniform with a = √5, U(−1/√in, 1/√in)."""
    return torch.empty(rank, width).uniform_(-1.0, 1.0, generator=generator).mul_(1.0 / math.sqrt(width))


class Adapter(nn.Module):
    """y = W x + bias + s · B (A x), W frozen (LoRA, arXiv 2106.09685).

    lora_A [rank, in] starts Kaiming uniform and lora_B [out, rank] zero, both float32, so that B·A changes nothing
    at first. `scale` is s, and stays when the rank moves. A rank of 0 is legal.

    `component_dims` is {parameter: its dimension that counts components}: all that resizes with the rank.
    """

    component_dims: ClassVar[dict[str, int]] = {"lora_A": 0, "lora_B": 1}

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float, generator: Generator) -> None:
        super().__init__()
        width, height = in_out(base)
        device = dense_weight(base).device
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(initial_rows(rank, width, generator).to(device))
        self.lora_B = nn.Parameter(torch.zeros(height, rank, device=device))
        self.scale = scale
        self.dropout = dropout

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
        """Values of `count` new components, as at initialisation, by the names of `component_dims`."""
        width, height = in_out(self.base)
        return {"lora_A": initial_rows(count, width, generator), "lora_B": torch.zeros(height, count)}

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank] as they act, everything but the scale folded in; differentiable."""
        return self.lora_A, self.lora_B

    def forward(self, x: Tensor) -> Tensor:
        if self.rank == 0:
            y: Tensor = self.base(x)
            return y
        a, b = self.factors()
        if self.dropout and self.training:
            update = linear(linear(dropout(x, self.dropout), a.to(x.dtype)), b.to(x.dtype))
            y = self.base(x) + self.scale * update
            return y  # noqa: RET504 (typed on the way)
        return lora_linear(x, dense_weight(self.base), self.base.bias, a, b, self.scale)  # type: ignore[arg-type]

    def delta(self) -> Tensor:
        """The dense update [out, in] in float32: what the adapter adds to W."""
        a, b = self.factors()
        return self.scale * (b.float() @ a.float())

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Add the update into the base weight, in float32 and then in the base's dtype; returns the base layer."""
        weight = dense_weight(self.base)
        weight.copy_(weight.float() + self.delta())
        return self.base

    @torch.no_grad()
    def load_components(self, tensors: dict[str, Tensor]) -> None:
        """Take over saved components of whatever rank, by the names of `component_dims`.

        Raises ValueError when a tensor is missing or does not fit the layer.
        """
        ranks = set()
        for name, dim in self.component_dims.items():
            if name not in tensors:
                raise ValueError(f"{name} is missing")
            saved, here = list(tensors[name].shape), list(getattr(self, name).shape)
            if len(saved) != len(here) or any(s != h for i, (s, h) in enumerate(zip(saved, here, strict=True)) if i != dim):
                raise ValueError(f"{name} has shape {saved}, the layer needs {[*here[:dim], 'rank', *here[dim + 1 :]]}")
            ranks.add(saved[dim])
        if len(ranks) != 1:
            raise ValueError(f"its tensors disagree about the rank: {sorted(ranks)}")
        for name, parameter in self.components().items():
            setattr(self, name, nn.Parameter(tensors[name].to(parameter.device, parameter.dtype, copy=True)))


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """{module name: adapter} in the model's own order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}


def adapter_parameters(adapters: Sequence[Adapter]) -> list[nn.Parameter]:
    """The trainable parameters of the adapters, without their frozen bases."""
    return [parameter for adapter in adapters for parameter in adapter.components().values()]
