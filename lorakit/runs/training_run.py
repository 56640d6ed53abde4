"""A run: drives the loop, and logs, evaluates, saves, stops and resumes around it.

The run folder holds recipe.yaml, manifest.json, metrics.jsonl, ranks.jsonl, checkpoints/, and, once it is finished,
adapter/ and result.json (written last: a run is finished if and only if it is there).
"""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from lorakit.adapters.optimizer import AdamW
from lorakit.compat import untested
from lorakit.errors import Interrupted, UsageError
from lorakit.export.native import save_native
from lorakit.files import append_json_line, keep_json_lines, read_json, try_folder, write_json, write_text
from lorakit.models.load import file_hashes
from lorakit.recipes.recipe import Recipe, dump_yaml, load_recipe, resolved
from lorakit.report.progress import Progress
from lorakit.report.summary import metric_value
from lorakit.runs.convert import converted
from lorakit.runs.environment import machine, peak_memory_mb, versions
from lorakit.runs.factors import factor_facts
from lorakit.runs.folder import ADAPTER, BEST, CHECKPOINTS, MANIFEST, METRICS, RANKS, RECIPE, RESULT
from lorakit.runs.session import Session, assemble, calibration
from lorakit.training import checkpoint
from lorakit.training.checkpoint import RunState, Saved
from lorakit.training.interrupt import StopRequest, before_it_begins
from lorakit.training.loop import StepReport, build_optimizer, count_steps, evaluation_limits, train
from lorakit.training.metrics import evaluate, is_better

log = logging.getLogger("lorakit")

# Keys that may differ between a run and its resumption: they do not change what is computed.
FREE_KEYS = {"output_dir", "data.cache", "train.logging_steps", "train.save_steps", "train.save_total_limit"}
FREE_KEYS |= {"train.resume_from_checkpoint"}


def run_training(recipe: Recipe, progress: Progress, resume: str | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Train as the recipe says; returns the content of result.json.

    Raises RecipeError and UsageError before anything is written, RunError when the run fails, Interrupted when it was
    stopped by a signal and a checkpoint was saved.
    """
    started = time.perf_counter()
    for warning in untested():
        log.warning("%s", warning)
    folder = Path(recipe.output_dir)
    resume = resume or recipe.train.resume_from_checkpoint
    saved = _starting_point(folder, recipe, resume, overwrite)
    if resume == "auto" and (folder / RESULT).is_file():
        log.info("the run %s is finished: nothing to do", folder)
        result: dict[str, Any] = read_json(folder / RESULT)
        return result
    with before_it_begins():
        session = assemble(recipe, progress)
    run = _Run(session, folder, progress, started)
    with StopRequest() as run.stop:
        run.start(saved, overwrite)
        # Python's collector would go through all that was imported and loaded again and again: 5 % of a step of a small model.
        gc.freeze()
        try:
            run.train()
        finally:
            gc.unfreeze()
        return run.finish()


def run_conversion(run: Path, overrides: Sequence[str], out: Path, progress: Progress, overwrite: bool = False) -> dict[str, Any]:
    """Turn a finished run's adapters into chunkwise ones, in a run folder of their own; trains nothing.

    Returns the content of result.json, with the metrics before it. Raises UsageError and RecipeError before anything is
    written.
    """
    started = time.perf_counter()
    if out.resolve() == run.resolve():
        raise UsageError(f"`{out}` is the run that is converted", "Name another folder with --out.")
    _check_folder(out, overwrite, "--overwrite replaces it, --out names another folder.")
    with before_it_begins():
        session = converted(run, overrides, out, progress)
    conversion = _Run(session, out, progress, started)
    with StopRequest() as conversion.stop:
        conversion.start(None, overwrite)
        conversion.state.last_metrics = conversion._evaluate(save=False)
        return conversion.finish({"converted_from": str(run)})


def _starting_point(folder: Path, recipe: Recipe, resume: str | None, overwrite: bool) -> Saved | None:
    """The checkpoint to start from, or None. Raises UsageError when the folder must not be written to."""
    if resume and overwrite:
        raise UsageError("--resume goes on with a run and --overwrite starts it anew", "Give one of them.")
    remedy = "--resume auto goes on with it, --overwrite replaces it, output_dir=… names another folder."
    _check_folder(folder, bool(resume or overwrite), remedy)
    if not resume:
        return None
    found = checkpoint.find(folder / CHECKPOINTS, os.path.expanduser(resume))
    if resume == "auto" and (folder / RESULT).is_file():
        _refuse_changes(_flat(resolved(load_recipe(folder / RECIPE))), recipe, folder)
        return None
    if found is None:
        log.info("nothing to resume in %s: starting from the first step", folder)
        return None
    saved = checkpoint.read(found)
    _refuse_changes(saved.run.fingerprint["recipe"], recipe, found)
    return saved


def _check_folder(folder: Path, may_hold_a_run: bool, remedy: str) -> None:
    """Raises UsageError when the folder must not be written to."""
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UsageError(f"output_dir `{folder}` is, or holds, the working folder", "Name a folder that does not exist yet.")
    in_the_way = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    if in_the_way.exists() and not in_the_way.is_dir():
        what = f"output_dir `{folder}` is a file" if in_the_way == folder else f"output_dir `{folder}`: `{in_the_way}` is a file"
        raise UsageError(what, "Name a folder that does not exist yet.")
    there = folder.is_dir() and any(folder.iterdir())
    # Both, since a folder of other work may well hold a recipe.yaml.
    if there and not all((folder / mark).is_file() for mark in (RECIPE, MANIFEST)):
        raise UsageError(
            f"output_dir `{folder}` holds files that are not a run", "Name another folder; nothing in this one was touched."
        )
    if there and not may_hold_a_run:
        raise UsageError(f"output_dir `{folder}` already holds a run", remedy)
    try:
        try_folder(folder)
    except OSError as error:
        what = f"output_dir `{folder}` can not be written: {error.strerror}"
        if error.filename and Path(error.filename) != folder:
            what += f" (`{error.filename}`)"
        raise UsageError(what, "Name a folder that can be made and written to; nothing was loaded yet.") from error


def _refuse_changes(before: dict[str, Any], recipe: Recipe, where: Path) -> None:
    """Raises UsageError naming the keys that differ from the run that is to be resumed."""
    now = _flat(resolved(recipe))
    keys = [key for key in sorted(before.keys() | now.keys()) if key not in FREE_KEYS and before.get(key) != now.get(key)]
    if keys:
        changed = "\n  ".join(f"{key}: {before.get(key)} → {now.get(key)}" for key in keys)
        raise UsageError(f"the recipe is not the one of {where}:\n  {changed}", "Resume with the old values, or start anew.")


class _Run:
    """One training run in progress."""

    stop: StopRequest
    optimizer: AdamW

    def __init__(self, session: Session, folder: Path, progress: Progress, started: float) -> None:
        self.session, self.folder, self.progress, self.started = session, folder, progress, started
        self.spec = session.recipe.train
        self.total = count_steps(len(session.train), self.spec)
        self.state = RunState()
        self.wall_before = 0.0
        self.writing = False  # whether there is anything in the folder yet

    # -- start -------------------------------------------------------------------------------------------------------

    def start(self, saved: Saved | None, overwrite: bool) -> None:
        session, model, method = self.session, self.session.task_model.model, self.session.method
        identity = self._model_identity()
        fingerprint: dict[str, Any] = {
            "recipe": _flat(resolved(session.recipe)),
            "training data": session.train.digest(),
            "validation data": session.validation.digest(),
            "base model": identity,
            "precision": str(session.dtype),
        }
        if saved is None:
            method.prepare(calibration(self.session, self._stage))
        else:
            self.state, self.wall_before = saved.run, saved.run.wall_seconds
            for what, now in fingerprint.items():
                if what != "recipe" and self.state.fingerprint.get(what) != now:
                    before = f"the {what} is not what {saved.folder} was trained with"
                    raise UsageError(before, "Restore it, or start anew with --overwrite.")
            saved.restore_model(model, method)
        self.optimizer = build_optimizer(method, session.heads, self.spec)
        method.begin(self.optimizer, self.total)
        if saved is None:
            # Dropout's random numbers start here, whatever loading the model and its head has drawn before.
            torch.manual_seed(self.spec.seed)
        else:
            saved.restore_optimizer(model, self.optimizer)
            saved.restore_random()
        self.state.fingerprint = fingerprint
        manifest = self._manifest(identity)
        if overwrite and self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.writing = True
        write_json(self.folder / MANIFEST, manifest)
        write_text(self.folder / RECIPE, dump_yaml(session.recipe))
        # What an earlier end of this run left is not its result any more.
        (self.folder / RESULT).unlink(missing_ok=True)
        shutil.rmtree(self.folder / ADAPTER, ignore_errors=True)
        keep_json_lines(self.folder / METRICS, self._is_before)
        # Later checkpoints will be written anew; left here, they would be what `--resume auto` goes on from.
        if saved is None:
            shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)
        for later in checkpoint.checkpoints(self.folder / CHECKPOINTS):
            if int(later.name.removeprefix("step-")) > self.state.step:
                shutil.rmtree(later)
        if saved is not None and self.state.best_step is not None:
            self._bring_best(saved.folder)
        write_text(self.folder / RANKS, "".join(json.dumps(line) + "\n" for line in self.state.ranks))
        self._record_ranks(0)
        if saved:
            log.info("resuming %s after step %d of %d", self.folder, self.state.step, self.total)

    @contextmanager
    def _stage(self, description: str) -> Iterator[Callable[[int, int], None]]:
        """A stage outside of the steps, which a signal ends at once: there is nothing to save, or all is saved already."""
        with self.progress.stage(description) as advance:

            def checked(done: int, total: int) -> None:
                advance(done, total)
                if self.stop.requested:
                    raise self._interrupted() if self.state.step else self._lost(description)

            yield checked

    def _is_before(self, line: dict[str, Any]) -> bool:
        """True if a line of metrics.jsonl tells of what the run's state already has in it."""
        evaluation = any(name.startswith("eval_") for name in line)
        if evaluation:
            return int(line["step"]) <= self.state.evaluated_step
        return 0 < int(line["step"]) <= self.state.step

    def _bring_best(self, resumed: Path) -> None:
        """Copy the best checkpoint along when a run goes on in another folder."""
        name = f"step-{self.state.best_step:08d}"
        theirs, ours = resumed.parent / BEST / name, self.folder / CHECKPOINTS / BEST / name
        if theirs.is_dir() and not ours.is_dir():
            shutil.copytree(theirs, ours)

    # -- train -------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        session, state = self.session, self.state
        with self.progress.training(state.step + 1, self.total):
            self._evaluate_if_due()  # a run that was stopped while it evaluated
            if self._out_of_patience():
                return
            steps = train(session.task_model, session.method, self.optimizer, session.train, self.spec, state.step + 1)
            for report in steps:
                self._log_step(report)
                # Saved before it is evaluated: an evaluation that runs out of memory must not take the steps with it.
                due = self.spec.save_steps is not None and state.step % self.spec.save_steps == 0
                if saved := due or state.step == self.total or self.stop.requested:
                    self._save()
                self._evaluate_if_due()
                if self.stop.requested and state.step < self.total:
                    raise self._interrupted()
                if self._out_of_patience():
                    if not saved:  # what the method does at the end may take long, and be interrupted
                        self._save()
                    return

    def _log_step(self, report: StepReport) -> None:
        state = self.state
        state.step, state.seconds, state.tokens = report.step, state.seconds + report.seconds, state.tokens + report.tokens
        line = {name: value for name, value in asdict(report).items() if name not in ("metrics", "total_steps")}
        append_json_line(self.folder / METRICS, line | report.metrics)
        self._record_ranks(report.step)
        self.progress.step(report, sum(state.ranks[-1]["ranks"].values()))

    def _record_ranks(self, step: int, **more: Any) -> None:
        """A line in ranks.jsonl at the start and at every change."""
        now = asdict(self.session.method.rank_state())
        if not self.state.ranks or any(self.state.ranks[-1][key] != value for key, value in now.items()):
            self.state.ranks.append({"step": step, **now, **more})
            append_json_line(self.folder / RANKS, self.state.ranks[-1])

    def _evaluate_if_due(self) -> None:
        state = self.state
        last = state.step == self.total
        due = last or (self.spec.eval_steps is not None and state.step > 0 and state.step % self.spec.eval_steps == 0)
        due |= self.spec.eval_on_start and state.step == 0
        if not due or state.evaluated_step == state.step:
            return
        metrics = self._evaluate()
        deciding = self.session.metrics[0]
        is_final = self.session.method.is_final
        better = is_final and is_better(deciding, metrics[deciding], state.best_value)
        state.evaluated_step, state.last_metrics = state.step, metrics
        state.evaluations_without_better = 0 if better or not is_final else state.evaluations_without_better + 1
        if better:
            state.best_value, state.best_step = metrics[deciding], state.step
            if self.spec.load_best_model_at_end:
                self._save(BEST)
        log.info(
            "step %d: validation %s%s", state.step, _shown(metrics), " (best so far)" if better and self.spec.eval_steps else ""
        )
        append_json_line(
            self.folder / METRICS, {"step": state.step, **{f"eval_{name}": value for name, value in metrics.items()}}
        )

    def _evaluate(self, save: bool = True) -> dict[str, float]:
        """save: false where all is saved already and a checkpoint of this moment would not be one to go on from."""
        session = self.session
        with self.progress.stage("evaluating") as advance:

            def between(done: int, total: int) -> None:
                advance(done, total)
                if self.stop.requested:
                    if save:
                        self._save()
                    raise self._interrupted() if save or self.state.step else self._lost("evaluating")

            limits = evaluation_limits(self.spec)
            return evaluate(session.task_model, session.validation, session.metrics, *limits, between).metrics

    def _out_of_patience(self) -> bool:
        patience, without = self.spec.early_stopping_patience, self.state.evaluations_without_better
        if patience is None or without < patience:
            return False
        log.info("stopping early: no better %s in %d evaluations", self.session.metrics[0], without)
        return True

    def _save(self, name: str = "") -> Path:
        """A checkpoint of this moment; `name` is a subfolder of its own, which keeps one."""
        session, root = self.session, self.folder / CHECKPOINTS / name
        self.state.wall_seconds = self._wall_seconds()
        keep = 1 if name else self.spec.save_total_limit
        return checkpoint.save(root, session.task_model.model, session.method, self.optimizer, self.state, keep)

    def _lost(self, during: str) -> Interrupted:
        """For a moment before the first step at which nothing is saved."""
        remedy = "Start again with --overwrite." if self.writing else "Start again: nothing was written."
        return Interrupted(f"stopped while {during}, before the first step", remedy)

    def _interrupted(self) -> Interrupted:
        where = f"{self.folder / CHECKPOINTS}/step-{self.state.step:08d}"
        return Interrupted(
            f"stopped after step {self.state.step} of {self.total}; saved {where}",
            "Go on with the same command and --resume auto.",
        )

    def _wall_seconds(self) -> float:
        return self.wall_before + time.perf_counter() - self.started

    # -- finish ------------------------------------------------------------------------------------------------------

    def finish(self, more: dict[str, Any] | None = None) -> dict[str, Any]:
        """Best model if asked for, what the method does at the end, the adapter, and result.json, with `more` in it, last."""
        session, state = self.session, self.state
        metrics, last_step = state.last_metrics, state.step
        for warning in session.method.finish():
            log.warning(warning)
        if self.spec.load_best_model_at_end and state.best_step not in (None, state.step):
            best = self.folder / CHECKPOINTS / BEST / f"step-{state.best_step:08d}"
            if best.is_dir():
                saved = checkpoint.read(best)
                saved.restore_model(session.task_model.model, session.method)
                metrics = saved.run.last_metrics
                log.info("the adapter is that of step %d, the best evaluation", state.best_step)
                self._record_ranks(last_step, restored_from=state.best_step)
            else:
                log.warning("%s, the best evaluation, is gone: the adapter is that of step %d, the last", best, last_step)
        result = more or {}
        if session.method.conclude(calibration(self.session, self._stage)):
            result["metrics_before"] = metrics
            metrics = self._evaluate(save=False)
            log.info("as it is saved: validation %s", _shown(metrics))
        save_native(self.folder / ADAPTER, session.task_model, session.method, session.facts)
        result = self._result(metrics) | result
        write_json(self.folder / RESULT, result)
        return result

    def _result(self, metrics: dict[str, float]) -> dict[str, Any]:
        session, state = self.session, self.state
        ranks = session.method.rank_state().ranks
        parameters = checkpoint.trainable(session.task_model.model).values()
        return {
            "method": "+".join([session.recipe.method.name, *(part.name for part in session.recipe.method.with_)]),
            "task": session.recipe.model.task,
            "metrics": metrics,
            "train_seconds": round(state.seconds, 3),
            "wall_seconds": round(self._wall_seconds(), 3),
            "tokens": state.tokens,
            "tokens_per_second": round(state.tokens / state.seconds, 1) if state.seconds else 0.0,
            "peak_memory_mb": peak_memory_mb(),
            "trainable_parameters": sum(p.numel() for p in parameters),
            "adapter_bytes": sum(file.stat().st_size for file in (self.folder / ADAPTER).glob("*.safetensors")),
            "rank_total": sum(ranks.values()),
            "ranks": ranks,
            "steps": state.step,
            "best_step": state.best_step,
            "seed": self.spec.seed,
            "group_by_length": self.spec.group_by_length,
            "precision": str(session.dtype).removeprefix("torch.").replace("float32", "fp32").replace("bfloat16", "bf16"),
            "model": {"name": session.facts.source.requested, "stand_in": session.facts.source.stand_in},
            "data": {"name": session.data_source.requested, "stand_in": session.data_source.stand_in},
            **factor_facts(session.method.adapters),
            **session.method.summary(),
        }

    def _model_identity(self) -> dict[str, Any]:
        """Identity of the base's weights: hashes of a folder's files, or the hub's commit."""
        source = self.session.facts.source
        return {"sha256": file_hashes(source), "commit": source.revision}

    def _manifest(self, identity: dict[str, Any]) -> dict[str, Any]:
        session, started = self.session, datetime.now(UTC).isoformat(timespec="seconds")
        before = self.folder / MANIFEST
        if self.state.step and before.is_file():
            kept: dict[str, Any] = read_json(before)
            return kept | {"resumed": [*kept.get("resumed", []), {"at": started, "step": self.state.step}]}
        return {
            "started": started,
            "command": sys.argv,
            "working_folder": str(Path.cwd()),
            "versions": versions(),
            "machine": machine(),
            "model": asdict(session.facts.source) | identity,
            "data": asdict(session.data_source)
            | {
                "shape": session.shape,
                "train_rows": len(session.train),
                "validation_rows": len(session.validation),
                "train_sha256": self.state.fingerprint["training data"],
                "validation_sha256": self.state.fingerprint["validation data"],
            },
            "labels": session.facts.labels.names if session.facts.labels else None,
        }


def _shown(metrics: dict[str, float]) -> str:
    return " · ".join(f"{name} {metric_value(value, '.4f')}" for name, value in metrics.items())


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of a nested mapping."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {
        key: leaf
        for name, inner in value.items()
        for key, leaf in _flat(inner, f"{prefix}.{name}" if prefix else str(name)).items()
    }
