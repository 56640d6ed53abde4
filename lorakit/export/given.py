"""Adapters that were trained before, read without their model: of PEFT's format, which other tools
write too, or lorakit's own.

PEFT's adapter_model.safetensors says which layers have factors and of which rank, and
adapter_config.json gives the scale. Everything in that file that changes what the adapter computes
and that a plain adapter can not hold is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils import skip_init

from lorakit.adapters.base import TENSOR_NAMES
from lorakit.adapters.inject import matches, saved_targets
from lorakit.errors import RunError, UsageError
from lorakit.export.native import FACTS_FILE, read_facts
from lorakit.export.peft import CONFIG_FILE
from lorakit.files import read_json, sha256
from lorakit.methods import build_method, config_classes
from lorakit.training.trained import ADAPTER_FILE, load_finite, own_name, peft_key

FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# Keys of adapter_config.json that were used, or that do not change what a trained adapter computes.
# The tensors themselves show which layers were chosen.
READ = {"peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha"}
READ |= {"lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save"}
WITHOUT_EFFECT = {
    *("auto_mapping", "inference_mode", "peft_version", "runtime_config", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("qalora_group_size", "ensure_weight_tying", "ephemeral_gpu_offload", "velora_config"),
    "fan_in_fan_out",  # of the base's weight; the factors are laid out alike in both cases
}
# Values of init_lora_weights that take a part of the base away, so that the adapter is valid on the
# changed base alone.
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class GivenAdapter:
    """A trained adapter: `factors` {module: (A [rank, in], B [out, rank])}, `scales` {module: s}
    and `heads` {name: tensor of a module trained in full}, as the file has them. `config` is
    adapter_config.json, `base` and `revision` the model that it names; `labels`: the classes of the
    head, where they are known."""

    folder: Path
    factors: dict[str, tuple[Tensor, Tensor]]
    scales: dict[str, float]
    heads: dict[str, Tensor]
    config: dict[str, Any]
    base: str | None
    revision: str | None
    sha256: str
    labels: list[str] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The factors' type; float32 if they differ."""
        found = {factor.dtype for pair in self.factors.values() for factor in pair}
        return found.pop() if len(found) == 1 else torch.float32

    def record(self) -> dict[str, Any]:
        """For manifest.json: from where the adapter is."""
        kind = str(self.dtype).removeprefix("torch.")
        path = str(self.folder.resolve())
        return {"path": path, "sha256": self.sha256, "base": self.base, "dtype": kind}


def read_peft(folder: Path) -> GivenAdapter:
    """Read a PEFT LoRA adapter. Raises UsageError that names what is missing, broken, or more than
    a plain adapter with heads can hold."""
    config = _config(folder)
    _refuse_more(folder, config)
    tensors = adapter_tensors(folder)
    pairs: dict[str, dict[str, Tensor]] = {}
    heads: dict[str, Tensor] = {}
    # Factors first, as they say more about what the adapter is.
    for key, tensor in sorted(tensors.items(), key=lambda item: ".lora_" not in item[0]):
        name = key.removeprefix(peft_key(""))
        if (factor := FACTOR.fullmatch(name)) and tensor.ndim == 2:
            pairs.setdefault(factor["module"], {})[factor["side"]] = tensor
        elif ".lora_" in name or not _is_saved(name, config):
            raise _not_held(folder, f"the tensor `{key}`", _why(name, tensor))
        else:
            heads[name.replace(".modules_to_save.", ".")] = tensor
    factors = {name: _pair(folder, name, pair) for name, pair in pairs.items()}
    if not factors:
        raise UsageError(
            f"`{folder / ADAPTER_FILE}` has no LoRA factors", "Name a folder with an adapter."
        )
    scales = {name: _scale(folder, name, len(a), config) for name, (a, _) in factors.items()}
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    digest = sha256(folder / ADAPTER_FILE)
    return GivenAdapter(folder, factors, scales, heads, config, base, revision, digest)


def adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder. Raises UsageError where they can not be read."""
    path = folder / ADAPTER_FILE
    if not path.is_file():
        remedy = "Name a folder with an adapter."
        if (folder / "adapter_model.bin").is_file():
            remedy = (
                "adapter_model.bin is a pickle, which can run code and is not read: load it with a"
                " PEFT that you trust it to, and save_pretrained writes safetensors."
            )
        raise UsageError(f"`{folder}` has no {ADAPTER_FILE}", remedy)
    try:
        return load_finite(path)
    except (OSError, SafetensorError, ValueError) as error:
        remedy = "Fetch it, or train it, again."
        raise UsageError(f"`{path}` can not be read: {error}", remedy) from error


def no_such_modules(wrong: Iterable[str], there: Iterable[str]) -> str:
    """The modules that an adapter has and a model has not, with the nearest names."""
    names, known = list(wrong), list(there)
    near = [hit for name in names[:3] for hit in get_close_matches(name, known, 1, 0.5)]
    shown = ", ".join(f"`{name}`" for name in names[:3]) + (" …" if len(names) > 3 else "")
    nearest = ", ".join(f"`{name}`" for name in dict.fromkeys(near))
    return f"{len(names)} of its modules, {shown}" + (f"; nearest: {nearest}" if near else "")


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        what = f"`{folder}` has no {CONFIG_FILE}" if folder.is_dir() else f"`{folder}` is no folder"
        raise UsageError(what, f"Name a folder with {CONFIG_FILE} and {ADAPTER_FILE}.")
    try:
        config = read_json(path)
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(f"`{path}` can not be read: {error}", "Fetch it again.") from error
    if not isinstance(config, dict):
        raise UsageError(f"`{path}` is not a JSON object", "Fetch it again.")
    return config


def _refuse_more(folder: Path, config: dict[str, Any]) -> None:
    """Raise UsageError for a key whose value changes what the adapter computes, unless it is
    read."""
    kind = config.get("peft_type")
    if kind != "LORA":
        why = "only LoRA is, without gates or other methods"
        raise _not_held(folder, f"`peft_type: {kind}`", why)
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(CHANGES_THE_BASE):
        why = "it is valid on a changed base; PEFT's path_initial_model_for_weight_conversion"
        raise _not_held(folder, f"`init_lora_weights: {start}`", f"{why} makes a plain one of it")
    for key, value in config.items():
        harmless = value in (None, False, "none") or value == {} or value == []
        if key not in READ | WITHOUT_EFFECT and not harmless:
            said = json.dumps(value)
            why = "lorakit's adapters are plain LoRA on linear layers"
            raise _not_held(folder, f"`{key}: {said}`", why)


def _not_held(folder: Path, what: str, why: str) -> UsageError:
    return UsageError(f"the adapter in `{folder}` has {what}, which can not be held", f"{why}.")


def _why(name: str, tensor: Tensor) -> str:
    if "lora_embedding" in name:
        return "it is LoRA on an embedding, and lorakit adapts linear layers alone"
    if "lora_magnitude" in name:
        return "it is DoRA's magnitude, and lorakit's adapters have two factors alone"
    if name.endswith(".bias"):
        return "lorakit's adapters train no biases (bias, lora_bias)"
    if tensor.ndim != 2 and ".lora_" in name:
        return "it is LoRA on a convolution, and lorakit adapts linear layers alone"
    return "neither a factor nor one of modules_to_save, such as a resized embedding"


def _is_saved(name: str, config: dict[str, Any]) -> bool:
    """True if the tensor belongs to one of modules_to_save, which PEFT matches by their ends."""
    module = name.replace(".modules_to_save.", ".").rpartition(".")[0]
    parts = [module, *(module[: found.start()] for found in re.finditer(r"\.", module))]
    return any(
        part == saved or part.endswith(f".{saved}")
        for part in parts
        for saved in config.get("modules_to_save") or []
    )


def _pair(folder: Path, name: str, pair: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    if pair.keys() != {"A", "B"} or len(pair["A"]) != pair["B"].shape[1]:
        what = f"the factors of `{name}` in `{folder}` are not a pair of one rank"
        raise UsageError(what, "Fetch or export the adapter again.")
    return pair["A"], pair["B"]


def _scale(folder: Path, name: str, rank: int, config: dict[str, Any]) -> float:
    """s of a module: as PEFT, the first pattern that matches decides."""

    def of(key: str, pattern: str) -> Any:
        patterns = (config.get(pattern) or {}).items()
        return next((value for p, value in patterns if matches(p, name)), config.get(key))

    try:
        alpha, expected = float(of("lora_alpha", "alpha_pattern")), of("r", "rank_pattern")
    except (TypeError, ValueError, re.error) as error:
        what = f"`{folder / CONFIG_FILE}` has no lora_alpha for `{name}`: {error}"
        raise UsageError(what, "Fetch the adapter again.") from error
    if expected != rank:
        what = f"`{name}` has rank {rank} in `{folder}`, but {CONFIG_FILE} says {expected}"
        raise UsageError(what, "r and rank_pattern must be those of the tensors.")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def read_given(folder: Path) -> GivenAdapter:
    """Read an adapter folder of lorakit, or of PEFT. Raises UsageError where it can not be read."""
    return read_own(folder) if (folder / FACTS_FILE).is_file() else read_peft(folder)


def read_own(folder: Path) -> GivenAdapter:
    """Read an adapter folder of lorakit, with gates folded into the factors. Raises UsageError for
    one that is valid on a pruned base alone."""
    try:
        facts = read_facts(folder)
        keys = config_classes()[facts.method["name"]]
        config = keys.model_validate_json(json.dumps(facts.method))
    except (RunError, KeyError, ValueError) as error:
        what = f"the adapter in `{folder}` can not be read: {error}"
        raise UsageError(what, "Name a folder that lorakit or PEFT wrote.") from error
    tensors = {own_name(key): tensor for key, tensor in adapter_tensors(folder).items()}
    names = [name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A")]
    method = build_method(config, 0)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    scales: dict[str, float] = {}
    for name, rank in saved_targets(config, names).items():
        parts = {
            key.removeprefix(f"{name}."): tensors.pop(key)
            for key in list(tensors)
            if key.startswith(f"{name}.")
        }
        if parts.keys() & TENSOR_NAMES:
            what = f"the adapter in `{folder}` was trained on a pruned base"
            raise UsageError(what, "Merge it, and train on the merged model.")
        sizes = parts["lora_A"].shape[1], parts["lora_B"].shape[0]
        layer: nn.Module = skip_init(nn.Linear, *sizes, bias=False)  # type: ignore[no-untyped-call]
        adapter = method.make_adapter(name, layer, rank)
        adapter.load_tensors(parts)
        plain = adapter.as_plain()
        factors[name], scales[name] = (plain["lora_A"], plain["lora_B"]), adapter.scale
    labels = None if facts.labels is None else facts.labels.names
    place = facts.base, facts.revision, sha256(folder / ADAPTER_FILE), labels
    return GivenAdapter(folder, factors, scales, tensors, dict(facts.method), *place)
