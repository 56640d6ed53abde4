"""Tensors that a run trains, and the files that hold them: adapter_model.safetensors, in which
adapters and heads have PEFT's key names, and method.safetensors with the method's own tables, if it
has any. A finished run's adapter folder and a checkpoint have the same two."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorakit.adapters.layer import adapters_of
from lorakit.errors import RunError
from lorakit.methods import Method

ADAPTER_FILE = "adapter_model.safetensors"
TABLES_FILE = "method.safetensors"


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


# -- files -----------------------------------------------------------------------------------------


def write_trained(folder: Path, model: nn.Module, method: Method) -> None:
    """Write all that is trained into an existing folder.

    Raises RunError, with nothing written, where a value is not finite.
    """
    trained = trained_tensors(model)
    if bad := not_finite(trained):
        raise RunError(
            f"not saved: values are not finite in {bad}",
            "Most often the learning_rate is too high, or the warm-up too short. What was saved"
            " before is whole.",
        )
    tensors = {native_key(name): tensor for name, tensor in trained.items()}
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    if tables := method.tensors():
        save_file(tables, folder / TABLES_FILE)


def read_trained(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(tensors of adapters and heads by name, the method's tables by name). Raises OSError or
    SafetensorError where they can not be read, ValueError where a value is not finite."""
    saved = load_finite(folder / ADAPTER_FILE)
    tables = load_file(folder / TABLES_FILE) if (folder / TABLES_FILE).exists() else {}
    return {own_name(key): tensor for key, tensor in saved.items()}, tables


def load_finite(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by key. Raises OSError or SafetensorError where they can not be read,
    ValueError where a value is not finite."""
    tensors = load_file(path)
    if bad := not_finite(tensors):
        raise ValueError(f"values are not finite in {bad}")
    return tensors


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """The first of the tensors with values that are infinite or not a number, and how many it has:
    "`….lora_B` (12 of 384)"; empty where all are finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool((finite := tensor.isfinite()).all()):
            return f"`{name}` ({int((~finite).sum())} of {tensor.numel()})"
    return ""


def peft_key(name: str) -> str:
    """PEFT's key of a tensor of the model."""
    return f"base_model.model.{name}"


def native_key(name: str) -> str:
    """Convert `….query.lora_A` to `base_model.model.….query.lora_A.weight`; heads and gates only
    get the prefix."""
    return peft_key(f"{name}.weight" if name.endswith((".lora_A", ".lora_B")) else name)


def own_name(key: str) -> str:
    """Convert `key` back to its name; inverse of `native_key`."""
    name = key.removeprefix(peft_key(""))
    return (
        name.removesuffix(".weight")
        if name.endswith((".lora_A.weight", ".lora_B.weight"))
        else name
    )
