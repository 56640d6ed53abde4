"""lorakit import"""

from __future__ import annotations

import shlex
from pathlib import Path

import typer

from lorakit.cli import common


def import_adapter(
    folder: Path = typer.Argument(
        ...,
        help="A folder with adapter_config.json and adapter_model.safetensors.",
        show_default=False,
        metavar="PEFT_FOLDER",
    ),
    out: Path = typer.Option(
        None, "--out", metavar="RUN", help="The new run folder; by default runs/ and its name."
    ),
    base: str = typer.Option(
        None,
        "--base",
        metavar="NAME_OR_PATH",
        help="The model, instead of the one that adapter_config.json names.",
    ),
    labels: str = typer.Option(
        None,
        "--labels",
        metavar="NAME,NAME…",
        help="The classes of a classifier's head, in its order.",
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the run that --out holds."),
) -> None:
    """Make a run of a PEFT LoRA adapter, for eval, generate, convert, export and inspect-ranks.
    Trains nothing."""
    from lorakit.report.history import RUNS
    from lorakit.report.progress import Progress
    from lorakit.report.summary import summary_panel
    from lorakit.runs.import_adapter import run_import

    console, err = common.consoles()
    folder = common.home(folder)
    run = common.home(out) or RUNS / folder.resolve().name
    names = [name.strip() for name in labels.split(",")] if labels else []
    result = run_import(folder, run, Progress(err), base, names, overwrite)
    untrained = ("train_seconds", "tokens_per_second")
    console.print(summary_panel({k: v for k, v in result.items() if k not in untrained}))
    err.print(
        f"saved {run}/adapter · see also: lorakit eval {shlex.quote(str(run))} data.name_or_path=…"
    )
