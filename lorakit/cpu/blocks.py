"""Blocks of transformers: which they are, computed again for the backward pass, and compiled."""

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
    """The model's transformer blocks; [] where it has no list of them."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    # The list with the most parameters: lists inside of blocks hold fewer.
    return list(
        max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()), default=[])
    )


def checkpoint_blocks(
    task_model: TaskModel, recompute_context: Callable[[], AbstractContextManager[None]] | None
) -> None:
    """Keep only what enters each block for the backward pass (Chen et al., arXiv 1604.06174).

    recompute_context: the method's; None where the blocks will be compiled, which then looks into
    the checkpoints and can not follow contexts.

    Raises RecipeError for an architecture that transformers can not do it for.
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
    """Let torch.compile make the blocks' passes with gradients, and try it. Returns what is done
    without because of it.

    Each block is compiled by itself ("regional compilation", PyTorch's recipe of that name): they
    share their code, so what is made for the first serves all, and again where sizes, which are
    symbols, or settings differ in kind. Passes without gradients stay as they are: they use caches
    and hooks that come and go, and what is evaluated is what the saved adapter gives.

    ranks_move: ranks are symbols too. Still, ranks of 0 and 1 are compiled for apart, as is
      whatever else differs between blocks;
    after torch._dynamo.config.recompile_limit forms (8) torch warns, and blocks of further ones run
    as without compilation.

    Raises RecipeError for a model without a list of blocks, RunError where compiling fails.
    """
    blocks = blocks_of(task_model.model)
    if not blocks:
        what = f"{type(task_model.model).__name__} has no list of blocks to compile"
        raise RecipeError.at("train.torch_compile", what, "false")
    # Else every rank of every layer would be compiled for; so, sizes of weights become symbols once
    # they are seen to differ.
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
    """The block's forward; where gradients are wanted, that of its class, compiled. moving:
    adapters whose ranks are symbols."""
    forward = block.forward
    compiled = torch.compile(MethodType(type(block).forward, block), backend=backend)

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        hidden, *others = args if args else (kwargs.pop("hidden_states"),)
        if not hidden.requires_grad:  # else the first block would be compiled apart from the others
            hidden = hidden.detach().requires_grad_()
        for value in compat.tree_leaves((hidden, others, kwargs)):
            # rows and tokens are symbols from the first on, or all would be compiled twice
            if isinstance(value, Tensor):
                compat.mark_dynamic(value, list(range(value.ndim)))
        for adapter in moving:  # each time, as a rank that moved has new parameters
            for name, dim in adapter.component_dims.items():
                compat.mark_dynamic(getattr(adapter, name), dim)
        return compiled(hidden, *others, **kwargs)

    return run


def _try_compiled(task_model: TaskModel) -> None:
    """A small step, always the same, so that what is compiled first does not depend on where a run
    starts or resumes."""
    model = task_model.model
    mode = model.training
    model.train()
    try:
        with torch.enable_grad():
            hidden = hidden_states(task_model)
            trained = [p for p in model.parameters() if p.requires_grad]
            torch.autograd.grad(hidden.float().sum(), trained, allow_unused=True)
    except Exception as error:  # dynamo and its backends raise all kinds
        if isinstance(error, LorakitError):
            raise
        cause = getattr(error, "inner_exception", error)  # what a backend raised
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
