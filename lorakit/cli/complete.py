"""Completions for the shell: recipe files, shipped recipes, run folders, and options that take one
of a few words. The shell itself completes other files where a list is empty."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer


def recipe_files(incomplete: str) -> list[str]:
    """YAML files that begin with `incomplete`, of its folder and of the folders in that."""
    above, _, _ = incomplete.rpartition("/")
    folder = Path(os.path.expanduser(above or ("/" if incomplete.startswith("/") else ".")))
    patterns = (f"{below}*.{suffix}" for below in ("", "[!.]*/") for suffix in ("yaml", "yml"))
    found = [path for pattern in patterns for path in folder.glob(pattern)]
    prefix = incomplete[: len(above) + 1] if "/" in incomplete else ""
    names = (prefix + path.relative_to(folder).as_posix() for path in found)
    return _beginning(names, incomplete)


def shipped_recipes(incomplete: str) -> list[str]:
    """Names of shipped recipes."""
    from lorakit.recipes.shipped import shipped

    return _beginning(shipped(), incomplete)


def runs(incomplete: str) -> list[str]:
    """Run folders under runs/, and within a run its checkpoints."""
    from lorakit.report.history import existing_runs

    found = existing_runs()
    inside = [run for run in found if incomplete.startswith(f"{run}/")]
    steps = [step for run in inside for step in run.glob("checkpoints/**/step-*")]
    return _beginning(map(str, [*found, *steps]), incomplete)


def one_of(default: Any, option: str, *names: str, help: str) -> Any:
    """Option that takes one of `names`, which its help and the shell list. What is given is checked
    by the code that reads it, whose error has the nearest name."""

    def beginning(incomplete: str) -> list[str]:
        return _beginning(names, incomplete)

    listed = f"[{'|'.join(names)}]"
    return typer.Option(default, option, metavar=listed, autocompletion=beginning, help=help)


def _beginning(names: Iterable[str], incomplete: str) -> list[str]:
    return sorted(name for name in names if name.startswith(incomplete))
