"""Conversion of a run to another method."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lorakit.adapters.inject import detach_all
from lorakit.errors import RecipeError, UsageError
from lorakit.files import write_text
from lorakit.kernels.dispatch import announce
from lorakit.methods import MethodConfig, adopting_method, config_classes, method_names
from lorakit.models.load import compute_dtype, default_device
from lorakit.recipes.recipe import Recipe, load_recipe, locating, resolved
from lorakit.recipes.yaml_data import dump
from lorakit.report.progress import Progress
from lorakit.runs.folder import RECIPE
from lorakit.runs.saved import for_one_set, saved_model, saved_recipe, trained_columns
from lorakit.runs.session import Session, adapt, check_rows, reading, reported_metrics
from lorakit.runs.sets import (
    find_data,
    read_examples,
    read_sets,
    training_examples,
    validation_examples,
)

# Keys that say where training began.
STARTS = ("init_from", "init_lora_weights")
# Keys that may be set besides the method's own and those of the data.
CONVERTIBLE = (
    "train.precision",
    "train.per_device_eval_batch_size",
    "train.max_tokens_per_micro_batch",
)


def converted(run: Path, overrides: Sequence[str], out: Path, progress: Progress) -> Session:
    """A moment of a run in the form of the method that adopts it: the same base, heads and adapter
    products (B A), with a recipe of its own.

    `overrides` set that method's own keys and the data source. Raises as `assemble`, and UsageError
    for a run that already has the form, and for overrides that would describe another adapter.
    """
    before, target = saved_recipe(run), adopting_method()
    overrides = for_one_set(run, overrides)
    if before.method.name == target:
        others = " or ".join(name for name in method_names() if name != target)
        raise UsageError(f"the run `{run}` is {target} already", f"Name a run of {others}.")
    _check_overrides(overrides, target)
    recipe = _recipe(run, before, target, overrides, out)
    device = default_device()
    dtype = compute_dtype(recipe.train.precision, device)
    announce(device)
    with progress.stage("loading the model"):
        task_model, trained, facts = saved_model(run, before, dtype)
    kept = {name: adapter.as_plain() for name, adapter in trained.adapters.items()}
    detach_all(task_model.model, trained.adapters)
    method, heads = adapt(task_model, recipe, device, saved=kept)
    method.adopt(kept)
    with locating(recipe):
        sources = find_data(recipe)
        rows = read_sets(recipe, sources, trained_columns(run, recipe, overrides))
        how = (facts.labels, task_model.tokenizer, task_model.model.config, progress)
        sets = read_examples(recipe, sources, rows, lambda one: reading(recipe, one.spec, *how))
        train, validation = training_examples(recipe, sets), validation_examples(sets)
        for split, examples in {"training": train, "validation": validation}.items():
            check_rows(task_model, examples, split)
    return Session(
        recipe,
        task_model,
        method,
        heads,
        train,
        validation,
        replace(facts, method=resolved(recipe)["method"]),
        tuple(sets),
        reported_metrics(recipe, facts.labels),
        dtype,
    )


def _check_overrides(overrides: Sequence[str], target: str) -> None:
    """Raise UsageError for an override that would describe another adapter than the run's."""
    own = [
        name
        for name in config_classes()[target].model_fields
        if name not in MethodConfig.model_fields
    ]
    for override in overrides:
        key = override.partition("=")[0]
        if key.startswith("output_dir"):
            raise UsageError(
                f"`{override}` can not be set here", "Name the new run's folder with --out."
            )
        if not (
            key.startswith(("data.", *(f"method.{name}" for name in own))) or key in CONVERTIBLE
        ):
            remedy = (
                f"What may be set: data.…, {', '.join(f'method.{name}' for name in own)},"
                f" {', '.join(CONVERTIBLE)}."
            )
            raise UsageError(f"`{override}` would make another adapter of the run", remedy)


def _recipe(run: Path, before: Recipe, target: str, overrides: Sequence[str], out: Path) -> Recipe:
    """The recipe of the new run: the keys that both methods share, and the overrides. Raises
    RecipeError."""
    shared = {
        name: value
        for name, value in resolved(before)["method"].items()
        if name in MethodConfig.model_fields and name not in STARTS
    }
    plain = resolved(before) | {"method": shared | {"name": target}, "output_dir": str(out)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / RECIPE
        write_text(file, dump(plain))
        recipe = load_recipe(file, overrides)
    recipe = replace(
        recipe, data=saved_recipe(run, [o for o in overrides if o.startswith("data.")]).data
    )
    if problems := recipe.method.untrained_conflicts():
        with locating(recipe):
            raise RecipeError(problems)
    return recipe
