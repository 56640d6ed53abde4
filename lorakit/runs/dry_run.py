"""Preview of a recipe: the resolved recipe, sources and downloads, targets, parameters, steps.
Trains nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from lorakit.adapters.base import in_out
from lorakit.adapters.inject import find_targets, in_blocks, linear_layers
from lorakit.adapters.layer import Target
from lorakit.data.joined import AnyExamples
from lorakit.data.labels import Labels, listed_classes, shown_class
from lorakit.methods import MethodConfig
from lorakit.models.load import compute_dtype, default_device, load_config
from lorakit.models.positions import skeleton
from lorakit.models.quantise import check_quantiser
from lorakit.models.spec import ModelSpec
from lorakit.models.tasks import task_named
from lorakit.recipes.recipe import Recipe, dump_yaml, locating
from lorakit.report.layout import layout
from lorakit.report.mix import mix_lines
from lorakit.report.progress import Progress
from lorakit.report.trackers import check_installed
from lorakit.runs.init_from import given_adapter
from lorakit.runs.session import Inputs, find_sources, read_inputs
from lorakit.sources.resolve import Source, plan
from lorakit.training.loop import count_steps, count_warmup_steps, rows_per_step
from lorakit.training.spec import TrainSpec


def dry_run(recipe: Recipe, progress: Progress) -> Iterator[str]:
    """Lines to show. Downloads nothing; figures that need a download first are left out, and a line
    says so.

    Raises RecipeError with everything that can be found wrong without a download.
    """
    given = given_adapter(recipe)
    with locating(recipe):
        check_installed(recipe.train.report_to)
        check_quantiser(recipe.model.quantization)
        model_source, data_sources = find_sources(recipe, plan)
        counted = not any(source.download for source in (model_source, *data_sources))
        inputs = read_inputs(recipe, model_source, data_sources, progress) if counted else None
        model = _skeleton(recipe, model_source, inputs)
        ranks: dict[str, int] = {}
        without: list[str] = []
        if model is not None:
            heads = task_named(recipe.model.task).head_names(model)
            ranks, without = find_targets(model, recipe.method, heads)

    yield dump_yaml(recipe)
    yield from _source_lines("model", model_source)
    for data_source in data_sources:
        yield from _source_lines("data", data_source)
    if given is not None:
        yield f"begins at  {given.folder}, an adapter on {len(given.factors)} layers"
    device = default_device()
    dtype = str(compute_dtype(recipe.train.precision, device)).removeprefix("torch.")
    stored = f"; base in {recipe.model.quantization}" if recipe.model.quantization else ""
    yield f"precision  {dtype} on {device}{stored}"
    if model is None:
        yield "targets    known once the model is downloaded"
    else:
        yield from _target_lines(model, recipe.model, recipe.method, ranks)
        for line in without:
            yield f"{'':10} {line}"
    if inputs is None:
        known = recipe.train.max_steps or "known once model and data are downloaded"
        yield f"steps      {known}"
        return
    rows, validation = len(inputs.train), len(inputs.validation)
    tokens, longest = int(inputs.train.lengths.sum()), int(inputs.train.lengths.max())
    yield (
        f"rows       {rows:,} training ({tokens:,} tokens, longest {longest}), {validation:,}"
        " validation"
    )
    yield from (f"{'':10} {line}" for line in mix_lines(inputs.train))
    if inputs.labels is not None:
        yield from _label_lines(inputs.labels, inputs.train, inputs.validation)
    yield f"metrics    {', '.join(inputs.metrics)} (the first decides)"
    yield f"steps      {_steps(inputs.train, recipe.train)}"
    yield f"output     {recipe.output_dir}"


def _steps(examples: AnyExamples, spec: TrainSpec) -> str:
    """The number of optimizer steps, their rows or packs, and how many of them are the warm-up."""
    units = examples.unit_lengths
    total = count_steps(len(units), spec)
    warmup = count_warmup_steps(total, spec)
    line = f"{total:,} of {rows_per_step(spec)}"
    if not examples.has_packs:
        line += " rows"
    else:
        full = units.sum() / (len(units) * units.max())
        line += f" packs of {len(examples) / len(units):.1f} rows ({full:.0%} full)"
    return f"{line}, {warmup:,} of them warm-up" if warmup else line


def _skeleton(recipe: Recipe, source: Source, inputs: Inputs | None) -> Any:
    """The model without weights; None where its configuration has to be downloaded first."""
    if inputs is not None:
        return skeleton(inputs.config, recipe.model, inputs.labels)
    if source.download:
        return None
    return skeleton(load_config(source, recipe.model), recipe.model, None)


def _label_lines(labels: Labels, train: AnyExamples, validation: AnyExamples) -> Iterator[str]:
    """The label space, and how many rows each class has in training and validation."""
    if labels.regression:
        yield "labels     a number"
        return
    yield f"labels     {listed_classes(labels.names)}"
    trained, held = (
        np.bincount(part.labels.astype(np.int64), minlength=labels.count)
        for part in (train, validation)
        if part.labels is not None
    )
    for number, name in enumerate(labels.names):
        yield (
            f"{'':10} {shown_class(name)}: {trained[number]:,} training, {held[number]:,}"
            " validation"
        )


def _source_lines(what: str, source: Source) -> Iterator[str]:
    shown = f"{source.used} INSTEAD OF {source.requested}" if source.stand_in else source.used
    yield f"{what:10} {shown} ({source.kind})"
    for line in (source.note or "").splitlines():
        yield f"{'':10} {line}"
    if source.download:
        yield f"{'':10} would download {source.download}"


def _target_lines(
    model: object, spec: ModelSpec, config: MethodConfig, ranks: dict[str, int]
) -> Iterator[str]:
    layers = linear_layers(model)  # type: ignore[arg-type]
    grid = layout(ranks)
    kinds = {grid.heads[kind]: len(grid.of_kind(kind)) for kind in grid.kinds}
    inside = set(in_blocks(model, ranks))  # type: ignore[arg-type]
    adapter = sum(
        config.parameters(Target(*in_out(layers[name]), rank, name in inside))
        for name, rank in ranks.items()
    )
    parameters = dict(model.named_parameters())  # type: ignore[attr-defined]
    heads = task_named(spec.task).head_names(model)
    head = sum(
        p.numel()
        for name, p in parameters.items()
        if name.startswith(tuple(f"{h}." for h in heads))
    )
    yield f"targets    {len(ranks)} layers: " + ", ".join(
        f"{count} × {kind}" for kind, count in kinds.items()
    )
    total = sum(p.numel() for p in parameters.values())
    yield (
        f"parameters {adapter + head:,} trained (adapters {adapter:,}, heads {head:,}); the model"
        f" has {total:,}"
    )
    if heads:
        yield f"heads      {', '.join(heads)}"
