"""What makes training passes fast on processors, whatever the architecture. Each is tried on the model before it is used; where
it can not be, the model runs as transformers has it, and the reason is told."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapter import Adapter
from lorakit.kernels.attention import NAME as ATTENTION
from lorakit.kernels.packing import BlockHooks, Packing, using
from lorakit.model import TaskModel
from lorakit.shared_input import SharedInput, can_share

# Rows of random tokens that are tried; how far hidden states may differ, as a share of their spread, and as a multiple of how far
# roundings alone carry them where rows are padded some more.
LENGTHS, MORE_PADDING = (7, 2, 12, 1), 4
TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 0.02}
TIMES_ROUNDINGS = 2.5
# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


@torch.no_grad()
def speed_up(task_model: TaskModel, adapters: Mapping[str, Adapter]) -> list[str]:
    """Pack rows and join layers that read the same input. Returns why not, for each that can not be."""
    _keep_freed_memory()
    if task_model.device.type != "cpu":  # elsewhere transformers' kernels do better on padded rows
        return []
    mode = task_model.model.training
    task_model.model.eval()
    try:
        reason = _pack(task_model)
        _share_inputs(task_model, adapters)
    finally:
        task_model.model.train(mode)
    return [f"rows are padded instead of packed, which is slower: {reason}"] if reason else []


def _keep_freed_memory() -> None:
    """Let freed memory wait for the next step instead of going back to the system, which hands it out page by page again: a
    tenth of a step of a small model."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _pack(task_model: TaskModel) -> str | None:
    """Let rows go through the model's blocks without padding; returns None, or the reason why they can not.

    The body must give what it gives for the padded rows.
    """
    model = task_model.model
    if model.config._attn_implementation != ATTENTION:
        return f"the model's attention is `{model.config._attn_implementation}`"
    lists: list[nn.ModuleList] = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        return "the model has no list of blocks"
    # The list with the most parameters: lists inside of blocks hold fewer.
    blocks = max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))
    hooks = BlockHooks(list(blocks))
    config = model.config.get_text_config()
    if dropped := [name for name, value in config.to_dict().items() if name.endswith("layerdrop") and value]:
        return f"the model leaves blocks out at random ({', '.join(dropped)})"
    real = _mask()
    try:
        expected = _body(task_model)[real].float()
        wider = _body(task_model, MORE_PADDING)[:, : max(LENGTHS)][real].float()
        hooks.install()
        with using(Packing(LENGTHS, max(LENGTHS), task_model.device)):
            packed = _body(task_model)[real].float()
    except Exception as error:  # anything may go wrong in a model that looks at its mask
        hooks.remove()
        return f"its blocks do not take packed rows ({type(error).__name__}: {error})"
    spread = (expected - expected.mean(0)).norm()
    share, roundings = (float((other - expected).norm() / spread) for other in (packed, wider))
    task_model.packs = share <= max(TOLERANCE.get(model.dtype, 0.0), TIMES_ROUNDINGS * roundings)
    if task_model.packs:
        return None
    hooks.remove()
    return f"its hidden states would differ by {share:.1%}"


def _share_inputs(task_model: TaskModel, adapters: Mapping[str, Adapter]) -> None:
    """Join adapted layers that are called one after the other with the very same tensor."""
    calls: list[tuple[Adapter, Tensor]] = []

    def seen(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, Adapter)
        calls.append((module, inputs[0]))

    handles = [adapter.register_forward_pre_hook(seen) for adapter in adapters.values()]
    try:
        _body(task_model)
    finally:
        for handle in handles:
            handle.remove()
    group: list[Adapter] = []
    for number, (adapter, x) in enumerate(calls):
        group.append(adapter)
        if number + 1 == len(calls) or calls[number + 1][1] is not x:
            if can_share(group) and not any(layer.dropout for layer in group):
                shared = SharedInput(group)
                for layer in group:
                    layer.shared = shared
            group = []
    try:
        with torch.enable_grad():  # what one product gave must not be changed in place, as some models do
            _body(task_model)
    except RuntimeError:
        for adapter in adapters.values():
            adapter.shared = None


def _mask(more: int = 0) -> Tensor:
    return torch.arange(max(LENGTHS) + more) < torch.tensor(LENGTHS)[:, None]


def _body(task_model: TaskModel, more: int = 0) -> Tensor:
    """Hidden states of rows of random tokens [rows, longest + more, hidden], padded to `more` places than needed."""
    model, mask = task_model.model, _mask(more)
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    words = model.config.get_text_config().vocab_size
    ids[:, : max(LENGTHS)] = torch.randint(words, _mask().shape, generator=torch.Generator().manual_seed(0))
    settings = {"use_cache": False} if task_model.task == "causal-lm" else {}
    hidden: Tensor = model.base_model(input_ids=ids, attention_mask=mask.long(), **settings).last_hidden_state
    return hidden
