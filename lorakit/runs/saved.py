"""Opening a run, finished or at a checkpoint (`lorakit.runs.moment`): its recipe, its model with
the trained adapters, and rows to evaluate it on."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lorakit.data.choice import recorded
from lorakit.data.examples import Examples
from lorakit.data.label_kinds import is_number
from lorakit.data.labels import Labels, count_labels, listed_classes
from lorakit.data.load import Loaded, load_rows
from lorakit.data.spec import DataSpec
from lorakit.errors import RecipeError, UsageError
from lorakit.export.native import AdapterFacts, adapted_modules, load_native, read_facts
from lorakit.methods import Method
from lorakit.models.load import default_device, load_model
from lorakit.models.task_model import TaskModel
from lorakit.models.tokenizer import load_tokenizer
from lorakit.recipes.recipe import Recipe, load_recipe, locating
from lorakit.report.history import run_of
from lorakit.report.progress import Progress
from lorakit.runs.folder import RECIPE
from lorakit.runs.moment import adapter_of, manifest_of, still_there, tokenizer_of
from lorakit.runs.session import adapt, data_wanted, reading
from lorakit.sources.resolve import Source, resolve

log = logging.getLogger("lorakit")
# Keys that select rows of the run's own data; they mean nothing for other data.
OF_ITS_DATA = (
    "subset",
    "offline",
    "revision",
    "train_split",
    "validation_split",
    "max_train_samples",
    "max_eval_samples",
)
# Keys that may hold a path.
PATHS = ("model.offline", "data.name_or_path", "data.offline")


def saved_recipe(run: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The resolved recipe of a run, or of the one that a checkpoint is of."""
    loaded = load_recipe(run_of(run) / RECIPE, overrides)
    recipe = _from_where_it_was_started(run, loaded, overrides)
    given = _keys(overrides)
    if "data.name_or_path" not in given:
        return recipe
    usual = {
        key: DataSpec.model_fields[key].default for key in OF_ITS_DATA if f"data.{key}" not in given
    }
    dropped = [
        f"{key}: {getattr(recipe.data, key)}"
        for key, value in usual.items()
        if getattr(recipe.data, key) != value
    ]
    if dropped:
        log.info("other data than the run's: without its %s", ", ".join(dropped))
    return replace(recipe, data=recipe.data.model_copy(update=usual))


def _keys(overrides: Sequence[str]) -> set[str]:
    return {override.partition("=")[0].strip() for override in overrides}


def _from_where_it_was_started(run: Path, recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """The recipe of a run with its relative paths resolved against the folder in which it was
    started, which its manifest names.

    Paths that `overrides` set are resolved against the working folder.
    """
    started = manifest_of(run).get("working_folder")
    if started is None or Path(started) == Path.cwd():
        return recipe
    for key in PATHS:
        section, name = key.split(".")
        spec = getattr(recipe, section)
        value = getattr(spec, name)
        if value is not None and key not in _keys(overrides) and (Path(started) / value).exists():
            spec = spec.model_copy(update={name: str(Path(started) / value)})
            recipe = replace(recipe, **{section: spec})
    return recipe


def saved_model(
    run: Path, recipe: Recipe, dtype: torch.dtype | str, heads_in_float32: bool = True
) -> tuple[TaskModel, Method, AdapterFacts]:
    """The run's model with its trained adapters and heads, on the exact base that it was trained
    on."""
    folder = adapter_of(run)
    with still_there(run):
        facts = read_facts(folder)
        source = facts.source.fetched()  # fetches a builtin again if its cache is gone
        facts = replace(facts, source=source)
        tokenizer = saved_tokenizer(run, recipe, source)
        task_model, _ = load_model(source, recipe.model, tokenizer, facts.labels, dtype)
        if facts.heads is not None:
            task_model.heads = facts.heads
        modules = adapted_modules(folder)
        method, _ = adapt(task_model, recipe, default_device(), heads_in_float32, modules)
        load_native(folder, task_model, method)
    task_model.model.eval()
    for adapter in method.adapters.values():
        adapter.freeze()
    return task_model, method, facts


def saved_tokenizer(run: Path, recipe: Recipe, source: Source) -> Any:
    """The run's tokenizer, with the chat template that it was trained with. source: the base's."""
    kept = replace(source, kind="local", location=str(tokenizer_of(run)))
    return load_tokenizer(kept, recipe.model)


def trained_columns(run: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Record of the columns that the run was trained on, without those that `overrides` set; {} for
    runs that recorded none."""
    found: dict[str, Any] = manifest_of(run).get("data", {}).get("shape") or {}
    given = _keys(overrides)
    if "data.prompt" in given:
        given.add("data.beside")
    if "data.text_columns" in given:
        given.add("data.columns")
    return {name: value for name, value in found.items() if f"data.{name}" not in given}


def saved_rows(run: Path, recipe: Recipe, overrides: Sequence[str]) -> tuple[Loaded, Source]:
    """The rows of the recipe's data, to evaluate `run` on, read from the columns that it was
    trained on where these exist.

    Where the `overrides` (already in the recipe) name other data than the run was trained on, no
    rows of a single file have to be held out. Raises RecipeError for data of another shape than the
    training data.
    """
    other_data = has_other_data(overrides)
    with locating(recipe):
        source = resolve(data_wanted(recipe))
        rows = load_rows(
            source, recipe.data, recipe.model.task, other_data, trained_columns(run, overrides)
        )
        if other_data:
            _check_shape(run, recipe, rows)
    return rows, source


def has_other_data(overrides: Sequence[str]) -> bool:
    """True if the overrides name other data than the run was trained on."""
    return "data.name_or_path" in _keys(overrides)


def _check_shape(run: Path, recipe: Recipe, rows: Loaded) -> None:
    """Raise RecipeError unless the rows have as many texts as the training rows, and the same kind
    of labels."""
    trained, now = trained_columns(run, ()), recorded(rows.spec)
    if trained and now["format"] != trained["format"]:
        what = (
            f"the run was trained on {trained['format']}, this data has columns for {now['format']}"
        )
        raise RecipeError.at(
            "data.name_or_path",
            what,
            "data of the same format, or data.prompt and data.completion over its columns",
        )
    if trained.get("columns") and now["columns"] and len(now["columns"]) != len(trained["columns"]):
        before, here = (
            f"{'a single text' if len(c) == 1 else 'a pair of texts'} ({', '.join(c)})"
            for c in (trained["columns"], now["columns"])
        )
        expected = (
            f"data of the same shape, or {len(trained['columns'])} of its columns in"
            " data.text_columns"
        )
        raise RecipeError.at(
            "data.name_or_path", f"the run was trained on {before}, this data has {here}", expected
        )
    labels = read_facts(adapter_of(run)).labels
    if labels is None or recipe.data.problem_type is not None:
        return
    with contextlib.suppress(RecipeError):  # a single label, for example, is enough for evaluation
        found = count_labels(rows.validation, rows.spec)
        if labels.regression and not found.regression and not all(map(is_number, found.names)):
            what = (
                "the run predicts a number, this data has the classes"
                f" {listed_classes(found.names[:5])}"
            )
            raise UsageError(what, "Name data whose labels are numbers.")
        if not labels.regression and found.regression:
            what = (
                f"the run tells classes apart ({listed_classes(labels.names[:5])}), this data has"
                " fractions as labels"
            )
            raise UsageError(what, "Name data with the run's classes.")


def saved_examples(
    rows: Loaded,
    recipe: Recipe,
    labels: Labels | None,
    tokenizer: Any,
    config: Any,
    progress: Progress,
) -> Examples:
    """The validation examples of the rows, read with the run's own labels."""
    with (
        locating(recipe),
        reading(recipe, rows.spec, labels, tokenizer, config, progress) as reader,
    ):
        return reader.validation(rows)
