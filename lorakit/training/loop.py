"""The training loop: batch, loss, backward, step, report. A generator, so that it does nothing else."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn

from lorakit.adapters.optimizer import AdamW, ParamGroup
from lorakit.data.examples import Batch, Examples, StepOrder, collate, micro_batches, steps_per_epoch
from lorakit.errors import RunError
from lorakit.methods import Method
from lorakit.models.task_model import TaskModel
from lorakit.numerics.schedule import LearningRateShape, learning_rate_factor
from lorakit.spec import Spec


class TrainSpec(Spec):
    """How to train; names and meanings are those of transformers' TrainingArguments."""

    num_train_epochs: float = Field(1.0, gt=0)
    """Passes over the training rows."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps in all; overrides num_train_epochs."""
    per_device_train_batch_size: int = Field(8, ge=1)
    """Rows of a micro-batch."""
    per_device_eval_batch_size: int | None = Field(None, ge=1)
    """Rows of an evaluation batch; by default twice the training one."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Micro-batches of an optimizer step."""
    max_tokens_per_micro_batch: int | None = Field(None, ge=1)
    """Cut the rows of a step into more micro-batches, for memory: of at most so many tokens, padding included where rows are not
    packed; a longer row goes alone. The step is the same. Evaluation batches keep to it too."""
    group_by_length: bool = False
    """Let a step hold rows of like length, out of every 50 steps' rows: less padding where rows are not packed, but what comes
    together is not random any more. transformers 5 calls it train_sampling_strategy."""
    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate of the adapters and heads."""
    lr_scheduler_type: LearningRateShape = "cosine"
    """Way of the learning rate after warm-up."""
    warmup_ratio: float = Field(0.0, ge=0, le=1)
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of the second moment."""
    adam_epsilon: float = Field(1e-8, gt=0)
    """Added to the denominator."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Gradients are scaled down to this norm; null for no clipping."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Type of the frozen base and of the activations; adapters and heads are always float32. auto: bf16 where the
    processor or GPU computes in it, else fp32."""
    gradient_checkpointing: bool = False
    """Keep only what enters each block and compute the rest again in the backward pass: less memory (SmolLM2: 1.2 GB instead of
    1.8), more time (1.2 times)."""
    torch_compile: bool = False
    """Let torch.compile make the blocks' training passes. Meant for GPUs, where it was not measured: on a processor rows are then
    padded and lorakit's kernels left out, so that MiniLM trains at 0.23 of the speed and SmolLM2-135M at 0.36."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of initialisation, order and dropout."""
    logging_steps: int = Field(10, ge=1)
    """A line on a plain terminal every so many steps (metrics.jsonl has every step)."""
    eval_steps: int | None = Field(None, ge=1)
    """Evaluate every so many steps; null only after the last."""
    eval_on_start: bool = False
    """Evaluate before the first step too."""
    save_steps: int | None = Field(None, ge=1)
    """Save a checkpoint every so many steps; null only on interruption."""
    save_total_limit: int | None = Field(2, ge=1)
    """Keep so many checkpoints; null keeps all."""
    load_best_model_at_end: bool = False
    """End with the adapter of the best evaluation instead of the last."""
    metric_for_best_model: str | None = None
    """The metric that decides; by default the task's own (accuracy, matthews_correlation …; loss for causal-lm)."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after so many evaluations without a better one."""
    resume_from_checkpoint: str | None = None
    """As --resume: `auto`, or a checkpoint folder."""

    @model_validator(mode="after")
    def _best_needs_evaluations(self) -> TrainSpec:
        for key in ("load_best_model_at_end", "early_stopping_patience"):
            if getattr(self, key) and self.eval_steps is None:
                raise ValueError(f"{key} needs evaluations to compare: set eval_steps")
        return self


@dataclass(frozen=True)
class StepReport:
    """Report of one optimizer step. tokens: real ones, without padding; seconds: of this step alone."""

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


def rows_per_step(spec: TrainSpec) -> int:
    return spec.per_device_train_batch_size * spec.gradient_accumulation_steps


def step_order(lengths: NDArray[np.int64], spec: TrainSpec) -> StepOrder:
    """Which of the training rows of these lengths every step holds."""
    return StepOrder(len(lengths), rows_per_step(spec), spec.seed, lengths if spec.group_by_length else None)


def evaluation_limits(spec: TrainSpec) -> tuple[int, int | None]:
    """(rows, tokens) of an evaluation batch, at most."""
    return spec.per_device_eval_batch_size or 2 * spec.per_device_train_batch_size, spec.max_tokens_per_micro_batch


def build_optimizer(method: Method, heads: list[nn.Parameter], spec: TrainSpec) -> AdamW:
    """AdamW over the method's groups and the heads."""
    groups = [*method.param_groups(), ParamGroup(heads)]
    return AdamW(groups, spec.weight_decay, (spec.adam_beta1, spec.adam_beta2), spec.adam_epsilon)


def train(
    task_model: TaskModel, method: Method, optimizer: AdamW, examples: Examples, spec: TrainSpec, first_step: int = 1
) -> Iterator[StepReport]:
    """Train from optimizer step `first_step` to the last, yielding a report after each.

    Nothing else happens here: whoever iterates evaluates, saves, logs and stops. The loss of a step is its sum over
    all micro-batches divided by the step's number of targets, so however its rows are cut, they give the same gradient.

    Raises RunError before the optimizer step when the loss or a gradient is not finite.
    """
    total = count_steps(len(examples), spec)
    warmup = math.ceil(spec.warmup_ratio * total)
    per_epoch = steps_per_epoch(len(examples), rows_per_step(spec))
    order = step_order(examples.lengths, spec)
    device, pad_id = task_model.device, task_model.pad_id
    for step in range(first_step, total + 1):
        started = time.perf_counter()
        task_model.model.train()
        limits = spec.per_device_train_batch_size, spec.max_tokens_per_micro_batch, task_model.longest_packed
        batches = [collate(examples, part, pad_id) for part in micro_batches(examples.lengths, order.of_step(step), *limits)]
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
            raise _diverged(step, batches, row_losses, loss)
        learning_rate = spec.learning_rate * learning_rate_factor(step, total, warmup, spec.lr_scheduler_type)
        optimizer.step(learning_rate)
        optimizer.zero_grad()
        metrics = method.after_step(step)
        tokens = sum(batch.tokens for batch in batches)
        seconds = time.perf_counter() - started
        yield StepReport(step, total, step / per_epoch, loss, learning_rate, grad_norm, tokens, seconds, metrics)


def _diverged(step: int, batches: list[Batch], row_losses: list[Tensor], loss: float) -> RunError:
    """Names the rows whose loss is not finite, or all rows of the step when only a gradient is not."""
    losses = torch.cat(row_losses).tolist()
    ids = [row for batch in batches for row in batch.row_ids]
    bad = [row for row, value in zip(ids, losses, strict=True) if not math.isfinite(value)]
    what = f"the loss is {loss}" if bad else "a gradient is not finite"
    return RunError(
        f"stopped before optimizer step {step}: {what}; rows {sorted(bad or ids)} of the training data, from 1",
        "Look at these rows; a lower learning_rate, warmup_ratio above 0 or precision: fp32 help against divergence.",
    )
