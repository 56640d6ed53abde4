"""Longest input of a model, found by running it with weights that take no memory."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from torch.overrides import TorchFunctionMode

from lorakit.adapters.trial import PROBE_LENGTH, probe_token
from lorakit.data.labels import Labels
from lorakit.models.fetching import auto_class
from lorakit.models.heads import with_labels
from lorakit.models.spec import ModelSpec

log = logging.getLogger("lorakit")

# Configuration keys that hold the number of positions.
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
# Two lengths that any model can read. From one to the other, the largest index into a table of
# positions grows by exactly their difference.
SHORT, LONG = 5, PROBE_LENGTH
FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full}


class _Reached(Exception):
    """Raised when the first block is reached: all embeddings have been looked up by then."""


def weightless(build: Callable[[], Any]) -> Any:
    """The module that `build` makes, on the processor, with weights that take no memory: each is a
    single zero, expanded to its shape. Integers (positions, masks) have their real values, so the
    module runs, but only the shapes of its results mean anything."""
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
    """Creates new floating-point tensors without memory (on the meta device), unless a device is
    named."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FACTORIES and kwargs.get("device") is None:
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
                kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)


def position_limit(model: nn.Module) -> int | None:
    """Number of tokens that the model's position tables hold; None without such tables (rotary and
    relative positions).

    A position table is an embedding whose largest index grows with the number of tokens until the
    model fails. RoBERTa and its relatives count from after the pad token's id, so that their table
    of 514 rows holds 512 positions.

    model: see `weightless`. Errors of a model that cannot read token ids alone are passed on.
    """
    short, long = _Embeddings(), _Embeddings()
    for tokens, seen in ((SHORT, short), (LONG, long)):
        with seen:
            _read(model, tokens)
    grown = [
        table
        for table, (last, _) in long.tables.items()
        if last - short.tables[table][0] == LONG - SHORT
    ]
    limits = [rows - (last - (LONG - 1)) for last, rows in map(long.tables.__getitem__, grown)]
    # Indices of relative-position buckets grow at first too, and then stay constant.
    return min(
        (limit for limit in limits if _fits(model, limit) and not _fits(model, limit + 1)),
        default=None,
    )


def _fits(model: nn.Module, tokens: int) -> bool:
    try:
        _read(model, tokens)
    except (IndexError, RuntimeError):
        return False
    return True


def _read(model: nn.Module, tokens: int) -> None:
    """Run the model on this many tokens, up to its first block."""
    with _stopping_at_blocks(model), torch.no_grad(), contextlib.suppress(_Reached):
        model(input_ids=torch.full((1, tokens), probe_token(model)))


class _Embeddings(TorchFunctionMode):
    """Records which embeddings are read: {table: (largest index, rows)}."""

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
    """Context in which the forward pass ends at the first call of a module in a ModuleList."""

    def stop(module: nn.Module, inputs: Any) -> None:
        raise _Reached

    blocks = [
        block for parts in model.modules() if isinstance(parts, nn.ModuleList) for block in parts
    ]
    handles = [block.register_forward_pre_hook(stop) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def skeleton(config: Any, spec: ModelSpec, labels: Labels | None) -> Any:
    """The model with weights that take no memory (`weightless`), for its names, shapes, and trial
    runs."""
    build: Callable[..., Any] = auto_class(spec.task).from_config
    described = with_labels(config, labels)
    model = weightless(lambda: build(described, trust_remote_code=spec.trust_remote_code))
    model.tie_weights()  # transformers 5.0 does not tie weights without memory by itself
    return model


def longest_input(config: Any, tokenizer: Any, spec: ModelSpec) -> int | None:
    """Number of tokens that the model can read, or None when it is not known: the positions of its
    tables, else those in its configuration, and no more than its tokenizer allows."""
    limits = []
    positions = _positions(config, spec)
    if isinstance(positions, int) and positions > 0:
        limits.append(positions)
    if tokenizer.model_max_length < 10**9:
        limits.append(tokenizer.model_max_length)
    return min(limits, default=None)


def _positions(config: Any, spec: ModelSpec) -> int | None:
    text = config.get_text_config()
    told = next((value for name in POSITIONS if (value := getattr(text, name, None))), None)
    try:
        tried = position_limit(skeleton(config, spec, None))
    except Exception as error:  # models that need more than token ids may fail in any way
        log.info("how many positions %s has could not be tried: %s", type(config).__name__, error)
        return told
    return told if tried is None else tried
