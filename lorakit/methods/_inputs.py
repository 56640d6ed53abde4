"""Inputs of the adapted layers while training rows pass through the model, before the first
step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.base import in_out
from lorakit.adapters.layer import Adapter
from lorakit.methods._base import Calibration


def watch_inputs(
    adapters: Mapping[str, Adapter],
    calibration: Calibration,
    rows: int,
    see: Callable[[str, Tensor], None],
) -> None:
    """Run `rows` training rows through the model; see(module, x [tokens, in]) is called for each
    batch and adapted layer, with the inputs of the real tokens in the model's type."""
    real: Tensor = torch.zeros(0)

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            see(name, x[real] if x.shape[:-1] == real.shape else x.reshape(-1, x.shape[-1]))

        return hook

    hooks = [adapter.register_forward_pre_hook(watch(name)) for name, adapter in adapters.items()]
    done = 0
    try:
        with calibration.stage("calibrating") as advance:
            for batch in calibration.batches(rows):
                real = batch.attention_mask.bool()
                calibration.forward(batch)
                done += len(batch.row_ids)
                advance(done, min(rows, calibration.rows))
    finally:
        for hook in hooks:
            hook.remove()


def input_norms(
    adapters: Mapping[str, Adapter], calibration: Calibration, rows: int
) -> dict[str, Tensor]:
    """{module: ‖x_j‖₂ of each of its inputs [in] over the real tokens of `rows` training rows}
    (Wanda, arXiv 2306.11695, eq. 1). Zeros for a module that read none."""
    sums = {
        name: torch.zeros(in_out(a.base)[0], device=a.lora_A.device) for name, a in adapters.items()
    }

    def add(name: str, x: Tensor) -> None:
        sums[name] += x.float().square().sum(0)

    watch_inputs(adapters, calibration, rows, add)
    return {name: total.sqrt() for name, total in sums.items()}
