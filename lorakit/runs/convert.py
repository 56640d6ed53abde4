"""A finished run in the form of another method."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from lorakit.adapters.inject import detach_all
from lorakit.adapters.layer import Adapter
from lorakit.data.choice import recorded
from lorakit.data.load import load_rows
from lorakit.errors import RecipeError, UsageError
from lorakit.files import write_text
from lorakit.kernels.dispatch import announce
from lorakit.methods import MethodConfig, config_classes
from lorakit.models.load import compute_dtype, default_device
from lorakit.recipes.recipe import load_recipe, locating, resolved
from lorakit.recipes.yaml_source import dump
from lorakit.report.progress import Progress
from lorakit.runs.folder import RECIPE
from lorakit.runs.saved import saved_model, saved_recipe, trained_columns
from lorakit.runs.session import Session, adapt, check_rows, data_wanted, reading, reported_metrics
from lorakit.sources.resolve import resolve

# What any adapter can be turned into, and the keys of the method section that it takes over.
CHUNKWISE = "chunkwise"
CONVERTIBLE = (
    "train.precision",
    "train.per_device_eval_batch_size",
    "train.max_tokens_per_micro_batch",
)
SHARED_KEYS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "rank_pattern",
)


def converted(run: Path, overrides: Sequence[str], out: Path, progress: Progress) -> Session:
    """The chunkwise form of a finished run: its base, its heads and its adapters' products, in a
    recipe of its own.

    `overrides` set what chunkwise has (method.ladder …) and where data comes from. Raises as
    `assemble`, and UsageError for a run that is chunkwise already, and for overrides that would
    make another adapter of it.
    """
    before = saved_recipe(run)
    if before.method.name == CHUNKWISE:
        raise UsageError(
            f"the run `{run}` is chunkwise already", "Name a vanilla, l1ra or salor run."
        )
    own = [
        name
        for name in config_classes()[CHUNKWISE].model_fields
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
    shared = {
        name: value for name, value in resolved(before)["method"].items() if name in SHARED_KEYS
    }
    plain = resolved(before) | {"method": {"name": CHUNKWISE, **shared}, "output_dir": str(out)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / RECIPE
        write_text(file, dump(plain))
        recipe = load_recipe(file, overrides)
    recipe = replace(
        recipe, data=saved_recipe(run, [o for o in overrides if o.startswith("data.")]).data
    )
    if getattr(recipe.method, "training", None) != "posthoc":
        with locating(recipe):
            raise RecipeError.at(
                "method.training",
                "nothing is trained here: the ladder is made of what there is",
                "posthoc",
            )
    device = default_device()
    dtype = compute_dtype(recipe.train.precision, device)
    announce(device)
    with progress.stage("loading the model"):
        task_model, trained, facts = saved_model(run, before, dtype)
    kept = {
        name: adapter.own_tensors() | _plain_factors(adapter)
        for name, adapter in trained.adapters.items()
    }
    detach_all(task_model.model, trained.adapters)
    method, heads = adapt(task_model, recipe, device, saved=kept)
    parts = ("lora_A", "lora_B", "residual_A", "residual_B", "base_mask")
    for name, adapter in method.adapters.items():
        adapter.load_tensors({part: kept[name][part] for part in parts if part in kept[name]})
    with locating(recipe):
        data_source = resolve(data_wanted(recipe))
        rows = load_rows(
            data_source, recipe.data, recipe.model.task, record=trained_columns(run, overrides)
        )
        with reading(
            recipe, rows.spec, facts.labels, task_model.tokenizer, task_model.model.config, progress
        ) as reader:
            train, validation = reader.read(rows)
        shape = recorded(rows.spec)
        for split, examples in {"training": train, "validation": validation}.items():
            check_rows(task_model, examples, split)
    facts = replace(facts, method=resolved(recipe)["method"])
    metrics = reported_metrics(recipe, facts.labels)
    return Session(
        recipe,
        task_model,
        method,
        heads,
        train,
        validation,
        facts,
        data_source,
        metrics,
        dtype,
        shape,
    )


def _plain_factors(adapter: Adapter) -> dict[str, Tensor]:
    """The factors of a plain LoRA layer that acts as this one, its residual aside."""
    a, b = adapter.factors()
    return {"lora_A": a.detach(), "lora_B": b.detach()}
