"""Evaluation of a saved run, on its own validation data or on other data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakit.data.joined import AnyExamples, Joined
from lorakit.errors import UsageError
from lorakit.kernels.dispatch import announce
from lorakit.models.load import compute_dtype, default_device
from lorakit.recipes.recipe import Recipe, locating
from lorakit.report.progress import Progress
from lorakit.runs.moment import chosen
from lorakit.runs.saved import for_one_set, saved_examples, saved_model, saved_recipe, saved_rows
from lorakit.runs.session import check_rows, reported_metrics
from lorakit.runs.sets import source_facts
from lorakit.training.loop import evaluation_limits
from lorakit.training.metrics import Evaluation, evaluate

# Keys that an evaluation may set: the rows and how they are read, the batch size, the precision,
# and the bits of the base, since an adapter may serve on another form of its base.
SETTABLE = (
    "data.",
    "model.quantization",
    "train.per_device_eval_batch_size=",
    "train.max_tokens_per_micro_batch=",
    "train.precision=",
    "train.metric_for_best_model=",
)


def evaluated_recipe(run: Path, overrides: Sequence[str]) -> Recipe:
    """The recipe of a finished run with overrides. Raises UsageError for overrides that would
    describe another run."""
    for override in overrides:
        if not override.startswith(SETTABLE):
            raise UsageError(
                f"`{override}` can not be set for a finished run",
                "Evaluation takes data.…, model.quantization and train.per_device_eval_batch_size.",
            )
        if override.startswith("data.chat_template"):
            raise UsageError(
                "a finished run has its chat template beside its adapter",
                "Leave data.chat_template out.",
            )
    return saved_recipe(run, overrides)


def evaluate_run(run: Path, overrides: Sequence[str], progress: Progress) -> dict[str, Any]:
    """{run, data, rows, metrics} of the run's adapter. Raises UsageError for overrides that would
    describe another run."""
    run = chosen(run)
    overrides = for_one_set(run, overrides)
    recipe = evaluated_recipe(run, overrides)
    rows, sources = saved_rows(run, recipe, overrides)
    # Other data changes neither the run's task nor its metrics.
    task = saved_recipe(
        run, [override for override in overrides if not override.startswith("data.")]
    )
    device = default_device()
    dtype = compute_dtype(recipe.train.precision, device)
    announce(device)
    with progress.stage("loading the model"):
        task_model, _, facts = saved_model(run, recipe, dtype)
    examples = saved_examples(
        rows, recipe, facts.labels, task_model.tokenizer, task_model.model.config, progress
    )
    with locating(recipe):
        check_rows(task_model, examples, "validation")
    limits = evaluation_limits(recipe.train)
    with progress.stage("evaluating") as advance:
        evaluation = evaluate(
            task_model, examples, reported_metrics(task, facts.labels), *limits, advance
        )
    return {
        "run": str(run),
        "data": source_facts(recipe, sources),
        "rows": len(examples),
        "metrics": evaluation.metrics,
        **_by_set(examples, evaluation),
    }


def _by_set(examples: AnyExamples, found: Evaluation) -> dict[str, Any]:
    """{"rows_by_set", "metrics_by_set"} of several data sets."""
    if not isinstance(examples, Joined):
        return {}
    rows = {name: len(part) for name, part in zip(examples.names, examples.parts, strict=True)}
    return {"rows_by_set": rows, "metrics_by_set": found.by_set}
