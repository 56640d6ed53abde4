"""What a recipe would do."""

from rich.console import Console

from lorakit.recipe import Recipe


def dry_run(recipe: Recipe, out: Console) -> None: ...
