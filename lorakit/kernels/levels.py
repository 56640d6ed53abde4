"""Processor levels: what the processor can do, and which level lorakit uses. There are four, and
each includes the lower ones.

    torch    no kernels of lorakit's own: torch computes everything
    avx2     kernels in C with vectors of 8 floats; bfloat16 is emulated, so `precision: auto` means
             float32
    avx512   vectors of 16 floats, and conversions to bfloat16; `precision: auto` means bfloat16
             from here on
    amx      matrix products in bfloat16 by AMX

AVX-512 without its bfloat16 instructions (Intel before Cooper Lake) counts as avx2.

`LORAKIT_KERNELS` names a level, or `auto`. `ATEN_CPU_CAPABILITY` and `ONEDNN_MAX_CPU_ISA` cap
torch; they cap lorakit too, as they are set to emulate a lesser processor. This module imports no
torch.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from enum import IntEnum
from functools import cache
from pathlib import Path

from lorakit.errors import UsageError

VARIABLE = "LORAKIT_KERNELS"
AUTO = "auto"
# The system call of Linux on x86-64 that requests permission to use AMX; without permission, AMX
# instructions end the process (Linux, Documentation/arch/x86/xstate.rst).
SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18


class Level(IntEnum):
    """A level; higher ones compare as greater."""

    torch, avx2, avx512, amx = range(4)

    def __str__(self) -> str:
        return self.name


# Features that each level adds to the one below it: {name in /proc/cpuinfo: compiler flag}.
INSTRUCTIONS: dict[Level, dict[str, str]] = {
    Level.avx2: {
        "avx2": "-mavx2",
        "fma": "-mfma",
        "f16c": "-mf16c",
        "bmi1": "-mbmi",
        "bmi2": "-mbmi2",
        "abm": "-mlzcnt",
    },
    Level.avx512: {
        "avx512f": "-mavx512f",
        "avx512bw": "-mavx512bw",
        "avx512dq": "-mavx512dq",
        "avx512vl": "-mavx512vl",
        "avx512_bf16": "-mavx512bf16",
    },
    Level.amx: {"amx_tile": "-mamx-tile", "amx_bf16": "-mamx-bf16"},
}
OF_ATEN = {"default": Level.torch, "avx2": Level.avx2}
OF_ONEDNN = {
    "sse41": Level.torch,
    "avx": Level.torch,
    "avx512_core": Level.avx2,
    "avx512_core_vnni": Level.avx2,
}


def compiler_flags(level: Level) -> list[str]:
    """The compiler flags for the instructions of a level and those below it."""
    return [
        flag for step, needed in INSTRUCTIONS.items() if step <= level for flag in needed.values()
    ]


@cache
def processor() -> str:
    """The processor's model name, or the architecture's name where the system does not report
    it."""
    return cpuinfo("model name") or platform.processor() or platform.machine()


@cache
def tuned_for() -> str:
    """The fields of the processor that a compiler's `-mtune=native` depends on, as one text."""
    return " ".join(
        cpuinfo(field) for field in ("vendor_id", "cpu family", "model", "model name", "cache size")
    )


@cache
def machine_level() -> tuple[Level, str]:
    """(the highest level that this machine can run, environment variables aside; the reason why it
    is not higher, or "").

    Processors are examined on Linux and x86-64 only; everywhere else the level is torch.
    """
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return (
            Level.torch,
            f"kernels are for Linux on x86_64, and this is {sys.platform} on {platform.machine()}",
        )
    has, reached = set(cpuinfo("flags").split()), Level.torch
    for level, needed in INSTRUCTIONS.items():
        if missing := [name for name in needed if name not in has]:
            return reached, f"the processor lacks {', '.join(missing)}"
        if level is Level.amx and not may_use_tiles():
            return reached, "the system does not let this process use AMX"
        reached = level
    return reached, ""


@cache
def processor_level() -> tuple[Level, str]:
    """(the level of the processor that torch may use, the variable that caps it or ""): the
    machine's level, or a lower one set by torch's variables.

    The variables are read once in a process, as torch does.
    """
    level, why = machine_level()[0], ""
    for name, cap in (
        ("ATEN_CPU_CAPABILITY", _aten_cap),
        ("ONEDNN_MAX_CPU_ISA", _onednn_cap),
        ("DNNL_MAX_CPU_ISA", _onednn_cap),
    ):
        if (value := os.environ.get(name)) and cap(value) < level:
            level, why = cap(value), f"{name}={value}"
    return level, why


def used() -> Level:
    """The level that lorakit uses. Raises UsageError where LORAKIT_KERNELS names a level that is
    unknown or that the machine lacks."""
    return _chosen(os.environ.get(VARIABLE) or AUTO)


def precision_level() -> Level:
    """The level that decides whether bfloat16 is fast: the one that lorakit uses.

    At level `torch` it is the processor's level that torch may use. So the type is the same with
    and without lorakit's kernels, be they forbidden or be there no compiler.
    """
    return processor_level()[0] if used() is Level.torch else used()


def bfloat16_is_fast() -> bool:
    """True if `precision: auto` means bfloat16 on this processor. Raises UsageError as `used`
    does."""
    return precision_level() >= Level.avx512


def reason() -> str:
    """The variable, with its value, that keeps the used level below the machine's, or ""."""
    level, why = processor_level()
    return why if used() == level else f"{VARIABLE}={os.environ[VARIABLE]}"


@cache
def _chosen(name: str) -> Level:
    level, why = processor_level()
    if name == AUTO:
        return level
    names = [each.name for each in Level]
    if name not in names:
        raise UsageError(
            f"{VARIABLE}={name}: there is no such level",
            f"It is one of {AUTO}, {', '.join(names)}.",
        )
    if Level[name] > level:
        has = (
            f"{why} keeps this machine at {level}"
            if why
            else f"this machine has {level} ({processor()})"
        )
        raise UsageError(
            f"{VARIABLE}={name}: {has}",
            f"Set it to {AUTO}, or to one of {', '.join(names[: level + 1])}.",
        )
    return Level[name]


def forget() -> None:
    """Have the machine and its variables looked at again, as in a new process."""
    for known in (processor, tuned_for, machine_level, processor_level, _chosen):
        known.cache_clear()


def _aten_cap(value: str) -> Level:
    return OF_ATEN.get(value.lower(), Level.amx)


def _onednn_cap(value: str) -> Level:
    """The level of one of oneDNN's names, in upper or lower case (`AVX2_VNNI_2`,
    `AVX512_CORE_BF16`, `AVX10_1_512_AMX` …). A name that oneDNN does not know caps nothing, in
    oneDNN neither."""
    name = value.lower()
    if name in OF_ONEDNN:
        return OF_ONEDNN[name]
    if name.startswith("avx2"):
        return Level.avx2
    return (
        Level.avx512
        if name.startswith(("avx512_core_", "avx10")) and "amx" not in name
        else Level.amx
    )


def cpuinfo(field: str) -> str:
    """A field of the first processor in /proc/cpuinfo; "" if there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return ""
    return next(
        (
            line.partition(":")[2].strip()
            for line in lines
            if line.partition(":")[0].strip() == field
        ),
        "",
    )


def may_use_tiles() -> bool:
    """Request permission from the system to use AMX in this process and its threads; True if
    granted."""
    asked: int = ctypes.CDLL(None).syscall(
        ctypes.c_long(SYS_ARCH_PRCTL),
        ctypes.c_long(ARCH_REQ_XCOMP_PERM),
        ctypes.c_long(XFEATURE_XTILEDATA),
    )
    return asked == 0
