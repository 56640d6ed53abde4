"""Environment that lorakit runs in: versions, devices, cache, builtins."""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lorakit.compat import tested, untested
from lorakit.files import cache_root
from lorakit.kernels import dispatch, levels, native
from lorakit.models.load import compute_dtype, default_device
from lorakit.sources.builtin import BUILTINS, cached

PACKAGES = ("lorakit", "torch", "transformers", "datasets", "tokenizers", "safetensors", "numpy")


def environment() -> dict[str, Any]:
    """{"versions", "tested", "warnings", "devices", "operations", "cache", "builtins": {short name:
    folder | None}}; the folders are what from_pretrained loads. operations: {operation: the level of
    the kernel that does it}. tested: {package: the versions that lorakit was tested with}, {} where
    it is not installed; warnings: a sentence for each package with another version."""
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
        "operations": {name: str(level) for name, level in dispatch.table().items()},
        "cache": str(cache_root()),
        "builtins": {name.removeprefix("builtin/"): str(folder) if (folder := cached(name)) else None for name in BUILTINS},
    }


def versions() -> dict[str, str | None]:
    """{package: version} of what decides the numbers."""

    def find(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {"python": platform.python_version()} | {package: find(package) for package in PACKAGES}


def machine() -> dict[str, Any]:
    """Machine that the numbers were computed on.

    level: the highest of the processor's (`lorakit.kernels.levels`); kernels: the one that lorakit's run at; kernels_lowered_by:
    why that is less, or "".
    """
    kernels, lowered_by = native.level_and_reason()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(),
        "architecture": platform.machine(),
        "processor": levels.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "level": str(levels.machine_level()[0]),
        "kernels": str(kernels),
        "kernels_lowered_by": lowered_by,
    }


def peak_memory_mb() -> float:
    """The process's highest resident set, in MB."""
    status = Path("/proc/self/status")  # Linux: ru_maxrss would start at the size of the process that started this one
    found = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE) if status.exists() else None
    if found:
        return round(int(found[1]) / 2**10, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)
