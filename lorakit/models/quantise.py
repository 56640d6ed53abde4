"""Quantisation of a loaded base: the linear layers of its blocks are stored in few bits."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.adapters.base import dense_weight
from lorakit.adapters.inject import find_quantisable, replace_layer
from lorakit.adapters.quantised import QuantisedLinear
from lorakit.errors import RecipeError, RunError
from lorakit.kernels.codes import (
    BLOCK,
    Bitsandbytes4Bit,
    Bitsandbytes8Bit,
    Torchao4Bit,
    Torchao8Bit,
)
from lorakit.kernels.stored import StoredWeight
from lorakit.models.spec import Quantization

log = logging.getLogger("lorakit")
KEY = "model.quantization"
EXTRAS = {"bitsandbytes": "quant", "torchao": "quant-torchao"}
# Largest error of a layer's quantised weights, as a share of their size. Weights with a normal
# distribution lose 0.09 by nf4 and 0.12 by fp4; far more means that the scales are of no use.
MOST_LOST = 0.3
# Measured on one core with AVX2, SmolLM2-135M in float32: a step of 330 tokens takes 4 % more time
# in 4 bits, 12 % in 8. Generation dequantises all weights for each token: 289 ms instead of 30.
ON_A_PROCESSOR = (
    "on a processor a quantised base saves memory and costs time: weights are dequantised for each"
    " product, forward and backward"
)


def check_quantiser(spec: Quantization | None) -> None:
    """Raise RecipeError if the package that quantises is not installed, with the command that
    installs it."""
    if spec is None or importlib.util.find_spec(spec.backend) is not None:
        return
    raise RecipeError.at(
        f"{KEY}.backend",
        f"quantization needs the package `{spec.backend}`, not installed here",
        f'after `pip install "lorakit[{EXTRAS[spec.backend]}]"`, or a recipe without it',
    )


@torch.no_grad()
def quantise(
    model: nn.Module, spec: Quantization, heads: Sequence[str], device: torch.device
) -> list[str]:
    """Quantise the layers one after the other, so that no second copy of the model is needed.
    Returns notes for the log.

    heads: the modules that are trained in full. device: computes the codes; they stay with the
    model. Raises RecipeError for a model without such layers, RunError for one that loses too much.
    """
    names = find_quantisable(model, heads)
    if not names:
        what = f"{type(model).__name__} has no linear layers in blocks to quantise"
        raise RecipeError.at(KEY, what, "no such key")
    dense = stored = 0
    squares, errors = 0.0, 0.0
    for name in names:
        layer = model.get_submodule(name)
        weight = dense_weight(layer)
        if spec.backend == "torchao" and spec.bits == 4 and weight.numel() % BLOCK:
            what = f"torchao can not quantise `{name}`, {weight.numel():,} weights, to 4 bits"
            expected = f"bitsandbytes; torchao takes multiples of {BLOCK} weights"
            raise RecipeError.at(f"{KEY}.backend", what, expected)
        made = _stored(weight.to(device), spec).to(weight.device)
        made.dtype = torch.float32
        error, size = _square(made.dense() - weight), _square(weight)
        if not error <= MOST_LOST**2 * size:
            lost = f"{(error / size) ** 0.5:.0%} of its size" if size else "all of it"
            raise RunError(
                f"`{name}` can not be quantised to {spec}: it would lose {lost}",
                "Are its weights finite? bits: 8 is more precise.",
            )
        made.dtype = weight.dtype
        dense, stored = dense + weight.numel() * weight.element_size(), stored + made.bytes_stored
        squares, errors = squares + size, errors + error
        bias = layer.bias
        assert bias is None or isinstance(bias, Tensor)
        replace_layer(model, name, QuantisedLinear(made, bias, isinstance(layer, Conv1D)))
    log.info(
        "base: %d layers in %s, %.0f MB instead of %.0f; their weights lose %.1f%% of their size",
        len(names),
        spec,
        stored / 2**20,
        dense / 2**20,
        100 * (errors / squares) ** 0.5 if squares else 0.0,
    )
    return [ON_A_PROCESSOR] if device.type == "cpu" else []


def _square(x: Tensor) -> float:
    return float(x.float().square().sum())


def _stored(weight: Tensor, spec: Quantization) -> StoredWeight:
    if spec.backend == "torchao":
        return (Torchao4Bit if spec.bits == 4 else Torchao8Bit)(weight, weight.dtype)
    if spec.bits == 8:
        return Bitsandbytes8Bit(weight, weight.dtype)
    return Bitsandbytes4Bit(weight, weight.dtype, spec.code, spec.quantises_scales)
