"""Recipes that come with lorakit: files of `recipes/` in the repository, which the wheel carries as
`lorakit/shipped_recipes/` (pyproject.toml, force-include)."""

from __future__ import annotations

import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
IN_WHEEL, IN_REPOSITORY = PACKAGE / "shipped_recipes", PACKAGE.parent / "recipes"


def shipped() -> dict[str, Path]:
    """{name: its file}, sorted by name; empty if the files were removed."""
    folder = IN_WHEEL if IN_WHEEL.is_dir() else IN_REPOSITORY
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def name_of(typed: str) -> str:
    """The name that `typed` means: with or without its suffix, and a folder before it."""
    return re.sub(r"\.ya?ml$", "", typed.rpartition("/")[2])


def description(text: str) -> str:
    """The first sentence of the comment that a recipe begins with; "" without one."""
    comment = re.match(r"(?:#.*\n)*", text)
    words = " ".join(re.sub(r"(?m)^#", "", comment[0] if comment else "").split())
    return re.split(r"(?<=\.) ", words)[0]
