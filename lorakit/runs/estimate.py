"""Estimate of a run: parameters, memory by kind, and time, from a short calibration with the run's
own steps.

The session and the loop are those of `lorakit train`, so the run itself is measured: its first
steps are timed, and its largest steps and longest evaluation batch are run once for their memory.
Nothing is written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lorakit.adapters import quantised
from lorakit.adapters.optimizer import AdamW
from lorakit.data.joined import draw_of
from lorakit.methods import prepare
from lorakit.recipes.recipe import Recipe
from lorakit.report.progress import Progress
from lorakit.runs.environment import peak_memory_mb
from lorakit.runs.memory import MB, memory_kept, memory_passing
from lorakit.runs.record import data_facts
from lorakit.runs.session import Session, assemble, calibration
from lorakit.runs.step_plan import StepPlan, StepTime, fit_step_time, measures, plan_steps
from lorakit.training.loop import build_optimizer, evaluation_limits, train
from lorakit.training.metrics import evaluate, evaluation_batches
from lorakit.training.spec import TrainSpec
from lorakit.training.trained import trainable

WARM_UP_STEPS = 2  # the first ones compile kernels and fill the allocator
FEWEST_STEPS, MOST_STEPS = 5, 12  # timed after the warm-up
# relative standard error of the seconds per token below which no more steps are timed
PRECISE = 0.03
SHORT_SECONDS = 10.0  # steps that are so short that MOST_STEPS take less are timed for this long
CALIBRATION_SECONDS = 60.0
# steps of each kind that are run to measure memory, and their share of the calibration's time
LARGEST_STEPS, LARGEST_SHARE = 4, 0.25
EVALUATION_BATCHES = 4


@dataclass(frozen=True)
class Measured:
    """Measurements that the estimate is made of. Times in seconds, memory in MB.

    spent: time of each of the run's first steps; evaluation: time of one evaluation; memory: {kind:
    MB} of the known kinds; peak: the process's peak.
    """

    session: Session
    plan: StepPlan
    loading: float
    preparing: float
    spent: list[float]
    evaluation: float
    memory: dict[str, float]
    peak: float

    @property
    def warm_up(self) -> int:
        """Number of first steps that are counted as measured and not used to predict others."""
        return min(WARM_UP_STEPS, len(self.spent) - 1)

    @property
    def step_time(self) -> StepTime:
        return fit_step_time(self.plan, self.warm_up, self.spent[self.warm_up :])

    @property
    def training(self) -> float:
        """Seconds of all steps of the run."""
        time, sizes = self.step_time, measures(self.plan)
        first, later = sum(self.spent[: self.warm_up]), sizes[time.measure][self.warm_up :]
        return first + time.overhead * len(later) + time.each * int(later.sum())

    @property
    def on_gpu(self) -> bool:
        return self.session.task_model.device.type == "cuda"

    @property
    def device_peak(self) -> float:
        """Peak memory of the device that trains."""
        return torch.cuda.max_memory_allocated() / MB if self.on_gpu else self.peak


def estimate(
    recipe: Recipe, progress: Progress, seconds: float = CALIBRATION_SECONDS
) -> dict[str, Any]:
    """Figures that `lorakit train` would show for the recipe, and their parts, as plain data for
    JSON.

    Times in seconds, memory in MB (2^20 bytes). Steps are timed for at most `seconds`, give or take
    one step; loading, preparing, the largest steps and a few evaluation batches come on top. Raises
    as a run does before and within its steps.
    """
    measured = _measure(recipe, progress, seconds)
    return _what(measured) | _memory_figures(measured) | _time_figures(measured)


def _measure(recipe: Recipe, progress: Progress, seconds: float) -> Measured:
    """Build the session and run some of its steps."""
    libraries = peak_memory_mb()  # only imports have happened so far: this is their memory
    started = time.perf_counter()
    session = assemble(recipe, progress)
    loaded = time.perf_counter()
    prepare(session.method, calibration(session, progress.stage))
    prepared = time.perf_counter()

    packed, draw = session.task_model.longest_packed, draw_of(session.train)
    plan = plan_steps(session.train.unit_lengths, recipe.train, packed, draw)
    optimizer = build_optimizer(session.method, session.heads, recipe.train)
    session.method.begin(optimizer, len(plan.tokens))
    torch.manual_seed(recipe.train.seed)
    kept = memory_kept(session, optimizer)

    spent = _time_steps(session, optimizer, plan, seconds, progress)
    timed = spent[min(WARM_UP_STEPS, len(spent) - 1) :]
    affordable = int(LARGEST_SHARE * seconds / np.mean(timed) / 2)
    largest = plan.largest(max(1, min(affordable, LARGEST_STEPS)))
    with progress.stage("running the largest steps") as advance:
        passing = memory_passing(session, optimizer, largest, advance)
    with progress.stage("timing an evaluation") as advance:
        evaluation = evaluation_seconds(session, advance)
    times = loaded - started, prepared - loaded
    on_gpu = session.task_model.device.type == "cuda"
    memory = kept | passing | ({} if on_gpu else {"libraries": libraries})
    return Measured(session, plan, *times, spent, evaluation, memory, peak_memory_mb())


def _what(measured: Measured) -> dict[str, Any]:
    """Figures about what is trained, and on which data and device."""
    session = measured.session
    recipe, model, parameters = session.recipe, session.facts.source, count_parameters(session)
    in_bits = recipe.model.quantization
    return {
        "method": "+".join([recipe.method.name, *(part.name for part in recipe.method.with_)]),
        "task": recipe.model.task,
        "model": {"name": model.requested, "stand_in": model.stand_in},
        "data": data_facts(session),
        "device": str(session.task_model.device),
        "precision": str(session.dtype).removeprefix("torch."),
        "quantization": None if in_bits is None else in_bits.model_dump(mode="json"),
        "trainable_parameters": parameters["trained"],
        "parameters": parameters,
    }


def _memory_figures(measured: Measured) -> dict[str, Any]:
    known, device_peak = measured.memory, measured.device_peak
    memory = known | {"other": max(0.0, device_peak - sum(known.values()))}
    return {
        "peak_memory_mb": measured.peak,
        "peak_gpu_memory_mb": round(device_peak, 1) if measured.on_gpu else None,
        "memory_mb": {kind: round(size, 3) for kind, size in memory.items()},
    }


def _time_figures(measured: Measured) -> dict[str, Any]:
    training, spent, fit = measured.training, measured.spent, measured.step_time
    tokens, steps = int(measured.plan.tokens.sum()), len(measured.plan.tokens)
    count = count_evaluations(measured.session.recipe.train, steps)
    parts = {
        "loading": measured.loading,
        "preparing": measured.preparing,
        "training": training,
        "evaluating": count * measured.evaluation,
    }
    error = None if math.isnan(fit.relative_error) else round(fit.relative_error, 4)
    return {
        "steps": steps,
        "tokens": tokens,
        "train_seconds": round(training, 3),
        "tokens_per_second": round(tokens / training, 1),
        "wall_seconds": round(sum(parts.values()), 3),
        "seconds": {part: round(taken, 3) for part, taken in parts.items()},
        "evaluations": {
            "count": count,
            "rows": len(measured.session.validation),
            "seconds_each": round(measured.evaluation, 3),
        },
        "calibration": {
            "warm_up_steps": measured.warm_up,
            "timed_steps": len(spent) - measured.warm_up,
            "seconds": round(sum(spent), 3),
            "seconds_per_step": fit.overhead,
            "measure": fit.measure,
            "seconds_each": fit.each,
            "relative_error": error,
        },
    }


# -- sizes of the run ------------------------------------------------------------------------------


def count_evaluations(spec: TrainSpec, steps: int) -> int:
    """Number of evaluations in a run of this many steps that is not stopped early."""
    every = spec.eval_steps or steps
    return math.ceil(steps / every) + spec.eval_on_start


def count_parameters(session: Session) -> dict[str, int]:
    """{"total", "trained", "adapters", "heads"}: parameters of the whole model, the trained ones,
    and their two parts."""
    heads = sum(p.numel() for p in session.heads)
    trained = sum(p.numel() for p in trainable(session.task_model.model).values())
    total = quantised.count_parameters(session.task_model.model)
    return {"total": total, "trained": trained, "adapters": trained - heads, "heads": heads}


# -- time ------------------------------------------------------------------------------------------


def _time_steps(
    session: Session, optimizer: AdamW, plan: StepPlan, most_seconds: float, progress: Progress
) -> list[float]:
    """Seconds of the run's first steps: as many steps as are needed for a precise estimate."""
    spent: list[float] = []
    most = min(len(plan.tokens), WARM_UP_STEPS + MOST_STEPS)
    with progress.stage("timing steps") as advance:
        for report in train(
            session.task_model, session.method, optimizer, session.train, session.recipe.train
        ):
            spent.append(report.seconds)
            advance(len(spent), max(most, len(spent)))
            if _known_well(plan, spent, most_seconds):
                break
    return spent


def _known_well(plan: StepPlan, spent: Sequence[float], most_seconds: float) -> bool:
    timed = len(spent) - WARM_UP_STEPS
    if sum(spent) >= most_seconds:
        return True
    if timed < FEWEST_STEPS:
        return False
    precise = fit_step_time(plan, WARM_UP_STEPS, spent[WARM_UP_STEPS:]).relative_error <= PRECISE
    return precise or (timed >= MOST_STEPS and sum(spent) >= SHORT_SECONDS)


def evaluation_seconds(session: Session, advance: Callable[[int, int], None]) -> float:
    """Seconds of one evaluation: a few of its batches, the longest among them, and the others by
    their tokens."""
    spec, examples = session.recipe.train, session.validation
    limits = evaluation_limits(spec)
    batches = evaluation_batches(session.task_model, examples, *limits)
    chosen = sorted({int(i) for i in np.linspace(0, len(batches) - 1, EVALUATION_BATCHES)})
    sample = examples.select(np.concatenate([batches[i] for i in chosen]))
    # A metric's imports happen only once, so they are not timed.
    evaluate(session.task_model, examples.select(batches[-1][-1:]), session.metrics, *limits)
    started = time.perf_counter()
    evaluate(session.task_model, sample, session.metrics, *limits, advance)
    return (time.perf_counter() - started) * examples.token_count / sample.token_count
