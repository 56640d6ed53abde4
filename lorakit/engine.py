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

# Rows of random tokens that are tried, and how far hidden states may differ, as a share of their spread.
LENGTHS = (7, 2, 12, 1)
# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.05}


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
    real = _mask()
    try:
        expected = _body(task_model)[real].float()
        hooks.install()
        with using(Packing(LENGTHS, max(LENGTHS), task_model.device)):
            packed = _body(task_model)[real].float()
    except Exception as error:  # anything may go wrong in a model that looks at its mask
        hooks.remove()
        return f"its blocks do not take packed rows ({type(error).__name__}: {error})"
    share = float((packed - expected).norm() / (expected - expected.mean(0)).norm())
    task_model.packs = share <= TOLERANCE.get(model.dtype, 0.0)
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
    for (adapter, x), (following, next_x) in zip(calls, [*calls[1:], (None, None)], strict=True):
        group.append(adapter)
        if following is None or next_x is not x:
            if can_share(group) and not any(layer.dropout for layer in group):
                shared = SharedInput(group)
                for layer in group:
                    layer.shared = shared
            group = []


def _mask() -> Tensor:
    return torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


def _body(task_model: TaskModel) -> Tensor:
    """Hidden states of padded rows of random tokens [rows, longest, hidden]."""
    model, mask = task_model.model, _mask()
    ids = torch.randint(model.config.get_text_config().vocab_size, mask.shape, generator=torch.Generator().manual_seed(0))
    more = {"use_cache": False} if task_model.task == "causal-lm" else {}
    hidden: Tensor = model.base_model(input_ids=ids, attention_mask=mask.long(), **more).last_hidden_state
    return hidden
