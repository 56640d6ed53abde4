"""Observers of a training run: its trackers, and the file that keeps its warnings."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lorakit.files import append_json_line, read_json
from lorakit.recipes.recipe import Recipe, flat, locating, resolved
from lorakit.report.trackers import Trackers, Watched, check_installed
from lorakit.runs.folder import MANIFEST, WARNINGS

log = logging.getLogger("lorakit")


def check_trackers(recipe: Recipe) -> None:
    """Raise RecipeError, with the place in the recipe, for a tracker that is not installed."""
    with locating(recipe):
        check_installed(recipe.train.report_to)


def start_trackers(trackers: Trackers, folder: Path, recipe: Recipe, step: int) -> None:
    """Start the trackers of the run in `folder`, which has its manifest; step: the last one that
    was done before."""
    if trackers.names:
        manifest = read_json(folder / MANIFEST)
        # A resumed run keeps these, and no two runs have them alike.
        marks = [manifest[name] for name in ("started", "working_folder", "command")]
        identity = uuid.uuid5(uuid.NAMESPACE_URL, repr(marks)).hex
        trackers.start(Watched(folder, identity, step), flat(resolved(recipe)))


class Warnings(logging.Handler):
    """The warnings of lorakit's log, which are kept in a file as soon as the run has a folder."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.early: list[dict[str, Any]] = []
        self.path: Path | None = None

    def emit(self, record: logging.LogRecord) -> None:
        at = datetime.now(UTC).isoformat(timespec="seconds")
        line = {"at": at, "message": record.getMessage()}
        if self.path is None:
            self.early.append(line)
        else:
            append_json_line(self.path, line)

    def keep_in(self, folder: Path) -> None:
        """Write those so far, and from now on each at once, to warnings.jsonl. A resumed run adds
        to those of its earlier parts."""
        self.path = folder / WARNINGS
        for line in self.early:
            append_json_line(self.path, line)


@contextmanager
def warnings_kept() -> Iterator[Warnings]:
    """Context in which lorakit's warnings are collected."""
    handler = Warnings()
    log.addHandler(handler)
    try:
        yield handler
    finally:
        log.removeHandler(handler)
