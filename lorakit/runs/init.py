"""The start of a newcomer: the shipped recipes, and a copy of one to edit."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lorakit.errors import UsageError
from lorakit.files import try_file, write_bytes
from lorakit.recipes.recipe import load_recipe
from lorakit.recipes.shipped import description, name_of, shipped


def list_recipes() -> list[dict[str, Any]]:
    """The shipped recipes, each {name, description, method, task}; a composition is `l1ra+salor`,
    as in result.json. Raises UsageError if there are none."""
    return [_described(name, path) for name, path in _shipped().items()]


def init(name: str, out: Path | None = None, force: bool = False) -> Path:
    """Write a copy of the shipped recipe `name`, by default to NAME.yaml; returns its path.

    Raises UsageError for a name that there is not, for a file that exists unless `force`, and for
    one that can not be written.
    """
    recipes, meant = _shipped(), name_of(name)
    if meant not in recipes:
        near = get_close_matches(meant.lower(), recipes, 1)
        remedy = f"Did you mean `{near[0]}`? " if near else ""
        raise UsageError(
            f"there is no shipped recipe `{name}`", f"{remedy}They are {', '.join(recipes)}."
        )
    target = out or Path(f"{meant}.yaml")
    if target.is_dir():
        raise UsageError(f"`{target}` is a folder", f"Name a file, as --out {target}/{meant}.yaml.")
    if target.exists() and not force:
        raise UsageError(f"`{target}` exists", "--force replaces it; --out names another file.")
    try:
        try_file(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(target, recipes[meant].read_bytes())
    except OSError as error:
        raise UsageError(
            f"`{target}` can not be written: {error.strerror}", "Name another file with --out."
        ) from error
    return target


def _shipped() -> dict[str, Path]:
    if not (found := shipped()):
        raise UsageError("the shipped recipes are missing", "Install lorakit anew.")
    return found


def _described(name: str, path: Path) -> dict[str, Any]:
    recipe = load_recipe(path)
    return {
        "name": name,
        "description": description(path.read_text(encoding="utf-8")),
        "method": "+".join([recipe.method.name, *(part.name for part in recipe.method.with_)]),
        "task": recipe.model.task,
    }
