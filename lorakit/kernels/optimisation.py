"""Optimisations: faster ways to compute a loaded model, each verified on that model before it is
used.

Where one can not be used, the model is computed without it and the reason is reported. With
LORAKIT_STRICT=1, which CI sets, an unexpected error is raised instead of becoming the reason.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

VARIABLE = "LORAKIT_STRICT"


class Unsupported(Exception):
    """The reason why an optimisation can not be used on a model."""


class Optimisation(ABC):
    """A faster way to compute a model or a part of it. trouble: the reason to report for an
    unexpected error."""

    trouble: ClassVar[str]

    @abstractmethod
    def install(self) -> None:
        """Make the model use the optimisation. Raises Unsupported."""

    @abstractmethod
    def verify(self) -> None:
        """Raise Unsupported unless the model gives the same results as before."""

    @abstractmethod
    def undo(self) -> None:
        """Restore the model as it was before `install`, which may have failed half-way."""


def attempt(optimisation: Optimisation) -> str | None:
    """Install and verify an optimisation. Returns None, or the reason why it was undone."""
    try:
        with explained(optimisation.trouble):
            optimisation.install()
            optimisation.verify()
    except Exception as error:
        optimisation.undo()
        if not isinstance(error, Unsupported):
            raise
        return str(error)
    return None


@contextmanager
def explained(trouble: str) -> Iterator[None]:
    """Context that turns errors into Unsupported; with LORAKIT_STRICT=1 they are raised
    unchanged."""
    try:
        yield
    except Unsupported:
        raise
    except Exception as error:  # a model that only resembles known ones may raise anything
        if os.environ.get(VARIABLE) == "1":
            raise
        raise Unsupported(f"{trouble} ({type(error).__name__}: {error})") from error
