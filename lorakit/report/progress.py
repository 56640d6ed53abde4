"""Progress on stderr: a live line with speed and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

if TYPE_CHECKING:  # the loop imports torch, and commands that train nothing use this module too
    from lorakit.training.loop import StepReport

log = logging.getLogger("lorakit")
PLAIN_SECONDS = 5.0  # between two lines of a stage on a plain terminal
SMOOTHING = 0.1  # weight of the newest step in speed and time left


class Progress:
    """Display of a run's progress while it works. One instance a command."""

    def __init__(self, console: Console, plain_every: int = 10) -> None:
        self.console = console
        self.live = console.is_terminal and not console.quiet
        self.plain_every = plain_every
        self._bars: Bars | None = None
        self._training: TaskID | None = None
        self._step_seconds: float | None = None
        self._speed = 0.0

    @contextmanager
    def stage(self, description: str, unit: str = "") -> Iterator[Callable[[int, int], None]]:
        """Show `description` while the block runs; it gets a function of (done, total) to call
        along the way. unit: what is counted, to show how many of them go by in a second, and the
        time left."""
        started = time.perf_counter()

        def details(done: int, total: int) -> str:
            spent = time.perf_counter() - started
            speed = f"{done / spent:,.0f} {unit}/s · " if unit and spent else ""
            return f"{speed}{_clock(spent / done * (total - done)) if done else '?'} left"

        if not self.live:
            yield self._plain_stage(description, details)
            return
        bars, own = self._bars, False
        if bars is None:
            bars, own = _bars(self.console), True
            bars.start()
        task = bars.add_task(description, total=None, details="")
        try:
            yield lambda done, total: bars.update(
                task,
                completed=done,
                total=total,
                details=details(done, total) if unit and done < total else "",
            )
        finally:
            bars.remove_task(task)
            if own:
                bars.stop()

    def _plain_stage(
        self, description: str, details: Callable[[int, int], str]
    ) -> Callable[[int, int], None]:
        """On a plain terminal a stage that takes long says every few seconds how far it is."""
        shown = time.perf_counter()

        def advance(done: int, total: int) -> None:
            nonlocal shown
            now = time.perf_counter()
            if now - shown >= PLAIN_SECONDS and done < total:
                shown = now
                line = f"{description} {done}/{total} · {details(done, total)}"
                self.console.print(Text(line))

        return advance

    @contextmanager
    def training(self, first_step: int, total_steps: int) -> Iterator[None]:
        """Around the training loop."""
        if not self.live:
            yield
            return
        with _bars(self.console) as self._bars:
            self._training = self._bars.add_task(
                "training",
                total=total_steps,
                completed=first_step - 1,
                details="",
            )
            try:
                yield
            finally:
                self._bars = None

    def step(self, report: StepReport, rank_total: int) -> None:
        """Show one optimizer step."""
        newest = report.seconds
        self._step_seconds = (
            newest
            if self._step_seconds is None
            else (1 - SMOOTHING) * self._step_seconds + SMOOTHING * newest
        )
        speed = report.tokens / newest
        self._speed = (
            speed if not self._speed else (1 - SMOOTHING) * self._speed + SMOOTHING * speed
        )
        left = _clock((report.total_steps - report.step) * self._step_seconds)
        parts = (
            f"loss {report.loss:.4f} · {self._speed:,.0f} tokens/s · {left} left · ranks"
            f" {rank_total}"
        )
        if "density" in report.metrics:
            parts += f" · density {report.metrics['density']:.3f}"
        if self._bars is not None and self._training is not None:
            self._bars.update(self._training, completed=report.step, details=parts)
        elif not self.live and (
            report.step % self.plain_every == 0 or report.step in (1, report.total_steps)
        ):
            self.console.print(
                Text(
                    f"step {report.step}/{report.total_steps} · {parts} · lr"
                    f" {report.learning_rate:.2e}",
                )
            )


def log_to(console: Console, level: int = logging.INFO) -> None:
    """Send lorakit's log to `console`, which puts it above a live line."""
    log.handlers[:] = [_ToConsole(console)]
    log.setLevel(level)
    log.propagate = False


class _ToConsole(logging.Handler):
    """Records as plain lines, warnings marked; never folded, so that they can be searched for."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        mark = (
            Text("warning: ", style="bold yellow") if record.levelno >= logging.WARNING else Text()
        )
        self.console.print(
            mark.append(record.getMessage(), style="not bold default"),
            soft_wrap=True,
        )


def _bars(console: Console) -> Bars:
    return Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[details]}", markup=False),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
