"""The training loop: batch, loss, backward, step, report. A generator, so that it does nothing
else."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lorakit.adapters.optimizer import AdamW, ParamGroup
from lorakit.data.batches import Batch, StepOrder, collate, micro_batches, steps_per_epoch
from lorakit.data.joined import AnyExamples, Draw, draw_of
from lorakit.errors import RunError
from lorakit.methods import Method
from lorakit.models.task_model import TaskModel
from lorakit.numerics.schedule import learning_rate_factor
from lorakit.training.spec import GROUPED, TrainSpec
from lorakit.training.trained import not_finite, trainable


@dataclass(frozen=True)
class StepReport:
    """Report of one optimizer step. tokens: real ones, without padding; seconds: of this step
    alone."""

    step: int
    total_steps: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    seconds: float
    metrics: dict[str, float]


def count_steps(rows: int, spec: TrainSpec) -> int:
    """Optimizer steps of the whole run."""
    if spec.max_steps is not None:
        return spec.max_steps
    return max(1, math.ceil(spec.num_train_epochs * steps_per_epoch(rows, rows_per_step(spec))))


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


def rows_per_step(spec: TrainSpec) -> int:
    return spec.per_device_train_batch_size * spec.gradient_accumulation_steps


def step_order(lengths: NDArray[np.int64], spec: TrainSpec, draw: Draw | None = None) -> StepOrder:
    """Order of the training rows, or packs, of these lengths: those of every step. draw: chooses
    those of an epoch, where that is not simply all of them."""
    return StepOrder(
        len(lengths),
        rows_per_step(spec),
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
) -> Iterator[StepReport]:
    """Train from optimizer step `first_step` to the last, yielding a report after each.

    Nothing else happens here: whoever iterates evaluates, saves, logs and stops. The loss of a step
    is its sum over all micro-batches divided by the step's number of targets, so however its rows
    are cut, they give the same gradient.

    Raises RunError before the optimizer step when the loss or a gradient is not finite.
    """
    total = count_steps(len(examples.unit_lengths), spec)
    per_epoch = steps_per_epoch(len(examples.unit_lengths), rows_per_step(spec))
    order = step_order(examples.unit_lengths, spec, draw_of(examples))
    device, pad_id = task_model.device, task_model.pad_id
    for step in range(first_step, total + 1):
        started = time.perf_counter()
        task_model.model.train()
        limits = (
            spec.per_device_train_batch_size,
            spec.max_tokens_per_micro_batch,
            task_model.longest_packed,
        )
        batches = [
            collate(examples, examples.rows_of(part), pad_id)
            for part in micro_batches(examples.unit_lengths, order.of_step(step), *limits)
        ]
        targets = sum(batch.targets for batch in batches)
        row_losses = []
        for batch in batches:
            batch = batch.to(device)
            method.before_forward(batch)
            losses, _ = task_model.row_losses(batch)
            if losses.requires_grad:  # not where every rank is 0 and no head is trained
                torch.autograd.backward(losses.sum() / targets)
            row_losses.append(losses.detach())
        method.before_step(step)
        grad_norm = float(optimizer.clip_grad_norm(spec.max_grad_norm))
        loss = float(torch.cat(row_losses).sum() / targets)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise _diverged(step, examples, batches, row_losses, task_model.model)
        learning_rate = scheduled_rate(step, total, spec)
        optimizer.step(learning_rate)
        optimizer.zero_grad()
        metrics = method.after_step(step)
        tokens = sum(batch.tokens for batch in batches)
        seconds = time.perf_counter() - started
        yield StepReport(
            step, total, step / per_epoch, loss, learning_rate, grad_norm, tokens, seconds, metrics
        )


def _diverged(
    step: int,
    examples: AnyExamples,
    batches: list[Batch],
    row_losses: list[Tensor],
    model: nn.Module,
) -> RunError:
    """Names the weights that are not finite, if there are any; else the rows whose loss is not
    finite, or all rows of the step when only a gradient is not."""
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
    losses = torch.cat(row_losses).tolist()
    ids = [row for batch in batches for row in batch.row_ids]
    bad_rows = [row for row, value in zip(ids, losses, strict=True) if not math.isfinite(value)]
    what = f"the loss is {sum(losses)}" if bad_rows else "a gradient is not finite"
    return RunError(
        f"{before}{what}; training {examples.where(bad_rows or ids)}, counted from 1",
        "Look at these rows; a lower learning_rate, a longer warm-up or precision: fp32 help"
        " against divergence.",
    )
