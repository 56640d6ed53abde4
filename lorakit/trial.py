"""What is found out about an architecture by trying it, since names and configurations do not tell: how many tokens it can read,
and which linear layers' weights it reads without calling the layer."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

# Two lengths that any model reads; between them, the largest index into a table of positions grows by their difference.
SHORT, LONG = 5, 9
# Token ids that are tried; none is the pad token, which models with positions of their own count differently.
TOKENS = (3, 4)
FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full}


class _Reached(Exception):
    """The first block is reached: what is looked up before it has been seen."""


def weightless(build: Callable[[], Any]) -> Any:
    """The module that `build` makes, on the processor, with weights that take no memory: each is one zero, expanded to its shape.
    Integers (positions, masks) are what they would be, so the module runs, and all it gives is nothing but shapes."""
    with _FloatsOnMeta():
        module = build()
    for owner in module.modules():
        for name, value in [*owner._parameters.items()]:
            if value is not None and value.is_meta:
                owner._parameters[name] = nn.Parameter(_expanded(value), requires_grad=False)
        for name, value in [*owner._buffers.items()]:
            if value is not None and value.is_meta:
                owner._buffers[name] = _expanded(value)
    return module


def _expanded(value: Tensor) -> Tensor:
    return torch.zeros((), dtype=value.dtype).expand(value.shape)


class _FloatsOnMeta(TorchFunctionMode):
    """New tensors of real numbers have no memory, unless a device is named."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FACTORIES and kwargs.get("device") is None:
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
                kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)


# ---- positions


def position_limit(model: nn.Module) -> int | None:
    """How many tokens the model's tables of positions hold; None where it has none (rotary and relative positions).

    A table of positions is one whose largest index grows with the number of tokens until the model fails. RoBERTa and its kin
    count from behind the pad token's id, so that their table of 514 rows holds 512 positions.

    model: see `weightless`. Raises what it raises where it can not read token ids alone.
    """
    short, long = _Embeddings(), _Embeddings()
    for tokens, seen in ((SHORT, short), (LONG, long)):
        with seen:
            _read(model, tokens)
    grown = [table for table, (last, _) in long.tables.items() if last - short.tables[table][0] == LONG - SHORT]
    limits = [rows - (last - (LONG - 1)) for last, rows in map(long.tables.__getitem__, grown)]
    # Buckets of relative positions grow at first too, and then no more.
    return min((limit for limit in limits if _fits(model, limit) and not _fits(model, limit + 1)), default=None)


def _fits(model: nn.Module, tokens: int) -> bool:
    try:
        _read(model, tokens)
    except (IndexError, RuntimeError):
        return False
    return True


def _read(model: nn.Module, tokens: int) -> None:
    """Let the model read so many tokens, up to its first block."""
    with _stopping_at_blocks(model), torch.no_grad(), contextlib.suppress(_Reached):
        model(input_ids=torch.full((1, tokens), _token(model)))


def _token(model: Any) -> int:
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    return next(token for token in TOKENS if token != pad)


class _Embeddings(TorchFunctionMode):
    """Sees which embeddings are read: {table: (largest index, rows)}."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[int, tuple[int, int]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is embedding:
            ids, weight = args[:2]
            before, _ = self.tables.get(id(weight), (-1, 0))
            self.tables[id(weight)] = max(int(ids.max()), before), len(weight)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _stopping_at_blocks(model: nn.Module) -> Iterator[None]:
    """The first module of a list of modules that is called ends the pass."""

    def stop(module: nn.Module, inputs: Any) -> None:
        raise _Reached

    blocks = [block for parts in model.modules() if isinstance(parts, nn.ModuleList) for block in parts]
    handles = [block.register_forward_pre_hook(stop) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---- linear layers


def is_linear(layer: nn.Linear | Conv1D) -> bool:
    """Whether the layer gives x Wᵀ + b. Those whose class has a forward pass of its own are tried, once a class: some are
    (Falcon's), some are not (routers that choose experts, layers that round their weights)."""
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
    """Those of the layers {name: layer} whose weight the model multiplies by itself instead of calling the layer, as Mamba
    (Gu and Dao, arXiv 2312.00752) does with `dt_proj`. An adapter around such a layer changes nothing.

    The products of other layers are not computed, so a pass costs little. Raises what the model raises that can not read token
    ids alone.
    """
    watch = _WeightReads(layers)
    mode = model.training
    model.eval()
    settings = {"use_cache": False} if "use_cache" in signature(model.forward).parameters else {}
    ids = torch.full((1, LONG), _token(model), device=next(model.parameters()).device)
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
        names = {self._names[id(value)] for value in (*args, *kwargs.values()) if id(value) in self._names}
        if func is linear and names:
            x, weight = args[:2]
            result: Any = x.new_zeros(*x.shape[:-1], len(weight))
        else:
            result = func(*args, **kwargs)
        if isinstance(result, Tensor):  # not its shape or its type
            self.found |= names.difference(self._inside)
        return result
