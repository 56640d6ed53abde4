"""Assembly: a recipe, or a finished run, becomes a model with adapters, and examples. The one place where both meet."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit import builtin
from lorakit.data.examples import Examples
from lorakit.data.formats import Reader, count_labels
from lorakit.data.load import load_rows
from lorakit.data.spec import DataSpec
from lorakit.errors import Problem, RecipeError, UsageError, collecting
from lorakit.evaluate import metric_names
from lorakit.export.native import AdapterFacts, load_native, read_facts
from lorakit.inject import inject, match_targets
from lorakit.methods import Method, build_method
from lorakit.model import (
    LONGEST_DEFAULT,
    Labels,
    TaskModel,
    compute_dtype,
    default_device,
    load_config,
    load_model,
    load_tokenizer,
    longest_input,
    train_heads,
)
from lorakit.recipe import Recipe, load_recipe, locating, resolved
from lorakit.report.progress import Progress
from lorakit.sources import Source, resolve_data, resolve_model

log = logging.getLogger("lorakit")
ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
RECIPE = "recipe.yaml"


@dataclass
class Session:
    """All that a run needs, built and on its device."""

    recipe: Recipe
    task_model: TaskModel
    method: Method
    heads: list[nn.Parameter]
    train: Examples
    validation: Examples
    facts: AdapterFacts
    data_source: Source
    metrics: tuple[str, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Inputs:
    """What a recipe's data and tokenizer come to, before the model's weights are loaded."""

    tokenizer: Any
    config: Any
    labels: Labels | None
    metrics: tuple[str, ...]
    train: Examples
    validation: Examples


def assemble(recipe: Recipe, progress: Progress) -> Session:
    """Load everything the recipe names and put it together. Nothing is written but caches.

    Raises RecipeError (with the place in the recipe) or RunError.
    """
    with locating(recipe):
        source, data_source = resolve_sources(recipe)
        inputs = read_inputs(recipe, source, data_source, progress)
        device = default_device()
        dtype = compute_dtype(recipe.train.precision, device)
        with progress.stage("loading the model"):
            torch.manual_seed(recipe.train.seed)
            task_model, notes = load_model(source, recipe.model, inputs.tokenizer, inputs.labels, dtype)
        for note in notes:
            log.warning(note)
        method, heads = _adapt(task_model, recipe, device)
    if source.kind == "hub":  # what is trained on is what is merged into, wherever the branch has moved
        source = replace(source, revision=getattr(inputs.config, "_commit_hash", None))
    if source.kind == "local":  # the run outlives the folder it was started in
        source = replace(source, location=str(Path(source.location).expanduser().resolve()))
    facts = AdapterFacts(resolved(recipe)["method"], recipe.model.task, inputs.labels, source)
    return Session(recipe, task_model, method, heads, inputs.train, inputs.validation, facts, data_source, inputs.metrics, dtype)


def read_inputs(recipe: Recipe, source: Source, data_source: Source, progress: Progress) -> Inputs:
    """Read and tokenise the data of a recipe for the model at `source`."""
    with progress.stage("reading the data"):
        rows = load_rows(data_source, recipe.data)
        labels = count_labels(rows.train, recipe.data) if recipe.model.task == "sequence-classification" else None
        metrics = reported_metrics(recipe, labels)
    tokenizer = load_tokenizer(source, recipe.model)
    config = load_config(source, recipe.model)
    with _reader(recipe, labels, tokenizer, config, progress) as reader:
        train, validation = reader.read(rows)
    return Inputs(tokenizer, config, labels, metrics, train, validation)


@contextlib.contextmanager
def _reader(recipe: Recipe, labels: Labels | None, tokenizer: Any, config: Any, progress: Progress) -> Iterator[Reader]:
    max_length = _max_length(recipe.data, config, tokenizer)
    with progress.stage("tokenising") as advance:
        yield Reader(recipe.model.task, labels, recipe.data, tokenizer, max_length, advance)


def resolve_sources(recipe: Recipe) -> tuple[Source, Source]:
    """Where model and data really come from; downloads builtins. Both are tried before either error is raised."""
    problems: list[Problem] = []
    model, data = recipe.model, recipe.data
    with collecting(problems):
        model_source = resolve_model(model.name_or_path, model.offline, model.revision)
    with collecting(problems):
        data_source = resolve_data(data.name_or_path, data.offline, data.subset)
    if problems:
        raise RecipeError(problems)
    return model_source, data_source


def saved_recipe(run: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The resolved recipe of a run folder. Raises UsageError when the folder holds no finished adapter."""
    if not (run / RECIPE).is_file():
        raise UsageError(f"`{run}` is not a run", "Name a folder that `lorakit train` wrote.")
    if not (run / ADAPTER).is_dir():
        raise UsageError(f"the run `{run}` has no adapter yet", "Finish it with `lorakit train RECIPE --resume auto`.")
    return load_recipe(run / RECIPE, overrides)


def saved_model(
    run: Path, recipe: Recipe, dtype: torch.dtype | str, heads_in_float32: bool = True
) -> tuple[TaskModel, Method, AdapterFacts]:
    """The run's model with its trained adapters and heads; the base is the very one that it was trained on."""
    facts = read_facts(run / ADAPTER)
    source = _same_source(facts.source)
    tokenizer = load_tokenizer(replace(source, kind="local", location=str(run / ADAPTER)), recipe.model)
    task_model, _ = load_model(source, recipe.model, tokenizer, facts.labels, dtype)
    method, _ = _adapt(task_model, recipe, default_device(), heads_in_float32)
    load_native(run / ADAPTER, task_model, method)
    task_model.model.eval()
    for adapter in method.adapters.values():
        adapter.freeze()
    return task_model, method, facts


def saved_examples(
    recipe: Recipe, labels: Labels | None, tokenizer: Any, config: Any, progress: Progress, other_data: bool
) -> tuple[Examples, Source]:
    """The validation examples of the recipe's data, read with the run's own labels.

    `other_data`: the data is not what the run was trained on, so none of a single file has to be left out.
    """
    with locating(recipe):
        source = resolve_data(recipe.data.name_or_path, recipe.data.offline, recipe.data.subset)
        rows = load_rows(source, recipe.data, only_validation=other_data)
        with _reader(recipe, labels, tokenizer, config, progress) as reader:
            examples = reader.validation(rows)
    return examples, source


def _adapt(
    task_model: TaskModel, recipe: Recipe, device: torch.device, heads_in_float32: bool = True
) -> tuple[Method, list[nn.Parameter]]:
    method = build_method(recipe.method, recipe.train.seed)
    ranks = match_targets(task_model.model, recipe.method, task_model.heads)
    task_model.model.to(device)
    inject(task_model.model, method, ranks)
    return method, train_heads(task_model, heads_in_float32)


def _same_source(source: Source) -> Source:
    """The source a run recorded, fetched again if it is a builtin whose cache is gone."""
    return replace(source, location=str(builtin.folder(source.used))) if source.kind == "builtin" else source


def _max_length(spec: DataSpec, config: Any, tokenizer: Any) -> int:
    limit = longest_input(config, tokenizer)
    if spec.max_seq_length is None:
        return min(limit or LONGEST_DEFAULT, LONGEST_DEFAULT)
    if limit is not None and spec.max_seq_length > limit:
        raise RecipeError.at(
            "data.max_seq_length", f"the model reads at most {limit} tokens, not {spec.max_seq_length}", f"at most {limit}"
        )
    return spec.max_seq_length


def reported_metrics(recipe: Recipe, labels: Labels | None) -> tuple[str, ...]:
    """The metrics to report, the deciding one first."""
    subset = recipe.data.subset or Path(recipe.data.name_or_path).name
    names = metric_names(labels, subset)
    wanted = recipe.train.metric_for_best_model
    if wanted is None:
        return names
    wanted = wanted.removeprefix("eval_")
    if wanted not in names:
        raise RecipeError.at("train.metric_for_best_model", f"this task does not report `{wanted}`", f"one of {', '.join(names)}")
    return (wanted, *(name for name in names if name != wanted))
