"""lorakit estimate"""

from __future__ import annotations

from pathlib import Path

import typer

from lorakit import process
from lorakit.cli import common


def estimate(
    recipe: Path = common.RECIPE,
    overrides: list[str] = common.OVERRIDES,
    seconds: float = typer.Option(
        60.0, "--seconds", min=0.0, metavar="N", help="Time steps for at most so long."
    ),
    as_json: bool = typer.Option(False, "--json", help="One JSON object instead of tables."),
) -> None:
    """Estimate a recipe's parameters, memory and time from a few of its steps; write nothing."""
    process.spin_if_idle()
    from lorakit.recipes.recipe import load_recipe
    from lorakit.report.estimate import estimate_tables
    from lorakit.report.progress import Progress
    from lorakit.runs.estimate import estimate as estimated

    loaded = load_recipe(common.home(recipe), common.given(overrides))
    out, err = common.consoles()
    found = estimated(loaded, Progress(err), seconds)
    if as_json:
        common.say_json(found)
        return
    out.print(estimate_tables(found))
