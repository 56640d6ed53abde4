"""The hub and its cache on this machine."""

from __future__ import annotations

import functools
import json
import os
import queue
import threading
from pathlib import Path

from huggingface_hub import constants, get_session, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, unlisted

from lorakit import compat
from lorakit.errors import RunError
from lorakit.files import try_folder

LIMIT_S = 8.0
"""Time limit for an answer from the hub, including name resolution."""


@functools.cache
def unreachable() -> str | None:
    """None if the hub answers, else the reason why not. Asked once per process, with a limit of
    LIMIT_S."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE"):
            return f"{variable} is set"
    if constants.HF_HUB_OFFLINE:
        return "huggingface_hub is in offline mode"
    answers: queue.Queue[str | None] = queue.Queue()

    def ask() -> None:
        try:
            status = get_session().head(constants.ENDPOINT, timeout=LIMIT_S).status_code
        except Exception as error:  # whatever fails here, the hub has not answered
            answers.put(f"the hub can not be reached ({str(error) or type(error).__name__})")
        else:
            # Other error statuses may be the hub's own; these come from a proxy or gateway in
            # between.
            blocked = status in (403, 407) or status >= 500
            answers.put(f"the hub can not be reached (HTTP status {status})" if blocked else None)

    # A thread, because no timeout of the HTTP client covers name resolution.
    threading.Thread(target=ask, daemon=True, name="ask-the-hub").start()
    try:
        return answers.get(timeout=LIMIT_S)
    except queue.Empty:
        return f"the hub can not be reached (no answer in {LIMIT_S:g} s)"


def could_have(name: str) -> bool:
    """True if `name` is a valid name on the hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_cache() -> None:
    """Raise RunError where files from the hub cannot be stored; reported here so that it is not
    mistaken for a fault of the data."""
    places = {constants.HF_HUB_CACHE: "HF_HUB_CACHE or HF_HOME", constants.HF_HOME: "HF_HOME"}
    for place, variables in places.items():
        try:
            try_folder(Path(place))
        except OSError as error:
            what = f"the hub's cache `{place}` can not be written: {error.strerror}"
            raise RunError(what, f"Set {variables} to a folder that can be written to.") from error


def model_folder(name: str, revision: str | None) -> Path | None:
    """The folder of the hub's cache with the files of model `name`, as last loaded at this
    revision; None if it is not in the cache."""
    config = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def complete_model(name: str, revision: str | None) -> Path | None:
    """The folder of the hub's cache that holds the complete model `name`, or None. A cache may hold
    only a config."""
    folder = model_folder(name, revision)
    if folder is None:
        return None
    shards = {"model.safetensors"}
    if (index := folder / "model.safetensors.index.json").exists():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    whole = all((folder / shard).exists() for shard in shards)
    kinds = ("tokenizer*", "vocab*", "*.model")
    tokenizer = any(next(folder.glob(kind), None) for kind in kinds)
    return folder if whole and tokenizer else None


def cached_commit(name: str, revision: str | None) -> str:
    """The commit of model `name` in the hub's cache, as last loaded at this revision. Raises
    RunError if there is none."""
    folder = model_folder(name, revision)
    if folder is None:
        raise RunError(
            f"the commit of `{name}` is not known: the hub's cache lost it since it was loaded",
            "Is something else removing files from the cache?",
        )
    return folder.name  # …/snapshots/COMMIT


def has_prepared_data(name: str, subset: str | None) -> bool:
    """True if `datasets` would find this prepared in its cache: OWNER___NAME / CONFIGURATION /
    VERSION / HASH. Imports datasets, which takes a second."""
    *owner, short = name.split("/")
    place = Path(compat.prepared_data(owner, short))
    infos = place.glob("*/*/*/dataset_info.json")
    found = {info.parents[2].name for info in infos if info.parent.suffix != ".incomplete"}
    # Without a subset, several configurations are ambiguous to `datasets`.
    return subset in found if subset else len(found) == 1
