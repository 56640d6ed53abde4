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
    """Make a chunkwise run from a finished one (adalora, l1ra, salor, vanilla): a ladder of ranks,
    tables, tiers. Trains nothing.

    Set its keys as method.ladder=[4,8,16] method.rank_target=8 method.kv.policy=int8.
    """
    from lorakit.methods import adopting_method
    from lorakit.report.history import read_history, run_folder
    from lorakit.report.progress import Progress
    from lorakit.report.sparsity import run_tables
    from lorakit.report.summary import summary_panel
    from lorakit.runs.train import run_conversion

    named, overrides = common.split_run(arguments)
    run = run_folder(named)
    folder = common.home(out) or run.with_name(f"{run.name}-{adopting_method()}")
    console, err = common.consoles()
    result = run_conversion(run, overrides, folder, Progress(err), overwrite)
    console.print(summary_panel(result))
    console.print(run_tables(read_history(folder), result))
    err.print(
        f"saved {folder}/adapter · see also: lorakit generate {shlex.quote(str(folder))} --prompt …"
    )
