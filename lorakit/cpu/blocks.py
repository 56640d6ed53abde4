"""Transformer blocks of a model: finding, checkpointing and compiling them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lorakit import compat
from lorakit.adapters.layer import Adapter
from lorakit.cpu.probe import hidden_states
from lorakit.errors import LorakitError, RecipeError, RunError
from lorakit.kernels.packing import current, using
from lorakit.models.task_model import TaskModel


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The model's transformer blocks; [] if it has no list of them."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    # Blocks are the list with the most weights (buffers, if quantised): lists inside a block hold
    # fewer.
    return list(max(lists, key=_weights, default=[]))


def _weights(blocks: nn.Module) -> int:
    return sum(tensor.numel() for tensor in (*blocks.parameters(), *blocks.buffers()))


def checkpoint_blocks(
    task_model: TaskModel, recompute_context: Callable[[], AbstractContextManager[None]] | None
) -> None:
    """Keep only what enters each block for the backward pass (Chen et al., arXiv 1604.06174).

    recompute_context: the method's context for recomputing a block; None where the blocks will be
    compiled, since torch.compile traces into checkpoints and can not follow contexts.

    Raises RecipeError for an architecture that transformers can not checkpoint.
    """
    if not compat.can_checkpoint(task_model.model):
        what = f"{type(task_model.model).__name__} can not compute its blocks again"
        raise RecipeError.at("train.gradient_checkpointing", what, "false")

    settings: dict[str, Any] = {"use_reentrant": False}
    if recompute_context is not None:
        settings["context_fn"] = lambda: (
            nullcontext(),
            _both(using(current()), recompute_context()),
        )
    compat.checkpoint(task_model.model, settings)


@contextmanager
def _both(
    first: AbstractContextManager[None], second: AbstractContextManager[None]
) -> Iterator[None]:
    with first, second:
        yield


def compile_blocks(
    task_model: TaskModel, ranks_move: bool = False, backend: str = "inductor"
) -> list[str]:
    """Compile the blocks' passes with gradients by torch.compile, and try one step. Returns the
    features that compilation disables.

    Each block is compiled by itself (PyTorch's "regional compilation"). Blocks share their code, so
    the code compiled for the first block serves all; it is compiled again where settings differ, or
    sizes differ in kind (sizes are symbolic). Passes without gradients are not compiled: they use
    caches and hooks that come and go, and evaluation must give what the saved adapter gives.

    ranks_move: ranks are symbolic too. Ranks of 0 and 1 are still compiled separately, as is
    anything else that differs between blocks. After torch._dynamo.config.recompile_limit variants
    (8) torch warns, and blocks that need a further variant run uncompiled.

    Raises RecipeError for a model without a list of blocks, RunError where compiling fails.
    """
    blocks = blocks_of(task_model.model)
    if not blocks:
        what = f"{type(task_model.model).__name__} has no list of blocks to compile"
        raise RecipeError.at("train.torch_compile", what, "false")
    # Sizes of weights become symbolic once they are seen to differ; otherwise every rank of every
    # layer would be compiled separately.
    compat.compile_for_any_size()
    for block in blocks:
        moving = (
            [module for module in block.modules() if isinstance(module, Adapter)]
            if ranks_move
            else []
        )
        block.forward = _compiled(block, moving, backend)
    task_model.pads_to_train = True
    _try_compiled(task_model)
    if task_model.device.type != "cpu":
        return []
    return [
        "train.torch_compile: in training, rows are padded and blocks do without lorakit's kernels,"
        " which can not be compiled"
    ]


def _compiled(block: nn.Module, moving: Sequence[Adapter], backend: str) -> Callable[..., Any]:
    """Make the block's forward, which runs its class's compiled forward where gradients are
    wanted. moving: adapters whose ranks are symbolic."""
    forward = block.forward
    compiled = torch.compile(MethodType(type(block).forward, block), backend=backend)

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        hidden, *others = args if args else (kwargs.pop("hidden_states"),)
        if not hidden.requires_grad:  # otherwise the first block would be compiled separately
            hidden = hidden.detach().requires_grad_()
        for value in compat.tree_leaves((hidden, others, kwargs)):
            # Rows and tokens are symbolic from the start; otherwise everything would be compiled
            # twice.
            if isinstance(value, Tensor):
                compat.mark_dynamic(value, list(range(value.ndim)))
        for adapter in moving:  # in every pass, as a resized adapter has new parameters
            for name, dim in adapter.component_dims.items():
                compat.mark_dynamic(getattr(adapter, name), dim)
        return compiled(hidden, *others, **kwargs)

    return run


def _try_compiled(task_model: TaskModel) -> None:
    """Run a small step, always the same one, so that the first compilation does not depend on
    where a run starts or resumes."""
    model = task_model.model
    mode = model.training
    model.train()
    try:
        with torch.enable_grad():
            hidden = hidden_states(task_model)
            trained = [p for p in model.parameters() if p.requires_grad]
            torch.autograd.grad(hidden.float().sum(), trained, allow_unused=True)
    except Exception as error:  # dynamo and its backends raise many types
        if isinstance(error, LorakitError):
            raise
        cause = getattr(error, "inner_exception", error)  # the backend's own error
        reason = next(iter(str(cause).strip().splitlines()), "")
        what = (
            f"torch.compile fails on the blocks of {type(model).__name__}: {type(cause).__name__}:"
            f" {reason}"
        )
        raise RunError(
            what,
            "On a processor it needs a C++ compiler ($CXX, or g++). Without: train.torch_compile:"
            " false.",
        ) from error
    finally:
        model.train(mode)
