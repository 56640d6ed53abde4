"""The machine that computes, as torch sees it."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from lorakit.kernels import levels, native
from lorakit.models.load import compute_dtype, default_device


def machine() -> dict[str, Any]:
    """Record of the machine for a run's manifest.

    level: the processor's highest (`lorakit.kernels.levels`); kernels: the level at which lorakit's
    kernels run; kernels_lowered_by: the reason why that is lower, or "".
    """
    kernels, lowered_by = native.level_and_reason()
    return {
        "system": platform.platform(),
        "architecture": platform.machine(),
        "processor": levels.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus(),
        "level": str(levels.machine_level()[0]),
        "kernels": str(kernels),
        "kernels_lowered_by": lowered_by,
    }


def gpus() -> list[str]:
    """Names of the GPUs."""
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def used_device() -> tuple[str, str]:
    """(device that a run uses, type that it computes in)."""
    device = default_device()
    return str(device), str(compute_dtype("auto", device)).removeprefix("torch.")
