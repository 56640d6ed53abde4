"""Kernels in C: whether they can run here, and which of them are called."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from lorakit.kernels import dispatch, levels, native
from lorakit.kernels.in_c import Library
from lorakit.kernels.levels import Level


def why_not(operation: str, level: Level = Level.avx2) -> str:
    """Why tests of an operation's kernel from a level on can not run here; "" where they can."""
    if dispatch.implementation(operation) >= level:
        return ""
    reached, lowered_by = native.level_and_reason()
    because = lowered_by or levels.machine_level()[1] or "it does not compile"
    return f"{operation} is tested at {level}, kernels run at {reached}: {because}"


class CallInC(NamedTuple):
    library: str
    function: str
    arguments: tuple[Any, ...]


def watch_calls(monkeypatch: pytest.MonkeyPatch, *libraries: str) -> list[CallInC]:
    """A list to which every call of a function of these libraries is added from now on."""
    seen: list[CallInC] = []
    call = Library.call

    def watched(self: Library, name: str, *arguments: Any) -> int:
        if self.name in libraries:
            seen.append(CallInC(self.name, name, arguments))
        return call(self, name, *arguments)

    monkeypatch.setattr(Library, "call", watched)
    return seen
