"""The `train` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from lorakit.numerics.schedule import LearningRateShape
from lorakit.spec import Spec

# Metrics of which a lower value is better; of all others a higher one is.
LOWER_IS_BETTER = {"loss", "perplexity", "mean_squared_error"}

TrackerName = Literal["tensorboard", "trackio", "wandb", "mlflow"]
Sampling = Literal["random", "sequential", "group_by_length"]
GROUPED: Sampling = "group_by_length"


class DistributedSpec(Spec):
    """How several processes train together, where a launcher starts them (`lorakit train --nproc`,
    torchrun)."""

    strategy: Literal["auto", "replicate"] = "auto"
    """replicate: every process holds the whole base and all adapters. auto is that."""
    timeout_seconds: float = Field(600.0, gt=0)
    """How long an exchange waits for the slowest process before the run fails."""


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
    """Cut the rows of a step into more micro-batches, for memory: of at most so many tokens,
    padding included where rows are not packed; a longer row goes alone. The step is the same.
    Evaluation batches keep to it too."""
    train_sampling_strategy: Sampling | None = None
    """Order of the training rows: random (drawn anew for each epoch), sequential (as in the data),
    or group_by_length. null is group_by_length where the key of that name is true, else random."""
    group_by_length: bool = False
    """Let a step hold rows of like length, out of every 50 steps' rows: less padding where rows are
    not packed, but what comes together is not random any more. The same as
    `train_sampling_strategy: group_by_length`, the name since transformers 5."""
    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate of the adapters and heads."""
    lora_plus_ratio: float | None = Field(None, ge=1)
    """Learning rate of B as a multiple of A's, as 16 (LoRA+, arXiv 2402.12354); null trains both at
    learning_rate."""
    lr_scheduler_type: LearningRateShape = "cosine"
    """Way of the learning rate after warm-up."""
    warmup_ratio: float = Field(0.0, ge=0, le=1)
    """Share of the steps over which the learning rate rises from 0."""
    warmup_steps: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)] | None = None
    """Number of steps over which the learning rate rises from 0 or, below 1, their share of all
    steps, as in transformers 5; null for warmup_ratio."""
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
    """Type of the frozen base and of the activations; adapters and heads are always float32. auto:
    bf16 where the processor or GPU computes in it, else fp32."""
    gradient_checkpointing: bool = False
    """Keep only what enters each block and compute the rest again in the backward pass: less memory
    (SmolLM2: 1.2 GB instead of 1.8), more time (1.2 times)."""
    torch_compile: bool = False
    """Let torch.compile make the blocks' training passes. Meant for GPUs, where it was not
    measured: on a processor rows are then padded and lorakit's kernels left out, so that MiniLM
    trains at 0.23 of the speed and SmolLM2-135M at 0.36."""
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
    """The metric that decides; by default the task's own (accuracy, matthews_correlation …; loss
    for causal-lm)."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after so many evaluations without a better one."""
    resume_from_checkpoint: str | None = None
    """As --resume: `auto`, or a checkpoint folder."""
    report_to: tuple[TrackerName, ...] = ()
    """Trackers that get the run's numbers beside metrics.jsonl, each an extra of lorakit:
    `[tensorboard]` writes event files into the run folder."""

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_tracker_or_none(cls, value: Any) -> Any:
        """Transformers' forms: one name instead of a list, and `none`."""
        if isinstance(value, str):
            return () if value == "none" else (value,)
        return tuple(value) if isinstance(value, list) else value

    @property
    def sampling(self) -> Sampling:
        """Order of the training rows, whichever key says it."""
        return self.train_sampling_strategy or (GROUPED if self.group_by_length else "random")

    @model_validator(mode="after")
    def _one_warm_up_and_one_order(self) -> TrainSpec:
        if self.warmup_steps is not None and self.warmup_ratio:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps} and warmup_ratio {self.warmup_ratio}: both"
                " say how long the warm-up is, so leave one out"
            )
        if self.group_by_length and self.sampling != GROUPED:
            raise ValueError(
                f"group_by_length is true and train_sampling_strategy {self.sampling}: leave one"
                " out"
            )
        return self

    @model_validator(mode="after")
    def _best_needs_evaluations(self) -> TrainSpec:
        for key in ("load_best_model_at_end", "early_stopping_patience"):
            if getattr(self, key) and self.eval_steps is None:
                raise ValueError(f"{key} needs evaluations to compare: set eval_steps")
        return self
