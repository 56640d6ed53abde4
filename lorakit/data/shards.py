"""Shards: examples that are too large for memory, in files that are mapped.

A set is a folder of the cache: a file for each array of Examples, which holds its values one after
another, and a manifest with their types and hashes, written last. The folder is filled under
another name and renamed when it is whole, so a set is whole or it is not there; its hashes are
checked when it is opened. Its name is the key of lorakit/data/token_cache.py.

Sets are large, so they have a limit of their own: beyond LIMIT, the least recently used go, except
those that were used within a day.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorakit.data.collect import Made
from lorakit.data.examples import ARRAYS, DIGESTED, Examples, Known, hash_array
from lorakit.data.spill import disk_errors
from lorakit.data.store import Disk, Store, array_file, mapped
from lorakit.files import cache_root, new_folder, read_json, write_json

log = logging.getLogger("lorakit")

LIMIT = 64 << 30  # bytes of all sets together
IN_USE = 24 * 3600  # seconds since its last use for which a set is kept in any case
MANIFEST, LOCK = "manifest.json", "lock"


def kept(key: str, make: Callable[[Store], Made]) -> Made:
    """Result of `make`, whose arrays are mapped files of the cache: those that are there, or else
    new ones. Raises RunError where the disk does not take them."""
    place = cache_root() / "shards" / key
    found = load(place, key)
    if found is not None:
        return found
    with disk_errors():
        _sweep(place.parent)
        with new_folder(place) as folder, _locked(folder):
            examples, counts = _filled(folder, make)
            arrays = {name: getattr(examples, name) for name in ARRAYS}
            manifest = {
                "key": key,
                "counts": counts,
                "arrays": {
                    name: [array.dtype.str, len(array)]
                    for name, array in arrays.items()
                    if array is not None
                },
                "examples": examples.digest(),
                "about": _about(examples, counts),
            }
            write_json(folder / MANIFEST, manifest)
        _sweep(place.parent, newest=place)
    return examples, counts


def unnamed(make: Callable[[Store], Made]) -> Made:
    """Result of `make`, whose arrays are mapped files that are not kept: they have no names any
    more, and go with the process."""
    folder = cache_root() / "shards"
    with disk_errors():
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as name, _locked(Path(name)):
            return _filled(Path(name), make)


def load(place: Path, key: str) -> Made | None:
    """A set; None if there is none, or if it is damaged or has another key."""
    try:
        about = read_json(place / MANIFEST)
        arrays: dict[str, Any] = {
            name: mapped(array_file(place, name), dtype, count)
            for name, (dtype, count) in about["arrays"].items()
        }
        examples, counts = Examples(**arrays), about["counts"]
        if (about["key"], about["examples"], about["about"]) != (
            key,
            examples.digest(),
            _about(examples, counts),
        ):
            raise ValueError("it is damaged, or another's")
        os.utime(place)  # it is now the most recently used
        return _digested(examples, about["examples"]), counts
    except FileNotFoundError:
        return None
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        log.info("kept tokens in %s are not used, rows are tokenised anew: %s", place, error)
        return None


def _filled(folder: Path, make: Callable[[Store], Made]) -> Made:
    """Result of `make` with all its arrays in the folder, and no other files of arrays there."""
    examples, counts = make(Disk(folder))
    for file in folder.glob("*.bin"):
        if file.stem not in ARRAYS:
            file.unlink()
    found: dict[str, Any] = {}
    for name in ARRAYS:
        array = getattr(examples, name)
        if array is not None and not array_file(folder, name).exists():
            growing = Disk(folder).growing(name, array.dtype)
            growing.append(array)
            found[name] = growing.done()
    return _digested(replace(examples, **found)), counts


def _digested(examples: Examples, sha256: str | None = None) -> Examples:
    """The examples with their digest, which is not computed again."""
    arrays = tuple(getattr(examples, name) for name in DIGESTED)
    return replace(examples, known=Known(sha256 or examples.digest(), arrays))


def _about(examples: Examples, counts: dict[str, int]) -> str:
    """sha256 of what the examples' own digest leaves out."""
    digest = hashlib.sha256(json.dumps(counts, sort_keys=True).encode())
    hash_array(digest, examples.row_ids)
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Context with a lock on an unfinished set, which the system opens when the process ends, so
    that one that was killed is known."""
    with (folder / LOCK).open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _sweep(folder: Path, newest: Path | None = None) -> None:
    """Remove sets that a killed process left unfinished, and the least recently used ones until the
    rest fits into LIMIT."""
    sets = []
    for place in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):  # another process has just renamed it
            sets.append((place.stat().st_mtime, _size(place), place))
    total = sum(size for _, size, _ in sets)
    for used, size, place in sorted(sets, key=lambda one: one[:2]):
        if place.name.startswith("."):
            gone = _is_left(place)
        else:
            gone = total > LIMIT and place != newest and time.time() - used > IN_USE
        if gone:
            shutil.rmtree(place, ignore_errors=True)
            total -= size


def _size(place: Path) -> int:
    return sum(file.stat().st_size for file in place.iterdir()) if place.is_dir() else 0


def _is_left(unfinished: Path) -> bool:
    """True if no process writes to an unfinished set any more."""
    try:
        with (unfinished / LOCK).open("r+") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except FileNotFoundError:  # another process made it a moment ago, or has just renamed it
        return unfinished.is_dir() and time.time() - unfinished.stat().st_mtime > IN_USE
    except OSError:  # another process holds the lock
        return False
