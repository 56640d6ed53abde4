"""A merged model as one GGUF file, which llama.cpp and Ollama load.

llama.cpp's convert_hf_to_gguf.py writes the same: the architecture's settings, the tokenizer with
its chat template, and the weights under the names of the gguf package.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorakit.errors import RunError, UsageError
from lorakit.export.gguf.architectures import (
    ARCHITECTURES,
    ELSEWHERE,
    architecture_of,
    model_keys,
    paired_heads,
    rope_parameters,
    side_by_side,
)
from lorakit.export.gguf.tokenizer import tokenizer_keys

FILE = "model.gguf"
Kind = gguf.GGMLQuantizationType
# {--dtype: (type of matrices, general.file_type)}. Vectors, and so norms and biases, are float32.
TYPES = {
    "float32": (Kind.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (Kind.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bfloat16": (Kind.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
Q8_BLOCK = 32


@dataclass(frozen=True)
class About:
    """Facts that the file states of the model: its name, its base's name on the hub, and its
    licence; the last two are None where they are not known."""

    name: str
    base: str | None
    licence: str | None


@dataclass(frozen=True)
class Planned:
    """A file that is to be written: {method of gguf.GGUFWriter without `add_`: value}, and what
    llama.cpp does otherwise than transformers, in sentences."""

    values: dict[str, Any]
    notes: list[str]


def plan_model(model: Any, tokenizer: Any, ends: set[int]) -> Planned:
    """The settings of a model and of its tokenizer. ends: tokens that end a text. Raises UsageError
    for one that llama.cpp does not have, or would compute otherwise."""
    config = model.config
    architecture = architecture_of(config)
    if architecture is None or not architecture.whole:
        known = ", ".join(name for name, one in ARCHITECTURES.items() if one.whole)
        raise UsageError(
            f"models of the architecture `{config.model_type}` can not be written as GGUF",
            f"Those that can: {known}. {ELSEWHERE}",
        )
    values = model_keys(config)
    rows = model.get_input_embeddings().num_embeddings
    read = tokenizer_keys(tokenizer, rows, ends, getattr(config, "bos_token_id", None))
    notes = list(read.notes)
    if values["context_length"] < config.max_position_embeddings:
        notes.append(
            f"llama.cpp does not know the model's sliding window, so the file's context ends with"
            f" it, at {values['context_length']:,} tokens"
        )
    return Planned(values | read.values, notes)


def named_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """(name in the file, tensor as llama.cpp has it) for all weights. Raises UsageError for one
    without a name."""
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(architecture.number, config.num_hidden_layers)
    pairs = paired_heads(config)
    head = model.get_output_embeddings()
    tied = head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    for key, tensor in model.state_dict().items():
        if tied and model.get_submodule(key.rpartition(".")[0]) is head:
            continue  # llama.cpp uses the input embedding where there is no output embedding
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None or not tensor.is_floating_point():
            what = f"GGUF has no name for `{key}` in the architecture {architecture.name}"
            raise UsageError(what, ELSEWHERE)
        last = key.split(".")[-2]
        if last in pairs:
            tensor = side_by_side(tensor, pairs[last])
        if architecture.norm_shift and last.endswith("norm"):
            tensor = tensor.float() + architecture.norm_shift
        yield name, tensor
    if (factors := rope_factors(model)) is not None:
        yield "rope_freqs.weight", factors


def rope_factors(model: Any) -> Tensor | None:
    """Divisors of the frequencies of Llama 3's rotary embedding, [half of a head]; None for
    others."""
    rope = rope_parameters(model.config)
    if rope["rope_type"] != "llama3":
        return None
    scaled = model.base_model.rotary_emb.inv_freq.float().cpu()
    steps = torch.arange(len(scaled), dtype=torch.float32) / len(scaled)
    factors: Tensor = float(rope["rope_theta"]) ** -steps / scaled
    return factors


def kind_of(tensor: Tensor, dtype: str) -> Any:
    """The type that a tensor gets in the file: float16 where a row is not a whole number of
    blocks."""
    if tensor.ndim < 2:
        return Kind.F32
    kind = TYPES[dtype][0]
    return Kind.F16 if kind == Kind.Q8_0 and tensor.shape[-1] % Q8_BLOCK else kind


def write_model(path: Path, model: Any, planned: Planned, about: About, dtype: str) -> int:
    """Write the merged model to the file `path`, one tensor after the other, and read it back.
    Returns the number of matrices that are in float16 since q8_0 can not hold them.

    dtype: a key of TYPES. Raises UsageError as `named_tensors` and for weights that the type can
    not hold, RunError if the file does not hold what was written.
    """
    writer = gguf.GGUFWriter(path, ARCHITECTURES[model.config.model_type].name)
    for method, value in (_general(about, model, dtype) | planned.values).items():
        getattr(writer, f"add_{method}")(value)
    _add_base(writer, about.base)
    other = 0
    for name, tensor in named_tensors(model):
        kind = kind_of(tensor, dtype)
        other += tensor.ndim > 1 and kind != TYPES[dtype][0]
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), kind)
    expected = {key: value.value for key, value in writer.kv_data[0].items()}
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in named_tensors(model):
        writer.write_tensor_data(_packed(name, tensor, kind_of(tensor, dtype)))
    writer.close()
    check_written(path, expected, model, dtype)
    return other


def _general(about: About, model: Any, dtype: str) -> dict[str, Any]:
    count = sum(parameter.numel() for parameter in model.parameters())
    values = {
        "type": gguf.GGUFType.MODEL,
        "name": about.name,
        "size_label": gguf.size_label(count, 0, 0, 0),
        "file_type": TYPES[dtype][1],
        "quantization_version": gguf.GGML_QUANT_VERSION,
        "license": about.licence,
    }
    return {key: value for key, value in values.items() if value is not None}


def _add_base(writer: Any, base: str | None) -> None:
    if base is None:
        return
    owner, _, name = base.rpartition("/")
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, name)
    if owner:
        writer.add_base_model_organization(0, owner)
    writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")


def _packed(name: str, tensor: Tensor, kind: Any) -> NDArray[Any]:
    """The tensor's bytes in the file. Raises UsageError where float16 can not hold its values."""
    values = _values(tensor)
    if kind == Kind.F16 and np.isfinite(values).all() and np.abs(values).max(initial=0) > 65504:
        raise UsageError(f"float16 can not hold the weights `{name}`", "--dtype bfloat16.")
    packed: NDArray[Any] = gguf.quantize(values, kind)
    return np.ascontiguousarray(packed)


def _values(tensor: Tensor) -> NDArray[np.float32]:
    values: NDArray[np.float32] = tensor.detach().cpu().float().numpy()
    return values


def check_written(path: Path, expected: dict[str, Any], model: Any, dtype: str) -> None:
    """Raise RunError unless the file holds these fields {key: value}, and the model's tensors as
    near as their types allow."""
    reader = gguf.GGUFReader(path)
    wrong = [key for key, value in expected.items() if not _same(reader.fields.get(key), value)]
    found = {tensor.name: tensor for tensor in reader.tensors}
    count = 0
    for name, tensor in named_tensors(model):
        count += 1
        there, kind = found.get(name), kind_of(tensor, dtype)
        if (
            there is None
            or there.tensor_type != kind
            or there.shape.tolist() != list(reversed(tensor.shape))
            or not _near(gguf.dequantize(there.data, kind), tensor, kind)
        ):
            wrong.append(name)
    if wrong or count != len(found):
        shown = f": {', '.join(wrong[:3])}" if wrong else ""
        raise RunError(
            f"`{path.name}` does not hold what was written{shown}", "Is the disk in order?"
        )


def _same(found: Any, value: Any) -> bool:
    if found is None:
        return False
    content = found.contents()
    if isinstance(value, float):
        return bool(np.float32(content) == np.float32(value))
    return bool(content == value)


def _near(found: NDArray[Any], tensor: Tensor, kind: Any) -> bool:
    """True if the values are those of `tensor`, rounded as the type does: by PyTorch's own rounding
    where it has the type, else within half a step of each block of 32."""
    given = tensor.detach().cpu().float()
    there = torch.tensor(found, dtype=torch.float32).view(given.shape)
    types = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
    if kind in types:
        return torch.equal(there, given.to(types[kind]).float())
    blocks = given.reshape(-1, Q8_BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    # The scale, largest / 127, is in float16: its own rounding is 2^-11 of a value.
    limit = largest / 127 * 0.5 + largest * 2**-11 + 127 * 2**-25
    return bool(((there.reshape(-1, Q8_BLOCK) - blocks).abs() <= limit).all())
