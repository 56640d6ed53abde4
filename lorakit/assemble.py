"""Assembly: a recipe, or a finished run, becomes a model with adapters, and examples. The one place where both meet."""

from __future__ import annotations

import contextlib
import gc
import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lorakit import builtin
from lorakit.adapter import Adapter
from lorakit.data.columns import text_columns
from lorakit.data.examples import Batch, Examples, StepOrder, collate, micro_batches
from lorakit.data.formats import Reader
from lorakit.data.inputs import detect_format
from lorakit.data.labels import Labels, count_labels, glue_task, is_number, warn_of_missing
from lorakit.data.load import Rows, load_rows
from lorakit.data.spec import DataSpec
from lorakit.engine import checkpoint_blocks, compile_blocks, speed_up
from lorakit.errors import Problem, RecipeError, RunError, UsageError, collecting
from lorakit.evaluate import metric_names
from lorakit.export.native import AdapterFacts, adapted_modules, load_native, read_facts
from lorakit.export.peft import not_for_peft
from lorakit.inject import detach_all, find_targets, in_blocks, inject, saved_targets
from lorakit.kernels.native import announce
from lorakit.kv_cache import PolicyCache
from lorakit.methods import Calibration, Method, MethodConfig, Stage, build_method, config_classes
from lorakit.model import (
    LONGEST_DEFAULT,
    TaskModel,
    check_model,
    compute_dtype,
    default_device,
    fit_head,
    load_config,
    load_model,
    load_tokenizer,
    longest_input,
    train_heads,
)
from lorakit.recipe import Recipe, load_recipe, locating, resolved
from lorakit.report.progress import Progress
from lorakit.sources import Source, cached_commit, resolve_data, resolve_model
from lorakit.storage import read_json, write_text
from lorakit.yaml_source import dump

log = logging.getLogger("lorakit")
ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
RECIPE = "recipe.yaml"
MANIFEST = "manifest.json"
# Keys that say which rows of the run's own data are used: they mean nothing for other data.
OF_ITS_DATA = ("subset", "offline", "revision", "train_split", "validation_split", "max_train_samples", "max_eval_samples")
# Keys that may hold a path.
PATHS = ("model.offline", "data.name_or_path", "data.offline")
# What any adapter can be turned into, and the keys of the method section that it takes over.
CHUNKWISE = "chunkwise"
CONVERTIBLE = ("train.precision", "train.per_device_eval_batch_size", "train.max_tokens_per_micro_batch")
SHARED_KEYS = ("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "rank_pattern")


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
    shape: dict[str, Any]
    """{"format": how rows are read, "columns": the text columns that a classifier reads, None for other tasks}."""


@dataclass(frozen=True)
class Inputs:
    """What a recipe's data and tokenizer come to, before the model's weights are loaded."""

    tokenizer: Any
    config: Any
    labels: Labels | None
    metrics: tuple[str, ...]
    train: Examples
    validation: Examples
    shape: dict[str, Any]


def assemble(recipe: Recipe, progress: Progress) -> Session:
    """Load everything the recipe names and put it together. Nothing is written but caches.

    Raises RecipeError (with the place in the recipe) or RunError.
    """
    with locating(recipe):
        source, data_source = resolve_sources(recipe)
        inputs = read_inputs(recipe, source, data_source, progress)
        device = default_device()
        dtype = compute_dtype(recipe.train.precision, device)
        announce(device)
        with progress.stage("loading the model"):
            torch.manual_seed(recipe.train.seed)
            task_model, notes = load_model(source, recipe.model, inputs.tokenizer, inputs.labels, dtype, inputs.config)
        for note in notes:
            log.warning(note)
        for split, examples in {"training": inputs.train, "validation": inputs.validation}.items():
            check_rows(task_model, examples, split)
        check_model(task_model, inputs.train)
        method, heads = _adapt(task_model, recipe, device)
        if unread := not_for_peft(task_model.model, method.adapters):
            log.warning("%s; a merged model and lorakit's own format hold them", unread)
        for note in speed_up(task_model, method.adapters):
            log.info(note)
        compiles = recipe.train.torch_compile
        if recipe.train.gradient_checkpointing:
            checkpoint_blocks(task_model, None if compiles else method.again)
        if compiles:
            with progress.stage("compiling the blocks"):
                notes = compile_blocks(task_model, recipe.method.ranks_move)
            for note in notes:
                log.info(note)
    if source.kind == "hub":  # what is trained on is what is merged into, wherever the branch has moved
        source = replace(source, revision=cached_commit(source.location, recipe.model.revision))
    if source.kind == "local":  # the run outlives the folder it was started in
        source = replace(source, location=str(Path(source.location).expanduser().resolve()))
    facts = AdapterFacts(resolved(recipe)["method"], recipe.model.task, inputs.labels, source)
    found, read = (recipe, task_model, method, heads), (inputs.train, inputs.validation)
    return Session(*found, *read, facts, data_source, inputs.metrics, dtype, inputs.shape)


def calibration(session: Session, stage: Stage) -> Calibration:
    """What the session's method may look at before the first step and after the last."""
    task_model, spec = session.task_model, session.recipe.train
    pad_id = task_model.pad_id

    def cut(examples: Examples, rows: NDArray[np.int64]) -> Iterator[Batch]:
        # These passes are not packed, so padding counts.
        for part in micro_batches(examples.lengths, rows, spec.per_device_train_batch_size, spec.max_tokens_per_micro_batch):
            yield collate(examples, part, pad_id).to(task_model.device)

    def batches(rows: int) -> Iterator[Batch]:
        # Never those of a length: they stand for all.
        first = StepOrder(len(session.train), min(rows, len(session.train)), spec.seed).of_step(1)
        yield from cut(session.train, first)

    def held_out() -> Iterator[Batch]:
        rows = np.arange(len(session.validation))
        for start in range(0, len(rows), spec.per_device_train_batch_size):
            yield from cut(session.validation, rows[start : start + spec.per_device_train_batch_size])

    def forward(batch: Batch) -> None:
        task_model.model.eval()
        with torch.no_grad():
            task_model.run_body(batch)

    blocks = in_blocks(task_model.model, session.method.adapters)
    return Calibration(len(session.train), batches, held_out, forward, stage, blocks)


def read_inputs(recipe: Recipe, source: Source, data_source: Source, progress: Progress) -> Inputs:
    """Read and tokenise the data of a recipe for the model at `source`."""
    with progress.stage("reading the data"):
        rows = load_rows(data_source, recipe.data, recipe.model.task)
        labels = count_labels(rows.train, recipe.data) if recipe.model.task == "sequence-classification" else None
        metrics = reported_metrics(recipe, labels)
        if recipe.train.metric_for_best_model is not None and recipe.train.eval_steps is None:
            what = "metric_for_best_model has no effect: there is only the evaluation after the last step"
            raise RecipeError.at("train.metric_for_best_model", what, "eval_steps too, or no such key")
    tokenizer = load_tokenizer(source, recipe.model)
    config = load_config(source, recipe.model)
    if labels is not None:
        labels, kept, said = fit_head(labels, config)
        if said is not None:
            log.log(logging.INFO if kept else logging.WARNING, said)
    with _reader(recipe, labels, tokenizer, config, progress) as reader:
        train, validation = reader.read(rows)
    warn_of_missing(labels, train.labels, validation.labels)
    return Inputs(tokenizer, config, labels, metrics, train, validation, _shape(recipe, rows.train.column_names))


@contextlib.contextmanager
def _reader(recipe: Recipe, labels: Labels | None, tokenizer: Any, config: Any, progress: Progress) -> Iterator[Reader]:
    max_length = _max_length(recipe, config, tokenizer)
    # Lists of tokens set off Python's collector, which would go through all that was imported again and again: up to a fifth
    # of the time.
    gc.freeze()
    try:
        with progress.stage("tokenising") as advance:
            yield Reader(recipe.model.task, labels, recipe.data, tokenizer, max_length, advance, config)
    finally:
        gc.unfreeze()


def check_rows(task_model: TaskModel, examples: Examples, split: str) -> None:
    """Raises RecipeError for a row in which a model that reads its class at the last token that is not the pad token finds none;
    says how many rows end in that token, since the class is then read before it."""
    if not task_model.reads_at_pad:
        return
    pad, name = task_model.pad_id, task_model.tokenizer.convert_ids_to_tokens(task_model.pad_id)
    real = np.concatenate([[0], np.cumsum(examples.tokens != pad)])[examples.offsets]
    empty = np.flatnonzero(np.diff(real) == 0)
    if len(empty):
        what = f"{split} row {examples.row_ids[empty[0]]} is nothing but the pad token `{name}`"
        more = f", like {len(empty) - 1} more" if len(empty) > 1 else ""
        expected = "another token: a decoder's class is read at the last one that is not the pad token"
        raise RecipeError.at("data.text_columns", what + more, expected)
    last = examples.tokens[examples.offsets[1:] - 1]
    if ending := int((last == pad).sum()):
        message = "%d of %d %s rows end in the pad token `%s`: their class is read before it, as transformers does"
        log.info(message, ending, len(examples), split, name)


def resolve_sources(recipe: Recipe) -> tuple[Source, Source]:
    """Where model and data really come from; downloads builtins. Both are tried before either error is raised."""
    problems: list[Problem] = []
    model, data = recipe.model, recipe.data
    with collecting(problems):
        model_source = resolve_model(model.name_or_path, model.offline, model.revision, model.task)
    with collecting(problems):
        data_source = resolve_data(data.name_or_path, data.offline, data.subset, model.task)
    if problems:
        raise RecipeError(problems)
    return model_source, data_source


def saved_recipe(run: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The resolved recipe of a run folder. Raises UsageError when the folder holds no finished adapter."""
    if not (run / RECIPE).is_file():
        raise UsageError(f"`{run}` is not a run", "Name a folder that `lorakit train` wrote.")
    if not (run / ADAPTER).is_dir():
        raise UsageError(f"the run `{run}` has no adapter yet", "Finish it with `lorakit train RECIPE --resume auto`.")
    recipe = _from_where_it_was_started(run, load_recipe(run / RECIPE, overrides), overrides)
    given = _keys(overrides)
    if "data.name_or_path" not in given:
        return recipe
    usual = {key: DataSpec.model_fields[key].default for key in OF_ITS_DATA if f"data.{key}" not in given}
    dropped = [f"{key}: {getattr(recipe.data, key)}" for key, value in usual.items() if getattr(recipe.data, key) != value]
    if dropped:
        log.info("other data than the run's: without its %s", ", ".join(dropped))
    return replace(recipe, data=recipe.data.model_copy(update=usual))


def _keys(overrides: Sequence[str]) -> set[str]:
    return {override.partition("=")[0].strip() for override in overrides}


def _from_where_it_was_started(run: Path, recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """The recipe of a run with its relative paths resolved from the folder that it was started in, which its manifest names.

    What `overrides` set is resolved from where they are typed.
    """
    started = read_json(run / MANIFEST).get("working_folder") if (run / MANIFEST).is_file() else None
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
    """The run's model with its trained adapters and heads; the base is the very one that it was trained on."""
    facts = read_facts(run / ADAPTER)
    source = _same_source(facts.source)
    facts = replace(facts, source=source)
    tokenizer = load_tokenizer(replace(source, kind="local", location=str(run / ADAPTER)), recipe.model)
    task_model, _ = load_model(source, recipe.model, tokenizer, facts.labels, dtype)
    method, _ = _adapt(task_model, recipe, default_device(), heads_in_float32, adapted_modules(run / ADAPTER))
    load_native(run / ADAPTER, task_model, method)
    task_model.model.eval()
    for adapter in method.adapters.values():
        adapter.freeze()
    return task_model, method, facts


def saved_rows(run: Path, recipe: Recipe, other_data: bool) -> tuple[Rows, Source]:
    """The rows of the recipe's data, to evaluate `run` with.

    `other_data`: the data is not what the run was trained on, so none of a single file has to be left out. Raises RecipeError
    for data of another shape than what the run was trained on.
    """
    with locating(recipe):
        source = resolve_data(recipe.data.name_or_path, recipe.data.offline, recipe.data.subset, recipe.model.task)
        rows = load_rows(source, recipe.data, recipe.model.task, only_validation=other_data)
        if other_data:
            _check_shape(run, recipe, rows)
    return rows, source


def _shape(recipe: Recipe, columns: Sequence[str]) -> dict[str, Any]:
    form = detect_format(recipe.model.task, recipe.data, columns)
    return {"format": form, "columns": text_columns(recipe.data, columns) if form == "classification" else None}


def _check_shape(run: Path, recipe: Recipe, rows: Rows) -> None:
    """Raises RecipeError unless the rows have as many texts as those that the run was trained on, and labels of their kind."""
    trained = read_json(run / MANIFEST)["data"].get("shape") if (run / MANIFEST).is_file() else None
    now = _shape(recipe, rows.validation.column_names)
    if trained is not None and now["format"] != trained["format"]:
        what = f"the run was trained on {trained['format']}, this data has columns for {now['format']}"
        raise RecipeError.at(
            "data.name_or_path", what, "data of the same format, or data.prompt and data.completion over its columns"
        )
    if trained is not None and now["columns"] and len(now["columns"]) != len(trained["columns"]):
        before, here = (
            f"{'a single text' if len(c) == 1 else 'a pair of texts'} ({', '.join(c)})"
            for c in (trained["columns"], now["columns"])
        )
        expected = f"data of the same shape, or {len(trained['columns'])} of its columns in data.text_columns"
        raise RecipeError.at("data.name_or_path", f"the run was trained on {before}, this data has {here}", expected)
    labels = read_facts(run / ADAPTER).labels
    if labels is None or recipe.data.problem_type is not None:
        return
    with contextlib.suppress(RecipeError):  # one label alone, for example, is enough to evaluate
        found = count_labels(rows.validation, recipe.data)
        if labels.regression and not found.regression and not all(map(is_number, found.names)):
            what = f"the run predicts a number, this data has the classes {', '.join(found.names[:5])}"
            raise UsageError(what, "Name data whose labels are numbers.")
        if not labels.regression and found.regression:
            what = f"the run tells classes apart ({', '.join(labels.names[:5])}), this data has fractions as labels"
            raise UsageError(what, "Name data with the run's classes.")


def saved_examples(
    rows: Rows, recipe: Recipe, labels: Labels | None, tokenizer: Any, config: Any, progress: Progress
) -> Examples:
    """The validation examples of the rows, read with the run's own labels."""
    with locating(recipe), _reader(recipe, labels, tokenizer, config, progress) as reader:
        return reader.validation(rows)


def converted(run: Path, overrides: Sequence[str], out: Path, progress: Progress) -> Session:
    """The chunkwise form of a finished run: its base, its heads and its adapters' products, in a recipe of its own.

    `overrides` set what chunkwise has (method.ladder …) and where data comes from. Raises as `assemble`, and UsageError for
    a run that is chunkwise already, and for overrides that would make another adapter of it.
    """
    before = saved_recipe(run)
    if before.method.name == CHUNKWISE:
        raise UsageError(f"the run `{run}` is chunkwise already", "Name a vanilla, l1ra or salor run.")
    own = [name for name in config_classes()[CHUNKWISE].model_fields if name not in MethodConfig.model_fields]
    for override in overrides:
        key = override.partition("=")[0]
        if key.startswith("output_dir"):
            raise UsageError(f"`{override}` can not be set here", "Name the new run's folder with --out.")
        if not (key.startswith(("data.", *(f"method.{name}" for name in own))) or key in CONVERTIBLE):
            remedy = f"What may be set: data.…, {', '.join(f'method.{name}' for name in own)}, {', '.join(CONVERTIBLE)}."
            raise UsageError(f"`{override}` would make another adapter of the run", remedy)
    shared = {name: value for name, value in resolved(before)["method"].items() if name in SHARED_KEYS}
    plain = resolved(before) | {"method": {"name": CHUNKWISE, **shared}, "output_dir": str(out)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / RECIPE
        write_text(file, dump(plain))
        recipe = load_recipe(file, overrides)
    recipe = replace(recipe, data=saved_recipe(run, [o for o in overrides if o.startswith("data.")]).data)
    if getattr(recipe.method, "training", None) != "posthoc":
        with locating(recipe):
            raise RecipeError.at("method.training", "nothing is trained here: the ladder is made of what there is", "posthoc")
    device = default_device()
    dtype = compute_dtype(recipe.train.precision, device)
    announce(device)
    with progress.stage("loading the model"):
        task_model, trained, facts = saved_model(run, before, dtype)
    kept = {name: adapter.own_tensors() | _plain_factors(adapter) for name, adapter in trained.adapters.items()}
    detach_all(task_model.model, trained.adapters)
    method, heads = _adapt(task_model, recipe, device, saved=kept)
    parts = ("lora_A", "lora_B", "residual_A", "residual_B", "base_mask")
    for name, adapter in method.adapters.items():
        adapter.load_tensors({part: kept[name][part] for part in parts if part in kept[name]})
    with locating(recipe):
        data_source = resolve_data(recipe.data.name_or_path, recipe.data.offline, recipe.data.subset, recipe.model.task)
        rows = load_rows(data_source, recipe.data, recipe.model.task)
        with _reader(recipe, facts.labels, task_model.tokenizer, task_model.model.config, progress) as reader:
            train, validation = reader.read(rows)
        shape = _shape(recipe, rows.train.column_names)
        for split, examples in {"training": train, "validation": validation}.items():
            check_rows(task_model, examples, split)
    facts = replace(facts, method=resolved(recipe)["method"])
    metrics = reported_metrics(recipe, facts.labels)
    return Session(recipe, task_model, method, heads, train, validation, facts, data_source, metrics, dtype, shape)


def _plain_factors(adapter: Adapter) -> dict[str, Tensor]:
    """The factors of a plain LoRA layer that acts as this one, its residual aside."""
    a, b = adapter.factors()
    return {"lora_A": a.detach(), "lora_B": b.detach()}


def _adapt(
    task_model: TaskModel,
    recipe: Recipe,
    device: torch.device,
    heads_in_float32: bool = True,
    saved: Iterable[str] | None = None,
) -> tuple[Method, list[nn.Parameter]]:
    """Put the method's adapters into the model, and make its heads trainable. saved: modules that have an adapter already."""
    method = build_method(recipe.method, recipe.train.seed)
    task_model.model.to(device)
    if saved is not None:
        ranks = saved_targets(recipe.method, saved)
    else:
        ranks, notes = find_targets(task_model.model, recipe.method, task_model.heads)
        for note in notes:
            log.warning(note)
    inject(task_model.model, method, ranks)

    def new_cache() -> PolicyCache | None:
        kv = method.kv_policies()
        return None if kv.exact else PolicyCache(task_model.model.config, kv.by_tier, kv.window)

    if recipe.model.task == "causal-lm" and not recipe.method.cache.exact:
        try:
            PolicyCache(task_model.model.config, recipe.method.cache.by_tier, recipe.method.cache.window)
        except RunError as error:
            raise RecipeError.at("method.kv.policy", str(error), "full") from error
    task_model.new_cache = new_cache
    return method, train_heads(task_model, heads_in_float32)


def _same_source(source: Source) -> Source:
    """The source a run recorded, fetched again if it is a builtin whose cache is gone."""
    return replace(source, location=str(builtin.folder(source.used))) if source.kind == "builtin" else source


def _max_length(recipe: Recipe, config: Any, tokenizer: Any) -> int:
    spec, limit = recipe.data, longest_input(config, tokenizer, recipe.model)
    if spec.max_seq_length is None:
        return min(limit or LONGEST_DEFAULT, LONGEST_DEFAULT)
    if limit is not None and spec.max_seq_length > limit:
        raise RecipeError.at(
            "data.max_seq_length", f"the model reads at most {limit} tokens, not {spec.max_seq_length}", f"at most {limit}"
        )
    return spec.max_seq_length


def reported_metrics(recipe: Recipe, labels: Labels | None) -> tuple[str, ...]:
    """The metrics to report, the deciding one first."""
    names = metric_names(labels, glue_task(recipe.data))
    wanted = recipe.train.metric_for_best_model
    if wanted is None:
        return names
    wanted = wanted.removeprefix("eval_")
    if wanted not in names:
        raise RecipeError.at("train.metric_for_best_model", f"this task does not report `{wanted}`", f"one of {', '.join(names)}")
    return (wanted, *(name for name in names if name != wanted))
