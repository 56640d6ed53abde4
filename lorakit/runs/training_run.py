"""A training run: drives the loop, and logs, evaluates, saves, stops and resumes around it.

The run folder holds recipe.yaml, manifest.json, metrics.jsonl, ranks.jsonl, checkpoints/, and, once
the run is finished, adapter/ and result.json (written last: a run is finished if and only if it
exists).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lorakit.adapters.optimizer import AdamW
from lorakit.errors import Interrupted
from lorakit.export.native import describe, save_native
from lorakit.files import append_json_line, new_folder, write_json
from lorakit.methods import prepare
from lorakit.models.tokenizer import save_tokenizer
from lorakit.report.progress import Progress
from lorakit.report.summary import metric_value
from lorakit.report.trackers import Trackers, step_values
from lorakit.runs.extension import extend, extends, take_last_best
from lorakit.runs.folder import ADAPTER, BEST, CHECKPOINTS, METRICS, RANKS, RESULT, TOKENIZER
from lorakit.runs.opening import open_folder
from lorakit.runs.record import fingerprint, result
from lorakit.runs.session import Session, calibration
from lorakit.runs.start import refuse_other_inputs
from lorakit.training import checkpoint
from lorakit.training.checkpoint import RunState, Saved
from lorakit.training.distributed import ALONE, World
from lorakit.training.interrupt import StopRequest
from lorakit.training.loop import (
    StepReport,
    build_optimizer,
    count_steps,
    count_warmup_steps,
    evaluation_limits,
    rows_per_step,
    train,
)
from lorakit.training.metrics import Evaluation, evaluate, is_better
from lorakit.training.trained import trained_tensors

log = logging.getLogger("lorakit")


class TrainingRun:
    """A training run in progress: `start`, `train`, `finish`."""

    stop: StopRequest
    optimizer: AdamW

    def __init__(
        self,
        session: Session,
        folder: Path,
        progress: Progress,
        started: float,
        world: World = ALONE,
    ) -> None:
        self.session, self.folder, self.progress, self.started = session, folder, progress, started
        self.spec, self.world = session.recipe.train, world
        self.state = RunState(rows_per_step=rows_per_step(self.spec, world.size))
        self._count_steps()
        self.wall_before = 0.0
        self.writing = False  # the folder already holds some of the run
        self.extended = False  # by this resumption
        self.trackers = Trackers()

    # -- start -------------------------------------------------------------------------------------

    def start(self, saved: Saved | None, overwrite: bool) -> None:
        """Bring model, method and optimizer to the first step or to the step of a checkpoint, and
        open the run folder."""
        session = self.session
        facts = fingerprint(session)
        if saved is None:
            prepare(session.method, calibration(session, self._stage))
        else:
            refuse_other_inputs(saved, facts)
            self.state, self.wall_before = saved.run, saved.run.wall_seconds
            self._count_steps()
            if extends(saved, self.total):
                self._extend(saved)
            saved.restore_model(session.task_model.model, session.method)
        self.state.fingerprint, self.state.total_steps = facts, self.total
        self._make_optimizer(saved)
        self.world.barrier()  # all are as far, and have read what the folder held
        self._assert_equal("the adapters at the start")
        if self.world.is_first:
            self.writing = True
            open_folder(self.folder, session, self.state, saved, overwrite, self.extended)
        self.world.barrier()
        self._record_ranks(0)
        if saved:
            log.info("resuming %s after step %d of %d", self.folder, self.state.step, self.total)
        if (warmup := count_warmup_steps(self.total, self.spec)) > self.total:
            message = (
                "the warm-up of %d steps outlasts the run of %d: the learning rate stays lower"
            )
            log.warning(message, warmup, self.total)

    def _count_steps(self) -> None:
        """Set the number of steps, by the rows of each: a run that is resumed by more or fewer
        processes keeps them."""
        self.state.rows_per_step = self.state.rows_per_step or rows_per_step(self.spec)
        units = len(self.session.train.unit_lengths)
        self.total = count_steps(units, self.spec, self.state.rows_per_step)

    def _assert_equal(self, what: str) -> None:
        """Raise RunError where processes have drifted apart."""
        if self.world.size > 1:
            self.world.assert_equal(trained_tensors(self.session.task_model.model), what)

    def _extend(self, saved: Saved) -> None:
        self.extended = True
        extend(self.state, self.folder, self.total, self.spec)
        if not self._evaluation_is_due():
            take_last_best(self.state, saved.folder.parent)

    def _make_optimizer(self, saved: Saved | None) -> None:
        session = self.session
        self.optimizer = build_optimizer(session.method, session.heads, self.spec)
        session.method.begin(self.optimizer, self.total)
        if saved is None:
            # Dropout's random numbers start here, independent of those drawn while the model was
            # loaded.
            torch.manual_seed(self.spec.seed)
        else:
            saved.restore_optimizer(session.task_model.model, self.optimizer)
            saved.restore_random()

    @contextmanager
    def _stage(self, description: str) -> Iterator[Callable[[int, int], None]]:
        """A stage outside the steps, which a signal ends at once.

        There is nothing to save then, or everything is saved already.
        """

        def interrupt() -> Interrupted:
            return self._interrupted() if self.state.step else self._lost(description)

        with self._interruptible(description, interrupt) as advance:
            yield advance

    def _one_stops(self) -> bool:
        return self.world.any(self.stop.requested)

    @contextmanager
    def _interruptible(
        self,
        description: str,
        interrupt: Callable[[], Interrupted],
        together: bool = False,
    ) -> Iterator[Callable[[int, int], None]]:
        """A stage whose progress function raises `interrupt()` after a signal; where all processes
        call it equally often (`together`), after a signal to any of them."""
        with self.progress.stage(description) as advance:
            stopping = self._one_stops if together else lambda: self.stop.requested

            def checked(done: int, total: int) -> None:
                advance(done, total)
                if stopping():
                    raise interrupt()

            yield checked

    # -- train -------------------------------------------------------------------------------------

    def train(self) -> None:
        """Run the loop to its end, or until evaluations have not improved for long enough."""
        session, state, spec = self.session, self.state, self.spec
        with self.progress.training(state.step + 1, self.total):
            self._evaluate_if_due()  # for a run that was stopped during an evaluation
            if self._out_of_patience():
                return
            parts = session.task_model, session.method, self.optimizer, session.train, spec
            together = self.world, state.rows_per_step, lambda: self.stop.requested
            for report in train(*parts, state.step + 1, *together):
                self._log_step(report)
                stopping = report.stop or (self.world.size == 1 and self.stop.requested)
                # Saved before it is evaluated: an evaluation that runs out of memory must not lose
                # the steps.
                due = spec.save_steps is not None and state.step % spec.save_steps == 0
                if saved := due or state.step == self.total or stopping:
                    self._save()
                self._evaluate_if_due()
                if stopping and state.step < self.total:
                    raise self._interrupted()
                if self._out_of_patience():
                    if not saved:  # finishing the method may take long, and be interrupted
                        self._save()
                    return

    def _log_step(self, report: StepReport) -> None:
        state = self.state
        state.step = report.step
        state.seconds += report.seconds
        state.tokens += report.tokens
        line = asdict(report)
        for name in ("metrics", "total_steps", "stop"):
            del line[name]
        self._append(line | report.metrics)
        self._record_ranks(report.step)
        self.progress.step(report, sum(state.ranks[-1]["ranks"].values()))

    def _append(self, line: dict[str, Any]) -> None:
        """Write a line of metrics.jsonl, which the trackers get too."""
        if not self.world.is_first:
            return
        append_json_line(self.folder / METRICS, line)
        self.trackers.log(line["step"], step_values(line))

    def _record_ranks(self, step: int, **more: Any) -> None:
        """Write a line of ranks.jsonl, at the start and at every change."""
        now, before = asdict(self.session.method.rank_state()), self.state.ranks
        if not before or any(before[-1][key] != value for key, value in now.items()):
            before.append({"step": step, **now, **more})
            if step:
                self._assert_equal(f"the adapters after step {step}")
            if self.world.is_first:
                append_json_line(self.folder / RANKS, before[-1])

    def _evaluate_if_due(self) -> None:
        if not self._evaluation_is_due():
            return
        state, deciding = self.state, self.session.metrics[0]
        found = self.evaluate()
        metrics, by_set = found.metrics, found.by_set
        is_final = self.session.method.is_final
        better = is_final and is_better(deciding, metrics[deciding], state.best_value)
        state.evaluated_step = state.step
        state.last_metrics, state.last_by_set = metrics, by_set
        state.evaluations_without_better += 1
        if better or not is_final:
            state.evaluations_without_better = 0
        if better:
            state.best_value, state.best_step = metrics[deciding], state.step
            if self.spec.load_best_model_at_end:
                self._save(BEST)
        best = " (best so far)" if better and self.spec.eval_steps else ""
        log.info("step %d: validation %s%s", state.step, _shown(metrics), best)
        line = {f"eval_{name}": value for name, value in metrics.items()}
        for one, values in by_set.items():
            log.info("step %d: validation of %s %s", state.step, one, _shown(values))
            line |= {f"eval_{one}_{name}": value for name, value in values.items()}
        self._append({"step": state.step, **line})

    def _evaluation_is_due(self) -> bool:
        step, every = self.state.step, self.spec.eval_steps
        if step == self.state.evaluated_step:
            return False
        if step == 0:
            return self.spec.eval_on_start
        return step == self.total or (every is not None and step % every == 0)

    def evaluate(self, save: bool = True) -> Evaluation:
        """Metrics on the validation data.

        save: write a checkpoint when a signal ends the evaluation; false where everything is saved
        already and a checkpoint of this moment could not be continued from.
        """
        session = self.session

        def interrupt() -> Interrupted:
            if save:
                self._save()
            return self._interrupted() if save or self.state.step else self._lost("evaluating")

        with self._interruptible("evaluating", interrupt, together=True) as advance:
            data, limits = session.validation, evaluation_limits(self.spec)
            parts = session.task_model, data, session.metrics
            return evaluate(*parts, *limits, advance, self.world)

    def _out_of_patience(self) -> bool:
        patience, without = self.spec.early_stopping_patience, self.state.evaluations_without_better
        if patience is None or without < patience:
            return False
        deciding = self.session.metrics[0]
        log.info("stopping early: no better %s in %d evaluations", deciding, without)
        return True

    def _save(self, name: str = "") -> None:
        """Save a checkpoint of this moment; `name`: a subfolder of its own, which keeps one
        checkpoint."""
        self.state.wall_seconds = self._wall_seconds()
        self._assert_equal(f"the adapters after step {self.state.step}")
        if self.world.is_first:
            self._write_checkpoint(name)
        self.world.barrier()

    def _write_checkpoint(self, name: str) -> None:
        task_model, method = self.session.task_model, self.session.method
        # Once for all checkpoints, which may be many, and the files are not small.
        if not (tokenizer := self.folder / CHECKPOINTS / TOKENIZER).is_dir():
            with new_folder(tokenizer) as staging:
                save_tokenizer(task_model.tokenizer, staging)

        def described(folder: Path) -> None:
            describe(folder, task_model, method, self.session.facts)

        root, keep = self.folder / CHECKPOINTS / name, 1 if name else self.spec.save_total_limit
        parts = (task_model.model, method, self.optimizer, self.state)
        checkpoint.save(root, *parts, keep, described)

    def _lost(self, during: str) -> Interrupted:
        """The error for a stop before the first step, when there is nothing to save."""
        remedy = "Start again: nothing was written."
        if self.writing:
            remedy = "Start again with --overwrite."
        return Interrupted(f"stopped while {during}, before the first step", remedy)

    def _interrupted(self) -> Interrupted:
        """The error for a stop after which everything is saved."""
        where = f"{self.folder / CHECKPOINTS}/step-{self.state.step:08d}"
        return Interrupted(
            f"stopped after step {self.state.step} of {self.total}; saved {where}",
            "Go on with the same command and --resume auto.",
        )

    def _wall_seconds(self) -> float:
        return self.wall_before + time.perf_counter() - self.started

    # -- finish ------------------------------------------------------------------------------------

    def finish(self, more: dict[str, Any] | None = None) -> dict[str, Any]:
        """Write the adapter, then result.json including `more`; returns its content, which is empty
        in processes that do not write.

        Before that, the best model is restored if the recipe asks for it, and the method finishes.
        """
        session, state = self.session, self.state
        found = _last_evaluation(state)
        for warning in session.method.finish():
            log.warning(warning)
        if self.spec.load_best_model_at_end and state.best_step not in (None, state.step):
            found = self._restore_best()
        more = more or {}
        if session.method.conclude(calibration(session, self._stage)):
            more["metrics_before"] = found.metrics
            found = self.evaluate(save=False)
            log.info("as it is saved: validation %s", _shown(found.metrics))
        self._assert_equal("the adapters at the end")
        content: dict[str, Any] = {}
        if self.world.is_first:
            save_native(self.folder / ADAPTER, session.task_model, session.method, session.facts)
            state.wall_seconds = self._wall_seconds()
            content = result(session, state, found, self.folder / ADAPTER) | more
            content["processes"] = self.world.size
            write_json(self.folder / RESULT, content)
        self.world.barrier()
        return content

    def _restore_best(self) -> Evaluation:
        """Restore the adapter of the best evaluation, if its checkpoint still exists; returns its
        metrics, or else the last ones."""
        state, session = self.state, self.session
        best = self.folder / CHECKPOINTS / BEST / f"step-{state.best_step:08d}"
        if not best.is_dir():
            gone = "%s, the best evaluation, is gone: the adapter is that of step %d, the last"
            log.warning(gone, best, state.step)
            return _last_evaluation(state)
        saved = checkpoint.read(best)
        saved.restore_model(session.task_model.model, session.method)
        log.info("the adapter is that of step %d, the best evaluation", state.best_step)
        self._record_ranks(state.step, restored_from=state.best_step)
        return _last_evaluation(saved.run)


def _last_evaluation(state: RunState) -> Evaluation:
    return Evaluation(state.last_metrics, None, state.last_by_set)


def _shown(metrics: dict[str, float]) -> str:
    return " · ".join(f"{name} {metric_value(value, '.4f')}" for name, value in metrics.items())
