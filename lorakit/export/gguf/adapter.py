"""The adapter as a GGUF file, as llama.cpp reads it with `--lora`.

llama.cpp's convert_lora_to_gguf.py writes the same: one alpha, `adapter.lora.alpha`, which its
runtime divides by the rank of each tensor, and for each layer `blk.N.attn_q.weight.lora_a` [rank,
in] and `.lora_b` [out, rank]. The layers' names are those of the gguf package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from lorakit.errors import RunError, UsageError
from lorakit.export.gguf.architectures import (
    ARCHITECTURES,
    Architecture,
    architecture_of,
    paired_heads,
    side_by_side,
)
from lorakit.export.peft import Portable

FILE = "adapter.gguf"
TYPES = {
    torch.float32: (np.float32, gguf.LlamaFileType.ALL_F32),
    torch.float16: (np.float16, gguf.LlamaFileType.MOSTLY_F16),
}


def gguf_tensors(model: Any, portable: Portable, dtype: torch.dtype) -> dict[str, NDArray[Any]]:
    """{name in the file: tensor} of the adapter. Raises UsageError for a model or a layer that
    llama.cpp's names do not have."""
    config, architecture = model.config.get_text_config(), _architecture(model)
    names = gguf.get_tensor_name_map(architecture.number, config.num_hidden_layers)
    pairs = paired_heads(config)
    tensors = {}
    for module, (a, b) in portable.pairs.items():
        name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if name is None:
            what = f"GGUF has no name for `{module}` in the architecture {architecture.name}"
            raise UsageError(what, "--merge, or train with other target_modules.")
        last = module.rpartition(".")[2]
        if last in pairs:
            b = side_by_side(b, pairs[last])
        for side, factor in (("lora_a", a), ("lora_b", b)):
            kind = TYPES[dtype][0]
            tensors[f"{name}.{side}"] = factor.detach().cpu().float().numpy().astype(kind)
    return tensors


def write_gguf(path: Path, model: Any, portable: Portable, dtype: torch.dtype) -> None:
    """Write the adapter to the file `path`, and read it back. Raises UsageError as `gguf_tensors`,
    and RunError if the file does not hold what was written."""
    tensors = gguf_tensors(model, portable, dtype)
    writer = gguf.GGUFWriter(path, _architecture(model).name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, portable.alpha)
    writer.add_file_type(TYPES[dtype][1])
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    alpha, written = read_gguf(path)
    same = written.keys() == tensors.keys() and np.float32(portable.alpha) == np.float32(alpha)
    if not same or any(not np.array_equal(written[name], tensors[name]) for name in tensors):
        raise RunError(f"`{path.name}` does not hold what was written", "Is the disk in order?")


def read_gguf(path: Path) -> tuple[float, dict[str, NDArray[Any]]]:
    """(alpha, {name: tensor}) of a GGUF LoRA adapter."""
    reader = gguf.GGUFReader(path)
    alpha = reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents()
    return float(alpha), {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def check_gguf(model: Any) -> None:
    """Raise UsageError for an architecture that can not be exported to GGUF."""
    _architecture(model)


def _architecture(model: Any) -> Architecture:
    config = model.config.get_text_config()
    found = architecture_of(config)
    if found is None:
        what = f"adapters of the architecture `{config.model_type}` can not be written as GGUF"
        known = ", ".join(ARCHITECTURES)
        raise UsageError(what, f"--format peft-portable, or one of: {known}.")
    return found
