"""Processor levels for benchmarks and tests: the environment that stands in for each of them, and
those that this machine can run.

A lower level is emulated by capping torch, oneDNN, MKL and lorakit together, for lorakit and for
whatever it is compared with. MKL, which computes products in float32, is capped on Intel's
processors only: on others it ignores its variable, and has no code beyond AVX2 anyway (oneMKL
Developer Guide, "Instruction Set Specific Dispatching"). Imports no torch.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lorakit.kernels import levels
from lorakit.kernels.levels import Level

# At level torch, a processor without AVX2. Benchmarks leave torch free there: see `AtLevel.of`.
CAPS = {
    Level.torch: {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    Level.avx2: {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    Level.avx512: {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    Level.amx: {},
}
CAPPING = {
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    levels.VARIABLE,
}
EVERY = "all"
NAMES = [level.name for level in Level]


def environment(variables: dict[str, str]) -> dict[str, str]:
    """This process's environment with these caps and no others."""
    kept = {name: value for name, value in os.environ.items() if name not in CAPPING}
    return kept | variables


@dataclass(frozen=True)
class AtLevel:
    """A level at which arms of a benchmark run. variables: those that stand in for it, or None for
    this process's own environment; precision: bf16 or fp32, the faster one at this level, or auto
    where every arm decides by itself."""

    level: Level
    variables: dict[str, str] | None
    precision: str

    @staticmethod
    def of(level: Level) -> AtLevel:
        """The level with its caps. At level torch lorakit has no kernels, and torch is free."""
        free = level is Level.torch
        caps = {} if free else CAPS[level]
        reached = levels.machine_level()[0] if free else level
        precision = "bf16" if reached >= Level.avx512 else "fp32"
        return AtLevel(level, {**caps, levels.VARIABLE: level.name}, precision)

    @staticmethod
    def own() -> AtLevel:
        """The level of this process, with whatever its environment sets."""
        return AtLevel(levels.used(), None, "auto")

    def environment(self) -> dict[str, str]:
        """The environment of an arm. An emulated level is one of the processor: GPUs are
        hidden."""
        if self.variables is None:
            return dict(os.environ)
        return environment({**self.variables, "CUDA_VISIBLE_DEVICES": ""})

    def facts(self) -> dict[str, Any]:
        """The level, its variables, the processor, the date and the versions, for tables and
        JSON."""
        own = {name: os.environ[name] for name in sorted(CAPPING & os.environ.keys())}
        return {
            "level": self.level.name,
            "environment": own if self.variables is None else self.variables,
            "processor": levels.processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
            "date": date.today().isoformat(),
            "versions": {name: _version(name) for name in ("torch", "transformers", "peft")},
        }

    def heading(self) -> str:
        """The facts in one line."""
        facts = self.facts()
        variables = " ".join(f"{name}={value}" for name, value in facts["environment"].items())
        packages = ", ".join(
            f"{name} {found}" for name, found in facts["versions"].items() if found is not None
        )
        return (
            f"level {self.level} ({variables or 'nothing capped'}); {facts['processor']},"
            f" {facts['cores'] or os.cpu_count()} cores; {facts['date']}; {packages}"
        )


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add --levels to a command; `chosen` reads it."""
    parser.add_argument(
        "--levels",
        nargs="+",
        choices=[*NAMES, EVERY],
        help="processor levels, one table each; all: every level that the machine can run."
        " By default the machine's own level, with the environment as it is",
    )


def chosen(names: list[str] | None) -> tuple[list[AtLevel], str]:
    """(the levels of --levels that this machine can run, a line that names the others, or "")."""
    if not names:
        return [AtLevel.own()], ""
    highest, lacks = levels.machine_level()
    wanted = [level for level in Level if EVERY in names or level.name in names]
    above = ", ".join(level.name for level in wanted if level > highest)
    left_out = f"left out, since this machine has no such level: {above} ({lacks})" if above else ""
    return [AtLevel.of(level) for level in wanted if level <= highest], left_out


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
