"""Levels: what a processor has, what caps it, what is an error, and the type that follows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from lorakit.errors import UsageError
from lorakit.kernels import levels
from lorakit.kernels.levels import INSTRUCTIONS, Level
from lorakit.models.load import compute_dtype

VARIABLES = ("LORAKIT_KERNELS", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
CPU = torch.device("cpu")
HASWELL = set(INSTRUCTIONS[Level.avx2])
SKYLAKE = HASWELL | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}  # AVX-512 without bfloat16
ZEN_4 = SKYLAKE | {"avx512_bf16"}
SAPPHIRE_RAPIDS = ZEN_4 | {"amx_tile", "amx_bf16", "amx_int8"}

Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """machine(flags of the processor, variables…): a Linux machine on x86-64, with tiles
    allowed."""

    def become(flags: set[str], tiles: bool = True, **variables: str) -> None:
        fields = {"flags": " ".join(sorted(flags)), "model name": "Some Processor"}
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(levels.platform, "machine", lambda: "x86_64")
        monkeypatch.setattr(levels, "cpuinfo", lambda field: fields.get(field, ""))
        monkeypatch.setattr(levels, "may_use_tiles", lambda: tiles)
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        levels.forget()

    yield become
    monkeypatch.undo()
    levels.forget()


@pytest.mark.parametrize(
    ("flags", "level", "lacks"),
    [
        (set(), Level.torch, "avx2"),
        (HASWELL - {"fma"}, Level.torch, "fma"),
        (HASWELL, Level.avx2, "avx512f"),
        (SKYLAKE, Level.avx2, "avx512_bf16"),
        (ZEN_4, Level.avx512, "amx_tile"),
        (SAPPHIRE_RAPIDS - HASWELL, Level.torch, "avx2"),
        (SAPPHIRE_RAPIDS, Level.amx, ""),
    ],
)
def test_a_processors_level(machine: Machine, flags: set[str], level: Level, lacks: str) -> None:
    machine(flags)
    found, why_not_more = levels.machine_level()
    assert found is level
    assert lacks in why_not_more
    assert bool(why_not_more) == bool(lacks)
    assert levels.used() is level
    assert levels.reason() == ""


def test_tiles_that_the_system_does_not_allow_are_not_there(machine: Machine) -> None:
    machine(SAPPHIRE_RAPIDS, tiles=False)
    assert levels.used() is Level.avx512
    assert "does not let" in levels.machine_level()[1]


def test_elsewhere_than_on_linux_and_x86_64_torch_works_alone(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(SAPPHIRE_RAPIDS)
    monkeypatch.setattr(levels.platform, "machine", lambda: "aarch64")
    levels.forget()
    assert levels.machine_level()[0] is Level.torch
    assert "aarch64" in levels.machine_level()[1]


@pytest.mark.parametrize(
    ("name", "value", "level"),
    [
        ("ATEN_CPU_CAPABILITY", "default", Level.torch),
        ("ATEN_CPU_CAPABILITY", "avx2", Level.avx2),
        ("ATEN_CPU_CAPABILITY", "avx512", Level.amx),  # torch's highest: it caps nothing
        ("ONEDNN_MAX_CPU_ISA", "SSE41", Level.torch),
        ("ONEDNN_MAX_CPU_ISA", "AVX2", Level.avx2),
        ("ONEDNN_MAX_CPU_ISA", "avx2_vnni_2", Level.avx2),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE", Level.avx2),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI", Level.avx2),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16", Level.avx512),
        ("ONEDNN_MAX_CPU_ISA", "AVX10_1_512", Level.avx512),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX", Level.amx),
        ("ONEDNN_MAX_CPU_ISA", "AVX10_1_512_AMX_FP16", Level.amx),
        ("ONEDNN_MAX_CPU_ISA", "DEFAULT", Level.amx),
        ("DNNL_MAX_CPU_ISA", "AVX512_CORE_BF16", Level.avx512),
    ],
)
def test_what_caps_torch_caps_lorakit(
    machine: Machine, name: str, value: str, level: Level
) -> None:
    machine(SAPPHIRE_RAPIDS, **{name: value})
    assert levels.used() is level
    assert levels.reason() == ("" if level is Level.amx else f"{name}={value}")


def test_a_cap_above_the_machine_changes_nothing_and_the_lowest_of_several_counts(
    machine: Machine,
) -> None:
    machine(HASWELL, ONEDNN_MAX_CPU_ISA="AVX512_CORE_BF16")
    assert (levels.used(), levels.reason()) == (Level.avx2, "")
    machine(SAPPHIRE_RAPIDS, ONEDNN_MAX_CPU_ISA="AVX512_CORE_BF16", ATEN_CPU_CAPABILITY="avx2")
    assert (levels.used(), levels.reason()) == (Level.avx2, "ATEN_CPU_CAPABILITY=avx2")


@pytest.mark.parametrize(
    ("flags", "variables", "said"),
    [
        (
            SAPPHIRE_RAPIDS,
            {"LORAKIT_KERNELS": "avx"},
            ["no such level", "auto, torch, avx2, avx512, amx"],
        ),
        (
            HASWELL,
            {"LORAKIT_KERNELS": "avx512"},
            ["this machine has avx2", "Some Processor", "auto, or to one of torch, avx2."],
        ),
        (
            SAPPHIRE_RAPIDS,
            {"LORAKIT_KERNELS": "amx", "ATEN_CPU_CAPABILITY": "avx2"},
            ["ATEN_CPU_CAPABILITY=avx2", "at avx2"],
        ),
    ],
)
def test_a_level_that_is_not_there_is_an_error(
    machine: Machine, flags: set[str], variables: dict[str, str], said: list[str]
) -> None:
    machine(flags, **variables)
    for ask in (levels.used, lambda: compute_dtype("auto", CPU)):
        with pytest.raises(UsageError) as error:
            ask()
        assert all(part in str(error.value) for part in said), str(error.value)


@pytest.mark.parametrize(
    ("flags", "variables", "dtype"),
    [
        (HASWELL, {}, torch.float32),
        (SKYLAKE, {}, torch.float32),
        (ZEN_4, {}, torch.bfloat16),
        (SAPPHIRE_RAPIDS, {}, torch.bfloat16),
        (SAPPHIRE_RAPIDS, {"LORAKIT_KERNELS": "avx512"}, torch.bfloat16),
        (SAPPHIRE_RAPIDS, {"LORAKIT_KERNELS": "avx2"}, torch.float32),
        (SAPPHIRE_RAPIDS, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, torch.float32),
        # the processor's: who computes is another question
        (SAPPHIRE_RAPIDS, {"LORAKIT_KERNELS": "torch"}, torch.bfloat16),
        (
            SAPPHIRE_RAPIDS,
            {"LORAKIT_KERNELS": "torch", "ATEN_CPU_CAPABILITY": "avx2"},
            torch.float32,
        ),
    ],
)
def test_the_type_follows_the_level(
    machine: Machine, flags: set[str], variables: dict[str, str], dtype: torch.dtype
) -> None:
    machine(flags, **variables)
    assert compute_dtype("auto", CPU) == dtype
    assert compute_dtype("bf16", CPU) == torch.bfloat16
    assert compute_dtype("fp32", CPU) == torch.float32


def lorakit(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, with none of the variables set but these."""
    environment = {
        name: value for name, value in os.environ.items() if name not in VARIABLES
    } | variables
    command = [sys.executable, "-c", "from lorakit.cli import main; main()", *arguments]
    return subprocess.run(
        command, env=environment, timeout=300, capture_output=True, text=True, check=False
    )


def test_env_says_the_machines_level_the_one_that_is_used_and_why() -> None:
    devices = json.loads(lorakit("env", "--json", LORAKIT_KERNELS="torch").stdout)["devices"]
    assert devices["processor"]
    assert devices["level"] in [level.name for level in Level]
    assert devices["kernels"] == "torch"
    assert devices["kernels_lowered_by"] == (
        "" if devices["level"] == "torch" else "LORAKIT_KERNELS=torch"
    )


@pytest.mark.parametrize("command", [["env"], ["validate", "nothing.yaml"]])
def test_no_command_starts_at_a_level_that_is_not_there(command: list[str]) -> None:
    done = lorakit(*command, LORAKIT_KERNELS="avx3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert (
        done.stderr
        == "error: LORAKIT_KERNELS=avx3: there is no such level\n  It is one of auto, torch, avx2,"
        " avx512, amx.\n"
    )
