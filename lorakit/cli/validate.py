"""lorakit validate"""

from __future__ import annotations

from pathlib import Path

from lorakit.cli import common


def validate(recipe: Path = common.RECIPE, overrides: list[str] = common.OVERRIDES) -> None:
    """Check a recipe: every wrong key and value, with its place."""
    from lorakit.recipes.recipe import load_recipe

    load_recipe(common.home(recipe), common.given(overrides))
    common.say(f"{recipe}: valid")
