"""Import of an adapter from elsewhere: a PEFT LoRA adapter becomes a finished run, without
training."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from lorakit import compat
from lorakit.adapters.inject import linear_layers
from lorakit.data.examples import Examples
from lorakit.data.keys import NO_DATA
from lorakit.data.labels import Labels
from lorakit.errors import RecipeError, RunError, UsageError
from lorakit.export.given import GivenAdapter, no_such_modules, read_peft
from lorakit.export.native import AdapterFacts, save_native
from lorakit.export.peft import target_list
from lorakit.files import append_json_line, new_folder, write_json, write_text
from lorakit.methods import plain_method
from lorakit.models.load import default_device, load_config, load_model
from lorakit.models.positions import skeleton
from lorakit.models.spec import ModelSpec
from lorakit.models.task_model import TaskModel
from lorakit.models.tasks import TASKS, task_named
from lorakit.models.tokenizer import TOKENIZER_CONFIG, load_tokenizer
from lorakit.recipes.recipe import Recipe, dump_yaml, recipe_of, resolved
from lorakit.report.progress import Progress
from lorakit.runs.folder import ADAPTER, MANIFEST, METRICS, RANKS, RECIPE, RESULT
from lorakit.runs.moment import tokenizer_of
from lorakit.runs.record import fingerprint, manifest, result
from lorakit.runs.session import Session, adapt, model_wanted
from lorakit.runs.sets import ReadSet
from lorakit.runs.start import check_folder
from lorakit.sources.resolve import Source, resolve
from lorakit.training.checkpoint import RunState
from lorakit.training.metrics import Evaluation
from lorakit.training.trained import load_trained

log = logging.getLogger("lorakit")
NOTHING = Examples(np.zeros(0, np.int32), np.zeros(1, np.int64), np.zeros(0, np.int64))


def run_import(
    folder: Path,
    out: Path,
    progress: Progress,
    base: str | None = None,
    labels: Sequence[str] = (),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Make the run folder `out` of the PEFT adapter in `folder`; returns the content of
    result.json.

    base: the model, instead of the one that the adapter names; labels: the classes of its head, in
    order. Raises UsageError, RecipeError or RunError before anything is written.
    """
    if out.resolve() == folder.resolve():
        raise UsageError(f"`{out}` is the adapter itself", "Name another folder with --out.")
    check_folder(out, overwrite, "--overwrite replaces it, --out names another folder.")
    given = read_peft(folder)
    if base is None and given.base is None:
        raise UsageError(f"the adapter in `{folder}` names no base", "Name it with --base.")
    with progress.stage("loading the model"):
        session = _session(given, out, base, list(labels))
    with new_folder(out) as staging:
        return _write(staging, session, given)


def _session(given: GivenAdapter, out: Path, base: str | None, names: list[str]) -> Session:
    """The adapter in its model."""
    recipe = _recipe(given, out, base, None)
    try:
        source = resolve(model_wanted(recipe)).fetched()
        config = load_config(source, recipe.model)
        known = _labels(given, recipe.model, config, names)
        tokenizer = load_tokenizer(_tokenizer_source(given, source), recipe.model)
        task_model, _ = load_model(source, recipe.model, tokenizer, known, "auto", config)
    except RecipeError as error:
        what = f"the base of the adapter, `{recipe.model.name_or_path}`: {error.problems[0].what}"
        raise UsageError(what, "--base names the model that it was trained on.") from error
    except RunError as error:
        remedy = "--base names a folder with the model, or builtin/… with the same weights."
        raise RunError(error.what, remedy) from error
    _check_modules(task_model.model, given)
    task_model.heads = _heads(task_model, given)
    recipe = _recipe(given, out, base, target_list(task_model.model, given.factors))
    method, heads = adapt(task_model, recipe, default_device(), saved=_in_order(task_model, given))
    tensors: dict[str, Tensor] = dict(given.heads)
    for name, (a, b) in given.factors.items():
        tensors |= {f"{name}.lora_A": a, f"{name}.lora_B": b}
    load_trained(task_model.model, tensors, f"the adapter in `{given.folder}`")
    for name, adapter in method.adapters.items():
        assert adapter.scale == given.scales[name], name
    source = source.pinned(recipe.model.revision)
    facts = AdapterFacts(
        resolved(recipe)["method"], recipe.model.task, known, source, task_model.heads
    )
    nowhere = Source(NO_DATA, NO_DATA, "local", NO_DATA)
    dtype = method.adapters[next(iter(given.factors))].base.weight.dtype
    parts = (recipe, task_model, method, heads, NOTHING, NOTHING)
    sets = (ReadSet(recipe.data.name_or_path, nowhere, {}, NOTHING, NOTHING),)
    return Session(*parts, facts, sets, (), dtype)


def _in_order(task_model: TaskModel, given: GivenAdapter) -> list[str]:
    """The adapted modules, in the model's order."""
    return [name for name in linear_layers(task_model.model) if name in given.factors]


def _recipe(
    given: GivenAdapter, out: Path, base: str | None, targets: list[str] | str | None
) -> Recipe:
    """The recipe that describes the adapter: the default method, and data that is not known."""
    config = given.config
    model: dict[str, Any] = {"name_or_path": base or given.base, "task": _task(given)}
    if base is None and given.revision is not None:
        model["revision"] = given.revision
    method = {
        "name": plain_method(),
        **{name: config[name] for name in ("r", "lora_alpha")},
        "lora_dropout": config.get("lora_dropout") or 0.0,
        "use_rslora": bool(config.get("use_rslora")),
        **{name: config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")},
    }
    if targets is not None:
        method["target_modules"] = targets
    data = {"model": model, "data": {"name_or_path": NO_DATA}, "method": method}
    try:
        return recipe_of(data | {"output_dir": str(out)})
    except RecipeError as error:
        what = f"the adapter in `{given.folder}` can not be described by a recipe: {error}"
        raise UsageError(what, "Look at its adapter_config.json.") from error


def _task(given: GivenAdapter) -> str:
    kind = given.config.get("task_type")
    by_type = {task.peft_type: task.name for task in TASKS}
    if kind is None:  # as some tools write it
        predicts = not given.heads
        return next(task.name for task in TASKS if task.predicts_tokens == predicts)
    if kind not in by_type:
        what = f"the adapter in `{given.folder}` has `task_type: {kind}`, which can not be held"
        raise UsageError(what, f"lorakit's tasks are {' and '.join(by_type)}.")
    return by_type[kind]


def _tokenizer_source(given: GivenAdapter, base: Source) -> Source:
    """The adapter's folder where it has a tokenizer, as its own chat template, or the one of its
    run if it is a checkpoint's; else the base."""
    for folder in (given.folder, tokenizer_of(given.folder)):
        if (folder / TOKENIZER_CONFIG).is_file():
            return replace(base, kind="local", location=str(folder))
    return base


def _labels(given: GivenAdapter, spec: ModelSpec, config: Any, names: list[str]) -> Labels | None:
    """The classes of the adapter's head: as named, as in a base that is a classifier of as many,
    or by their numbers; a single output is a regression's."""
    if task_named(spec.task).predicts_tokens:
        if names:
            raise UsageError(f"a {spec.task} model has no classes", "Leave --labels out.")
        return None
    theirs = [str(name) for _, name in sorted((config.id2label or {}).items())]
    for count in sorted({*(len(tensor) for tensor in given.heads.values()), len(theirs)}):
        numbered = [str(number) for number in range(count)]
        if not _fits(given.heads, skeleton(config, spec, Labels(numbered))):
            continue
        if names and len(names) != count:
            what = f"the head has {count} classes, not {len(names)}"
            raise UsageError(what, "Name each of them with --labels, in the head's order.")
        if names:
            return Labels(names)
        if count == 1:
            return Labels(regression=True)
        named = len(theirs) == count and theirs != [f"LABEL_{i}" for i in range(count)]
        return Labels(theirs if named else numbered)
    what = f"the head of the adapter in `{given.folder}` does not fit {type(config).__name__}"
    raise UsageError(what, "--base names the model that it was trained on.")


def _fits(heads: Mapping[str, Tensor], model: nn.Module) -> bool:
    shapes = {name: p.shape for name, p in model.named_parameters()}
    return all(shapes.get(name) == tensor.shape for name, tensor in heads.items())


def _heads(task_model: TaskModel, given: GivenAdapter) -> list[str]:
    """Names of the modules that the adapter holds in full. Raises UsageError for others than heads,
    and for weights that neither the adapter nor its base has."""
    model, found = task_model.model, []
    left = set(given.heads)
    for head in task_model.heads:
        inside = {f"{head}.{name}" for name, _ in model.get_submodule(head).named_parameters()}
        if inside & left:
            if missing := sorted(inside - left):
                what = f"the adapter in `{given.folder}` has `{head}` without `{missing[0]}`"
                raise UsageError(what, "Fetch or export it again.")
            found.append(head)
            left -= inside
    if left:
        what = f"the adapter in `{given.folder}` trained `{min(left)}` in full (modules_to_save)"
        raise UsageError(what, "lorakit holds the heads of classifiers alone.")
    if nowhere := sorted(task_model.fresh - given.heads.keys()):
        what = f"neither the base nor the adapter has `{nowhere[0]}`, which would be random"
        raise UsageError(what, "--base names the model that it was trained on.")
    return found


def _check_modules(model: Any, given: GivenAdapter) -> None:
    """Raise UsageError for factors without a linear layer of that shape in the model."""
    layers = linear_layers(model)
    remedy = "--base names the model that it was trained on."
    if wrong := [name for name in given.factors if name not in layers]:
        what = f"{type(model).__name__} has no such linear layers as the adapter in"
        raise UsageError(f"{what} `{given.folder}`: {no_such_modules(wrong, layers)}", remedy)
    embeddings = compat.input_embeddings(model)
    for name in given.factors:
        if embeddings is not None and layers[name].weight is getattr(embeddings, "weight", None):
            what = f"`{name}` shares its weight with the input embeddings"
            raise UsageError(f"{what}: an adapter on it can not be merged", remedy)


def _write(folder: Path, session: Session, given: GivenAdapter) -> dict[str, Any]:
    """Write the files of a finished run; returns the content of result.json."""
    record, unknown = given.record(), {"name": None, "stand_in": False}
    state = RunState(fingerprint=fingerprint(session))
    facts = manifest(session, state, folder / MANIFEST) | {"imported": record, "data": unknown}
    write_json(folder / MANIFEST, facts)
    write_text(folder / RECIPE, dump_yaml(session.recipe))
    ranks = {"step": 0, **asdict(session.method.rank_state())}
    write_text(folder / RANKS, json.dumps(ranks) + "\n")
    append_json_line(folder / METRICS, {"step": 0, "imported": record})
    save_native(folder / ADAPTER, session.task_model, session.method, session.facts)
    content = result(session, state, Evaluation({}, None), folder / ADAPTER)
    content |= {"imported": record, "data": unknown}
    write_json(folder / RESULT, content)
    return content
