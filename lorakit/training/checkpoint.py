"""Checkpoints: all that changes during a run, so that a resumed run ends with the same bytes.

A checkpoint is a folder `step-00000100` with tensors.safetensors (adapters, heads, Adam's moments,
random state) and state.json (step, method state, rank history, best evaluation). It is written
under another name and then renamed, so that it is complete or absent.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorakit.adapters.layer import adapters_of
from lorakit.adapters.optimizer import AdamW, Moments
from lorakit.errors import RunError, UsageError
from lorakit.files import expanded, new_folder, read_json, write_json
from lorakit.methods import Method

FORMAT = 1


@dataclass
class RunState:
    """Progress of a run, apart from tensors and the method's own state."""

    step: int = 0
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


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: parameter} of all that is trained, adapters and heads, named as it is saved."""
    adapters = adapters_of(model).items()
    parts = {f"{name}.{part}": p for name, a in adapters for part, p in a.parts().items()}
    return {name: p for name, p in parts.items() if p.requires_grad} | _head_parameters(model)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of the adapters, all but the base's own weights, and of the heads, on the CPU, by
    name."""
    adapters = adapters_of(model).items()
    tensors = {
        f"{name}.{part}": tensor
        for name, adapter in adapters
        for part, tensor in adapter.own_tensors().items()
    }
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()} | head_tensors(
        model
    )


def head_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The heads' tensors alone, on the CPU, by name."""
    return {name: p.detach().cpu().contiguous() for name, p in _head_parameters(model).items()}


def load_trained(model: nn.Module, tensors: dict[str, Tensor], origin: str) -> None:
    """Load saved adapters, of any ranks, and heads.

    Raises RunError that names a module which is missing or does not fit.
    """
    for name, adapter in adapters_of(model).items():
        prefix = f"{name}."
        try:
            adapter.load_tensors(
                {
                    n.removeprefix(prefix): tensor
                    for n, tensor in tensors.items()
                    if n.startswith(prefix)
                }
            )
        except ValueError as error:
            raise RunError(f"{origin} does not fit the model: `{name}`: {error}") from error
    for name, parameter in _head_parameters(model).items():
        if name not in tensors or tensors[name].shape != parameter.shape:
            raise RunError(
                f"{origin} does not fit the model: `{name}` is missing or has another shape"
            )
        parameter.data.copy_(tensors[name])


def _head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: parameter} of everything that is trained outside the adapters."""
    within = tuple(f"{name}." for name in adapters_of(model))
    return {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad and not name.startswith(within)
    }


def save(
    root: Path,
    model: nn.Module,
    method: Method,
    optimizer: AdamW,
    state: RunState,
    keep: int | None,
) -> Path:
    """Write the checkpoint of step `state.step` under `root` and drop all but the newest `keep`."""
    tensors = {f"model.{name}": tensor for name, tensor in trained_tensors(model).items()}
    tensors |= {f"method.{name}": tensor for name, tensor in method.tensors().items()}
    for name, parameter in trainable(model).items():
        for part, tensor in vars(optimizer.state[parameter]).items():
            if tensor is not None:
                tensors[f"optimizer.{part}.{name}"] = tensor.cpu().contiguous()
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    for unfinished in root.glob(".step-*"):  # of a process that was killed while it saved
        shutil.rmtree(unfinished)
    folder = root / f"step-{state.step:08d}"
    with new_folder(folder) as staging:
        save_file(tensors, staging / "tensors.safetensors")
        write_json(
            staging / "state.json",
            {"format": FORMAT, "run": asdict(state), "method": method.state_dict()},
        )
    if keep is not None:
        for old in checkpoints(root)[:-keep]:
            shutil.rmtree(old)
    return folder


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read. Restore the model first: its parameters are replaced, and an
    optimizer holds them."""

    folder: Path
    run: RunState
    method: dict[str, Any]
    tensors: dict[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """{name without prefix: tensor} of the tensors whose name begins with `prefix`."""
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }

    def restore_model(self, model: nn.Module, method: Method) -> None:
        """Restore adapters, heads, and the method's tensors and state."""
        load_trained(model, self.part("model."), f"the checkpoint {self.folder}")
        method.load_tensors(self.part("method."))
        method.load_state_dict(self.method)

    def restore_optimizer(self, model: nn.Module, optimizer: AdamW) -> None:
        """Restore Adam's moments and ages, and the masks."""
        names = [part.name for part in fields(Moments)]
        for name, parameter in trainable(model).items():
            saved = {part: self.tensors.get(f"optimizer.{part}.{name}") for part in names}
            optimizer.state[parameter] = Moments(
                **{p: t.to(parameter.device) for p, t in saved.items() if t is not None}
            )

    def restore_random(self) -> None:
        """Restore the random generators, which dropout draws from."""
        torch.set_rng_state(self.tensors["random.cpu"])
        if "random.cuda" in self.tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.tensors["random.cuda"])


def read(folder: Path) -> Saved:
    """Read a checkpoint. Raises RunError for a broken one."""
    try:
        saved = read_json(folder / "state.json")
        if saved["format"] != FORMAT:
            raise RunError(
                f"the checkpoint {folder} has format {saved['format']}, this lorakit reads {FORMAT}"
            )
        return Saved(
            folder,
            RunState(**saved["run"]),
            saved["method"],
            load_file(folder / "tensors.safetensors"),
        )
    except (OSError, ValueError, SafetensorError, KeyError, TypeError) as error:
        remedy = "Resume from an older one, or start anew with --overwrite."
        raise RunError(f"the checkpoint {folder} can not be read: {error}", remedy) from error


def checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints under `root`, oldest first."""
    found = [
        path
        for path in root.glob("step-*")
        if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def find(root: Path, wanted: str) -> Path | None:
    """The checkpoint that `--resume` names: the newest for `auto` (None when there is none), else a
    folder."""
    if wanted == "auto":
        return max(
            checkpoints(root), key=lambda path: int(path.name.removeprefix("step-")), default=None
        )
    folder = expanded(wanted)
    if not (folder / "state.json").is_file():
        there = ", ".join(str(path) for path in checkpoints(root)) or "none"
        raise UsageError(f"`{wanted}` is not a checkpoint", f"Name `auto` or a folder of: {there}.")
    return folder
