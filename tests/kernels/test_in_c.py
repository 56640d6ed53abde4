"""Calls into C: a wrong one fails in Python, and what is declared is what the source says."""

from __future__ import annotations

import ctypes
import importlib
import os
import pkgutil
import re
import subprocess
from array import array
from typing import Any

import pytest
import torch

from lorakit import kernels
from lorakit.inference import decode_step
from lorakit.kernels import in_c as module
from lorakit.kernels import levels, native
from lorakit.kernels.in_c import (
    FAILS,
    FLOAT,
    FLOATS,
    INT,
    INT32S,
    NOTHING,
    POINTER,
    THREADS,
    CStructure,
    Library,
)
from lorakit.kernels.levels import Level
from tests.support.kernels import why_not

compiled = pytest.mark.skipif(bool(why_not("dropout")), reason=why_not("dropout"))

MODULES = [
    importlib.import_module(f"lorakit.kernels.{m.name}")
    for m in pkgutil.iter_modules(kernels.__path__)
]
LIBRARIES = {
    id(value): value
    for owner in (*MODULES, decode_step)
    for value in vars(owner).values()
    if isinstance(value, Library)
}.values()
DROPOUT = next(library for library in LIBRARIES if library.name == "dropout")


def test_every_source_has_declared_functions() -> None:
    assert sorted(library.name for library in LIBRARIES) == sorted(
        path.stem for path in native.SOURCES.glob("*.c")
    )


def prototypes(name: str) -> dict[str, tuple[str, list[str]]]:
    """{function: (what it returns, its parameters)} of a source at the highest level; nothing
    runs."""
    compiler = os.environ.get("CC") or "cc"
    flags = levels.compiler_flags(Level.amx)
    source = str(native.SOURCES / f"{name}.c")
    done = subprocess.run(
        [compiler, *flags, "-E", "-P", source], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"{compiler} does not know all levels")
    function = (
        r"((?:static|inline|__attribute__ ?\(\(.*?\)\)|\s)*)\b(void|int64_t) (\w+)\(([^()]*)\) *{"
    )
    return {
        name: (returned, [re.sub(r"\s+", " ", one).strip() for one in parameters.split(",")])
        for before, returned, name, parameters in re.findall(function, done.stdout)
        if "static" not in before
    }


def kind_of(parameter: str) -> Any:
    """The declared type that a parameter in C should have; of a structure, its name."""
    what, stars = parameter.replace("const", "").strip(), parameter.count("*")
    base = what.split()[0]
    if stars == 0:
        return FLOAT if base == "float" else INT if base in ("int64_t", "uint64_t") else base
    if stars == 1 and base in ("float", "int32_t"):
        return {"float": FLOATS, "int32_t": INT32S}[base]
    return base if base[0].isupper() else POINTER


@compiled
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_declared_types_are_those_of_the_source(library: Library) -> None:
    written = prototypes(library.name)
    for name, (returned, *kinds) in library.functions.items():
        in_c_returned, parameters = written[name]
        assert returned is (NOTHING if in_c_returned == "void" else FAILS), name
        declared = [INT if kind is THREADS else kind for kind in kinds]
        structures = {
            ctypes.POINTER(each): each.__name__.lstrip("_") for each in library.structures
        }
        assert [structures.get(kind, kind) for kind in declared] == [*map(kind_of, parameters)], (
            name
        )
        assert (kinds[-1] is THREADS) == parameters[-1].endswith("threads"), name
    sizes = {f"size_of_{each.__name__.lstrip('_')}" for each in library.structures}
    assert written.keys() == library.functions.keys() | sizes


X, Y = torch.ones(4), torch.zeros(4)
RIGHT: list[Any] = [X, Y, 4, 4, 7, 0, 1.0, 0]  # x, y, count, length, seed, dropped, factor, bf16


@compiled
def test_a_right_call_runs() -> None:
    Y.zero_()
    DROPOUT.call("dropout", *RIGHT)
    assert torch.equal(X, Y)


@compiled
@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        *((0, wrong) for wrong in ([1.0], 3, "x", torch.ones(4, device="meta"))),
        *((2, wrong) for wrong in (4.0, X, None, "4")),
        *((6, wrong) for wrong in (X, None, "1")),
    ],
)
def test_a_wrong_argument_fails_in_python(place: int, wrong: Any) -> None:
    arguments = [*RIGHT]
    arguments[place] = wrong
    with pytest.raises((ctypes.ArgumentError, TypeError)):
        DROPOUT.call("dropout", *arguments)


@compiled
@pytest.mark.parametrize("arguments", [RIGHT[:-1], [*RIGHT, 0]], ids=["one less", "one more"])
def test_a_wrong_number_of_arguments_fails_in_python(arguments: list[Any]) -> None:
    with pytest.raises(TypeError, match="takes 9 arguments"):
        DROPOUT.call("dropout", *arguments)


def test_addresses_are_of_the_declared_type() -> None:
    for kind, dtype in ((FLOATS, torch.float32), (INT32S, torch.int32)):
        tensor = torch.zeros(3, dtype=dtype)
        address = kind.from_param(tensor)
        assert address is not None
        assert address.value == tensor.data_ptr()
        assert kind.from_param(None) is None
        with pytest.raises(TypeError, match="not torch"):
            kind.from_param(torch.zeros(3, dtype=torch.float64))
    numbers = array("q", [1, 2])
    found = POINTER.from_param(numbers)
    assert found is not None
    assert found.value == numbers.buffer_info()[0]


@compiled
def test_a_structure_of_another_size_is_refused() -> None:
    class AttentionCall(CStructure):
        _fields_ = (("rows", ctypes.c_int64),)

    forward = [*module.address_of(AttentionCall), *[POINTER] * 4, FLOATS]
    library = Library("attention", {"attention_forward": (FAILS, *forward)}, [AttentionCall])
    with pytest.raises(TypeError, match=r"AttentionCall of attention.c: \d+ bytes in C, 8 here"):
        library.call("attention_forward", AttentionCall(), X, X, X, Y, Y)
