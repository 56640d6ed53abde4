"""Products with frozen weights that are stored in few bits (QLoRA, Dettmers et al., arXiv
2305.14314, eq. 5).

Such a weight is dequantised for each product and freed after it, in the forward pass and again in
the backward pass, so that no dense copy is alive in between.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorakit.kernels.products import frozen_linear


class StoredWeight(nn.Module, ABC):
    """A frozen weight [out, in], stored as codes with their scales, which are buffers.

    dtype: the type that it is dequantised to, in which products are computed. It may be changed;
    the codes do not depend on it.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    @property
    def bytes_stored(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.buffers())

    @abstractmethod
    def dense(self) -> Tensor:
        """The dequantised weight [out, in], contiguous, in `dtype`; the same values at each
        call."""


Weight = Tensor | StoredWeight
"""A frozen weight [out, in] as products take it."""


def opened(weight: Weight) -> tuple[Tensor, StoredWeight | None]:
    """(the dense weight [out, in], its stored form, or None if the weight is dense itself)."""
    return (weight, None) if isinstance(weight, Tensor) else (weight.dense(), weight)


class _StoredLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: StoredWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return frozen_linear(x, weight.dense(), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return frozen_linear(grads[0], ctx.weight.dense().T, None), None, None


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """Compute W x + bias with a frozen weight, dense or stored, for x [..., in]. Of a stored one,
    gradients go to x alone."""
    if isinstance(weight, Tensor):
        return functional.linear(x, weight, bias)
    y: Tensor = _StoredLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y
