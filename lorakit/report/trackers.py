"""Experiment trackers: sinks that watch a run. They get its numbers and change nothing.

Each tracker is one small class with the methods of `Tracker`. A tracker that fails is reported once
and left out from then on; the run goes on without it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from lorakit.errors import RecipeError, first_line

log = logging.getLogger("lorakit")

PROJECT = "lorakit"  # unless the tracker's own variable of the environment names another


@dataclass(frozen=True)
class Watched:
    """The run that a tracker watches. folder: its run folder; identity: 32 hex digits, the same
    whenever this run is resumed; step: the last step before the tracker starts, 0 for a new run."""

    folder: Path
    identity: str
    step: int = 0

    @property
    def name(self) -> str:
        return self.folder.resolve().name


class Tracker(Protocol):
    """A tracker of one run. Any of the three methods may raise whatever its package raises."""

    def __init__(self, run: Watched) -> None: ...

    def start(self, config: Mapping[str, Any]) -> None:
        """Open the run; config: {dotted key: value} of its resolved recipe."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers of a step, as {"train/loss": 0.7}."""

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """Close the run; result: result.json, None for a run that stopped before its end."""


class TensorBoard:
    """Event files in RUN/tensorboard, for `tensorboard --logdir RUN`.

    Written as torch's SummaryWriter does, but without torch.
    """

    def __init__(self, run: Watched) -> None:
        self.run = run
        self.events = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self.summaries = importlib.import_module("tensorboard.compat.proto.summary_pb2")

    def start(self, config: Mapping[str, Any]) -> None:
        module = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        self.writer = module.EventFileWriter(str(self.run.folder / "tensorboard"))
        # TensorBoard drops what an earlier file has from this step on: those steps are made again.
        started = self.events.SessionLog(status=self.events.SessionLog.START)
        self._add(self.run.step + 1, session_log=started)
        rows = [f"    {key}: {json.dumps(value)}" for key, value in config.items()]
        self._add(0, summary=self._text("recipe", "\n".join(rows)))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        value = self.summaries.Summary.Value
        found = [value(tag=name, simple_value=number) for name, number in values.items()]
        self._add(step, summary=self.summaries.Summary(value=found))
        self.writer.flush()

    def finish(self, result: Mapping[str, Any] | None) -> None:
        self.writer.close()

    def _add(self, step: int, **content: Any) -> None:
        self.writer.add_event(self.events.Event(wall_time=time.time(), step=step, **content))

    def _text(self, tag: str, text: str) -> Any:
        """A summary for TensorBoard's text plugin, which shows Markdown."""
        tensors = importlib.import_module("tensorboard.compat.proto.tensor_pb2")
        types = importlib.import_module("tensorboard.compat.proto.types_pb2")
        plugin = self.summaries.SummaryMetadata.PluginData(plugin_name="text")
        value = self.summaries.Summary.Value(
            tag=f"{tag}/text_summary",
            metadata=self.summaries.SummaryMetadata(plugin_data=plugin),
            tensor=tensors.TensorProto(dtype=types.DT_STRING, string_val=[text.encode()]),
        )
        return self.summaries.Summary(value=[value])


class Trackio:
    """A run in trackio's local database, for `trackio show`; $TRACKIO_PROJECT names the project."""

    def __init__(self, run: Watched) -> None:
        self.run, self.package = run, importlib.import_module("trackio")

    def start(self, config: Mapping[str, Any]) -> None:
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        # trackio continues a run by its name, and folders of one name are not one run.
        name = f"{self.run.name}-{self.run.identity[:6]}"
        self.package.init(project=project, name=name, config=dict(config), resume="allow")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.package.log(dict(values), step=step)

    def finish(self, result: Mapping[str, Any] | None) -> None:
        if result is not None:
            self.package.log(_final(result), step=result["steps"])
        self.package.finish()


class WandB:
    """A run of Weights & Biases; $WANDB_PROJECT names the project."""

    def __init__(self, run: Watched) -> None:
        self.run, self.package = run, importlib.import_module("wandb")

    def start(self, config: Mapping[str, Any]) -> None:
        self.tracked = self.package.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=self.run.name,
            id=self.run.identity,
            resume="allow",
            config=dict(config),
            dir=str(self.run.folder),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.tracked.log(dict(values), step=step)

    def finish(self, result: Mapping[str, Any] | None) -> None:
        self.tracked.summary.update(_final(result or {}))
        self.tracked.finish(exit_code=0 if result is not None else 1)


class MLflow:
    """A run of MLflow, where $MLFLOW_TRACKING_URI says; $MLFLOW_EXPERIMENT_NAME names the
    experiment."""

    def __init__(self, run: Watched) -> None:
        self.run, self.package = run, importlib.import_module("mlflow")

    def start(self, config: Mapping[str, Any]) -> None:
        self.package.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        mark = "lorakit.run"
        known = self.package.search_runs(
            filter_string=f"tags.`{mark}` = '{self.run.identity}'", output_format="list"
        )
        tags = {mark: self.run.identity}
        self.package.start_run(
            run_id=known[0].info.run_id if known else None, run_name=self.run.name, tags=tags
        )
        if not known:  # parameters can not be changed
            self.package.log_params(dict(config))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.package.log_metrics(dict(values), step=step)

    def finish(self, result: Mapping[str, Any] | None) -> None:
        if result is not None:
            self.package.log_metrics(_final(result), step=result["steps"])
        self.package.end_run("FINISHED" if result is not None else "KILLED")


# {name in `train.report_to`, which is also the package and the extra: tracker}
TRACKERS: Mapping[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WandB,
    "mlflow": MLflow,
}


def check_installed(names: Iterable[str]) -> None:
    """Raise RecipeError if the package of a tracker is not installed, with the command that
    installs it."""
    missing = [name for name in names if not _is_installed(name)]
    if missing:
        packages = "packages" if len(missing) > 1 else "package"
        listed = " and ".join(f"`{name}`" for name in missing)
        raise RecipeError.at(
            "train.report_to",
            f"report_to needs the {packages} {listed}, not installed here",
            f'after `pip install "lorakit[{",".join(missing)}]"`, or a list without it',
        )


def _is_installed(package: str) -> bool:
    """False for a mere folder of that name, such as wandb's own output in the working folder."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None


class Trackers:
    """All trackers of a run, as one that never fails. A context that closes them at its end."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.names = list(dict.fromkeys(names))
        self.watching: dict[str, Tracker] = {}

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish(None)

    def start(self, run: Watched, config: Mapping[str, Any]) -> None:
        """Start each; called after the run's folder and manifest are written."""
        for name in self.names:
            self._try(name, partial(self._start, name, run, config))

    def _start(self, name: str, run: Watched, config: Mapping[str, Any]) -> None:
        tracker = TRACKERS[name](run)
        tracker.start(config)
        self.watching[name] = tracker

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, tracker in list(self.watching.items()):
            self._try(name, partial(tracker.log, step, values))

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """Close what is still open; without effect the second time."""
        for name, tracker in list(self.watching.items()):
            self._try(name, partial(tracker.finish, result))
        self.watching.clear()

    def _try(self, name: str, action: Callable[[], None]) -> None:
        """Do it, with what the package prints on stderr: stdout is for tables and JSON."""
        try:
            with contextlib.redirect_stdout(sys.stderr):
                action()
        except Exception as error:
            self.watching.pop(name, None)
            reason = f"{type(error).__name__}: {first_line(error)}"
            log.warning("%s failed and gets no more values: %s", name, reason)


def step_values(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl under the names that trackers get: train/loss of a
    step, eval/loss of an evaluation."""
    values = {}
    for name, value in line.items():
        if name in ("step", "seconds") or isinstance(value, bool):
            continue
        if isinstance(value, int | float):
            part = "eval" if name.startswith("eval_") else "train"
            values[f"{part}/{name.removeprefix('eval_')}"] = float(value)
    if line.get("seconds"):
        values["train/tokens_per_second"] = line["tokens"] / line["seconds"]
    return values


def _final(result: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of result.json: final/accuracy …, final/train_seconds …"""
    numbers = {**result, **(result.get("metrics") or {})}
    return {
        f"final/{name}": float(value)
        for name, value in numbers.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "seed"
    }
