"""lorakit report"""

from __future__ import annotations

from pathlib import Path

import typer

from lorakit.cli import common


def report(
    run: Path = common.RUN,
    out: Path = typer.Option(
        None, "--out", metavar="FILE.html", help="The page; by default report.html in the run."
    ),
) -> None:
    """Write one self-contained HTML page about a run, finished or not."""
    from lorakit.report.history import run_folder
    from lorakit.runs.report import report as write_report

    folder = run_folder(common.home(run))
    written = write_report(folder, common.home(out))
    _, err = common.consoles()
    err.print(f"run {folder}")
    common.say(str(written))
