"""Extension of a run: it is resumed with more steps or epochs than it had.

From its checkpoint on, all schedules are those of a run of the new total: the learning rate, and
what a method does over the course of a run. What a method has brought to its end stays there
(`Method.begin`).
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from lorakit.errors import UsageError
from lorakit.files import new_folder, read_json
from lorakit.runs.folder import ADAPTER, BEST, MANIFEST, METRICS, RANKS, RECIPE, RESULT, WARNINGS
from lorakit.training import checkpoint
from lorakit.training.checkpoint import RunState, Saved
from lorakit.training.loop import scheduled_rate
from lorakit.training.spec import TrainSpec

log = logging.getLogger("lorakit")


def extends(saved: Saved, total: int) -> bool:
    """True if a run of `total` steps is longer than the one that the checkpoint is of. Raises
    UsageError for a shorter one, since the schedules have gone by the old total."""
    before = saved.run.total_steps
    if total < before:
        what = f"{saved.folder} is of a run of {before} steps, and {total} are fewer"
        remedy = (
            f"Resume with {before} or more; export and eval take the checkpoint of an earlier step."
        )
        raise UsageError(what, remedy)
    return total > before


def extend(state: RunState, folder: Path, total: int, spec: TrainSpec) -> None:
    """Make the state of a run in `folder` that of one of `total` steps, and say so. Patience that
    had run out is counted anew."""
    step, before = state.step, state.total_steps
    state.extended = [*state.extended, {"step": step, "from": before, "to": total}]
    if spec.early_stopping_patience and (
        state.evaluations_without_better >= spec.early_stopping_patience
    ):
        state.evaluations_without_better = 0
    was, now = scheduled_rate(step, before, spec), scheduled_rate(step + 1, total, spec)
    message = "extending %s after step %d: %d steps instead of %d; the learning rate, %.3g, is now"
    log.info(message + " %.3g", folder, step, total, before, was, now)


def take_last_best(state: RunState, checkpoints: Path) -> None:
    """Take over the evaluation of the last step, if it was the best: it came after the checkpoint,
    and the extended run does not evaluate at this step."""
    best = checkpoint.newest(checkpoints / BEST)
    if best is None or best.name != f"step-{state.step:08d}":
        return
    later, _ = checkpoint.read_state(best)
    state.best_step, state.best_value = later.best_step, later.best_value
    state.evaluated_step = later.evaluated_step
    state.last_metrics, state.last_by_set = later.last_metrics, later.last_by_set


def keep_finished(run: Path) -> None:
    """Copy a finished run, without its checkpoints, into a subfolder that is a run of its own,
    `ended-at-00000200`. Nothing is kept of a run that is not finished."""
    if not (run / RESULT).is_file():
        return
    steps = read_json(run / RESULT)["steps"]
    with new_folder(kept := run / f"ended-at-{steps:08d}") as staging:
        for name in (RECIPE, MANIFEST, METRICS, RANKS, RESULT, WARNINGS):
            if (run / name).is_file():
                shutil.copyfile(run / name, staging / name)
        shutil.copytree(run / ADAPTER, staging / ADAPTER)
    log.info("the finished run of %d steps is kept in %s", steps, kept)
