"""Tests of a model's linear layers by running them, since classes are not enough to know: which
layers compute exactly x Wᵀ + b, and which the model bypasses by reading their weight."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from lorakit.adapters.quantised import QuantisedLinear

# Candidate token ids. The pad token is not used, as some models give it no position of its own.
TOKENS = (3, 4)
PROBE_LENGTH = 9  # tokens; short enough for any model


def probe_token(model: Any) -> int:
    """A token id to run the model with."""
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    return next(token for token in TOKENS if token != pad)


def is_linear(layer: nn.Linear | Conv1D | QuantisedLinear) -> bool:
    """True if the layer computes x Wᵀ + b, as a quantised one does. A class of others with its own
    forward pass is tested once: some compute it (Falcon's), others do not (routers of experts,
    layers that round their weights)."""
    if isinstance(layer, QuantisedLinear):
        return True
    kind = type(layer)
    if kind.forward not in (nn.Linear.forward, Conv1D.forward):
        if kind not in _LINEAR:
            _LINEAR[kind] = _acts_linearly(layer)
        return _LINEAR[kind]
    return True


_LINEAR: dict[type[nn.Module], bool] = {}


def _acts_linearly(layer: nn.Linear | Conv1D) -> bool:
    generator = torch.Generator().manual_seed(0)
    copied = copy.copy(layer)
    copied._parameters = {
        name: None if value is None else nn.Parameter(torch.randn(value.shape, generator=generator))
        for name, value in layer._parameters.items()
    }
    weight, bias = copied.weight, copied.bias
    if isinstance(layer, Conv1D):
        weight = weight.T
    x = torch.randn(2, weight.shape[1], generator=generator)
    try:
        with torch.no_grad():
            return torch.allclose(copied(x), linear(x, weight, bias), rtol=1e-3, atol=1e-3)
    except Exception:  # its input or output is not a single tensor
        return False


def bypassed_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> set[str]:
    """Names of the layers whose weight the model multiplies itself instead of calling the layer, as
    Mamba (Gu and Dao, arXiv 2312.00752) does with `dt_proj`. An adapter around such a layer has no
    effect.

    The products of other layers are not computed, so a pass costs little. Errors of a model that
    can not run on token ids alone are raised unchanged.
    """
    watch = _WeightReads(layers)
    mode = model.training
    model.eval()
    settings = {"use_cache": False} if "use_cache" in signature(model.forward).parameters else {}
    ids = torch.full((1, PROBE_LENGTH), probe_token(model), device=next(model.parameters()).device)
    try:
        with watch, torch.no_grad():
            model(input_ids=ids, **settings)
    finally:
        watch.close()
        model.train(mode)
    return watch.found


class _WeightReads(TorchFunctionMode):
    """Context that finds weights that are read outside their layers' forward passes."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.found: set[str] = set()
        self._names = {id(layer.weight): name for name, layer in layers.items()}
        self._inside: list[str] = []
        self._handles = []
        for name, layer in layers.items():
            self._handles.append(layer.register_forward_pre_hook(partial(self._enter, name)))
            self._handles.append(layer.register_forward_hook(self._leave, always_call=True))

    def _enter(self, name: str, layer: nn.Module, inputs: Any) -> None:
        self._inside.append(name)

    def _leave(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        self._inside.pop()

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        names = {
            self._names[id(value)]
            for value in (*args, *kwargs.values())
            if id(value) in self._names
        }
        if func is linear and names:
            x, weight = args[:2]
            result: Any = x.new_zeros(*x.shape[:-1], len(weight))
        else:
            result = func(*args, **kwargs)
        if isinstance(result, Tensor):  # not a read of its shape or type
            self.found |= names.difference(self._inside)
        return result
