"""CPU fast path for training passes, whatever the architecture. Each optimisation is tried on the model before it is used; where
it can not be used, the model runs as transformers has it, and the reason is reported."""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit import compat
from lorakit.adapters.layer import Adapter, in_out
from lorakit.adapters.shared_input import SharedInput, can_share
from lorakit.cpu.bert import BertBlock
from lorakit.cpu.llama import LlamaBlock
from lorakit.cpu.whole_block import Unsupported, WholeBlock
from lorakit.errors import LorakitError, RecipeError, RunError
from lorakit.kernels import native
from lorakit.kernels.attention import NAME as ATTENTION
from lorakit.kernels.lora_linear import TILE, frozen_linear
from lorakit.kernels.packing import BlockHooks, Packing, current, using
from lorakit.models.task_model import TaskModel

log = logging.getLogger("lorakit")

# Rows of random tokens that are tried; how far hidden states may differ, as a share of their spread, or else as a multiple of how
# far roundings alone carry them where rows are padded some more.
LENGTHS, MORE_PADDING = (7, 2, 12, 1), 4
TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 0.05}
TIMES_ROUNDINGS = 2.5
WHOLE_BLOCKS: tuple[type[LlamaBlock] | type[BertBlock], ...] = (LlamaBlock, BertBlock)
# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def speed_up(task_model: TaskModel, adapters: Mapping[str, Adapter]) -> list[str]:
    """Pack rows and join layers that read the same input. Returns why not, for what can not be."""
    if task_model.device.type != "cpu":  # elsewhere transformers' kernels do better on padded rows
        return []
    _keep_freed_memory()
    model = task_model.model
    mode = model.training
    model.eval()
    try:
        reason = _try(task_model, adapters)
    finally:
        model.train(mode)
    return [f"rows are padded instead of packed, which is slower: {reason}"] if reason else []


def checkpoint_blocks(task_model: TaskModel, recompute_context: Callable[[], AbstractContextManager[None]] | None) -> None:
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
def _both(first: AbstractContextManager[None], second: AbstractContextManager[None]) -> Iterator[None]:
    with first, second:
        yield


def compile_blocks(task_model: TaskModel, ranks_move: bool = False, backend: str = "inductor") -> list[str]:
    """Let torch.compile make the blocks' passes with gradients, and try it. Returns what is done without because of it.

    Each block is compiled by itself ("regional compilation", PyTorch's recipe of that name): they share their code, so what is
    made for the first serves all, and again where sizes, which are symbols, or settings differ in kind. Passes without gradients
    stay as they are: they use caches and hooks that come and go, and what is evaluated is what the saved adapter gives.

    ranks_move: ranks are symbols too. Still, ranks of 0 and 1 are compiled for apart, as is whatever else differs between blocks;
    after torch._dynamo.config.recompile_limit forms (8) torch warns, and blocks of further ones run as without compilation.

    Raises RecipeError for a model without a list of blocks, RunError where compiling fails.
    """
    blocks = _blocks(task_model.model)
    if not blocks:
        what = f"{type(task_model.model).__name__} has no list of blocks to compile"
        raise RecipeError.at("train.torch_compile", what, "false")
    # Else every rank of every layer would be compiled for; so, sizes of weights become symbols once they are seen to differ.
    compat.compile_for_any_size()
    for block in blocks:
        moving = [module for module in block.modules() if isinstance(module, Adapter)] if ranks_move else []
        block.forward = _compiled(block, moving, backend)
    task_model.pads_to_train = True
    _try_compiled(task_model)
    if task_model.device.type != "cpu":
        return []
    return [
        "train.torch_compile: in training, rows are padded and blocks do without lorakit's kernels, which can not be compiled"
    ]


def _compiled(block: nn.Module, moving: Sequence[Adapter], backend: str) -> Callable[..., Any]:
    """The block's forward; where gradients are wanted, that of its class, compiled. moving: adapters whose ranks are symbols."""
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
            if isinstance(value, Tensor):  # rows and tokens are symbols from the first on, or all would be compiled twice
                compat.mark_dynamic(value, list(range(value.ndim)))
        for adapter in moving:  # each time, as a rank that moved has new parameters
            for name, dim in adapter.component_dims.items():
                compat.mark_dynamic(getattr(adapter, name), dim)
        return compiled(hidden, *others, **kwargs)

    return run


def _try_compiled(task_model: TaskModel) -> None:
    """A small step, always the same, so that what is compiled first does not depend on where a run starts or resumes."""
    model = task_model.model
    mode = model.training
    model.train()
    try:
        with torch.enable_grad():
            hidden = _body(task_model)
            trained = [p for p in model.parameters() if p.requires_grad]
            torch.autograd.grad(hidden.float().sum(), trained, allow_unused=True)
    except Exception as error:  # dynamo and its backends raise all kinds
        if isinstance(error, LorakitError):
            raise
        cause = getattr(error, "inner_exception", error)  # what a backend raised
        reason = next(iter(str(cause).strip().splitlines()), "")
        what = f"torch.compile fails on the blocks of {type(model).__name__}: {type(cause).__name__}: {reason}"
        raise RunError(
            what, "On a processor it needs a C++ compiler ($CXX, or g++). Without: train.torch_compile: false."
        ) from error
    finally:
        model.train(mode)


def _keep_freed_memory() -> None:
    """Let freed memory wait for the next step instead of going back to the system, which hands it out page by page again: a
    tenth of a step of a small model."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never


def _try(task_model: TaskModel, adapters: Mapping[str, Adapter]) -> str | None:
    """Join layers; let rows go through the model's blocks without padding. Returns None, or the reason why they can not.

    The body must give what it gave for padded rows and layers by themselves.
    """
    real = _mask()
    tiles = task_model.model.base_model.dtype == torch.bfloat16 and native.load_with_tiles("linear") is not None
    if tiles:
        _use_tiles(task_model.model)
    try:
        expected, calls = _watched(task_model, adapters)
    except Exception as error:  # anything may go wrong in a body that wants other arguments than ids and a mask
        return f"its body does not run by itself ({type(error).__name__}: {error})"
    if expected.shape[:2] != real.shape:
        return f"its body gives {expected.shape[1]} hidden states for {real.shape[1]} tokens"
    expected = expected[real].float()
    _share_inputs(calls)
    hooks, reason = _block_hooks(task_model.model)
    if hooks is not None:
        hooks.install()
    packing = None if hooks is None else Packing(LENGTHS, max(LENGTHS), task_model.device)
    for joined in (True, False):
        try:
            # With gradients: what one product gave must not be changed in place, as some models do.
            with using(packing), torch.enable_grad():
                found = _body(task_model).detach()[real].float()
        except Exception as error:  # anything may go wrong in a model that looks at its mask
            trouble: str | None = f"its blocks do not take packed rows ({type(error).__name__}: {error})"
        else:
            trouble = _difference(task_model, expected, found)
        if trouble is None:
            task_model.packs = hooks is not None
            task_model.compiles = not (tiles and hooks is not None and all(map(_fits_tiles, hooks.blocks)))
            if tiles and task_model.compiles:
                log.info("some products go without AMX tiles, which is slower: their sizes are no multiples of %d", TILE)
            if tiles and hooks is not None and packing is not None:
                _run_whole(task_model, hooks.blocks, packing, expected)
            return reason
        if joined:
            if any(adapter.shared is not None for adapter in adapters.values()):
                log.info("layers that read the same input are multiplied one by one, which may be slower: %s", trouble)
            for adapter in adapters.values():
                adapter.shared = None
    if hooks is not None:
        hooks.remove()
    return reason or trouble


def _run_whole(task_model: TaskModel, blocks: Sequence[nn.Module], packing: Packing, expected: Tensor) -> None:
    """Let blocks of known makes be one operation each, where that gives the expected hidden states [tokens, hidden]."""
    whole: list[WholeBlock] = []
    trouble: str | None = f"{type(blocks[0]).__name__} is neither of Llama's make nor of BERT's"
    for make in WHOLE_BLOCKS:
        try:
            whole = [make(block, task_model.model.config) for block in blocks]
            break
        except Unsupported as reason:
            if make.parts == {name for name, _ in blocks[0].named_children()}:
                trouble = str(reason)
    for block in whole:
        block.install()
    if whole:
        try:
            with using(packing), torch.enable_grad():
                found = _body(task_model).detach()[_mask()].float()
        except Exception as error:  # anything may go wrong in blocks that only look like others
            trouble = f"{type(error).__name__}: {error}"
        else:
            trouble = _difference(task_model, expected, found)
    if trouble:
        log.info("blocks are run layer by layer, which is slower: %s", trouble)
        for block in whole:
            block.remove()


def _use_tiles(model: nn.Module) -> None:
    """Let frozen linear layers go through `frozen_linear`; only `forward` of the instance changes."""
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in vars(module):
            module.forward = MethodType(_by_tiles, module)  # type: ignore[method-assign]


def _by_tiles(self: nn.Linear, x: Tensor) -> Tensor:
    return nn.Linear.forward(self, x) if self.weight.requires_grad else frozen_linear(x, self.weight, self.bias)


def _fits_tiles(block: nn.Module) -> bool:
    """True if every product of a block, but its attention's, goes by tiles."""
    adapted = [module.base for module in block.modules() if isinstance(module, Adapter)]
    layers = [module for module in block.modules() if isinstance(module, nn.Linear | Conv1D)]
    by_tiles = all(type(layer) is nn.Linear or any(layer is base for base in adapted) for layer in layers)
    return by_tiles and all(size % TILE == 0 for layer in layers for size in in_out(layer))


def _block_hooks(model: Any) -> tuple[BlockHooks | None, str | None]:
    """The hooks that pack the model's rows, or None and why there can be none, as far as one can see."""
    if (attention := compat.attention_name(model.config)) != ATTENTION:
        return None, f"the model's attention is `{attention}`"
    blocks = _blocks(model)
    if not blocks:
        return None, "the model has no list of blocks"
    settings = model.config.get_text_config().to_dict()
    if dropped := [name for name, value in settings.items() if name.endswith("layerdrop") and value]:
        return None, f"the model leaves blocks out at random ({', '.join(dropped)})"
    return BlockHooks(blocks), None


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The model's transformer blocks; [] where it has no list of them."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    # The list with the most parameters: lists inside of blocks hold fewer.
    return list(max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()), default=[]))


@torch.no_grad()
def _difference(task_model: TaskModel, expected: Tensor, found: Tensor) -> str | None:
    """None, or by how much hidden states [tokens, hidden] differ, where it is more than roundings explain."""
    spread = (expected - expected.mean(0)).norm()
    share = float((found - expected).norm() / spread)
    if share <= TOLERANCE.get(task_model.model.base_model.dtype, 0.0):
        return None
    with using(None):
        wider = _body(task_model, MORE_PADDING)[:, : max(LENGTHS)][_mask()].float()
    roundings = float((wider - expected).norm() / spread)
    return None if share <= TIMES_ROUNDINGS * roundings else f"its hidden states would differ by {share:.1%}"


@torch.no_grad()
def _watched(task_model: TaskModel, adapters: Mapping[str, Adapter]) -> tuple[Tensor, list[tuple[Adapter, Tensor]]]:
    """(hidden states of padded rows; each adapter with what it read, in the order of their calls)."""
    calls: list[tuple[Adapter, Tensor]] = []

    def seen(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, Adapter)
        calls.append((module, inputs[0]))

    handles = [adapter.register_forward_pre_hook(seen) for adapter in adapters.values()]
    try:
        return _body(task_model), calls
    finally:
        for handle in handles:
            handle.remove()


def _share_inputs(calls: Sequence[tuple[Adapter, Tensor]]) -> None:
    """Join adapted layers that were called one after the other with the very same tensor."""
    group: list[Adapter] = []
    for number, (adapter, x) in enumerate(calls):
        group.append(adapter)
        if number + 1 == len(calls) or calls[number + 1][1] is not x:
            if can_share(group) and not any(layer.dropout for layer in group):
                shared = SharedInput(group)
                for layer in group:
                    layer.shared = shared
            group = []


def _mask(more: int = 0) -> Tensor:
    return torch.arange(max(LENGTHS) + more) < torch.tensor(LENGTHS)[:, None]


def _body(task_model: TaskModel, more: int = 0) -> Tensor:
    """Hidden states of rows of random tokens [rows, longest + more, hidden], padded to `more` places than needed."""
    model, mask = task_model.model, _mask(more)
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    words = model.config.get_text_config().vocab_size
    ids[:, : max(LENGTHS)] = torch.randint(words, _mask().shape, generator=torch.Generator().manual_seed(0))
    settings = {"use_cache": False} if task_model.task == "causal-lm" else {}
    ids, mask = ids.to(task_model.device), mask.to(task_model.device)
    hidden: Tensor = model.base_model(input_ids=ids, attention_mask=mask.long(), **settings).last_hidden_state
    return hidden
