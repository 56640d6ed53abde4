"""lorakit train"""

from __future__ import annotations

import shlex
from pathlib import Path

import typer

from lorakit import process
from lorakit.cli import common


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
    dry_run: bool = typer.Option(
        False,
        "--dry-run",
        help="Show the resolved recipe, targets, parameters, steps and downloads; train nothing.",
    ),
) -> None:
    """Train an adapter as a recipe says."""
    from lorakit.training.interrupt import before_it_begins

    with before_it_begins():
        process.spin_if_idle()
        from lorakit.recipes.recipe import load_recipe
        from lorakit.report.history import read_history
        from lorakit.report.progress import Progress
        from lorakit.report.sparsity import run_tables
        from lorakit.report.summary import summary_panel
        from lorakit.runs.train import run_training

        loaded = load_recipe(common.home(recipe), common.given(overrides))
    out, err = common.consoles()
    if dry_run:
        from lorakit.runs.dry_run import dry_run as plan

        for line in plan(loaded, Progress(err)):
            out.print(line, soft_wrap=True)
        return

    result = run_training(loaded, Progress(err, loaded.train.logging_steps), resume, overwrite)
    folder = Path(loaded.output_dir)
    out.print(summary_panel(result))
    out.print(run_tables(read_history(folder), result))
    shown = shlex.quote(str(folder))
    err.print(
        f"saved {folder}/adapter · see also: lorakit inspect-ranks {shown} · lorakit export {shown}"
        " --merge"
    )
