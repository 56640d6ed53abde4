"""What lorakit runs on: versions, devices, cache, builtins."""

from __future__ import annotations

from typing import Any

import torch

from lorakit.builtin import BUILTINS, cache_root, cached
from lorakit.compat import tested, untested
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
            "processor": torch.backends.cpu.get_cpu_capability(),
            "kernels_in_c": here["kernels_in_c"],
            "products_by_tiles": here["products_by_tiles"],
        },
        "cache": str(cache_root()),
        "builtins": {name.removeprefix("builtin/"): str(folder) if (folder := cached(name)) else None for name in BUILTINS},
    }
