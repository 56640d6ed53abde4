"""lorakit eval"""

from __future__ import annotations

import json

import typer

from lorakit.cli import _common


def evaluate(
    arguments: list[str] = _common.RUN_AND_OVERRIDES,
    as_json: bool = typer.Option(False, "--json", help="One JSON object instead of a table."),
) -> None:
    """Evaluate a run's adapter on its validation data, or on other data with data.name_or_path=…"""
    from rich.table import Table

    from lorakit.evaluation import evaluate_run
    from lorakit.report.history import run_folder
    from lorakit.report.progress import Progress

    run, overrides = _common.split_run(arguments)
    out, err = _common.consoles()
    found = evaluate_run(run_folder(run), overrides, Progress(err))
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
        return
    table = Table(
        "metric", "value", title=f"{found['run']} on {found['data']['name']}, {found['rows']} rows", title_justify="left"
    )
    for name, value in found["metrics"].items():
        table.add_row(name, f"{value:.4f}")
    out.print(table)
