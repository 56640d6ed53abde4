"""lorakit convert"""

from __future__ import annotations

import shlex
from pathlib import Path

import typer

from lorakit.cli import common


def convert(
    arguments: list[str] = common.RUN_AND_OVERRIDES,
    out: Path = typer.Option(
        None, "--out", metavar="DIR", help="The new run folder; by default RUN-chunkwise."
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the run that --out holds."),
) -> None:
    """Make a chunkwise run from another (adalora, l1ra, salor, vanilla) or its checkpoint: a ladder
    of ranks, tables, tiers. Trains nothing.

    Set its keys as method.ladder=[4,8,16] method.rank_target=8 method.kv.policy=int8.
    """
    from lorakit.methods import adopting_method
    from lorakit.report.history import read_history, run_folder, run_of
    from lorakit.report.progress import Progress
    from lorakit.report.sparsity import run_tables
    from lorakit.report.summary import summary_panel
    from lorakit.runs.train import run_conversion

    named, overrides = common.split_run(arguments)
    run = run_folder(named, or_checkpoint=True)
    home = run_of(run)
    name = home.name if home == run else f"{home.name}-{run.name}"
    folder = common.home(out) or home.with_name(f"{name}-{adopting_method()}")
    console, err = common.consoles()
    result = run_conversion(run, overrides, folder, Progress(err), overwrite)
    console.print(summary_panel(result))
    console.print(run_tables(read_history(folder), result))
    err.print(
        f"saved {folder}/adapter · see also: lorakit generate {shlex.quote(str(folder))} --prompt …"
    )
