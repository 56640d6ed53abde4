"""PEFT's adapter format in two forms, written without PEFT.

`peft-portable`: one rank r, one lora_alpha and no patterns. Unless all ranks and scales are equal,
factors are padded with zeros, the scales are folded into B, and lora_alpha = r. Loaders that
support only one alpha and one r read it as PEFT does: vLLM scales all modules by lora_alpha / r
(vllm/lora/peft_helper.py); llama.cpp's converter writes lora_alpha once, and its runtime divides it
by the rank of each tensor.

`peft`: each module has its own rank and alpha by patterns, which only PEFT reads. Modules of rank 0
are left out, since PEFT refuses r = 0.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit import compat
from lorakit.adapters.layer import Adapter
from lorakit.files import write_json
from lorakit.methods import Method
from lorakit.models.task_model import TaskModel
from lorakit.models.tokenizer import save_tokenizer
from lorakit.training.trained import ADAPTER_FILE, head_tensors, peft_key

CONFIG_FILE = "adapter_config.json"
# The same model types as in PEFT.
PEFT_MAMBA = {"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"}
PEFT_EXPERTS = {"mixtral", "qwen2_moe"}
EXPERT_NAMES = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


@dataclass(frozen=True)
class Unread:
    """Modules whose adapters PEFT does not load (`certain`) or may not load, with the reason."""

    modules: list[str]
    why: str
    certain: bool

    def __str__(self) -> str:
        verb = "does not" if self.certain else "may not"
        return (
            f"PEFT {verb} load adapters on {len(self.modules)} layers, such as `{self.modules[0]}`:"
            f" {self.why}"
        )


def not_for_peft(model: Any, names: Iterable[str]) -> Unread | None:
    """Adapted modules that PEFT does not load, or may not load; None if it loads all.

    transformers 5 keeps the experts of a mixture as one parameter. PEFT takes layers with the
    former names of experts for these (peft/utils/transformers_weight_conversion.py), so shared
    experts and dense blocks silently get no adapter. On Mamba and related models PEFT refuses
    `out_proj`, whose weight GPU kernels read directly (peft/tuners/tuners_utils.py).
    """
    ends = {name: name.rpartition(".")[2] for name in names}
    kind = model.config.model_type
    if kind in PEFT_MAMBA and (found := [name for name, end in ends.items() if end == "out_proj"]):
        return Unread(found, "it refuses them in this architecture", certain=True)
    named = [name for name, end in ends.items() if end in EXPERT_NAMES]
    converted = compat.old_experts(kind) in PEFT_EXPERTS
    fused = any(
        name.endswith("experts.gate_up_proj") and p.ndim == 3
        for name, p in model.named_parameters()
    )
    if named and (converted or fused):
        return Unread(named, "it takes them for the experts, which are one parameter", converted)
    return None


def peft_config(
    task_model: TaskModel, method: Method, base: str, revision: str | None
) -> dict[str, Any]:
    """Make adapter_config.json with ranks and alphas by pattern. Patterns are full names, escaped
    and anchored, so each matches one module.

    PEFT needs a target: if every rank is 0, the first module gets one component of zeros.
    """
    ranks = exported_ranks(method)
    chosen = {name: adapter for name, adapter in method.adapters.items() if ranks[name]} or dict(
        [next(iter(method.adapters.items()))]
    )
    config = _config(task_model, chosen, method, base, revision)
    for name in chosen:
        pattern = f"^{re.escape(name)}"
        rank = max(ranks[name], 1)
        if rank != config["r"]:
            config["rank_pattern"][pattern] = rank
        if (alpha := method.alpha(name, rank)) != config["lora_alpha"]:
            config["alpha_pattern"][pattern] = _number(alpha)
    return config


def exported_ranks(method: Method) -> dict[str, int]:
    """{module: rank of the pair that `method.export` gives}, including the rank of a residual."""
    return {name: len(method.export(adapter)[0]) for name, adapter in method.adapters.items()}


def write_peft(
    folder: Path,
    task_model: TaskModel,
    method: Method,
    base: str,
    revision: str | None,
    dtype: torch.dtype,
) -> None:
    """Write the `peft` form into an existing folder."""
    config = peft_config(task_model, method, base, revision)
    tensors = _head_tensors(task_model, dtype)
    for name, adapter in method.adapters.items():
        if re.fullmatch(config["target_modules"], name):
            a, b = _at_least_one(*method.export(adapter))
            tensors |= _pair(name, a, b, dtype)
    _write(folder, config, tensors, task_model)


def write_portable(
    folder: Path,
    task_model: TaskModel,
    method: Method,
    base: str,
    revision: str | None,
    dtype: torch.dtype,
) -> None:
    """Write the `peft-portable` form into an existing folder. Modules of rank 0 are included as
    zeros, so that targets can be named by their last parts."""
    portable = portable_factors(method)
    config = _config(task_model, method.adapters, method, base, revision) | {
        "r": portable.rank,
        "lora_alpha": _number(portable.alpha),
        "use_rslora": False,
    }
    config["target_modules"] = target_list(task_model.model, method.adapters)
    tensors = _head_tensors(task_model, dtype)
    for name, (a, b) in portable.pairs.items():
        tensors |= _pair(name, a, b, dtype)
    _write(folder, config, tensors, task_model)


@dataclass(frozen=True)
class Portable:
    """Factors of one rank and one alpha, {module: (A [rank, in], B [out, rank])}: the update is
    alpha / rank · B A."""

    rank: int
    alpha: float
    pairs: dict[str, tuple[Tensor, Tensor]]


def portable_factors(method: Method) -> Portable:
    """The adapters at one rank, the largest, or 1 if all are 0.

    Adapters of one rank and one scale stay as they are; others are padded with zeros, with their
    scales folded into B.
    """
    pairs = {name: method.export(adapter) for name, adapter in method.adapters.items()}
    ranks = {len(a) for a, _ in pairs.values()}
    scales = {adapter.scale for adapter in method.adapters.values()}
    rank = max(1, *ranks)
    if len(scales) == 1 and ranks == {rank}:
        name = next(iter(pairs))
        own = method.alpha(name, rank)
        return Portable(rank, own * rank / method.config.divisor(rank), pairs)
    padded = {}
    for name, (a, b) in pairs.items():
        rows, columns = rank - len(a), rank - b.shape[1]
        padded[name] = (
            torch.cat([a, a.new_zeros(rows, a.shape[1])]),
            torch.cat([method.adapters[name].scale * b, b.new_zeros(b.shape[0], columns)], 1),
        )
    return Portable(rank, float(rank), padded)


def target_list(model: nn.Module, adapters: Collection[str]) -> list[str] | str:
    """The adapted modules as PEFT's target_modules: a list of names, each of which matches all
    modules whose names end with it.

    A module is named by the last parts of its name if these match adapted modules only (`q_proj`;
    never the number of a block), else by its full name. If even a full name is the end of another
    module's name, no list is correct, and the result is one regular expression.
    """
    inside = tuple(f"{name}." for name in adapters)
    others = [
        f".{name}"
        for name, _ in model.named_modules()
        if name not in adapters and not name.startswith(inside)
    ]
    clean: dict[str, bool] = {}

    def means_adapted_alone(end: str) -> bool:
        if end not in clean:
            clean[end] = not any(other.endswith(f".{end}") for other in others)
        return clean[end]

    found: dict[str, None] = {}
    for name in adapters:
        parts = name.split(".")
        first = 1 + max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
        ends = [".".join(parts[start:]) for start in range(len(parts) - 1, first - 1, -1)]
        end = next(filter(means_adapted_alone, [*ends, name]), None)
        if end is None:
            return _any_of(adapters)
        found[end] = None
    return list(found)


def _any_of(names: Iterable[str]) -> str:
    """Make a regular expression that matches these names."""
    return "|".join(re.escape(name) for name in names)


def _config(
    task_model: TaskModel,
    adapters: dict[str, Adapter],
    method: Method,
    base: str,
    revision: str | None,
) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": task_model.task.peft_type,
        "base_model_name_or_path": base,
        "revision": revision,
        "r": method.config.r,
        "lora_alpha": _number(method.config.lora_alpha),
        "use_rslora": method.config.use_rslora,
        "lora_dropout": method.config.lora_dropout,
        "target_modules": _any_of(adapters),
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": task_model.heads or None,
        "fan_in_fan_out": any(isinstance(a.base.layer, Conv1D) for a in adapters.values()),
        "bias": "none",
        "inference_mode": True,
    } | ({"peft_version": version} if (version := _peft_version()) else {})


@cache
def _peft_version() -> str | None:
    # Every checkpoint asks, and the answer is in the metadata of a dozen packages.
    return compat.oldest_tested("peft")


def _number(alpha: float) -> float:
    """A whole number as an int, as PEFT writes lora_alpha."""
    return int(alpha) if alpha.is_integer() else alpha


def _at_least_one(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return (a, b) if len(a) else (a.new_zeros(1, a.shape[1]), b.new_zeros(b.shape[0], 1))


def _pair(name: str, a: Tensor, b: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        peft_key(f"{name}.lora_A.weight"): a.detach().to("cpu", dtype).contiguous(),
        peft_key(f"{name}.lora_B.weight"): b.detach().to("cpu", dtype).contiguous(),
    }


def _head_tensors(task_model: TaskModel, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        peft_key(name): tensor.to(dtype) for name, tensor in head_tensors(task_model.model).items()
    }


def _write(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], task_model: TaskModel
) -> None:
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    write_json(folder / CONFIG_FILE, config)
    save_tokenizer(task_model.tokenizer, folder)
