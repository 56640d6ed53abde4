"""Assembly: a recipe, or a finished run, becomes a model with adapters, and examples. Data and
model meet only here."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lorakit.adapters.inject import find_targets, in_blocks, inject, saved_targets
from lorakit.cpu.blocks import checkpoint_blocks, compile_blocks
from lorakit.cpu.speed_up import speed_up
from lorakit.data.batches import Batch, StepOrder, collate, micro_batches
from lorakit.data.chat_template import use_template
from lorakit.data.examples import Examples
from lorakit.data.joined import AnyExamples, draw_of, parts_of
from lorakit.data.keys import ChosenSpec
from lorakit.data.labels import Labels, glue_task, warn_of_alike, warn_of_missing
from lorakit.data.load import Loaded
from lorakit.data.reading import Reader
from lorakit.errors import Problem, RecipeError, RunError, collecting
from lorakit.export.native import AdapterFacts
from lorakit.export.peft import not_for_peft
from lorakit.inference.kv.policy_cache import PolicyCache
from lorakit.kernels.dispatch import announce
from lorakit.methods import Calibration, KVPolicies, Method, Stage, build_method
from lorakit.models.heads import fit_head, train_heads
from lorakit.models.load import (
    LONGEST_DEFAULT,
    check_model,
    compute_dtype,
    default_device,
    dense_weights,
    load_config,
    load_model,
)
from lorakit.models.positions import longest_input
from lorakit.models.quantise import check_quantiser
from lorakit.models.task_model import TaskModel
from lorakit.models.tokenizer import load_tokenizer
from lorakit.recipes.recipe import Recipe, locating, resolved
from lorakit.report.mix import mix_lines
from lorakit.report.progress import Progress
from lorakit.runs.sets import (
    ReadSet,
    common_template,
    count_labels,
    data_sets,
    find_data,
    read_examples,
    read_sets,
    training_examples,
    validation_examples,
)
from lorakit.sources.resolve import Source, Wanted, resolve
from lorakit.training.distributed import ALONE, World
from lorakit.training.metrics import metric_names

log = logging.getLogger("lorakit")


@dataclass
class Session:
    """Everything that a run needs, built and on its device."""

    recipe: Recipe
    task_model: TaskModel
    method: Method
    heads: list[nn.Parameter]
    train: AnyExamples
    validation: AnyExamples
    facts: AdapterFacts
    sets: tuple[ReadSet, ...]
    metrics: tuple[str, ...]
    dtype: torch.dtype
    started_from: dict[str, Any] | None = None
    """The adapter that training began with, as manifest.json records it."""


@dataclass(frozen=True)
class Inputs:
    """Inputs of a run, made from a recipe's data and tokenizer before the model's weights are
    loaded."""

    tokenizer: Any
    config: Any
    labels: Labels | None
    metrics: tuple[str, ...]
    sets: tuple[ReadSet, ...]
    train: AnyExamples
    validation: AnyExamples
    max_length: int
    """Tokens to which rows are cut."""


def assemble(recipe: Recipe, progress: Progress, world: World = ALONE) -> Session:
    """Load everything that the recipe names and put it together. Writes nothing but caches. Of
    several processes, the first tokenises, and the others take what it left in the cache.

    Raises RecipeError (with the place in the recipe) or RunError.
    """
    with locating(recipe):
        check_quantiser(recipe.model.quantization)
        source, data_sources = find_sources(recipe)
        with world.one_after_the_first():
            inputs = read_inputs(recipe, source, data_sources, progress)
        for line in mix_lines(inputs.train):
            log.info("%s", line)
        device = default_device()
        dtype = compute_dtype(recipe.train.precision, device)
        announce(device)
        with progress.stage("loading the model"):
            torch.manual_seed(recipe.train.seed)
            task_model, notes = load_model(
                source, recipe.model, inputs.tokenizer, inputs.labels, dtype, inputs.config
            )
        for note in notes:
            log.warning(note)
        for split, examples in {"training": inputs.train, "validation": inputs.validation}.items():
            check_rows(task_model, examples, split)
        check_model(task_model, inputs.train)
        method, heads = adapt(task_model, recipe, device)
        if unread := not_for_peft(task_model.model, method.adapters):
            log.warning("%s; a merged model and lorakit's own format hold them", unread)
        for note in speed_up(task_model, method.adapters):
            log.info(note)
        compiles = recipe.train.torch_compile
        if recipe.train.gradient_checkpointing:
            again = method.tiers.recompute_context if method.tiers else nullcontext
            checkpoint_blocks(task_model, None if compiles else again)
        if compiles:
            with progress.stage("compiling the blocks"):
                notes = compile_blocks(task_model, recipe.method.ranks_move)
            for note in notes:
                log.info(note)
    # A later merge, started from another folder, must use the exact base that was trained on.
    source = source.pinned(recipe.model.revision)
    facts = AdapterFacts(resolved(recipe)["method"], recipe.model.task, inputs.labels, source)
    found, read = (recipe, task_model, method, heads), (inputs.train, inputs.validation)
    return Session(*found, *read, facts, inputs.sets, inputs.metrics, dtype)


def calibration(session: Session, stage: Stage) -> Calibration:
    """Data and functions that the session's method may use before the first step and after the
    last."""
    task_model, spec = session.task_model, session.recipe.train
    pad_id = task_model.pad_id

    def cut(examples: AnyExamples, rows: NDArray[np.int64]) -> Iterator[Batch]:
        # These passes are not packed, so padding counts as tokens.
        for part in micro_batches(
            examples.lengths,
            rows,
            spec.per_device_train_batch_size,
            spec.max_tokens_per_micro_batch,
        ):
            yield collate(examples, part, pad_id).to(task_model.device)

    def batches(rows: int) -> Iterator[Batch]:
        # Never rows grouped by length: the sample must represent all rows.
        yield from cut(session.train, _sample(session.train, rows, spec.seed))

    def held_out() -> Iterator[Batch]:
        rows = np.arange(len(session.validation))
        for start in range(0, len(rows), spec.per_device_train_batch_size):
            yield from cut(
                session.validation, rows[start : start + spec.per_device_train_batch_size]
            )

    def forward(batch: Batch) -> None:
        task_model.model.eval()
        with torch.no_grad():
            task_model.run_body(batch)

    def dense(names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        facts = session.facts
        return dense_weights(facts.source, session.recipe.model, facts.labels, names)

    blocks = in_blocks(task_model.model, session.method.adapters)
    return Calibration(len(session.train), batches, held_out, forward, stage, blocks, dense)


def _sample(train: AnyExamples, count: int, seed: int) -> NDArray[np.int64]:
    """Rows drawn from the training examples; of several data sets, in the proportions of an
    epoch."""
    draw = draw_of(train)
    units = len(train) if draw is None else len(train.unit_lengths)
    drawn = StepOrder(units, min(count, units), seed, draw=draw).of_step(1)
    return drawn if draw is None else train.rows_of(drawn)[:count]


def read_inputs(
    recipe: Recipe, source: Source, data_sources: Sequence[Source], progress: Progress
) -> Inputs:
    """Read and tokenise the data of a recipe for the model at `source`."""
    rows = read_rows(recipe, data_sources, progress)
    return inputs_of(recipe, source, data_sources, rows, progress)


def read_rows(recipe: Recipe, data_sources: Sequence[Source], progress: Progress) -> list[Loaded]:
    """Read the rows of each data set of a recipe."""
    with progress.stage("reading the data", "MB") as advance:
        return read_sets(recipe, data_sources, progress=advance)


def inputs_of(
    recipe: Recipe,
    source: Source,
    data_sources: Sequence[Source],
    rows: Sequence[Loaded],
    progress: Progress,
) -> Inputs:
    """Tokenise the rows of a recipe's data sets for the model at `source`."""
    labels = count_labels(data_sets(recipe), rows)
    metrics = reported_metrics(recipe, labels)
    if recipe.train.metric_for_best_model is not None and recipe.train.eval_steps is None:
        what = (
            "metric_for_best_model has no effect: there is only the evaluation after the last step"
        )
        raise RecipeError.at("train.metric_for_best_model", what, "eval_steps too, or no such key")
    tokenizer = load_tokenizer(source, recipe.model)
    use_template(tokenizer, common_template(rows))
    config = load_config(source, recipe.model)
    if labels is not None:
        labels, kept, said = fit_head(labels, config)
        if said is not None:
            log.log(logging.INFO if kept else logging.WARNING, said)
    how = (labels, tokenizer, config, progress)
    sets = read_examples(recipe, data_sources, rows, lambda one: reading(recipe, one.spec, *how))
    train, validation = training_examples(recipe, sets), validation_examples(sets)
    warn_of_alike(labels)
    warn_of_missing(labels, train.labels, validation.labels)
    read = (tuple(sets), train, validation, max_length(recipe, config, tokenizer))
    return Inputs(tokenizer, config, labels, metrics, *read)


@contextlib.contextmanager
def reading(
    recipe: Recipe,
    spec: ChosenSpec,
    labels: Labels | None,
    tokenizer: Any,
    config: Any,
    progress: Progress,
) -> Iterator[Reader]:
    """Context with a Reader, which makes examples from rows as `spec` says."""
    longest = max_length(recipe, config, tokenizer)
    # Lists of tokens trigger Python's garbage collector, which would scan all imported objects each
    # time: up to a fifth of the time.
    gc.freeze()
    try:
        with progress.stage("tokenising", "rows") as advance:
            yield Reader(labels, spec, tokenizer, longest, advance, config)
    finally:
        gc.unfreeze()


def check_rows(task_model: TaskModel, examples: AnyExamples, split: str) -> None:
    """Check the rows of each data set."""
    for part in parts_of(examples):
        _check_rows(task_model, part, split)


def _check_rows(task_model: TaskModel, examples: Examples, split: str) -> None:
    """Raise RecipeError for a row without a class position, in a model that reads the class at the
    last token that is not the pad token. Logs how many rows end in the pad token, since their class
    is read before it."""
    if not task_model.reads_at_pad:
        return
    pad, name = task_model.pad_id, task_model.tokenizer.convert_ids_to_tokens(task_model.pad_id)
    empty, ending = list[int](), 0
    for start, block in examples.blocks():
        real = np.concatenate([[0], np.cumsum(block.tokens != pad)])[block.offsets]
        empty += (start + np.flatnonzero(np.diff(real) == 0)).tolist()
        ending += int((block.tokens[block.offsets[1:] - 1] == pad).sum())
    if empty:
        what = f"{split} row {examples.row_ids[empty[0]]} is nothing but the pad token `{name}`"
        more = f", like {len(empty) - 1} more" if len(empty) > 1 else ""
        expected = (
            "another token: a decoder's class is read at the last one that is not the pad token"
        )
        raise RecipeError.at("data.text_columns", what + more, expected)
    if ending:
        message = (
            "%d of %d %s rows end in the pad token `%s`: their class is read before it, as"
            " transformers does"
        )
        log.info(message, ending, len(examples), split, name)


def model_wanted(recipe: Recipe) -> Wanted:
    """The model that a recipe names."""
    spec = recipe.model
    return Wanted("model", spec.name_or_path, spec.offline, spec.revision, task=spec.task)


def find_sources(
    recipe: Recipe, find: Callable[[Wanted], Source] = resolve
) -> tuple[Source, tuple[Source, ...]]:
    """Sources of the model and of the data sets, by `resolve` or `plan`. All are tried before an
    error is raised."""
    problems: list[Problem] = []
    with collecting(problems):
        model = find(model_wanted(recipe))
    with collecting(problems):
        data = find_data(recipe, find)
    if problems:
        raise RecipeError(problems)
    return model, data


def adapt(
    task_model: TaskModel,
    recipe: Recipe,
    device: torch.device,
    heads_in_float32: bool = True,
    saved: Iterable[str] | None = None,
) -> tuple[Method, list[nn.Parameter]]:
    """Put the method's adapters into the model, and make its heads trainable. saved: names of the
    modules that already have an adapter."""
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
        kv = method.tiers.kv_policies() if method.tiers else KVPolicies()
        return None if kv.exact else PolicyCache(task_model.model.config, kv.by_tier, kv.window)

    cache = recipe.method.cache
    if task_model.task.predicts_tokens and not cache.exact:
        try:
            PolicyCache(task_model.model.config, cache.by_tier, cache.window)
        except RunError as error:
            raise RecipeError.at(cache.key, str(error), f"{cache.key}: full") from error
    task_model.new_cache = new_cache
    return method, train_heads(task_model, heads_in_float32)


def max_length(recipe: Recipe, config: Any, tokenizer: Any) -> int:
    """Tokens to which rows are cut."""
    spec, limit = recipe.data, longest_input(config, tokenizer, recipe.model)
    if spec.max_seq_length is None:
        return min(limit or LONGEST_DEFAULT, LONGEST_DEFAULT)
    if limit is not None and spec.max_seq_length > limit:
        raise RecipeError.at(
            "data.max_seq_length",
            f"the model reads at most {limit} tokens, not {spec.max_seq_length}",
            f"at most {limit}",
        )
    return spec.max_seq_length


def reported_metrics(recipe: Recipe, labels: Labels | None) -> tuple[str, ...]:
    """The metrics to report, the one that selects the best checkpoint first."""
    tasks = {glue_task(one) for one in recipe.data.sets()}
    names = metric_names(labels, tasks.pop() if len(tasks) == 1 else None)
    wanted = recipe.train.metric_for_best_model
    if wanted is None:
        return names
    wanted = wanted.removeprefix("eval_")
    if wanted not in names:
        raise RecipeError.at(
            "train.metric_for_best_model",
            f"this task does not report `{wanted}`",
            f"one of {', '.join(names)}",
        )
    return (wanted, *(name for name in names if name != wanted))
