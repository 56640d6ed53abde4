"""lorakit init"""

from __future__ import annotations

import shlex
from pathlib import Path

import typer

from lorakit.cli import common, complete
from lorakit.errors import UsageError


def init(
    name: str = typer.Argument(
        None,
        help="A shipped recipe; by default all are listed.",
        show_default=False,
        metavar="[NAME]",
        autocompletion=complete.shipped_recipes,
    ),
    out: Path = typer.Option(
        None, "--out", metavar="FILE", help="By default NAME.yaml in the working folder."
    ),
    force: bool = typer.Option(False, "--force", help="Replace the file that is there."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object instead of text."),
) -> None:
    """List the recipes that come with lorakit, or write a copy of one to edit."""
    from lorakit.runs import init as recipes

    if name is not None:
        written = recipes.init(common.typed(name), common.home(out), force)
        following = f"lorakit train {shlex.quote(str(written))}"
        if as_json:
            common.say_json({"written": str(written), "next": following})
        else:
            common.say(f"{written} written; edit it, then: {following}")
        return
    if out is not None or force:
        option = "--force" if out is None else "--out"
        raise UsageError(
            f"`{option}` is for a recipe that is written", "Name it: `lorakit init NAME`."
        )
    found = recipes.list_recipes()
    if as_json:
        common.say_json({"recipes": found})
        return
    from rich import box
    from rich.table import Table

    console, err = common.consoles()
    table = Table("recipe", "what it does", "method", "task", box=box.SIMPLE_HEAD)
    for one in found:
        table.add_row(one["name"], one["description"], one["method"], one["task"])
    console.print(table)
    err.print("lorakit init NAME writes a copy to edit")
