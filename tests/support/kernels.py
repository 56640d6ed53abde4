"""Whether kernels in C can run here."""

from __future__ import annotations

from lorakit.kernels import dispatch, levels, native
from lorakit.kernels.levels import Level


def why_not(operation: str, level: Level = Level.avx2) -> str:
    """Why tests of an operation's kernel from a level on can not run here; "" where they can."""
    if dispatch.implementation(operation) >= level:
        return ""
    reached, lowered_by = native.level_and_reason()
    because = lowered_by or levels.machine_level()[1] or "it does not compile"
    return f"{operation} is tested at {level}, kernels run at {reached}: {because}"
