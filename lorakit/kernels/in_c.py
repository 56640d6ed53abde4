"""Calls into C: libraries of `csrc/`, with the types of their functions' arguments.

A call with more or fewer arguments, or with one of another type, raises in Python, and so does a
library whose structures have another size than those here.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorakit.kernels import dispatch, native
from lorakit.kernels.levels import Level

INT, FLOAT = ctypes.c_int64, ctypes.c_float  # every whole number is an int64_t
FAILS = INT  # what a function returns: 0, or what went wrong
NOTHING = None


class POINTER:
    """Type of an argument that is an address: of a tensor on the CPU, of an array, or None."""

    dtype: ClassVar[torch.dtype | None] = None

    @classmethod
    def from_param(cls, value: Any) -> ctypes.c_void_p | None:
        if isinstance(value, Tensor):
            if not value.is_cpu or cls.dtype not in (None, value.dtype):
                kind = cls.dtype or "any type"
                raise TypeError(f"a {value.dtype} on {value.device}, not {kind} on the CPU")
            return ctypes.c_void_p(value.data_ptr())
        if isinstance(value, array):
            return ctypes.c_void_p(value.buffer_info()[0])
        if value is not None:
            raise TypeError(f"a {type(value).__name__}, not a tensor or an array")
        return None


class FLOATS(POINTER):
    """Address of float32 values."""

    dtype = torch.float32


class INT32S(POINTER):
    """Address of int32 values."""

    dtype = torch.int32


class THREADS:
    """Last argument of a function whose work is shared: torch's number of threads, filled in."""


class Structure(ctypes.Structure):
    """A structure of C of the same name and fields."""


class Library:
    """A library (`csrc/NAME.c`).

    functions: {name: (what it returns, the types of its arguments …)}. structures: those that it
    is handed, for each of which it has a function `size_of_NAME` (SIZE_OF in csrc/common.h).
    """

    def __init__(
        self,
        name: str,
        functions: Mapping[str, Sequence[Any]],
        structures: Sequence[type[Structure]] = (),
    ) -> None:
        self.name, self.functions, self.structures = name, functions, structures
        self._shares = {name for name, kinds in functions.items() if kinds[-1] is THREADS}
        self._declared: ctypes.CDLL | None = None

    def call(self, name: str, *arguments: Any) -> int:
        """What a function returns. The library must be there: `dispatch.implementation` tells.

        A structure goes as its address. Raises TypeError and ctypes.ArgumentError.
        """
        library = native.load(self.name)
        assert library is not None, f"{self.name}.c has not been loaded"
        if library is not self._declared:
            self._declare(library)
        if name in self._shares:
            arguments = *arguments, torch.get_num_threads()
        function = getattr(library, name)
        if len(arguments) != len(function.argtypes):  # ctypes lets further ones pass
            count = len(function.argtypes)
            raise TypeError(f"{name} takes {count} arguments, not {len(arguments)}")
        result: int = function(*arguments)
        return result

    def _declare(self, library: ctypes.CDLL) -> None:
        for structure in self.structures:
            size_of = getattr(library, f"size_of_{structure.__name__.lstrip('_')}")
            size_of.argtypes, size_of.restype = [], INT
            if size_of() != ctypes.sizeof(structure):
                sizes = f"{size_of()} bytes in C, {ctypes.sizeof(structure)} here"
                raise TypeError(f"{structure.__name__} of {self.name}.c: {sizes}")
        for name, (returned, *kinds) in self.functions.items():
            function = getattr(library, name)
            function.restype = returned
            function.argtypes = [INT if kind is THREADS else kind for kind in kinds]
        self._declared = library


def address_of(*structures: type[Structure]) -> list[Any]:
    """Types of arguments that are addresses of structures."""
    return [ctypes.POINTER(structure) for structure in structures]


def takes(operation: str, *tensors: Tensor) -> bool:
    """True if an operation over vectors of floats (csrc/vectors.h) runs in C for these: contiguous,
    on the CPU, all bfloat16 or all float32."""
    dtype = tensors[0].dtype
    return (
        dtype in (torch.bfloat16, torch.float32)
        and all(x.dtype == dtype and x.is_cpu and x.is_contiguous() for x in tensors)
        and dispatch.implementation(operation) is not Level.torch
    )


def is_bf16(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16
