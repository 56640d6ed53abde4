"""The forms of weights in few bits: one class for each, by the package that quantises.

Weights are rounded to bfloat16 before they are quantised, so that the codes depend on the
checkpoint alone: a run computes in bfloat16 or float32 as its machine is good at, and a merge in
another type must still see the very base that was trained on.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lorakit import compat
from lorakit.kernels.stored import StoredWeight

# Weights that share a scale, and scales that share one in turn (QLoRA, section 3).
BLOCK, SCALES_BLOCK = 64, 256


def _rounded(weight: Tensor) -> Tensor:
    """The weight's bfloat16 values, in float32 so that scales are computed in it."""
    return weight.detach().to(torch.bfloat16).float().contiguous()


class Bitsandbytes4Bit(StoredWeight):
    """Codes of 4 bits with a scale for each 64 weights, by bitsandbytes.

    quant_type: nf4, whose 16 values are quantiles of a normal distribution, or fp4, a float with 2
    bits of exponent (QLoRA, section 3). double_quant: scales are codes of 8 bits with a scale for
    each 256, which takes 4.13 instead of 4.5 bits a weight.
    """

    def __init__(
        self, weight: Tensor, dtype: torch.dtype, quant_type: str, double_quant: bool
    ) -> None:
        super().__init__(weight.shape, dtype)
        self.quant_type = quant_type
        values = _rounded(weight)
        if weight.shape[1] % 2:  # rows of odd length are decoded by torch.compile, which takes long
            values = pad(values.flatten(), (0, values.numel() % 2))
        self.coded_shape = values.shape
        codes, state = compat.bitsandbytes("quantize_4bit")(
            values, None, None, BLOCK, double_quant, quant_type
        )
        self.register_buffer("codes", codes)
        scales = {"absmax": state.absmax, "values": state.code}
        if double_quant:
            nested = state.state2
            scales |= {"offset": state.offset, "of_scales": nested.absmax, "steps": nested.code}
        for name, tensor in scales.items():
            self.register_buffer(name, tensor)
        self.double_quant = double_quant

    def dense(self) -> Tensor:
        make = compat.bitsandbytes("QuantState")
        kept: dict[str, Any] = dict(self.named_buffers())
        nested: dict[str, Any] = {}
        if self.double_quant:
            scales = make(
                absmax=kept["of_scales"],
                code=kept["steps"],
                blocksize=SCALES_BLOCK,
                dtype=torch.float32,
            )
            nested = {"offset": kept["offset"], "state2": scales}
        state = make(
            absmax=kept["absmax"],
            shape=self.coded_shape,
            code=kept["values"],
            blocksize=BLOCK,
            quant_type=self.quant_type,
            dtype=self.dtype,
            **nested,
        )
        weight: Tensor = compat.bitsandbytes("dequantize_4bit")(kept["codes"], state)
        return weight.flatten()[: self.shape.numel()].view(self.shape)


class Bitsandbytes8Bit(StoredWeight):
    """Codes of 8 bits with a scale for each output (the weights of LLM.int8(), Dettmers et al.,
    arXiv 2208.07339), by bitsandbytes. Inputs are not quantised, unlike there."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__(weight.shape, dtype)
        quantise = compat.bitsandbytes("int8_vectorwise_quant")
        codes, scales, _ = quantise(_rounded(weight).half())
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def dense(self) -> Tensor:
        kept = dict(self.named_buffers())
        weight: Tensor = compat.bitsandbytes("int8_vectorwise_dequant")(
            kept["codes"], kept["scales"]
        )
        return weight.to(self.dtype)


class Torchao4Bit(StoredWeight):
    """NF4 with quantised scales, as in QLoRA, by torchao (`NF4Tensor`)."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        """weight: with a number of entries that is a multiple of BLOCK."""
        super().__init__(weight.shape, dtype)
        # the largest power of two that divides the number of blocks
        shared = math.gcd(weight.numel() // BLOCK, SCALES_BLOCK)
        stored = compat.torchao("to_nf4")(_rounded(weight), BLOCK, shared)
        names, self._context = stored.__tensor_flatten__()
        for name in names:
            self.register_buffer(name, getattr(stored, name))

    def dense(self) -> Tensor:
        kept = dict(self.named_buffers())
        stored = compat.torchao("NF4Tensor").__tensor_unflatten__(kept, self._context, None, None)
        weight: Tensor = stored.get_original_weight()
        return weight.to(self.dtype)


class Torchao8Bit(StoredWeight):
    """Codes of 8 bits with a scale for each output, by torchao (`Int8WeightOnlyConfig`)."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__(weight.shape, dtype)
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = torch.nn.Parameter(_rounded(weight), False)
        compat.torchao("quantize_")(layer, compat.torchao("Int8WeightOnlyConfig")())
        self.register_buffer("codes", compat.attribute(layer.weight, "qdata", "torchao"))
        self.register_buffer("scales", compat.attribute(layer.weight, "scale", "torchao"))

    def dense(self) -> Tensor:
        kept = dict(self.named_buffers())
        return (kept["codes"] * kept["scales"]).to(self.dtype)
