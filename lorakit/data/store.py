"""Stores: where the arrays of examples grow, in memory or in files that are then mapped."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lorakit.data.spill import disk_errors

BUFFER = 1 << 20  # bytes of a file that are written at once


class Growing(Protocol):
    """An array that grows at its end."""

    def append(self, values: NDArray[Any]) -> None: ...

    def done(self) -> NDArray[Any]:
        """All values; nothing can be appended any more."""
        ...


class Store(Protocol):
    def growing(self, name: str, dtype: Any) -> Growing:
        """A new array. name: for one of Examples the name of its field."""
        ...


class Memory:
    """A store in memory."""

    def growing(self, name: str, dtype: Any) -> Growing:
        return _InMemory(dtype)


class Disk:
    """A store in a folder, whose files hold the values of an array one after another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def growing(self, name: str, dtype: Any) -> Growing:
        return _OnDisk(array_file(self.folder, name), np.dtype(dtype))


class _InMemory:
    def __init__(self, dtype: Any) -> None:
        self._parts: list[NDArray[Any]] = [np.empty(0, dtype)]

    def append(self, values: NDArray[Any]) -> None:
        self._parts.append(values)

    def done(self) -> NDArray[Any]:
        return np.concatenate(self._parts)


class _OnDisk:
    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._path, self._dtype, self._count = path, dtype, 0
        with disk_errors():
            self._file = path.open("xb", buffering=BUFFER)

    def append(self, values: NDArray[Any]) -> None:
        with disk_errors():
            self._file.write(np.ascontiguousarray(values, self._dtype).data)
        self._count += len(values)

    def done(self) -> NDArray[Any]:
        with disk_errors():
            self._file.close()
        return mapped(self._path, self._dtype, self._count)


def array_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.bin"


def mapped(path: Path, dtype: Any, count: int) -> NDArray[Any]:
    """The `count` values of a file, which is mapped: they are read when they are used. Raises
    ValueError or OSError for a file of another size."""
    size = count * np.dtype(dtype).itemsize
    if path.stat().st_size != size:
        raise ValueError(f"{path.name} has not {size} bytes")
    if count == 0:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, "r", shape=(count,)))


def let_go(array: NDArray[Any] | None) -> None:
    """Tell the system that the pages of a mapped array may go, which count as the process's memory
    from when they are used; they are read anew when they are used again. Other arrays stay."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap):
        base.madvise(mmap.MADV_DONTNEED)
