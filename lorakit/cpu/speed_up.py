"""CPU fast path for training passes, for any architecture. Each optimisation is verified on the
model before it is used; where one can not be used, transformers' own code runs and the reason is
reported."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from lorakit import process
from lorakit.adapters.layer import Adapter
from lorakit.cpu.optimisations import (
    FirstTokens,
    FrozenLinears,
    PackedRows,
    SharedInputs,
    WholeBlocks,
    has_products,
)
from lorakit.cpu.probe import Probe
from lorakit.kernels.optimisation import Unsupported, attempt
from lorakit.kernels.products import multiple
from lorakit.models.task_model import TaskModel

log = logging.getLogger("lorakit")


def speed_up(task_model: TaskModel, adapters: Mapping[str, Adapter]) -> list[str]:
    """Install the optimisations that the model supports. Returns a sentence with the reason if
    rows can not be packed; other reasons are logged."""
    if task_model.device.type != "cpu":  # elsewhere transformers' kernels do better on padded rows
        return []
    process.keep_freed_memory()
    model = task_model.model
    mode = model.training
    model.eval()
    try:
        reason = _optimise(task_model, adapters)
    finally:
        model.train(mode)
    return [f"rows are padded instead of packed, which is slower: {reason}"] if reason else []


def _optimise(task_model: TaskModel, adapters: Mapping[str, Adapter]) -> str | None:
    """Install the optimisations; returns None, or the reason why rows are not packed."""
    in_c = has_products(task_model.model)
    try:
        probe = Probe(task_model, adapters)
    except Unsupported as error:
        return str(error)
    if in_c and (reason := attempt(FrozenLinears(probe))):
        log.info("frozen layers are computed by torch, which is slower: %s", reason)
    packed, trouble = None, None
    try:
        packed = PackedRows(probe)
    except Unsupported as error:
        trouble = str(error)
    if packed is not None and (trouble := attempt(packed)):
        return trouble
    if reason := attempt(SharedInputs(probe, adapters)):
        log.info(
            "layers that read the same input are multiplied one by one, which may be slower: %s",
            reason,
        )
    if in_c and task_model.compiles:
        log.info(
            "some products are computed by torch, which is slower: their sizes are no multiples"
            " of %d",
            multiple(task_model.model.base_model.dtype),
        )
    if in_c and packed is not None:
        if reason := attempt(WholeBlocks(probe, packed.hooks.blocks)):
            log.info("blocks are run layer by layer, which is slower: %s", reason)
        elif not task_model.task.predicts_tokens:
            reason = attempt(FirstTokens(probe, packed.hooks.blocks[-1]))
            log.debug("the last block computes %s", reason or "first tokens only")
    return trouble
