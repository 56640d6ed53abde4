"""Opening a run, finished or at a checkpoint (`lorakit.runs.moment`): its recipe, its model with
the trained adapters, and rows to evaluate it on."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from lorakit.data.choice import recorded
from lorakit.data.joined import AnyExamples, joined
from lorakit.data.keys import SetKeys
from lorakit.data.label_kinds import is_number
from lorakit.data.labels import Labels, count_labels, listed_classes
from lorakit.data.load import Loaded
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
from lorakit.runs.session import adapt, reading
from lorakit.runs.sets import about, check_some_validation, data_sets, find_data, read_sets
from lorakit.sources.resolve import Source
from lorakit.spec import Spec

log = logging.getLogger("lorakit")
S = TypeVar("S", bound=Spec)
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
OF_SETS = SetKeys.model_fields
# Keys of a data set that may hold a path.
PATHS = ("name_or_path", "offline")


def saved_recipe(run: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The resolved recipe of a run, or of the one that a checkpoint is of."""
    loaded = load_recipe(run_of(run) / RECIPE, overrides)
    recipe = _from_where_it_was_started(run, loaded, overrides)
    given = _keys(overrides)
    if not has_other_data(overrides):
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
    given, folder = _keys(overrides), Path(started)
    model, data = recipe.model, recipe.data
    sets = () if data.mix is None or "data.mix" in given else data.mix
    moved = [_moved(one, f"data.mix.{i}", PATHS, folder, given) for i, one in enumerate(sets)]
    data = _moved(data, "data", PATHS, folder, given)
    if moved:
        data = data.model_copy(update={"mix": tuple(moved)})
    return replace(recipe, model=_moved(model, "model", PATHS[1:], folder, given), data=data)


def _moved(spec: S, section: str, names: Sequence[str], folder: Path, given: set[str]) -> S:
    """The section with the paths that exist in `folder` resolved against it, unless they are
    `given` as overrides."""
    found = {
        name: str(folder / value)
        for name in names
        if (value := getattr(spec, name)) and f"{section}.{name}" not in given
        if (folder / value).exists()
    }
    return spec.model_copy(update=found) if found else spec


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


def for_one_set(run: Path, overrides: Sequence[str]) -> list[str]:
    """The overrides, for a run on a mix of data sets: where data.name_or_path names one of these
    (or is its name in reports), the mix is that set alone, as it was trained on; where it names
    other data, the mix is that data."""
    given = {key.strip(): value for key, _, value in (o.partition("=") for o in overrides)}
    name = given.get("data.name_or_path")
    if name is None or "data.mix" in given:
        return list(overrides)
    recipe = saved_recipe(run)
    if recipe.data.mix is None:
        return list(overrides)
    same = [
        (one, spec)
        for one, spec in zip(data_sets(recipe), recipe.data.mix, strict=True)
        if name in (one.name, spec.name_or_path)
    ]
    entry, rest = {"name_or_path": name}, list(overrides)
    if len(same) == 1:
        ((one, spec),) = same
        entry = spec.model_dump(mode="json") | {"name": one.name}
        rest = [o for o in overrides if o.partition("=")[0].strip() != "data.name_or_path"]
    # JSON is YAML, but for characters beyond the first 65,536 as pairs of surrogates.
    return [f"data.mix={json.dumps([entry], ensure_ascii=False)}", *map(_of_first_set, rest)]


def _of_first_set(override: str) -> str:
    """The override, of the first set of the mix where it is of a key of `data` that sets have."""
    section, _, name = override.partition("=")[0].strip().partition(".")
    return f"data.mix.0{override[4:]}" if section == "data" and name in OF_SETS else override


def trained_shapes(run: Path) -> dict[str | None, dict[str, Any]]:
    """{data set: record of the columns that the run was trained on}, None for the name of an only
    one; {} for runs that recorded none."""
    data = manifest_of(run).get("data") or {}
    sets = data.get("sets") or [data | {"name": None}]
    return {one["name"]: one["shape"] for one in sets if one.get("shape")}


def trained_columns(run: Path, recipe: Recipe, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """For each data set of the recipe, the record of the columns that it, or the run's only set,
    was trained on, without those that `overrides` set; {} where there is none."""
    shapes, given = trained_shapes(run), _keys(overrides)
    if "data.prompt" in given:
        given.add("data.beside")
    if "data.text_columns" in given:
        given.add("data.columns")
    found = []
    for one in data_sets(recipe):
        shape = shapes.get(None) or shapes.get(one.name) or {}
        section = "data" if one.number is None else f"data.mix.{one.number}"
        free = {k for k in shape if not {f"data.{k}", f"{section}.{k}"} & given}
        found.append({key: shape[key] for key in shape if key in free})
    return found


def saved_rows(
    run: Path, recipe: Recipe, overrides: Sequence[str]
) -> tuple[list[Loaded], tuple[Source, ...]]:
    """The rows of the recipe's data sets, to evaluate `run` on, read from the columns that it was
    trained on where these exist.

    Where the `overrides` (already in the recipe) name other data than the run was trained on, no
    rows of a single file have to be held out. Raises RecipeError for data of another shape than the
    training data.
    """
    other_data = has_other_data(overrides)
    with locating(recipe):
        sources = find_data(recipe)
        columns = trained_columns(run, recipe, overrides)
        rows = read_sets(recipe, sources, columns, other_data)
        for one, loaded in zip(data_sets(recipe), rows, strict=True) if other_data else ():
            with about(one):
                _check_shape(run, recipe, loaded)
    return rows, sources


def has_other_data(overrides: Sequence[str]) -> bool:
    """True if the overrides name other data than the run was trained on."""
    return bool({"data.name_or_path", "data.mix.0.name_or_path"} & _keys(overrides))


def _check_shape(run: Path, recipe: Recipe, rows: Loaded) -> None:
    """Raise RecipeError unless the rows have as many texts as training rows have, and the same kind
    of labels."""
    trained, now = [*trained_shapes(run).values()], recorded(rows.spec)
    formats = list(dict.fromkeys(one["format"] for one in trained))
    if trained and now["format"] not in formats:
        what = (
            f"the run was trained on {' and '.join(formats)}, this data has columns for"
            f" {now['format']}"
        )
        raise RecipeError.at(
            "data.name_or_path",
            what,
            "data of the same format, or data.prompt and data.completion over its columns",
        )
    texts = [one["columns"] for one in trained if one.get("columns")]
    if texts and now["columns"] and len(now["columns"]) not in map(len, texts):
        before, here = (
            f"{'a single text' if len(c) == 1 else 'a pair of texts'} ({', '.join(c)})"
            for c in (texts[0], now["columns"])
        )
        expected = f"data of the same shape, or {len(texts[0])} of its columns in data.text_columns"
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
    rows: Sequence[Loaded],
    recipe: Recipe,
    labels: Labels | None,
    tokenizer: Any,
    config: Any,
    progress: Progress,
) -> AnyExamples:
    """The validation examples of all data sets that have some, read with the run's own labels.
    Raises RecipeError where none has."""
    found, names = [], []
    with locating(recipe):
        for one, loaded in zip(data_sets(recipe), rows, strict=True):
            if not len(loaded.validation):
                continue
            with (
                about(one),
                reading(recipe, loaded.spec, labels, tokenizer, config, progress) as reader,
            ):
                found.append(reader.validation(loaded))
            names.append(one.name)
        check_some_validation(found)
    return joined(found, names)
