"""Moments of a run that have an adapter: its end, and its checkpoints.

What a command takes as RUN becomes one path, the folder of a finished run or of a checkpoint, from
which these functions find the files.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorakit.errors import RunError, UsageError
from lorakit.files import read_json
from lorakit.report.history import read_metrics, run_of
from lorakit.runs.folder import ADAPTER, CHECKPOINTS, MANIFEST, RECIPE, RESULT, TOKENIZER
from lorakit.training import checkpoint
from lorakit.training.checkpoint import RunState

log = logging.getLogger("lorakit")


def chosen(folder: Path) -> Path:
    """The moment that `folder` stands for: a checkpoint, a run with an adapter of its own, or the
    newest checkpoint of a run without one. The log says which step a checkpoint is of.

    Raises UsageError for other folders, and for a run that has saved nothing yet.
    """
    run = run_of(folder)
    if not (run / RECIPE).is_file():
        raise UsageError(f"`{folder}` is not a run", "Name a folder that `lorakit train` wrote.")
    if run != folder:
        state = state_of(folder)
        log.info("a checkpoint of %s: step %d of %d", run, state.step, state.total_steps)
        return folder
    if (run / ADAPTER).is_dir():
        return run
    newest = checkpoint.newest(run / CHECKPOINTS)
    if newest is None:
        what = f"the run `{run}` has no adapter yet, and no checkpoint"
        raise UsageError(what, "Finish it with `lorakit train RECIPE --resume auto`.")
    state = state_of(newest)
    message = "the run %s is not finished: this is its checkpoint of step %d of %d"
    log.info(message, run, state.step, state.total_steps)
    return newest


def is_checkpoint(moment: Path) -> bool:
    return run_of(moment) != moment


def adapter_of(moment: Path) -> Path:
    """The folder with the adapter's files."""
    return moment if is_checkpoint(moment) else moment / ADAPTER


def tokenizer_of(moment: Path) -> Path:
    """The folder with the tokenizer and its chat template: all checkpoints of a run share one."""
    return run_of(moment) / CHECKPOINTS / TOKENIZER if is_checkpoint(moment) else moment / ADAPTER


def state_of(checkpoint_folder: Path) -> RunState:
    """How far the run was at a checkpoint. Raises RunError for a broken one."""
    return checkpoint.read_state(checkpoint_folder)[0]


@contextmanager
def still_there(moment: Path) -> Iterator[None]:
    """Context that explains a RunError about a checkpoint which a run that goes on has dropped
    meanwhile."""
    try:
        yield
    except RunError as error:
        if moment.is_dir():
            raise
        what = f"the checkpoint {moment} is gone: its run went on and keeps newer ones"
        raise RunError(what, "Repeat the command, or raise train.save_total_limit.") from error


def manifest_of(moment: Path) -> dict[str, Any]:
    """The run's manifest.json; {} where it has none."""
    path = run_of(moment) / MANIFEST
    found: dict[str, Any] = read_json(path) if path.is_file() else {}
    return found


def result_of(moment: Path) -> dict[str, Any]:
    """The content of result.json, {} where there is none; of a checkpoint, those of its entries
    that are known of it. `metrics` is {} for a step that was not evaluated."""
    if not is_checkpoint(moment):
        path = moment / RESULT
        found: dict[str, Any] = read_json(path) if path.is_file() else {}
        return found
    state = state_of(moment)
    ranks: dict[str, int] = state.ranks[-1]["ranks"]
    # A checkpoint is saved before its step is evaluated.
    _, evaluations = read_metrics(moment)
    metrics = next((line for line in evaluations if line["step"] == state.step), {})
    return {
        "metrics": {name[5:]: value for name, value in metrics.items() if name != "step"},
        "train_seconds": round(state.seconds, 3),
        "tokens": state.tokens,
        "rank_total": sum(ranks.values()),
        "ranks": ranks,
        "steps": state.step,
        "total_steps": state.total_steps,
    }
