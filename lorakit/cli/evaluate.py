"""lorakit eval"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lorakit import process
from lorakit.cli import common, complete
from lorakit.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console


GENERATE = typer.Option(
    False, "--generate", help="Answer the prompts and compare with the accepted answers."
)
METRIC = complete.one_of(
    None,
    "--metric",
    *("exact_match", "f1", "bleu"),
    help="With --generate, may be repeated. By default exact_match and f1.",
)
LONGEST_ANSWER = typer.Option(
    None, "--max-new-tokens", min=1, help="With --generate: longest answer, by default 64."
)
BATCH_SIZE = typer.Option(
    None, "--batch-size", min=1, help="With --generate: prompts answered at a time."
)
ANSWERS = typer.Option(
    None,
    "--answers",
    metavar="FILE.jsonl",
    help="With --generate: write prompts, answers and references.",
)
AS_JSON = typer.Option(False, "--json", help="One JSON object instead of a table.")


def evaluate(
    arguments: list[str] = common.RUN_AND_OVERRIDES,
    generate: bool = GENERATE,
    metric: list[str] = METRIC,
    max_new_tokens: int = LONGEST_ANSWER,
    batch_size: int = BATCH_SIZE,
    answers: Path = ANSWERS,
    as_json: bool = AS_JSON,
) -> None:
    """Evaluate a run's adapter on its validation data, or on other data with data.name_or_path=…"""
    if generate:
        process.wait_by_spinning()
    from lorakit.report.history import run_folder
    from lorakit.report.progress import Progress

    run, overrides = common.split_run(arguments)
    out, err = common.consoles()
    if generate:
        from lorakit.runs.answer import MAX_NEW_TOKENS, evaluate_answers
        from lorakit.training.answer_metrics import DEFAULT_METRICS

        names, longest = metric or DEFAULT_METRICS, max_new_tokens or MAX_NEW_TOKENS
        found = evaluate_answers(
            run_folder(run, or_checkpoint=True),
            overrides,
            names,
            longest,
            batch_size,
            common.home(answers),
            Progress(err),
        )
    else:
        from lorakit.runs.evaluate import evaluate_run

        _needs_generate(
            {
                "metric": metric,
                "max-new-tokens": max_new_tokens,
                "batch-size": batch_size,
                "answers": answers,
            }
        )
        found = evaluate_run(run_folder(run, or_checkpoint=True), overrides, Progress(err))
    if as_json:
        common.say_json(found)
    else:
        _print_table(found, out)


def _needs_generate(options: dict[str, object]) -> None:
    """Raise UsageError for an option that was given without `--generate`, which it requires."""
    given = [name for name, value in options.items() if value]
    if given:
        raise UsageError(f"`--{given[0]}` is for answers that are generated", "Add `--generate`.")


def _print_table(found: dict[str, Any], out: Console) -> None:
    from rich.table import Table

    from lorakit.report.summary import metric_value

    # Printed separately: as the table's title it would be wrapped to the table's width.
    out.print(f"{found['run']} on {found['data']['name']}, {found['rows']} rows", soft_wrap=True)
    by_set = found.get("metrics_by_set") or {}
    table = Table("metric", "value", *by_set)
    for name, value in found["metrics"].items():
        values = [value, *(metrics[name] for metrics in by_set.values())]
        table.add_row(name, *(metric_value(one, ".4f") for one in values))
    out.print(table)
