"""Environment that lorakit runs in: versions, devices, cache, builtins. Imports no torch."""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lorakit.compat import tested, untested
from lorakit.files import cache_root
from lorakit.kernels import dispatch, levels, native
from lorakit.sources.builtin import cached
from lorakit.sources.catalogue import BUILTINS, PREFIX

PACKAGES = (
    *("lorakit", "torch", "transformers", "datasets", "tokenizers", "safetensors", "numpy"),
    *("bitsandbytes", "torchao"),
)
# Device files of NVIDIA, of AMD, and of either under Windows (WSL).
GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def environment() -> dict[str, Any]:
    """{"versions", "tested", "warnings", "devices", "operations", "cache", "builtins"}.

    versions: see `versions`. tested: {package: versions that lorakit was tested with}, {} where it
    is not installed. warnings: a sentence for each package with another version. operations:
    {operation: level of the kernel that runs it}. builtins: {short name: folder that
    from_pretrained loads, or None if it is not in the cache}."""
    packages = tested()
    operations = dispatch.table(native.compiled_level()[0])
    folders = {name.removeprefix(PREFIX): cached(name) for name in BUILTINS}
    return {
        "versions": {name: known.installed for name, known in packages.items()} | versions(),
        "tested": {name: known.range for name, known in packages.items()},
        "warnings": untested(),
        "devices": _devices(),
        "operations": {name: str(level) for name, level in operations.items()},
        "cache": str(cache_root()),
        "builtins": {name: folder and str(folder) for name, folder in folders.items()},
    }


def _devices() -> dict[str, Any]:
    """The processor and the GPUs. torch is imported only where there may be a GPU: the import takes
    longer than all the rest."""
    gpus: list[str] = []
    used, precision = "cpu", "bfloat16" if levels.bfloat16_is_fast() else "float32"
    if any(Path(driver).exists() for driver in GPU_DRIVERS):
        from lorakit.runs import machine

        gpus, (used, precision) = machine.gpus(), machine.used_device()
    kernels, lowered_by = native.compiled_level()
    level, lacks = levels.machine_level()
    return {
        "used": used,
        "precision": precision,
        "cores": os.cpu_count(),
        "gpus": gpus,
        "processor": levels.processor(),
        "level": str(level),
        "level_lacks": lacks,
        "kernels": str(kernels),
        "kernels_lowered_by": lowered_by,
    }


def versions() -> dict[str, str | None]:
    """{package: version} of the packages that affect the numbers."""

    def find(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {"python": platform.python_version()} | {package: find(package) for package in PACKAGES}


def peak_memory_mb() -> float:
    """The process's peak resident set, in MB."""
    # Linux: ru_maxrss would include the size of the parent process.
    status = Path("/proc/self/status")
    found = (
        re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE)
        if status.exists()
        else None
    )
    if found:
        return round(int(found[1]) / 2**10, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)
