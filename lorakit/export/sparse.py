"""The `sparse` form: each tensor that gets smaller by it is stored as a bitmap and its packed
non-zeros, as plain tensors in safetensors.

Tensor NAME becomes `NAME.bitmap`, uint8 [⌈n / 8⌉], and `NAME.values`, its non-zero entries [live]
in its own dtype. Zero means the bits of +0.0, so every tensor is restored bit by bit, -0.0 and NaNs
included. Other tensors are stored unchanged. The metadata has one key, with the version and the
shapes of the encoded tensors in the order of their names: "1 8x384 384x8". (safetensors writes two
keys in a random order, so the bytes would not be reproducible.)

A folder of this form holds adapters and heads. With a pruned base it also holds the base:
model.safetensors, with the names of the plain model and without the heads, and base_config.json.
There is no config.json, and PEFT refuses the adapter's type: transformers ignores the metadata and
would initialise missing weights at random.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig

from lorakit.adapters.inject import detach_all, inject, saved_targets
from lorakit.errors import RunError
from lorakit.export.native import FACTS_FILE, AdapterFacts, read_facts
from lorakit.export.peft import CONFIG_FILE, peft_config
from lorakit.files import write_json
from lorakit.methods import Method, build_method, config_classes
from lorakit.models.fetching import quiet
from lorakit.models.heads import train_heads
from lorakit.models.load import load_model, use_kernels
from lorakit.models.positions import skeleton
from lorakit.models.spec import ModelSpec
from lorakit.models.task_model import TaskModel
from lorakit.models.tasks import task_named
from lorakit.models.tokenizer import load_tokenizer, save_tokenizer
from lorakit.numerics.sparsity import pack_bits, unpack_bits
from lorakit.sources.resolve import Source
from lorakit.training.trained import (
    ADAPTER_FILE,
    load_trained,
    native_key,
    own_name,
    trained_tensors,
)

KEY = "lorakit_sparse"
VERSION = "1"
BITMAP, VALUES = ".bitmap", ".values"
BASE_FILE = "model.safetensors"
BASE_CONFIG_FILE = "base_config.json"

# The types that are encoded, and integer types of the same size.
BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
# Bytes that a second tensor adds to the header, without its name.
HEADER_ENTRY = 80
# A shape of at most 64 dimensions, torch's limit. Shapes are checked before memory is allocated.
SHAPE = re.compile(r"[1-9][0-9]{0,17}(x[1-9][0-9]{0,17}){0,63}")
LONGEST_SHAPE = 64


# -- tensors ---------------------------------------------------------------------------------------


def encode(
    tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Encode tensors as (tensors, metadata) to store, on the CPU; floating-point tensors are first
    cast to `dtype`, if given.

    Raises ValueError for a name with the ending of an encoded tensor's.
    """
    stored: dict[str, Tensor] = {}
    header = [VERSION]
    for name in sorted(tensors):
        if name.endswith((BITMAP, VALUES)):
            raise ValueError(
                f"`{name}`: names that end in {BITMAP} and {VALUES} are kept for encoded tensors"
            )
        tensor = tensors[name].detach().cpu().contiguous()
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        if tensor.dtype not in BITS or not 0 < tensor.ndim <= LONGEST_SHAPE:
            stored[name] = tensor
            continue
        # numpy selects by a mask without making a list of indices
        bits = tensor.reshape(-1).view(BITS[tensor.dtype]).numpy()
        mask = bits != 0
        size = -(-len(bits) // 8) + int(mask.sum()) * tensor.itemsize + HEADER_ENTRY + len(name)
        if size >= tensor.nbytes:
            stored[name] = tensor
            continue
        stored[f"{name}{BITMAP}"] = pack_bits(torch.from_numpy(mask))
        stored[f"{name}{VALUES}"] = torch.from_numpy(bits[mask]).view(tensor.dtype)
        header.append("x".join(map(str, tensor.shape)))
    return stored, {KEY: " ".join(header)}


def decode(stored: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Restore the tensors given to `encode`. Raises ValueError, naming the tensor, for data that
    `encode` can not have written."""
    if KEY not in metadata:
        raise ValueError("it is not of the sparse form")
    version, *shapes = metadata[KEY].split(" ")
    if version != VERSION:
        raise ValueError(f"it is of version {version[:20]!r}, this lorakit reads {VERSION}")
    bitmaps = {name.removesuffix(BITMAP) for name in stored if name.endswith(BITMAP)}
    values = {name.removesuffix(VALUES) for name in stored if name.endswith(VALUES)}
    for name in sorted(bitmaps ^ values):
        raise ValueError(f"`{name}` has no {VALUES if name in bitmaps else BITMAP}")
    for name in sorted(bitmaps & stored.keys()):
        raise ValueError(f"`{name}` is there twice, dense and encoded")
    encoded = sorted(bitmaps)
    if len(shapes) < len(encoded):
        raise ValueError(
            f"`{encoded[len(shapes)]}` has no shape: {len(shapes)} shapes for {len(encoded)}"
            " encoded tensors"
        )
    if len(shapes) > len(encoded):
        last = f", `{encoded[-1]}` the last of them" if encoded else ""
        raise ValueError(f"{len(shapes)} shapes for {len(encoded)} encoded tensors{last}")
    tensors = {
        name: tensor for name, tensor in stored.items() if not name.endswith((BITMAP, VALUES))
    }
    for name, shape in zip(encoded, shapes, strict=True):
        try:
            tensors[name] = _restored(stored[f"{name}{BITMAP}"], stored[f"{name}{VALUES}"], shape)
        except ValueError as error:
            raise ValueError(f"`{name}`: {error}") from error
    return tensors


def _restored(bitmap: Tensor, values: Tensor, shape: str) -> Tensor:
    if not SHAPE.fullmatch(shape):
        raise ValueError(f"{shape[:40]!r} is not a shape")
    if values.dtype not in BITS or values.ndim != 1:
        raise ValueError(f"its values are {list(values.shape)} of {values.dtype}")
    dims = [int(size) for size in shape.split("x")]
    mask = unpack_bits(bitmap, math.prod(dims)).numpy()
    live = values.view(BITS[values.dtype])
    if (count := int(mask.sum())) != len(live):
        raise ValueError(f"its bitmap says {count} values, and there are {len(live)}")
    if int(torch.count_nonzero(live)) != len(live):
        raise ValueError("a zero is among its values")
    bits = torch.zeros(mask.size, dtype=live.dtype)
    bits.numpy()[mask] = live.numpy()
    return bits.view(values.dtype).view(dims)


def save_sparse(
    tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype | None = None
) -> None:
    """Write a file of this form. Raises RunError for a name that the form can not store."""
    try:
        stored, metadata = encode(tensors, dtype)
    except ValueError as error:
        raise RunError(f"`{path}` can not be written: {error}") from error
    save_file(stored, path, metadata=metadata)


def load_sparse(path: Path) -> dict[str, Tensor]:
    """Read the tensors of such a file, bit by bit. Raises RunError for a file that is missing,
    truncated or inconsistent."""
    try:
        with safe_open(path, framework="pt") as file:
            return decode({name: _read(file, name) for name in file.keys()}, file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise RunError(f"`{path}` can not be read: {error}", "Export it again.") from error


def _read(file: Any, name: str) -> Tensor:
    try:
        tensor: Tensor = file.get_tensor(name)
    # types and shapes in a damaged header make torch raise many types
    except Exception as error:
        raise ValueError(
            f"`{name}`: {next(iter(str(error).splitlines()), type(error).__name__)}"
        ) from error
    return tensor


# -- folders ---------------------------------------------------------------------------------------


def write_sparse(
    folder: Path,
    task_model: TaskModel,
    method: Method,
    facts: AdapterFacts,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the form into an existing folder: adapters and heads in `dtype`, float32 by default,
    and a pruned base in its own dtype.

    The masks of the base are left out, since its zeros determine them. With a pruned base, the
    adapters are removed from the model.
    """
    bases = {name: adapter.base for name, adapter in method.adapters.items()}
    masks = {f"{name}.{part}" for name, base in bases.items() for part in base.told_by_weight}
    trained = {
        name: tensor
        for name, tensor in trained_tensors(task_model.model).items()
        if name not in masks
    }
    save_sparse(
        {native_key(name): tensor for name, tensor in trained.items()},
        folder / ADAPTER_FILE,
        dtype or torch.float32,
    )
    config = peft_config(task_model, method, facts.base, facts.revision)
    write_json(folder / CONFIG_FILE, config | {"peft_type": "LORAKIT_SPARSE"})
    write_json(folder / FACTS_FILE, facts.as_json())
    save_tokenizer(task_model.tokenizer, folder)
    if any(base.is_changed for base in bases.values()):
        detach_all(task_model.model, method.adapters)
        weights = {
            name: tensor
            for name, tensor in _own_weights(task_model.model).items()
            if name not in trained
        }
        save_sparse(weights, folder / BASE_FILE)
        task_model.model.config.to_json_file(folder / BASE_CONFIG_FILE)


def load_base(folder: Path) -> Any:
    """Load the pruned base of such a folder as a plain transformers model, with the trained heads,
    all in the base's dtype.

    Raises RunError if the folder holds no base, or one that is damaged or does not fit its
    configuration.
    """
    facts = read_facts(folder)
    weights = load_sparse(folder / BASE_FILE)
    trained = load_sparse(folder / ADAPTER_FILE)
    try:
        config = AutoConfig.from_pretrained(folder / BASE_CONFIG_FILE)
        empty = skeleton(config, _spec(folder, facts), None)
        shapes = {name: tensor.shape for name, tensor in empty.state_dict().items()}
        weights |= {
            name: tensor for key, tensor in trained.items() if (name := own_name(key)) in shapes
        }
        for name in sorted(_own_weights(empty).keys() - weights.keys()):
            raise ValueError(f"`{name}` is missing")
        for name, tensor in weights.items():
            if tensor.shape != shapes.get(name):
                raise ValueError(f"`{name}` is not in the model, or has another shape there")
        with quiet():
            model = type(empty).from_pretrained(
                None, config=config, state_dict=weights, dtype="auto"
            )
        return model.eval()
    except (OSError, ValueError, KeyError) as error:
        raise RunError(
            f"the base in `{folder}` can not be loaded: {error}", "Export it again."
        ) from error


def load_sparse_model(folder: Path) -> tuple[TaskModel, Method]:
    """Load the model of such a folder with its adapters in place, as in the run. A base that is
    not pruned comes from the run's source. Raises RunError or RecipeError for parts that can not be
    read or do not fit."""
    facts = read_facts(folder)
    try:
        spec = _spec(folder, facts)
        config = config_classes()[facts.method["name"]].model_validate(facts.method)
    except (KeyError, ValueError) as error:
        raise RunError(f"`{folder / FACTS_FILE}` is damaged: {error}") from error
    tokenizer = load_tokenizer(Source(str(folder), str(folder), "local", str(folder)), spec)
    if (folder / BASE_FILE).exists():
        model = load_base(folder)
        use_kernels(model)
        task = task_named(spec.task)
        task_model = TaskModel(model, tokenizer, task, task.head_names(model))
    else:
        task_model, _ = load_model(facts.source, spec, tokenizer, facts.labels, "auto")
    method = build_method(config, 0)
    tensors = {own_name(key): tensor for key, tensor in load_sparse(folder / ADAPTER_FILE).items()}
    adapted = [name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A")]
    inject(task_model.model, method, saved_targets(config, adapted))
    train_heads(task_model)
    load_trained(task_model.model, tensors, f"the adapter in `{folder}`")
    task_model.model.eval()
    return task_model, method


def _spec(folder: Path, facts: AdapterFacts) -> ModelSpec:
    return ModelSpec.model_validate({"name_or_path": str(folder), "task": facts.task})


def _own_weights(model: nn.Module) -> dict[str, Tensor]:
    """{name: tensor} of a model's state, with tied tensors once, by their first name."""
    first: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first.setdefault(id(tensor), (name, tensor))
    return dict(first.values())
