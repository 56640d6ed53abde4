"""Progress of a run in lorakit's log, for programs that use lorakit as a library."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, cast

from lorakit.report.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

log = logging.getLogger("lorakit")


class _Lines:
    """Stands in for a plain terminal: every line is a record of the log."""

    is_terminal = False
    quiet = False

    def print(self, line: Text) -> None:
        log.info("%s", line.plain)


def logged_progress(every: int = 10) -> Progress:
    """Progress that shows nothing itself; a line is logged every so many steps."""
    return Progress(cast("Console", _Lines()), every)
