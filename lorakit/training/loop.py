"""The training loop: batch, loss, backward, step, report. A generator, so that it does nothing
else."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lorakit.adapters.optimizer import AdamW, ParamGroup
from lorakit.data.batches import Batch, StepOrder, collate, micro_batches, steps_per_epoch
from lorakit.data.joined import AnyExamples, Draw, draw_of
from lorakit.errors import RunError
from lorakit.methods import Method
from lorakit.models.task_model import TaskModel
from lorakit.numerics.schedule import learning_rate_factor
from lorakit.training.distributed import ALONE, World
from lorakit.training.spec import GROUPED, TrainSpec
from lorakit.training.trained import not_finite, trainable


@dataclass(frozen=True)
class StepReport:
    """Report of one optimizer step. tokens: real ones, without padding; seconds: of this step
    alone; stop: a process was told to stop before its end."""

    step: int
    total_steps: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    seconds: float
    metrics: dict[str, float]
    stop: bool


def count_steps(rows: int, spec: TrainSpec, each: int | None = None) -> int:
    """Optimizer steps of the whole run. each: rows of a step; by default those of one process."""
    if spec.max_steps is not None:
        return spec.max_steps
    per_epoch = steps_per_epoch(rows, each or rows_per_step(spec))
    return max(1, math.ceil(spec.num_train_epochs * per_epoch))


def count_warmup_steps(total_steps: int, spec: TrainSpec) -> int:
    """Optimizer steps over which the learning rate rises, of a run of `total_steps`: a share is
    rounded up, as in transformers' TrainingArguments.get_warmup_steps."""
    warmup = spec.warmup_steps
    if warmup is not None and warmup >= 1:
        return int(warmup)
    return math.ceil((spec.warmup_ratio if warmup is None else warmup) * total_steps)


def scheduled_rate(step: int, total_steps: int, spec: TrainSpec) -> float:
    """The learning rate of optimizer step `step` (the first is 1) of a run of `total_steps`."""
    warmup = count_warmup_steps(total_steps, spec)
    factor = learning_rate_factor(step, total_steps, warmup, spec.lr_scheduler_type)
    return spec.learning_rate * factor


def rows_per_step(spec: TrainSpec, processes: int = 1) -> int:
    return spec.per_device_train_batch_size * spec.gradient_accumulation_steps * processes


def step_order(
    lengths: NDArray[np.int64], spec: TrainSpec, draw: Draw | None = None, rows: int | None = None
) -> StepOrder:
    """Order of the training rows, or packs, of these lengths: those of every step. draw: chooses
    those of an epoch, where that is not simply all of them. rows: of a step; by default those of
    one process."""
    return StepOrder(
        len(lengths),
        rows or rows_per_step(spec),
        spec.seed,
        lengths if spec.sampling == GROUPED else None,
        shuffled=spec.sampling != "sequential",
        draw=draw,
    )


def evaluation_limits(spec: TrainSpec) -> tuple[int, int | None]:
    """(rows, tokens) of an evaluation batch, at most."""
    return (
        spec.per_device_eval_batch_size or 2 * spec.per_device_train_batch_size,
        spec.max_tokens_per_micro_batch,
    )


def build_optimizer(method: Method, heads: list[nn.Parameter], spec: TrainSpec) -> AdamW:
    """AdamW over the method's groups and the heads, with the B factors in groups of their own where
    the recipe gives them another learning rate."""
    groups = [*method.param_groups(), ParamGroup(heads)]
    if spec.lora_plus_ratio is not None:
        left = {id(adapter.lora_B) for adapter in method.adapters.values()}
        groups = [part for group in groups for part in _parted(group, left, spec.lora_plus_ratio)]
    return AdamW(groups, spec.weight_decay, (spec.adam_beta1, spec.adam_beta2), spec.adam_epsilon)


def _parted(group: ParamGroup, left: set[int], ratio: float) -> list[ParamGroup]:
    """The group as it is if none of its parameters are in `left` (by id) or its rate is constant;
    else two, in which those in `left` have `ratio` times the learning rate (LoRA+, Hayou et al.,
    arXiv 2402.12354)."""
    chosen = [p for p in group.params if id(p) in left]
    if group.lr is not None or not chosen:
        return [group]
    others = [p for p in group.params if id(p) not in left]
    faster = replace(group, params=chosen, lr_factor=group.lr_factor * ratio)
    return [replace(group, params=others), faster] if others else [faster]


def train(
    task_model: TaskModel,
    method: Method,
    optimizer: AdamW,
    examples: AnyExamples,
    spec: TrainSpec,
    first_step: int = 1,
    world: World = ALONE,
    rows: int | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Iterator[StepReport]:
    """Train from optimizer step `first_step` to the last, yielding a report after each.

    Nothing else happens here: whoever iterates evaluates, saves, logs and stops. The loss of a step
    is its sum over all micro-batches, of all processes, divided by the step's number of targets, so
    however its rows are cut and dealt, they give the same gradient. rows: of a step; by default
    those of one process times their number. stopping: asked once a step; the report says whether
    any process was to stop.

    Raises RunError before the optimizer step when the loss or a gradient is not finite.
    """
    rows = rows or rows_per_step(spec, world.size)
    lengths = examples.unit_lengths
    total, per_epoch = count_steps(len(lengths), spec, rows), steps_per_epoch(len(lengths), rows)
    order = step_order(lengths, spec, draw_of(examples), rows)
    device = task_model.device
    for step in range(first_step, total + 1):
        started = time.perf_counter()
        task_model.model.train()
        units = order.of_step(step)
        every = examples.rows_of(units)
        targets, tokens = examples.count_targets(every), int(examples.lengths[every].sum())
        world.seed_step(spec.seed, step)
        row_losses, places = [torch.zeros(0, device=device)], [torch.zeros(0, dtype=torch.int64)]
        own = world.share(units, lengths)
        for batch in _batches(examples, own, every, spec, task_model):
            batch = replace(batch, step=step).to(device)
            method.before_forward(batch)
            losses, _ = task_model.row_losses(batch)
            if losses.requires_grad:  # not where every rank is 0 and no head is trained
                torch.autograd.backward(losses.sum() / targets)
            row_losses.append(losses.detach())
            assert batch.places is not None
            places.append(batch.places.cpu())
        sums = torch.cat(row_losses).sum() / targets, stopping()
        loss, stop = world.sum_gradients(optimizer.parameters(), sums)
        method.before_step(step)
        grad_norm = float(optimizer.clip_grad_norm(spec.max_grad_norm))
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            bad = np.zeros(len(every))
            bad[torch.cat(places)] = ~torch.cat(row_losses).isfinite().cpu()
            raise _diverged(step, examples, every, world.sum(bad) > 0, loss, task_model.model)
        learning_rate = scheduled_rate(step, total, spec)
        optimizer.step(learning_rate)
        optimizer.zero_grad()
        metrics = method.after_step(step)
        seconds = time.perf_counter() - started
        found = (loss, learning_rate, grad_norm, tokens, seconds, metrics)
        yield StepReport(step, total, step / per_epoch, *found, bool(stop))


def _batches(
    examples: AnyExamples,
    units: NDArray[np.int64],
    every: NDArray[np.int64],
    spec: TrainSpec,
    task_model: TaskModel,
) -> Iterator[Batch]:
    """The micro-batches of these units, which know the places of their rows in `every`, all rows of
    the step."""
    if not len(units):  # another process has all rows of a small step
        return
    limits = spec.per_device_train_batch_size, spec.max_tokens_per_micro_batch
    order = np.argsort(every, kind="stable")
    for part in micro_batches(examples.unit_lengths, units, *limits, task_model.longest_packed):
        rows = examples.rows_of(part)
        places = order[np.searchsorted(every, rows, sorter=order)]
        batch = collate(examples, rows, task_model.pad_id)
        yield replace(batch, places=torch.from_numpy(places))


def _diverged(
    step: int,
    examples: AnyExamples,
    rows: NDArray[np.int64],
    infinite: NDArray[np.bool_],
    loss: float,
    model: nn.Module,
) -> RunError:
    """Names the weights that are not finite, if there are any; else those of the step's rows whose
    loss is not finite (infinite), or all of them when only a gradient is not."""
    before = f"stopped before optimizer step {step}: "
    if bad := not_finite({n: p for n, p in model.named_parameters() if not p.requires_grad}):
        return RunError(
            f"{before}weights of the base are not finite: {bad}",
            "The model's files are damaged, or its weights are beyond the precision: fetch them"
            " again, or set precision: fp32.",
        )
    if bad := not_finite(trainable(model)):
        return RunError(
            f"{before}trained weights are not finite: {bad}",
            "Training broke them: a lower learning_rate or a longer warm-up helps.",
        )
    what = f"the loss is {loss}" if infinite.any() else "a gradient is not finite"
    where = examples.where(examples.row_ids[rows[infinite] if infinite.any() else rows].tolist())
    return RunError(
        f"{before}{what}; training {where}, counted from 1",
        "Look at these rows; a lower learning_rate, a longer warm-up or precision: fp32 help"
        " against divergence.",
    )
