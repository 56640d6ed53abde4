"""Memory of training, by kind, measured on the run's own steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.optimizer import AdamW
from lorakit.compat import dispatch_mode, storage_number, tree_leaves, weak_storage
from lorakit.runs.session import Session
from lorakit.training.loop import train

MB = 2**20


def memory_kept(session: Session, optimizer: AdamW) -> dict[str, float]:
    """{kind: MB} of memory held throughout training: base, heads, adapters, gradients (at the end
    of a step's backward pass) and the optimizer's state. A storage that several tensors share
    counts once."""
    own = _own_tensors(session)
    state = [
        t for moments in optimizer.state.values() for t in vars(moments).values() if t is not None
    ]
    gradients = sum(p.numel() * p.element_size() for p in optimizer.state)
    sizes = {"base": base_bytes(session), "heads": _bytes(session.heads), "adapters": _bytes(own)}
    return {
        kind: size / MB
        for kind, size in (sizes | {"gradients": gradients, "optimizer": _bytes(state)}).items()
    }


def base_bytes(session: Session) -> int:
    """Bytes of the model without adapters and heads."""
    others = {_key(tensor) for tensor in [*_own_tensors(session), *session.heads]}
    tensors = _tensors(session.task_model.model)
    return _bytes(tensor for tensor in tensors if _key(tensor) not in others)


def _own_tensors(session: Session) -> list[Tensor]:
    adapters = session.method.adapters.values()
    return [tensor for adapter in adapters for tensor in adapter.own_tensors().values()]


def memory_passing(
    session: Session,
    optimizer: AdamW,
    numbers: Sequence[int],
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """{kind: MB} of the peak memory that is allocated and freed within a step, over the run's steps
    of these numbers, which are run.

    activations: tensors that autograd keeps for the backward pass, except logits. logits: all
    tensors whose last dimension is the vocabulary (or the classes) and that are alive at one
    moment, including gradients and float32 copies.
    """
    model, spec = session.task_model.model, session.recipe.train
    config = model.config
    width = session.task_model.task.logits_width(config)
    fixed = {_key(tensor) for tensor in _tensors(model)}
    activations, logits = LiveStorages(fixed), LiveStorages(fixed)
    for done, step in enumerate(numbers):
        advance(done, len(numbers))
        steps = train(session.task_model, session.method, optimizer, session.train, spec, step)
        with watching(activations, logits, width):
            for _ in islice(steps, 1):
                pass
    return {"activations": activations.most / MB, "logits": logits.most / MB}


class LiveStorages:
    """Counts the bytes of live storages without keeping them alive; those in `fixed` do not
    count."""

    def __init__(self, fixed: set[int]) -> None:
        self.fixed = fixed
        self.most = 0
        self._alive: dict[int, tuple[Any, int]] = {}

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if _key(tensor) in self.fixed or storage_number(storage) in self._alive:
            return
        self._alive = {key: kept for key, kept in self._alive.items() if not kept[0].expired()}
        self._alive[storage_number(storage)] = weak_storage(storage), storage.nbytes()
        self.most = max(self.most, sum(size for _, size in self._alive.values()))


class _Watch(dispatch_mode()):  # type: ignore[misc]
    """Adds to `logits` every result of an operation, in the forward and the backward pass, whose
    last dimension is `width`."""

    def __init__(self, logits: LiveStorages, width: int) -> None:
        super().__init__()
        self.logits, self.width = logits, width

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.ndim and tensor.shape[-1] == self.width:
                self.logits.add(tensor)
        return out


@contextmanager
def watching(activations: LiveStorages, logits: LiveStorages, width: int) -> Iterator[None]:
    def pack(tensor: Tensor) -> Tensor:
        if not (tensor.ndim and tensor.shape[-1] == width):
            activations.add(tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        _Watch(logits, width),
    ):
        yield


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _key(tensor: Tensor) -> int:
    """Key that is unique among storages that are alive at the same time."""
    return tensor.untyped_storage().data_ptr()


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = {_key(tensor): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())
