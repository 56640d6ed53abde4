"""lorakit schema"""

from __future__ import annotations

from lorakit.cli import common


def schema() -> None:
    """Print the JSON Schema of recipes, for editors that complete YAML."""
    from lorakit.recipes.recipe import json_schema

    common.say_json(json_schema(), indent=2)
