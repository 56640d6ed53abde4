"""Resolution of names into sources: a local path, a builtin, the hub, or the hub's cache.

`plan` decides what a name refers to, without downloading anything; `resolve` decides the same and
then fetches. The resulting `Source` answers all later questions. Only a name on the hub can be
replaced by a stand-in, and only when the hub cannot be reached.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from lorakit.errors import RecipeError, RunError
from lorakit.files import expanded, sha256
from lorakit.sources import builtin, catalogue, hub
from lorakit.sources.catalogue import PREFIX, TWINS, Kind

log = logging.getLogger("lorakit")

SUFFIXES = r"\.(jsonl|ndjson|json|csv|tsv|parquet|txt)(\.(gz|bz2|xz|zst))?$"
DATA_FILE = re.compile(SUFFIXES, re.IGNORECASE)


@dataclass(frozen=True)
class Wanted:
    """Model or data set that a recipe names, and its `offline` replacement for when the hub cannot
    be reached.

    revision applies to a model, subset to a data set; messages suggest builtins for `task`.
    """

    kind: Kind
    name: str
    offline: str | None = None
    revision: str | None = None
    subset: str | None = None
    task: str | None = None

    @property
    def key(self) -> str:
        """Key of the name in the recipe."""
        return f"{self.kind}.name_or_path"

    @property
    def offline_key(self) -> str:
        return f"{self.kind}.offline"

    @property
    def builtins(self) -> list[str]:
        """The builtins that could be named instead."""
        return catalogue.of_kind(self.kind, self.task)


@dataclass(frozen=True)
class Source:
    """Source that a name in the recipe refers to.

    `location` is a folder or file for local and builtin sources and for a model in the hub's cache,
    and the name on the hub for the hub and for a data set in its cache. A data set's `subset` is
    not part of it.
    """

    requested: str
    """The name in the recipe."""
    used: str
    """The name of the source that is used: `requested`, or its replacement."""
    kind: Literal["local", "builtin", "hub", "hub-cache"]
    location: str
    stand_in: bool = False
    """True if another source than the requested one is used: results are not those of
    `requested`."""
    note: str | None = None
    """The reason why the source is not simply the requested one."""
    revision: str | None = None
    """The commit of a model from the hub, once it is known."""
    download: str | None = None
    """Download that is still to be made, in words. A builtin's `location` does not exist before
    it."""

    @property
    def base(self) -> str:
        """Name to record as an adapter's base: the hub model with the same weights, or the
        folder."""
        if self.kind == "builtin":
            return catalogue.find(self.used).hub or self.location
        return self.location if self.kind == "local" else self.requested

    @property
    def commit(self) -> str | None:
        """The commit of a model from the hub."""
        # The hub's cache keeps each commit in a folder named after it.
        return Path(self.location).name if self.kind == "hub-cache" else self.revision

    @property
    def altered(self) -> str | None:
        """Change made to the weights of `base`, in words; None where they are identical."""
        return catalogue.find(self.used).altered if self.kind == "builtin" else None

    def folder(self, revision: str | None = None) -> Path | None:
        """The folder on this machine with the files of a loaded model; None if it is not in the
        hub's cache. revision: the recipe's, for while the commit is not known."""
        if self.kind != "hub":
            return expanded(self.location)
        return hub.model_folder(self.location, self.revision or revision)

    def hashes(self) -> dict[str, str]:
        """{file name: SHA-256} of a local model's weights and configuration; a model from the hub
        has a commit instead."""
        folder = Path(self.location)
        files = [*folder.glob("*.safetensors"), *folder.glob("config.json")]
        return {file.name: sha256(file) for file in sorted(files)}

    def pinned(self, revision: str | None) -> Source:
        """The source of a model that was loaded at this revision, as a run records it: by its
        commit, so that a branch that moves does not matter, or by a path that is valid from every
        folder."""
        if self.kind == "hub":
            return replace(self, revision=hub.cached_commit(self.location, revision))
        if self.kind == "local":
            return replace(self, location=str(expanded(self.location).resolve()))
        return self

    def fetched(self) -> Source:
        """The source, with everything downloaded that can be downloaded ahead: a builtin's folder.

        Raises RunError if that fails, or if files from the hub could not be stored.
        """
        if self.kind == "hub":
            hub.check_cache()
        if self.kind != "builtin":
            return self
        return replace(self, location=str(builtin.folder(self.used)), download=None)


def kind_of(name: str) -> Literal["local", "builtin", "hub"]:
    """Kind of source that a name refers to, by its form and by the files on disk. Uses no
    network."""
    if name.startswith((".", "/", "~")) or DATA_FILE.search(name) or name.count("/") > 1:
        return "local"
    if Path(name).exists():
        return "local"
    return "builtin" if name.startswith(PREFIX) else "hub"


def resolve(wanted: Wanted) -> Source:
    """Source of `wanted`, fetched if it is a builtin; a stand-in is announced first.

    Raises RecipeError (at `wanted.key` or `wanted.offline_key`) for a name that cannot be right,
    RunError if the hub is needed and cannot be reached or a builtin cannot be fetched.
    """
    source = plan(wanted)
    if source.stand_in:
        log.warning("%s", _box(["STAND-IN IN USE", *(source.note or "").split("\n")]))
    elif source.note:
        log.info("%s: %s", source.requested, source.note)
    return source.fetched()


def plan(wanted: Wanted) -> Source:
    """Source that `resolve` would return, without downloading. Raises the same errors, except those
    of fetching."""
    _check_offline(wanted)
    name = wanted.name
    if kind_of(name) != "hub":
        return _at_hand(name, wanted, wanted.key)
    if not hub.could_have(name):
        what = f"`{name}` is neither on disk nor a name that the hub could have"
        expected = "owner/name as on the hub, builtin/…, or a path on disk"
        raise RecipeError.at(wanted.key, what, expected, _nearest(Path(name)))
    if (reason := hub.unreachable()) is None:
        return Source(name, name, "hub", name, download=_hub_download(wanted))
    if (copy := _cached(wanted)) is not None:
        return Source(name, name, "hub-cache", copy, note=f"from the hub's cache: {reason}")
    if wanted.kind == "model" and name in TWINS and wanted.revision in (None, "main"):
        same = _at_hand(TWINS[name], wanted, wanted.key)
        note = f"{same.used} holds the very same weights as {name}: {reason}"
        return replace(same, requested=name, note=note)
    return _stand_in(wanted, reason)


def _at_hand(name: str, wanted: Wanted, key: str) -> Source:
    """The source of a name that is local or a builtin. Raises RecipeError at `key`."""
    if kind_of(name) == "builtin":
        entry, place = catalogue.find(name, key, wanted.kind), builtin.cached(name)
        size = f"{name}, {entry.size / 1e6:.1f} MB from the package index"
        return Source(name, name, "builtin", str(place or name), download=None if place else size)
    path, expected = expanded(name), "a folder with config.json and the weights"
    if not path.exists():
        where = {"model": "a folder that is there", "data": "a file or folder that is there"}
        there = f"{where[wanted.kind]}, a name on the hub, or builtin/…"
        raise RecipeError.at(key, f"there is no `{name}` on disk", there, _nearest(path))
    if wanted.kind == "model" and not path.is_dir():
        raise RecipeError.at(key, f"`{name}` is a file", expected)
    if wanted.kind == "model" and not (path / "config.json").is_file():
        adapter = (path / "adapter_config.json").is_file()
        hint = " (it holds an adapter, not a model)" if adapter else ""
        raise RecipeError.at(key, f"the folder `{name}` has no config.json{hint}", expected)
    return Source(name, name, "local", str(path))


def _cached(wanted: Wanted) -> str | None:
    """Location in the hub's cache; None where it is missing or incomplete."""
    if wanted.kind == "data":
        return wanted.name if hub.has_prepared_data(wanted.name, wanted.subset) else None
    folder = hub.complete_model(wanted.name, wanted.revision)
    return None if folder is None else str(folder)


def _hub_download(wanted: Wanted) -> str | None:
    if wanted.kind == "data":  # looking into its cache imports datasets, which takes a second
        return f"data set {wanted.name} from the hub, unless its cache has it"
    return None if _cached(wanted) else f"model {wanted.name} from the hub"


def _check_offline(wanted: Wanted) -> None:
    """Raise RecipeError if `offline` could not serve, even if it is not needed this time."""
    offline, key = wanted.offline, wanted.offline_key
    if offline is None:
        return
    meant = kind_of(offline)
    if meant == "hub":
        near = get_close_matches(offline, wanted.builtins, n=1)
        what = f"`{offline}` would come from the hub, which is just what can not be reached"
        expected = ", or ".join(["a local path", *wanted.builtins])
        raise RecipeError.at(key, f"{what} when it is needed", expected, near[0] if near else None)
    if meant == "builtin":
        catalogue.find(offline, key, wanted.kind)


def _stand_in(wanted: Wanted, reason: str) -> Source:
    name, model = wanted.name, wanted.kind == "model"
    if wanted.offline is None:
        instead = ", ".join(["a local path", *wanted.builtins])
        folder = "a local folder with the model"
        raise RunError(
            f"`{name}` is neither on disk nor in the hub's cache, and {reason}",
            f"Ways out: name {folder if model else 'a local file or folder with the data'}; "
            f"set `{wanted.offline_key}` to what may be used instead ({instead}); "
            "or bring a cache that has it and point HF_HOME to it.",
        )
    source = _at_hand(wanted.offline, wanted, wanted.offline_key)
    note = [
        f"requested: {'model' if model else 'data set'} {name}",
        f"but {reason}",
        f"used INSTEAD: {wanted.offline}",
        f"results are NOT those of {name}",
    ]
    return replace(source, requested=name, stand_in=True, note="\n".join(note))


def _nearest(path: Path) -> str | None:
    """The path on disk that a missing one probably means: its first wrong part replaced by a
    similar name."""
    there, wrong = path.parent, path.name
    while not there.exists() and there != there.parent:
        there, wrong = there.parent, there.name
    siblings = [child.name for child in there.iterdir()] if there.is_dir() else []
    near = get_close_matches(wrong, siblings, n=1)
    if not near:
        return None
    meant = there / near[0] / path.relative_to(there / wrong)
    return str(meant if meant.exists() else there / near[0])


def _box(lines: list[str]) -> str:
    bar = "!" * (max(map(len, lines)) + 4)
    return "\n".join(["", bar, *(f"! {line}" for line in lines), bar])
