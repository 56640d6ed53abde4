"""Checkpoints: all that changes during a run, so that a resumed run ends with the same bytes.

A checkpoint is a folder `step-00000100`. Its adapter has the form of a finished run's: the files of
`lorakit.training.trained`, and those that describe them. Beside it, state.safetensors has Adam's
moments and the random state, and state.json the step, method state, rank history and best
evaluation. It is written under another name and then renamed, so that it is complete or absent.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorakit.adapters.optimizer import AdamW, Moments
from lorakit.errors import RunError, UsageError
from lorakit.files import expanded, fill_json, new_folder, read_json
from lorakit.methods import Method
from lorakit.training.trained import load_trained, read_trained, trainable, write_trained

FORMAT = 2
STATE = "state.json"
TENSORS = "state.safetensors"


@dataclass
class RunState:
    """Progress of a run, apart from tensors and the method's own state. total_steps: of the whole
    run, by which its schedules go; extended: a line {step, from, to} for each time that this total
    was raised; rows_per_step: of the data in each step, however many processes share them."""

    step: int = 0
    total_steps: int = 0
    seconds: float = 0.0
    wall_seconds: float = 0.0
    tokens: int = 0
    evaluated_step: int = -1
    best_value: float | None = None
    best_step: int | None = None
    evaluations_without_better: int = 0
    last_metrics: dict[str, float] = field(default_factory=dict)
    last_by_set: dict[str, dict[str, float]] = field(default_factory=dict)
    ranks: list[dict[str, Any]] = field(default_factory=list)
    fingerprint: dict[str, Any] = field(default_factory=dict)
    extended: list[dict[str, int]] = field(default_factory=list)
    rows_per_step: int = 0


def save(
    root: Path,
    model: nn.Module,
    method: Method,
    optimizer: AdamW,
    state: RunState,
    keep: int | None,
    describe: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Write the checkpoint of step `state.step` under `root` and drop all but the newest `keep`.

    describe: writes into a folder the files that say what its adapter is.
    """
    tensors = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    for name, parameter in trainable(model).items():
        for part, tensor in vars(optimizer.state[parameter]).items():
            if tensor is not None:
                tensors[f"optimizer.{part}.{name}"] = tensor.cpu().contiguous()
    for unfinished in root.glob(".step-*"):  # of a process that was killed while it saved
        shutil.rmtree(unfinished)
    folder = root / f"step-{state.step:08d}"
    with new_folder(folder) as staging:
        write_trained(staging, model, method)
        describe(staging)
        save_file(tensors, staging / TENSORS)
        fill_json(
            staging / STATE,
            {"format": FORMAT, "run": asdict(state), "method": method.state_dict()},
        )
    if keep is not None:
        for old in checkpoints(root)[:-keep]:
            shutil.rmtree(old)
    return folder


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read. Restore the model first: its parameters are replaced, and an
    optimizer holds them. `trained`: tensors of adapters and heads; `tables`: the method's; `rest`:
    of the optimizer and the random state."""

    folder: Path
    run: RunState
    method: dict[str, Any]
    trained: dict[str, Tensor]
    tables: dict[str, Tensor]
    rest: dict[str, Tensor]

    def restore_model(self, model: nn.Module, method: Method) -> None:
        """Restore adapters, heads, and the method's tensors and state."""
        load_trained(model, self.trained, f"the checkpoint {self.folder}")
        method.load_tensors(self.tables)
        method.load_state_dict(self.method)

    def restore_optimizer(self, model: nn.Module, optimizer: AdamW) -> None:
        """Restore Adam's moments and ages, and the masks."""
        names = [part.name for part in fields(Moments)]
        for name, parameter in trainable(model).items():
            saved = {part: self.rest.get(f"optimizer.{part}.{name}") for part in names}
            optimizer.state[parameter] = Moments(
                **{p: t.to(parameter.device) for p, t in saved.items() if t is not None}
            )

    def restore_random(self) -> None:
        """Restore the random generators, which dropout draws from."""
        torch.set_rng_state(self.rest["random.cpu"])
        if "random.cuda" in self.rest and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.rest["random.cuda"])


def read(folder: Path) -> Saved:
    """Read a checkpoint. Raises RunError for a broken one."""
    state, method = read_state(folder)
    try:
        return Saved(folder, state, method, *read_trained(folder), load_file(folder / TENSORS))
    except (OSError, ValueError, SafetensorError) as error:
        raise _broken(folder, error) from error


def read_state(folder: Path) -> tuple[RunState, dict[str, Any]]:
    """(progress of the run, state of the method) of a checkpoint. Raises RunError for a broken
    one, and for one of another lorakit."""
    try:
        saved = read_json(folder / STATE)
        if (form := saved["format"]) != FORMAT:
            what = f"the checkpoint {folder} has format {form}, of another version of lorakit"
            remedy = f"This one reads format {FORMAT}: go on with that version, or start anew."
            raise RunError(what, remedy)
        return RunState(**saved["run"]), saved["method"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _broken(folder, error) from error


def _broken(folder: Path, error: Exception) -> RunError:
    remedy = "Resume from an older one, or start anew with --overwrite."
    return RunError(f"the checkpoint {folder} can not be read: {error}", remedy)


def checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints under `root`, oldest first."""
    found = [
        path
        for path in root.glob("step-*")
        if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def newest(root: Path) -> Path | None:
    """The newest checkpoint under `root`; None when there is none."""
    return next(reversed(checkpoints(root)), None)


def find(root: Path, wanted: str) -> Path | None:
    """The checkpoint that `--resume` names: the newest for `auto` (None when there is none), else a
    folder."""
    if wanted == "auto":
        return newest(root)
    folder = expanded(wanted)
    if not (folder / STATE).is_file():
        there = ", ".join(str(path) for path in checkpoints(root)) or "none"
        raise UsageError(f"`{wanted}` is not a checkpoint", f"Name `auto` or a folder of: {there}.")
    return folder
