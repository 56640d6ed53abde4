"""Optimisations: faster ways to compute a loaded model, each verified on that model before it is
used.

Where one can not be used, the model is computed without it and the reason is reported. With
LORAKIT_STRICT=1, which CI sets, an error that nobody expects is raised instead of being a reason.
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
    """A faster way to compute a model, or a part of it. trouble: what an error within it means."""

    trouble: ClassVar[str]

    @abstractmethod
    def install(self) -> None:
        """Let the model use it. Raises Unsupported."""

    @abstractmethod
    def verify(self) -> None:
        """Raises Unsupported unless the model gives what it gave before."""

    @abstractmethod
    def undo(self) -> None:
        """Let the model be as it was before `install`, which may have failed half-way."""


def attempt(optimisation: Optimisation) -> str | None:
    """Install an optimisation and verify it. None; or the reason why it is undone."""
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
    """Errors within it are raised as Unsupported; with LORAKIT_STRICT=1, as they are."""
    try:
        yield
    except Unsupported:
        raise
    except Exception as error:  # anything may go wrong in a model that only looks like others
        if os.environ.get(VARIABLE) == "1":
            raise
        raise Unsupported(f"{trouble} ({type(error).__name__}: {error})") from error
