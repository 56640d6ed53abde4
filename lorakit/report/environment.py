"""What lorakit runs on: versions, devices, cache, builtins."""

from __future__ import annotations

from typing import Any

import torch

from lorakit.builtin import BUILTINS, cache_root, cached
from lorakit.compat import tested, untested
from lorakit.kernels import levels
from lorakit.model import compute_dtype, default_device
from lorakit.run import machine, versions


def environment() -> dict[str, Any]:
    """{"versions", "tested", "warnings", "devices", "cache", "builtins": {short name: folder | None}}; the folders are what
    from_pretrained loads. tested: {package: the versions that lorakit was tested with}, {} where it is not installed; warnings: a
    sentence for each package with another version."""
    device = default_device()
    here, packages = machine(), tested()
    return {
        "versions": {package: known.installed for package, known in packages.items()} | versions(),
        "tested": {package: known.range for package, known in packages.items()},
        "warnings": untested(),
        "devices": {
            "used": str(device),
            "precision": str(compute_dtype("auto", device)).removeprefix("torch."),
            "cores": here["cores"],
            "threads": torch.get_num_threads(),
            "gpus": here["gpus"],
            "processor": here["processor"],
            "level": here["level"],
            "level_lacks": levels.machine_level()[1],
            "kernels": here["kernels"],
            "kernels_lowered_by": here["kernels_lowered_by"],
            "torch_kernels": torch.backends.cpu.get_cpu_capability(),
        },
        "cache": str(cache_root()),
        "builtins": {name.removeprefix("builtin/"): str(folder) if (folder := cached(name)) else None for name in BUILTINS},
    }
