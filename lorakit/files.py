"""Atomic writes of folders, JSON and text: a file is either complete or absent."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file beside `path`, flush it to disk and rename it, so a reader never sees half a
    file."""
    unfinished = _beside(path)
    try:
        with unfinished.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    write_text(path, json_text(value))


def fill_json(path: Path, value: Any) -> None:
    """Write a file in a folder of `new_folder`, which flushes it to disk."""
    path.write_text(json_text(value), encoding="utf-8", newline="")


def json_text(value: Any) -> str:
    return json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """Replace numbers that JSON can not express (NaN, infinity) in `value` by None."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Context with a folder to fill. It becomes `path`, replacing what is there, when the block
    succeeds, and is removed when the block fails."""
    made = [folder for folder in path.parents if not folder.exists()]  # the deepest first
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = _beside(path)
    try:
        staging.mkdir()
        yield staging
        for file in staging.rglob("*"):
            if file.is_file():
                # safetensors makes files that only their owner can read
                os.chmod(file, 0o666 & ~_umask())
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        if path.exists():
            old = _beside(path)
            try:
                os.replace(path, old)
                os.replace(staging, path)
            except BaseException:
                if old.exists() and not path.exists():
                    os.replace(old, path)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(staging, path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def try_folder(path: Path) -> None:
    """Raise OSError unless files can be written to folder `path`, which need not exist. Leaves
    nothing behind.

    The folder is made as a test, since permissions do not reveal everything: names may be too long,
    file systems may take no folders.
    """
    if path.is_dir():
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return
    made = [folder for folder in (path, *path.parents) if not folder.exists()]  # the deepest first
    try:
        path.mkdir(parents=True)
        handle, name = tempfile.mkstemp(dir=path)
        os.close(handle)
        os.unlink(name)
    finally:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def try_file(path: Path) -> None:
    """Raise OSError unless file `path` can be written, to fail before hours of work rather than
    after. Leaves nothing behind."""
    try_folder(path.parent)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))


def sha256(path: Path) -> str:
    """The file's SHA-256 in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def append_json_line(path: Path, value: Any) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(finite(value), ensure_ascii=False, allow_nan=False) + "\n")


def keep_json_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the lines of a JSON-lines file for which `keep` is False, and a half-written last
    line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            if keep(json.loads(line)):
                kept.append(line + "\n")
    write_text(path, "".join(kept))


def _beside(path: Path) -> Path:
    """An unused path beside `path`. It is known before a file is made, so that clean-up works even
    after a signal."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def expanded(path: str | Path) -> Path:
    """Replace `~` in `path` by the home folder. `~name` of an unknown user stays as it is."""
    return Path(os.path.expanduser(path))


def cache_root() -> Path:
    """The folder that holds the unpacked builtins: $LORAKIT_CACHE, or `lorakit` in the user's cache
    folder."""
    if chosen := os.environ.get("LORAKIT_CACHE"):
        return expanded(chosen).absolute()
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache").absolute() / "lorakit"
