"""lorakit train"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lorakit import process
from lorakit.cli import common
from lorakit.errors import UsageError

if TYPE_CHECKING:
    from lorakit.recipes.recipe import Recipe


def train(
    recipe: Path = common.RECIPE,
    overrides: list[str] = common.OVERRIDES,
    resume: str = typer.Option(
        None,
        "--resume",
        metavar="auto|PATH",
        help="Go on from the newest checkpoint, or from this one.",
    ),
    overwrite: bool = typer.Option(
        False, "--overwrite", help="Replace the run that output_dir holds."
    ),
    nproc: int = typer.Option(
        1,
        "--nproc",
        min=1,
        metavar="N",
        help="Train with so many processes on this machine, one for each GPU.",
    ),
    restarts: int = typer.Option(
        0,
        "--restarts",
        min=0,
        metavar="K",
        help="With --nproc: go on from the newest checkpoint, up to K times, when one fails.",
    ),
    dry_run: bool = typer.Option(
        False,
        "--dry-run",
        help="Show the resolved recipe, targets, parameters, steps and downloads; train nothing.",
    ),
) -> None:
    """Train an adapter as a recipe says."""
    from lorakit.training.interrupt import before_it_begins

    if restarts and nproc == 1:
        raise UsageError("--restarts needs several processes", "Add --nproc N, or leave it out.")
    with before_it_begins():
        if nproc == 1 and process.processes() == 1:
            process.spin_if_idle()
        from lorakit.recipes.recipe import load_recipe
        from lorakit.report.progress import Progress

        loaded = load_recipe(common.home(recipe), common.given(overrides))
    out, err = common.consoles()
    if dry_run:
        from lorakit.runs.dry_run import dry_run as plan

        for line in plan(loaded, Progress(err)):
            out.print(line, soft_wrap=True)
    elif nproc > 1 and process.processes() == 1:
        with before_it_begins():
            from lorakit.runs.launch import launch

        raise typer.Exit(launch(sys.argv[1:], loaded, nproc, restarts, resume, overwrite))
    else:
        _train(loaded, resume, overwrite)


def _train(recipe: Recipe, resume: str | None, overwrite: bool) -> None:
    """Train in this process, which may be one of several that a launcher has started."""
    from lorakit.training.interrupt import before_it_begins

    with before_it_begins():  # importing takes seconds
        from lorakit.report.history import read_history
        from lorakit.report.progress import Progress
        from lorakit.report.sparsity import run_tables
        from lorakit.report.summary import summary_panel
        from lorakit.runs.train import run_training

    if process.attempt():
        resume, overwrite = "auto", False
    out, err = common.consoles()
    result = run_training(recipe, Progress(err, recipe.train.logging_steps), resume, overwrite)
    if not result:  # of a process that does not write
        return
    folder = Path(recipe.output_dir)
    out.print(summary_panel(result))
    out.print(run_tables(read_history(folder), result))
    shown = shlex.quote(str(folder))
    err.print(
        f"saved {folder}/adapter · see also: lorakit inspect-ranks {shown} · lorakit export {shown}"
        " --merge"
    )
