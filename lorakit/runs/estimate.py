"""Estimate of what a run would take: parameters, memory by kind, and time, from a short calibration with the run's own steps.

The session is the one that `lorakit train` builds, and the loop is the run's, so what is measured is the run itself: its
first steps are timed, its largest steps and its longest evaluation batch are run once for their memory. Nothing is written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lorakit.adapters.optimizer import AdamW
from lorakit.compat import dispatch_mode, storage_number, tree_leaves, weak_storage
from lorakit.data.examples import Examples, batch_tokens, micro_batches
from lorakit.recipes.recipe import Recipe
from lorakit.report.progress import Progress
from lorakit.runs.environment import peak_memory_mb
from lorakit.runs.session import Session, assemble, calibration
from lorakit.training.checkpoint import trainable
from lorakit.training.loop import build_optimizer, count_steps, evaluation_limits, step_order, train
from lorakit.training.metrics import evaluate, evaluation_batches
from lorakit.training.spec import TrainSpec

WARM_UP_STEPS = 2  # the first ones compile kernels and fill the allocator
FEWEST_STEPS, MOST_STEPS = 5, 12  # timed after the warm-up
PRECISE = 0.03  # relative standard error of the seconds per token at which more steps are not worth their time
SHORT_SECONDS = 10.0  # steps so short that MOST_STEPS take less are timed for this long
CALIBRATION_SECONDS = 60.0
LARGEST_STEPS, LARGEST_SHARE = 4, 0.25  # run for their memory: so many of each kind, in this share of the calibration's time
EVALUATION_BATCHES = 4
MB = 2**20


@dataclass(frozen=True)
class Plan:
    """The steps of a run, each array [steps]. tokens: real ones; positions: with rows padded to the longest of their
    micro-batch; longest: tokens of the longest row; at_once: what the largest micro-batch takes (`batch_tokens`)."""

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    longest: NDArray[np.int64]
    at_once: NDArray[np.int64]

    def largest(self, count: int) -> list[int]:
        """Numbers (the first step is 1) of `count` steps of the most at once and `count` with the longest rows, no two of them
        alike, in rising order: the memory that small tensors were in is of no use to larger ones, so a run that meets
        larger and larger steps takes more than its largest alone."""
        chosen: set[int] = set()
        for sizes in (self.at_once, self.longest):
            _, steps = np.unique(sizes, return_index=True)  # by size; the first step of each
            chosen.update(int(step) + 1 for step in steps[-count:])
        return sorted(chosen, key=lambda step: (self.longest[step - 1], self.at_once[step - 1]))


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step: `overhead` + `each` · its size in `measure`, "tokens" or "positions". relative_error: the
    standard error of the seconds for one of these in the timed steps, divided by their mean; NaN for a single step."""

    measure: str
    overhead: float
    each: float
    relative_error: float


def estimate(recipe: Recipe, progress: Progress, seconds: float = CALIBRATION_SECONDS) -> dict[str, Any]:
    """Figures that `lorakit train` would show for the recipe, and what they are made of: plain data for JSON.

    Times in seconds, memory in MB (2^20 bytes). The steps are timed for at most `seconds`, give or take a step; loading,
    preparing, the largest steps and a few evaluation batches come on top. Raises as a run does before and within its steps.
    """
    libraries = peak_memory_mb()  # nothing but imports has happened: this is what they take
    started = time.perf_counter()
    session = assemble(recipe, progress)
    loading = time.perf_counter() - started

    started = time.perf_counter()
    session.method.prepare(calibration(session, progress.stage))
    preparing = time.perf_counter() - started

    spec, task_model = recipe.train, session.task_model
    parameters = count_parameters(session)
    plan = plan_steps(session.train.lengths, spec, task_model.longest_packed)
    optimizer = build_optimizer(session.method, session.heads, spec)
    session.method.begin(optimizer, len(plan.tokens))
    torch.manual_seed(spec.seed)
    kept = memory_kept(session, optimizer)

    spent = _time_steps(session, optimizer, plan, seconds, progress)
    warm_up = _warm_up(len(spent))
    step_time = fit_step_time(plan, warm_up, spent[warm_up:])
    affordable = int(LARGEST_SHARE * seconds / np.mean(spent[warm_up:]) / 2)
    with progress.stage("running the largest steps") as advance:
        passing = memory_passing(session, optimizer, plan.largest(max(1, min(affordable, LARGEST_STEPS))), advance)
    with progress.stage("timing an evaluation") as advance:
        evaluation = _evaluation_seconds(session, advance)
    peak = peak_memory_mb()

    tokens, steps = int(plan.tokens.sum()), len(plan.tokens)
    training = sum(spent[:warm_up]) + step_time.overhead * (steps - warm_up)
    training += step_time.each * int(_measures(plan)[step_time.measure][warm_up:].sum())
    evaluations = count_evaluations(spec, steps)
    parts = {"loading": loading, "preparing": preparing, "training": training, "evaluating": evaluations * evaluation}
    on_gpu = task_model.device.type == "cuda"
    device_peak = torch.cuda.max_memory_allocated() / MB if on_gpu else peak
    memory = kept | passing | ({} if on_gpu else {"libraries": libraries})
    memory["other"] = max(0.0, device_peak - sum(memory.values()))
    return {
        "method": "+".join([recipe.method.name, *(part.name for part in recipe.method.with_)]),
        "task": recipe.model.task,
        "model": {"name": session.facts.source.requested, "stand_in": session.facts.source.stand_in},
        "data": {"name": session.data_source.requested, "stand_in": session.data_source.stand_in},
        "device": str(task_model.device),
        "precision": str(session.dtype).removeprefix("torch."),
        "trainable_parameters": parameters["trained"],
        "parameters": parameters,
        "peak_memory_mb": peak,
        "peak_gpu_memory_mb": round(device_peak, 1) if on_gpu else None,
        "memory_mb": {kind: round(size, 3) for kind, size in memory.items()},
        "steps": steps,
        "tokens": tokens,
        "train_seconds": round(training, 3),
        "tokens_per_second": round(tokens / training, 1),
        "wall_seconds": round(sum(parts.values()), 3),
        "seconds": {part: round(spent, 3) for part, spent in parts.items()},
        "evaluations": {"count": evaluations, "rows": len(session.validation), "seconds_each": round(evaluation, 3)},
        "calibration": {
            "warm_up_steps": warm_up,
            "timed_steps": len(spent) - warm_up,
            "seconds": round(sum(spent), 3),
            "seconds_per_step": step_time.overhead,
            "measure": step_time.measure,
            "seconds_each": step_time.each,
            "relative_error": None if math.isnan(step_time.relative_error) else round(step_time.relative_error, 4),
        },
    }


# -- what the run consists of ----------------------------------------------------------------------------------------


def plan_steps(lengths: NDArray[np.int64], spec: TrainSpec, longest_packed: float) -> Plan:
    """The steps of a run over rows of these lengths [rows], those of up to `longest_packed` tokens packed, as the loop has
    them."""
    order, total = step_order(lengths, spec), count_steps(len(lengths), spec)
    limits = spec.per_device_train_batch_size, spec.max_tokens_per_micro_batch, longest_packed
    sizes = np.zeros((4, total), np.int64)
    for step in range(total):
        parts = [lengths[part] for part in micro_batches(lengths, order.of_step(step + 1), *limits)]
        sizes[:, step] = (
            sum(part.sum() for part in parts),
            sum(batch_tokens(part, 0) for part in parts),
            parts[0][0],
            max(batch_tokens(part, longest_packed) for part in parts),
        )
    return Plan(*sizes)


def count_evaluations(spec: TrainSpec, steps: int) -> int:
    """Evaluations of a run of so many steps that is not stopped early."""
    every = spec.eval_steps or steps
    return math.ceil(steps / every) + spec.eval_on_start


def count_parameters(session: Session) -> dict[str, int]:
    """{"total", "trained", "adapters", "heads"}: parameters of the whole, those that are trained, and what these belong to."""
    heads = sum(p.numel() for p in session.heads)
    trained = sum(p.numel() for p in trainable(session.task_model.model).values())
    total = sum(p.numel() for p in session.task_model.model.parameters())
    return {"total": total, "trained": trained, "adapters": trained - heads, "heads": heads}


# -- time ------------------------------------------------------------------------------------------------------------


def fit_step_time(plan: Plan, first: int, seconds: Sequence[float]) -> StepTime:
    """Least squares, with neither part below zero, through steps of the plan from index `first` on that took so long.

    Whether the padding of rows takes time depends on the model: the measure is the one that the seconds follow best.
    """
    fits = [
        _fit(measure, sizes[first : first + len(seconds)].astype(float), np.asarray(seconds))
        for measure, sizes in _measures(plan).items()
    ]
    return min(fits, key=lambda fit: fit.relative_error)


def _measures(plan: Plan) -> dict[str, NDArray[np.int64]]:
    return {"tokens": plan.tokens, "positions": plan.positions}


def _fit(measure: str, sizes: NDArray[np.float64], seconds: NDArray[np.float64]) -> StepTime:
    centred = sizes - sizes.mean()
    ratio = float(seconds.mean() / sizes.mean())
    slope = float(centred @ seconds / (centred @ centred)) if centred.any() else ratio
    slope = min(max(slope, 0.0), ratio)
    each = seconds / sizes
    error = float(each.std(ddof=1) / math.sqrt(len(each)) / each.mean()) if len(each) > 1 else math.nan
    return StepTime(measure, float(seconds.mean() - slope * sizes.mean()), slope, error)


def _time_steps(session: Session, optimizer: AdamW, plan: Plan, most_seconds: float, progress: Progress) -> list[float]:
    """Seconds of the run's first steps, of as many as it takes to know them well enough."""
    spent: list[float] = []
    most = min(len(plan.tokens), WARM_UP_STEPS + MOST_STEPS)
    with progress.stage("timing steps") as advance:
        for report in train(session.task_model, session.method, optimizer, session.train, session.recipe.train):
            spent.append(report.seconds)
            advance(len(spent), max(most, len(spent)))
            if _known_well(plan, spent, most_seconds):
                break
    return spent


def _known_well(plan: Plan, spent: Sequence[float], most_seconds: float) -> bool:
    timed = len(spent) - WARM_UP_STEPS
    if sum(spent) >= most_seconds:
        return True
    if timed < FEWEST_STEPS:
        return False
    precise = fit_step_time(plan, WARM_UP_STEPS, spent[WARM_UP_STEPS:]).relative_error <= PRECISE
    return precise or (timed >= MOST_STEPS and sum(spent) >= SHORT_SECONDS)


def _warm_up(steps: int) -> int:
    """How many of the steps that were run count as they are and stand for no others."""
    return min(WARM_UP_STEPS, steps - 1)


def _evaluation_seconds(session: Session, advance: Callable[[int, int], None]) -> float:
    """Seconds of one evaluation: a few of its batches, the longest among them, and the others by their tokens."""
    spec, examples = session.recipe.train, session.validation
    limits = evaluation_limits(spec)
    batches = evaluation_batches(session.task_model, examples, *limits)
    chosen = sorted({int(i) for i in np.linspace(0, len(batches) - 1, EVALUATION_BATCHES)})
    sample = _only(examples, np.concatenate([batches[i] for i in chosen]))
    evaluate(session.task_model, _only(examples, batches[-1][-1:]), session.metrics, *limits)  # a metric's imports come but once
    started = time.perf_counter()
    evaluate(session.task_model, sample, session.metrics, *limits, advance)
    return (time.perf_counter() - started) * len(examples.tokens) / len(sample.tokens)


def _only(examples: Examples, rows: NDArray[np.int64]) -> Examples:
    """The examples of these rows alone."""
    places = np.concatenate([np.arange(examples.offsets[row], examples.offsets[row + 1]) for row in rows])
    return replace(
        examples,
        tokens=examples.tokens[places],
        offsets=np.concatenate([[0], np.cumsum(examples.lengths[rows])]),
        row_ids=examples.row_ids[rows],
        token_types=None if examples.token_types is None else examples.token_types[places],
        labels=None if examples.labels is None else examples.labels[rows],
        first_target=None if examples.first_target is None else examples.first_target[rows],
    )


# -- memory ----------------------------------------------------------------------------------------------------------


def memory_kept(session: Session, optimizer: AdamW) -> dict[str, float]:
    """{kind: MB} of what is there during all of the training: base, heads, adapters, gradients (at the end of a step's
    backward pass) and the optimizer's state. A storage that several tensors share counts once."""
    model, adapters = session.task_model.model, session.method.adapters.values()
    own = [tensor for adapter in adapters for tensor in adapter.own_tensors().values()]
    others = {_key(tensor) for tensor in [*own, *session.heads]}
    base = [tensor for tensor in _tensors(model) if _key(tensor) not in others]
    state = [t for moments in optimizer.state.values() for t in vars(moments).values() if t is not None]
    gradients = sum(p.numel() * p.element_size() for p in optimizer.state)
    sizes = {"base": _bytes(base), "heads": _bytes(session.heads), "adapters": _bytes(own)}
    return {kind: size / MB for kind, size in (sizes | {"gradients": gradients, "optimizer": _bytes(state)}).items()}


def memory_passing(
    session: Session, optimizer: AdamW, numbers: Sequence[int], advance: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, float]:
    """{kind: MB} of what comes and goes within a step, at its most, over the run's steps of these numbers, which are run.

    activations: what autograd keeps for the backward pass, logits aside. logits: all that is as wide as the vocabulary (or
    has an entry a class) at one moment, gradients and float32 copies included.
    """
    model, spec = session.task_model.model, session.recipe.train
    config = model.config
    width = config.num_labels if session.recipe.model.task == "sequence-classification" else config.get_text_config().vocab_size
    fixed = {_key(tensor) for tensor in _tensors(model)}
    activations, logits = _Live(fixed), _Live(fixed)
    for done, step in enumerate(numbers):
        advance(done, len(numbers))
        steps = train(session.task_model, session.method, optimizer, session.train, spec, step)
        with _watching(activations, logits, width):
            for _ in islice(steps, 1):
                pass
    return {"activations": activations.most / MB, "logits": logits.most / MB}


class _Live:
    """Counts the bytes of storages that are alive, without keeping them so; those in `fixed` do not count."""

    def __init__(self, fixed: set[int]) -> None:
        self.fixed = fixed
        self.most = 0
        self._alive: dict[int, tuple[Any, int]] = {}

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if _key(tensor) in self.fixed or storage_number(storage) in self._alive:
            return
        self._alive = {key: kept for key, kept in self._alive.items() if not kept[0].expired()}
        self._alive[storage_number(storage)] = weak_storage(storage), storage.nbytes()
        self.most = max(self.most, sum(size for _, size in self._alive.values()))


class _Watch(dispatch_mode()):  # type: ignore[misc]
    """Shows every tensor that an operation gives, in the forward and the backward pass, to `logits` if it is as wide."""

    def __init__(self, logits: _Live, width: int) -> None:
        super().__init__()
        self.logits, self.width = logits, width

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.ndim and tensor.shape[-1] == self.width:
                self.logits.add(tensor)
        return out


@contextmanager
def _watching(activations: _Live, logits: _Live, width: int) -> Iterator[None]:
    def pack(tensor: Tensor) -> Tensor:
        if not (tensor.ndim and tensor.shape[-1] == width):
            activations.add(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), _Watch(logits, width):
        yield


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _key(tensor: Tensor) -> int:
    """Key that tells apart storages that are alive at the same time."""
    return tensor.untyped_storage().data_ptr()


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = {_key(tensor): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())
