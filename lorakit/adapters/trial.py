"""Linear layers of a model, found by trying them, since classes do not tell: which compute nothing
but x Wᵀ + b, and which the model does not call but reads the weight of."""

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

# Token ids that are tried; none is the pad token, which models with positions of their own count
# differently.
TOKENS = (3, 4)
PROBE_LENGTH = 9  # tokens that any model reads


def probe_token(model: Any) -> int:
    """A token to try the model with."""
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    return next(token for token in TOKENS if token != pad)


def is_linear(layer: nn.Linear | Conv1D) -> bool:
    """True if the layer gives x Wᵀ + b. Those whose class has a forward pass of its own are tried,
    once a class: some are (Falcon's), some are not (routers that choose experts, layers that round
    their weights)."""
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
    except Exception:  # another input or another output than one tensor
        return False


def bypassed_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> set[str]:
    """Those of the layers {name: layer} whose weight the model multiplies by itself instead of
    calling the layer, as Mamba (Gu and Dao, arXiv 2312.00752) does with `dt_proj`. An adapter
    around such a layer changes nothing.

    The products of other layers are not computed, so a pass costs little. Raises what the model
    raises that can not read token ids alone.
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
    """Finds weights that are read outside of their layers' forward passes."""

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
        if isinstance(result, Tensor):  # not its shape or its type
            self.found |= names.difference(self._inside)
        return result
