"""lorakit validate"""

from __future__ import annotations

from pathlib import Path

from lorakit.cli import _common


def validate(recipe: Path = _common.RECIPE, overrides: list[str] = _common.OVERRIDES) -> None:
    """Check a recipe: every wrong key and value, with its place."""
    from lorakit.recipes.recipe import load_recipe

    load_recipe(_common.home(recipe), _common.given(overrides))
    _common.say(f"{recipe}: valid")
