"""Evaluation: the metrics of a task on a set of examples. Classification metrics come from
scikit-learn and scipy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lorakit.data.batches import Batch, collate, micro_batches
from lorakit.data.joined import AnyExamples, Joined, parts_of
from lorakit.data.labels import Labels
from lorakit.models.task_model import TaskModel
from lorakit.training.distributed import ALONE, World
from lorakit.training.spec import LOWER_IS_BETTER

# GLUE's official metrics (Wang et al., arXiv 1804.07461, table 1); the first decides which
# evaluation is best.
GLUE_METRICS = {
    "cola": ("matthews_correlation",),
    "sst2": ("accuracy",),
    "mrpc": ("f1", "accuracy"),
    "qqp": ("f1", "accuracy"),
    "stsb": ("pearson", "spearmanr"),
    "mnli": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "wnli": ("accuracy",),
}


@dataclass(frozen=True)
class Evaluation:
    """metrics: {name: value, NaN if undefined}; predictions [rows]: class ids or values, or None
    for language modelling; by_set: {data set: its metrics} where there are several."""

    metrics: dict[str, float]
    predictions: NDArray[Any] | None
    by_set: dict[str, dict[str, float]] = field(default_factory=dict)


def metric_names(labels: Labels | None, subset: str | None) -> tuple[str, ...]:
    """The metrics that a task reports; the first decides which evaluation is best."""
    if labels is None:
        return ("loss", "perplexity")
    if labels.regression:
        return (*GLUE_METRICS["stsb"], "mean_squared_error", "loss")
    official = GLUE_METRICS.get(subset or "", ("accuracy",))
    return tuple(dict.fromkeys((*official, "accuracy", "f1", "matthews_correlation", "loss")))


def is_better(metric: str, value: float, best: float | None) -> bool:
    """True if `value` beats `best` (None: nothing yet). A NaN beats nothing."""
    if math.isnan(value):
        return False
    return best is None or (value < best if metric in LOWER_IS_BETTER else value > best)


@torch.inference_mode()
def evaluation_batches(
    task_model: TaskModel, examples: AnyExamples, batch_size: int, max_tokens: int | None
) -> list[NDArray[np.int64]]:
    """The rows of each batch of an evaluation: all of them, the longest first, within the limits of
    `micro_batches`. No batch has rows of two data sets, so that each is evaluated as if alone."""
    ends = np.cumsum([len(part) for part in parts_of(examples)])
    limits = batch_size, max_tokens, task_model.longest_packed
    return [
        batch
        for rows in np.split(np.arange(len(examples)), ends[:-1])
        for batch in micro_batches(examples.lengths, rows, *limits)
    ]


@torch.inference_mode()
def evaluate(
    task_model: TaskModel,
    examples: AnyExamples,
    names: tuple[str, ...],
    batch_size: int,
    max_tokens: int | None = None,
    between: Callable[[int, int], None] = lambda done, total: None,
    world: World = ALONE,
) -> Evaluation:
    """Run the model over `examples`, in batches of at most so many rows and tokens, and compute the
    metrics `names`, over all targets and, of several data sets, over those of each. Of several
    processes, each runs its share of the batches, and all return the same.

    `between(rows done, rows in all)` is called after each batch; what it raises ends the
    evaluation.
    """
    losses = np.zeros(len(examples))
    targets = np.zeros(len(examples), np.int64)
    answers: NDArray[Any] = np.zeros(len(examples))
    classes = 0
    for rows, batch in _passes(task_model, examples, batch_size, max_tokens, between, world):
        targets[rows] = batch.row_targets.numpy()
        row_losses, logits = task_model.row_losses(batch.to(task_model.device))
        losses[rows] = row_losses.float().cpu().numpy()
        if logits is not None:
            classes = logits.shape[-1]
            chosen = logits.float().squeeze(-1) if classes == 1 else logits.argmax(-1)
            answers[rows] = chosen.cpu().numpy()
    losses, targets, answers = world.sum(losses), world.sum(targets), world.sum(answers)
    predictions: NDArray[Any] | None = None
    if classes := world.largest(classes):
        predictions = answers.astype(np.float32 if classes == 1 else np.int64)

    def metrics(part: slice) -> dict[str, float]:
        loss = float(losses[part].sum() / targets[part].sum())
        labels = None if examples.labels is None else examples.labels[part]
        answers = None if predictions is None else predictions[part]
        return {name: _metric(name, loss, labels, answers, classes) for name in names}

    found = Evaluation(metrics(slice(None)), predictions)
    if isinstance(examples, Joined):
        firsts = examples.firsts.tolist()
        spans = zip(examples.names, firsts[:-1], firsts[1:], strict=True)
        found.by_set.update({name: metrics(slice(*span)) for name, *span in spans})
    return found


@torch.inference_mode()
def class_logits(
    task_model: TaskModel,
    examples: AnyExamples,
    batch_size: int,
    max_tokens: int | None = None,
    between: Callable[[int, int], None] = lambda done, total: None,
) -> NDArray[np.float64]:
    """The logits [rows, classes] of `examples`, in their order; the rest is as in `evaluate`."""
    found: NDArray[np.float64] | None = None
    for rows, batch in _passes(task_model, examples, batch_size, max_tokens, between):
        logits = task_model.logits(batch.to(task_model.device)).double().cpu().numpy()
        found = np.zeros((len(examples), logits.shape[1])) if found is None else found
        found[rows] = logits
    assert found is not None
    return found


def _passes(
    task_model: TaskModel,
    examples: AnyExamples,
    batch_size: int,
    max_tokens: int | None,
    between: Callable[[int, int], None],
    world: World = ALONE,
) -> Iterator[tuple[NDArray[np.int64], Batch]]:
    """(rows, their batch) of each pass of this process over `examples`, with the model in
    evaluation mode. `between` is called when all processes have one more pass behind them, equally
    often in each."""
    task_model.model.eval()
    batches = evaluation_batches(task_model, examples, batch_size, max_tokens)
    done = 0
    for start in range(0, len(batches), world.size):
        dealt = batches[start : start + world.size]
        if world.rank < len(dealt):
            rows = dealt[world.rank]
            yield rows, collate(examples, rows, task_model.pad_id)
        done += sum(map(len, dealt))
        between(done, len(examples))


def _metric(
    name: str,
    loss: float,
    labels: NDArray[Any] | None,
    predictions: NDArray[Any] | None,
    classes: int,
) -> float:
    if name == "loss":
        return loss
    if name == "perplexity":
        return math.exp(min(loss, 700.0))
    assert labels is not None
    assert predictions is not None
    if name == "mean_squared_error":
        return float(np.mean((labels - predictions) ** 2))
    # Half a second of imports, which the first step does not wait for and language models never
    # need.
    from scipy import stats
    from sklearn import metrics

    if name == "accuracy":
        return float(metrics.accuracy_score(labels, predictions))
    if name == "f1":
        return float(
            metrics.f1_score(
                labels, predictions, average="binary" if classes == 2 else "macro", zero_division=0
            )
        )
    if name == "matthews_correlation":
        if len(np.union1d(labels, predictions)) < 2:
            return 0.0  # as scikit-learn, but without its warning
        return float(metrics.matthews_corrcoef(labels, predictions))
    if len(labels) < 2 or np.ptp(labels) == 0 or np.ptp(predictions) == 0:
        # as scipy and GLUE's script, but without scipy's warning: a constant has no correlation
        return math.nan
    return float(
        (stats.pearsonr if name == "pearson" else stats.spearmanr)(labels, predictions).statistic
    )
