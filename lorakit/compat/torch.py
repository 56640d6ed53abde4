"""torch: operations on lists of tensors, storages, hooks, dispatch, compilation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from lorakit.compat.lookup import attribute, part


class _Foreach:
    """torch's operations on lists of tensors: `foreach.add_(tensors, 1.0)`."""

    def __getattr__(self, name: str) -> Any:
        operation = part(f"torch._foreach_{name}")
        setattr(self, name, operation)
        return operation


foreach = _Foreach()


def fused_adamw() -> Callable[..., Any]:
    """torch's AdamW step over lists of tensors."""
    found: Callable[..., Any] = part("torch._fused_adamw_")
    return found


def tree_leaves(tree: Any) -> list[Any]:
    """Leaves of nested lists, tuples and mappings."""
    found: list[Any] = part("torch.utils._pytree.tree_leaves")(tree)
    return found


def dispatch_mode() -> Any:
    """torch's base class for an object that sees every operation."""
    return part("torch.utils._python_dispatch.TorchDispatchMode")


def weak_storage(storage: Any) -> Any:
    """Make a weak reference to a tensor's storage, with a method `expired`."""
    return part("torch.multiprocessing.reductions.StorageWeakRef")(storage)


def storage_number(storage: Any) -> int:
    """A number that identifies a storage while it is alive."""
    number: int = attribute(storage, "_cdata", "torch")
    return number


def has_forward_hooks(module: Any) -> bool:
    """True if a hook watches or changes the inputs or the outputs of the module."""
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return any(attribute(module, name, "torch") for name in hooks)


def process_store(timeout: timedelta, prefix: str) -> tuple[Any, int, int]:
    """(store, rank, number of processes) that the environment says (RANK, WORLD_SIZE, MASTER_ADDR
    …), with a prefix before the keys of the store."""
    rendezvous = part("torch.distributed.rendezvous.rendezvous")
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    return part("torch.distributed.PrefixStore")(prefix, store), rank, size


def check_apply() -> None:
    """Raise RunError unless torch moves modules to devices and types with `_apply`, which an
    adapter overrides."""
    part("torch.nn.Module._apply")


def compile_for_any_size() -> None:
    """Let torch.compile treat sizes of parameters like sizes of inputs: as symbolic once they are
    seen to differ."""
    config, name = part("torch._dynamo.config"), "force_parameter_static_shapes"
    attribute(config, name, "torch")
    setattr(config, name, False)


@contextlib.contextmanager
def sizes_restored() -> Iterator[None]:
    """Context that restores the setting changed by `compile_for_any_size` when it ends."""
    config, name = part("torch._dynamo.config"), "force_parameter_static_shapes"
    before = attribute(config, name, "torch")
    try:
        yield
    finally:
        setattr(config, name, before)


def mark_dynamic(tensor: Any, dims: list[int] | int) -> None:
    """Let torch.compile treat the sizes of these dimensions as symbolic from the first pass."""
    part("torch._dynamo.maybe_mark_dynamic")(tensor, dims)
