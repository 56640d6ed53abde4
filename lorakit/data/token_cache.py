"""Tokenised rows on disk, under a name that is a hash of everything that they depend on.

A file of the cache is right or it is not used: anything that changes the examples (a character of a
row, a key of the recipe, the tokenizer, a library's version, lorakit's own code that makes them)
changes the name, and the content is checked against a hash inside the file. So nothing has to be
invalidated, and files may be deleted at any time. When the folder grows beyond LIMIT, the least
recently used files are removed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from lorakit import compat
from lorakit.data import shards
from lorakit.data.collect import Made
from lorakit.data.examples import ARRAYS, Examples
from lorakit.data.store import Memory, Store
from lorakit.data.table import Table
from lorakit.files import cache_root, sha256, write_bytes

log = logging.getLogger("lorakit")

LIMIT = 2 << 30  # bytes of all files together
# Below this size of the rows, in bytes, tokenising takes about as long as hashing the tokenizer
# (whose vocabulary alone has megabytes), the rows and the result.
WORTHWHILE = 500_000
# lorakit's code that determines the content of a file; it does not determine which rows there are.
MAKERS = (
    *("cells.py", "chat_template.py", "collect.py", "columns.py", "examples.py", "labels.py"),
    *(
        "messages.py",
        "packs.py",
        "spans.py",
        "spill.py",
        "store.py",
        "stored.py",
        "table.py",
        "token_cache.py",
        "tokenise.py",
        "typed.py",
    ),
    *("formats/*.py", "chat_templates/*.jinja"),
)
PACKAGES = ("tokenizers", "transformers")
SUFFIX = ".safetensors"


def kept(
    data: Table,
    tokenizer: Any,
    settings: Mapping[str, Any],
    make: Callable[[Store], Made],
) -> Made:
    """Result of `make`, (examples, counts of rows): from the cache, bit for bit, if it is there;
    else it is stored there.

    `settings`, as plain data, is everything that the result depends on besides the rows, the
    tokenizer and the code. Small data, and tokenizers whose state cannot be fully known, bypass the
    cache. A cache that cannot be read or written only costs time, unless the rows are too large for
    memory: their tokens are in files in any case (lorakit/data/shards.py). Errors of `make` are
    passed on and leave nothing behind.
    """
    key = _key(data, tokenizer, settings) if data.nbytes >= WORTHWHILE else None
    if data.is_spilled:
        return shards.unnamed(make) if key is None else shards.kept(key, make)
    if key is None:
        return make(Memory())
    place = cache_root() / "tokenised" / f"{key}{SUFFIX}"
    found = load(place, key)
    if found is None:
        found = make(Memory())
        _save(place, key, *found)
    return found


def _key(data: Table, tokenizer: Any, settings: Mapping[str, Any]) -> str | None:
    """The sha256 that identifies a result, or None where not everything that it depends on can be
    hashed."""
    state = _tokenizer_state(tokenizer)
    rows = None if state is None else _content(data)
    if rows is None:
        return None
    code = [sha256(file) for name in MAKERS for file in sorted(Path(__file__).parent.glob(name))]
    versions = [version(name) for name in PACKAGES]
    facts = [code, versions, settings, state, rows]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _content(data: Table) -> str | None:
    """sha256 of the rows; None for a column of a type that Arrow cannot copy or write."""
    try:
        return data.digest()
    except pa.ArrowException as error:
        log.info("tokenised rows are not kept, so the next run tokenises them anew: %s", error)
        return None


def _tokenizer_state(tokenizer: Any) -> str | None:
    """Everything that the tokenizer's output depends on; None if not all of it can be known, or if
    tokenising is random.

    It is known for tokenizers of the Rust library as transformers wraps them, but not for those
    written in Python or with code of their own.
    """
    if not (tokenizer.is_fast and type(tokenizer).__module__.startswith("transformers.")):
        return None
    backend = compat.backend(tokenizer)
    # BPE dropout, or sampling of Unigram
    if any(getattr(backend.model, name, None) for name in ("dropout", "alpha", "nbest_size")):
        return None
    backend.no_padding()  # removes the padding of the last call; each call sets it anew
    backend.no_truncation()
    try:
        inside = backend.to_str()
    # a bare Exception: parts that are written in Python cannot be serialised
    except Exception as error:
        log.info("tokenised rows are not kept, so the next run tokenises them anew: %s", error)
        return None
    # settings on Python's side
    outside = (
        *("special_tokens_map", "truncation_side", "split_special_tokens", "model_input_names"),
        "chat_template",
    )
    digest = hashlib.sha256(
        f"{type(tokenizer)} {[getattr(tokenizer, name) for name in outside]} ".encode()
    )
    digest.update(inside.encode())
    return digest.hexdigest()


def load(place: Path, key: str) -> Made | None:
    """(examples, counts of rows) of a file; None if there is no file, or if it is damaged or has
    another key."""
    try:
        with safe_open(place, "numpy") as file:
            about = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        if about.get("key") != key or about.get("sha256") != _digest(
            arrays, about.get("counts", "")
        ):
            raise ValueError("it is damaged, or another's")
        os.utime(place)  # it is now the most recently used
        return Examples(**arrays), json.loads(about["counts"])
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        log.info("kept tokens in %s are not used, rows are tokenised anew: %s", place, error)
        return None


def _save(place: Path, key: str, examples: Examples, counts: Mapping[str, int]) -> None:
    fields = {name: getattr(examples, name) for name in ARRAYS}
    arrays = {name: array for name, array in fields.items() if array is not None}
    counted = json.dumps(counts)
    about = {"key": key, "counts": counted, "sha256": _digest(arrays, counted)}
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(place, safetensors.numpy.save(arrays, about))
        _make_room(place)
    except OSError as error:
        log.info(
            "tokenised rows are not kept, so the next run tokenises them anew: %s can not be"
            " written (%s)",
            place,
            error,
        )


def _digest(arrays: Mapping[str, NDArray[Any]], counted: str) -> str:
    digest = hashlib.sha256(counted.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _make_room(newest: Path) -> None:
    """Remove the least recently used files, except `newest`, until the rest fits into LIMIT."""
    used = sorted(
        (file.stat().st_mtime, file.stat().st_size, file) for file in newest.parent.iterdir()
    )
    total = sum(size for _, size, _ in used)
    for _, size, file in used:
        if total > LIMIT and file != newest:
            file.unlink(missing_ok=True)
            total -= size
