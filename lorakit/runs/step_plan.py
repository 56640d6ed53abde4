"""The steps of a run before it starts: the tokens of each, and the time that each takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorakit.data.batches import batch_tokens, micro_batches
from lorakit.data.joined import Draw
from lorakit.training.loop import count_steps, step_order
from lorakit.training.spec import TrainSpec


@dataclass(frozen=True)
class StepPlan:
    """The steps of a run, each array [steps]. tokens: real ones; positions: with rows padded to the
    longest of their micro-batch; longest: tokens of the longest row; at_once: what the largest
    micro-batch takes (`batch_tokens`)."""

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    longest: NDArray[np.int64]
    at_once: NDArray[np.int64]

    def largest(self, count: int) -> list[int]:
        """Numbers (from 1) of the `count` steps with the largest micro-batches and the `count` with
        the longest rows, all of different sizes, in rising order. The order matters: memory freed
        by small tensors cannot hold larger ones, so a run whose steps grow takes more than its
        largest step alone."""
        chosen: set[int] = set()
        for sizes in (self.at_once, self.longest):
            # sorted by size; the first step of each size
            _, steps = np.unique(sizes, return_index=True)
            chosen.update(int(step) + 1 for step in steps[-count:])
        return sorted(chosen, key=lambda step: (self.longest[step - 1], self.at_once[step - 1]))


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step: `overhead` + `each` · its size in `measure`, "tokens" or
    "positions". relative_error: standard error of the seconds per unit of size in the timed steps,
    divided by their mean; NaN for a single step."""

    measure: str
    overhead: float
    each: float
    relative_error: float


def plan_steps(
    lengths: NDArray[np.int64], spec: TrainSpec, longest_packed: float, draw: Draw | None = None
) -> StepPlan:
    """The steps of a run over rows, or packs, of these lengths [rows]; those of up to
    `longest_packed` tokens have no padding, as in the loop. draw: as in `step_order`."""
    order, total = step_order(lengths, spec, draw), count_steps(len(lengths), spec)
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
    return StepPlan(*sizes)


def fit_step_time(plan: StepPlan, first: int, seconds: Sequence[float]) -> StepTime:
    """Least squares, with neither part below zero, through steps of the plan from index `first` on
    that took so long.

    The padding of rows takes time in some models and not in others, so the measure that fits the
    seconds better is chosen.
    """
    fits = [
        _fit(measure, sizes[first : first + len(seconds)].astype(float), np.asarray(seconds))
        for measure, sizes in measures(plan).items()
    ]
    return min(fits, key=lambda fit: fit.relative_error)


def measures(plan: StepPlan) -> dict[str, NDArray[np.int64]]:
    return {"tokens": plan.tokens, "positions": plan.positions}


def _fit(measure: str, sizes: NDArray[np.float64], seconds: NDArray[np.float64]) -> StepTime:
    centred = sizes - sizes.mean()
    ratio = float(seconds.mean() / sizes.mean())
    slope = float(centred @ seconds / (centred @ centred)) if centred.any() else ratio
    slope = min(max(slope, 0.0), ratio)
    each = seconds / sizes
    error = (
        float(each.std(ddof=1) / math.sqrt(len(each)) / each.mean()) if len(each) > 1 else math.nan
    )
    return StepTime(measure, float(seconds.mean() - slope * sizes.mean()), slope, error)
