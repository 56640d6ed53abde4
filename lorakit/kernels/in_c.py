"""Calls into C: the libraries of `csrc/`, with the argument types of their functions.

A call with a wrong number or type of arguments raises in Python; so does a library whose structures
differ in size from those declared here.
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
FAILS = INT  # return type of a function that gives 0 or an error code
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
    """The last argument of a function that uses threads: torch's number of threads, filled in by
    `call`."""


class CStructure(ctypes.Structure):
    """A structure of C of the same name and fields."""


class Library:
    """A library (`csrc/NAME.c`).

    functions: {name: (return type, argument types …)}. structures: the structures that it is
    passed; for each the library has a function `size_of_NAME` (SIZE_OF in csrc/common.h).
    """

    def __init__(
        self,
        name: str,
        functions: Mapping[str, Sequence[Any]],
        structures: Sequence[type[CStructure]] = (),
    ) -> None:
        self.name, self.functions, self.structures = name, functions, structures
        self._shares = {name for name, kinds in functions.items() if kinds[-1] is THREADS}
        self._declared: ctypes.CDLL | None = None

    def call(self, name: str, *arguments: Any) -> int:
        """Call a function and give its result. The library must have loaded, as
        `dispatch.implementation` ensures.

        A structure is passed by address. Raises TypeError and ctypes.ArgumentError.
        """
        library = native.load(self.name)
        assert library is not None, f"{self.name}.c has not been loaded"
        if library is not self._declared:
            self._declare(library)
        if name in self._shares:
            arguments = *arguments, torch.get_num_threads()
        function = getattr(library, name)
        if len(arguments) != len(function.argtypes):  # ctypes accepts surplus arguments
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


def address_of(*structures: type[CStructure]) -> list[Any]:
    """Argument types for addresses of structures."""
    return [ctypes.POINTER(structure) for structure in structures]


def takes(operation: str, *tensors: Tensor) -> bool:
    """True if a vector operation (csrc/vectors.h) runs in C for these tensors, which must be
    contiguous, on the CPU, and all bfloat16 or all float32."""
    dtype = tensors[0].dtype
    return (
        dtype in (torch.bfloat16, torch.float32)
        and all(x.dtype == dtype and x.is_cpu and x.is_contiguous() for x in tensors)
        and dispatch.implementation(operation) is not Level.torch
    )


def is_bf16(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16
