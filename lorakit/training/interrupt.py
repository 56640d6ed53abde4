"""Ctrl-C: before a run's first step it stops the command at once, later the run ends its step.

SIGTERM, which clusters send, is treated as SIGINT. Nothing heavy is imported here: the first lines
of a command already run under it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Self

from lorakit.process import processes

log = logging.getLogger("lorakit")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
EXIT_CODE = 130
# Signals to one of several processes that are this near are one.
TOGETHER_SECONDS = 5.0


class Stopped(BaseException):
    """A signal that ends the command. No Exception, and no KeyboardInterrupt either, which
    libraries turn into their own."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number).name
        super().__init__(f"stopped by {self.signal}")


class _Handler(ABC):
    """Handles SIGINT and SIGTERM while entered; the earlier handlers are restored at the end."""

    def __init__(self) -> None:
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        self._previous = _handle_with(self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _restore(self._previous)

    @abstractmethod
    def _handle(self, number: int, frame: FrameType | None) -> None:
        """The handler of both signals."""


class Stops(_Handler):
    """While entered, the first SIGINT or SIGTERM raises Stopped; a second one ends the process
    there and then.

    `number` is that of the signal that came, or None. An exception that an interrupted library
    raises in its turn (a broken import may end in an ImportError) is no error then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.number: int | None = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            with contextlib.suppress(OSError):
                os.write(2, f"{Stopped(number)} at once\n".encode())
            os._exit(EXIT_CODE)
        self.number = number
        raise Stopped(number)


class StopRequest(_Handler):
    """While entered, SIGINT and SIGTERM set `requested`; a second one raises Stopped."""

    def __init__(self) -> None:
        super().__init__()
        self.requested = False
        self._first = 0.0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested:
            # A cluster may signal all processes of a job, and the launcher passes its own on.
            if processes() > 1 and now - self._first < TOGETHER_SECONDS:
                return
            raise Stopped(number)
        self.requested, self._first = True, now
        said = (
            f"{signal.Signals(number).name}: saving a checkpoint after this step (once more to stop"
            " at once, without)"
        )
        try:
            log.warning(said)
        except RuntimeError:  # the signal came in the middle of a write to the same stream
            with contextlib.suppress(OSError):
                os.write(2, f"{said}\n".encode())


def _handle_with(handler: object) -> dict[signal.Signals, object]:
    """Install the handler for SIGNALS; returns the previous ones. Outside of the main thread Python
    takes no signals."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in SIGNALS}  # type: ignore[arg-type]


def _restore(previous: dict[signal.Signals, object]) -> None:
    for number, handler in previous.items():
        signal.signal(number, handler)  # type: ignore[arg-type]


@contextlib.contextmanager
def before_it_begins() -> Iterator[None]:
    """Context in which the message of a signal says that nothing was written."""
    try:
        yield
    except Stopped as stopped:
        stopped.args = (f"{stopped} before training began: nothing was written",)
        raise
