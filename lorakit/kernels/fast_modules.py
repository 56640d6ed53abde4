"""Replacement of the forward passes of a model's modules by kernels: activations, gated
feed-forward layers, norms and dropout."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import activations

from lorakit.kernels.activations import gelu, silu, silu_mul
from lorakit.kernels.dropout import FastDropout, use_fast_dropout
from lorakit.kernels.norms import add_layer_norm, layer_norm, rms_norm
from lorakit.kernels.optimisation import Optimisation, Unsupported, attempt

log = logging.getLogger("lorakit")

Fast = Callable[..., Tensor]  # (module, its one or two inputs)

ACTIVATIONS: dict[type[nn.Module], str] = {
    activations.GELUActivation: "gelu",
    activations.NewGELUActivation: "gelu_tanh",
    activations.GELUTanh: "gelu_tanh",
    activations.SiLUActivation: "silu",
    nn.SiLU: "silu",
}
# size of the random input on which a kernel must agree with the module it replaces
PROBE_ROWS, PROBE_WIDTH = 3, 16


def use_fast_elementwise(model: nn.Module) -> list[str]:
    """Let the model's activations, gated feed-forward layers, norms and dropouts use these kernels
    on the CPU. Returns the names of the changed modules.

    The modules themselves stay: only `forward` of the instance changes (and nn.Dropout becomes its
    subclass FastDropout). A module that has the name or the attributes of a known one but computes
    something else is left alone.
    """
    changed = use_fast_dropout(model)
    verified: dict[tuple[Any, ...], bool] = {}
    for name, module in model.named_modules():
        fast = _fast_forward(module)
        if (
            fast is None
            or "forward" in vars(module)
            or any(p.device.type != "cpu" for p in module.parameters())
        ):
            continue
        # One module of each class and settings is verified, as a feed-forward layer may hold a
        # gigabyte.
        settings = sorted(
            (n, v)
            for n, v in vars(module).items()
            if isinstance(v, bool | int | float | str) and n != "training"
        )
        kind, optimisation = (type(module), *settings), FastForward(module, fast)
        if kind not in verified:
            reason = attempt(optimisation)
            verified[kind] = reason is None
            if reason:
                log.debug("%s keeps its own forward: %s", name, reason)
        elif verified[kind]:
            optimisation.install()
        if verified[kind]:
            changed.append(name)
    return changed


class FastForward(Optimisation):
    """Replacement of a module's forward by a kernel, for its usual arguments on the CPU and
    outside torch.compile."""

    trouble = "it puts its parts together in another way"

    def __init__(self, module: nn.Module, fast: Fast) -> None:
        self.module, self.fast = module, fast

    def install(self) -> None:
        self.module.forward = MethodType(_on_cpu(self.fast), self.module)

    @torch.no_grad()
    def verify(self) -> None:
        """Compare with the module's own forward on random input, up to rounding."""
        module, two = self.module, self.fast is _output
        like = (
            module.get_parameter("dense.weight")
            if two
            else next(module.parameters(), torch.empty(PROBE_WIDTH))
        )
        rng = torch.Generator().manual_seed(0)
        widths = (like.shape[-1], like.shape[0])[: _inputs(self.fast)]
        inputs = [
            4 * torch.randn(PROBE_ROWS, width, generator=rng).to(like.dtype) for width in widths
        ]
        mode = module.training
        try:
            theirs = type(module).forward(module.eval(), *inputs)
            ours = module(*inputs)
        except (TypeError, RuntimeError, ValueError) as error:
            raise Unsupported(self.trouble) from error
        finally:
            module.train(mode)
        roundings = 4 * torch.finfo(theirs.dtype).eps
        if ours.dtype != theirs.dtype or not (ours - theirs).norm() <= roundings * theirs.norm():
            raise Unsupported("it gives something else")

    def undo(self) -> None:
        vars(self.module).pop("forward", None)


def _fast_forward(module: nn.Module) -> Fast | None:
    """The candidate for the module's forward, or None. It is chosen by the exact class, or by name
    and attributes, since each family of models has its own classes of RMS norms, gated feed-forward
    layers and outputs of blocks."""
    name, parts = type(module).__name__, dict(module.named_children())
    if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
        return lambda module, x: layer_norm(x, module.weight, module.bias, float(module.eps))
    if name.endswith("RMSNorm") and isinstance(getattr(module, "weight", None), nn.Parameter):
        eps = next(
            (
                eps
                for eps in ("variance_epsilon", "eps")
                if isinstance(getattr(module, eps, None), float)
            ),
            None,
        )
        return (
            None
            if eps is None
            else lambda module, x: rms_norm(x, module.weight, getattr(module, eps))
        )
    if name.endswith("MLP") and type(parts.get("act_fn")) in (nn.SiLU, activations.SiLUActivation):
        layers = [parts.get(layer) for layer in ("gate_proj", "up_proj", "down_proj")]
        return _gated_mlp if all(type(layer) is nn.Linear for layer in layers) else None
    if name.endswith("Output") and {part: type(parts[part]) for part in sorted(parts)} == OUTPUT:
        return _output if parts["LayerNorm"].weight is not None else None
    kernel = activation_kernel(module)
    return None if kernel is None else lambda module, x: _activation(x, kernel)


def activation_kernel(module: nn.Module) -> str | None:
    """The name of the kernel that computes the module's activation, or None."""
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return ACTIVATIONS.get(type(module))


def _activation(x: Tensor, kernel: str) -> Tensor:
    return silu(x) if kernel == "silu" else gelu(x, "tanh" if kernel == "gelu_tanh" else "none")


def _gated_mlp(module: Any, x: Tensor) -> Tensor:
    y: Tensor = module.down_proj(silu_mul(module.gate_proj(x), module.up_proj(x)))
    return y


# Parts of BERT's output module, the last of a block.
OUTPUT: dict[str, type[nn.Module]] = {
    "LayerNorm": nn.LayerNorm,
    "dense": nn.Linear,
    "dropout": FastDropout,
}


def _output(module: Any, x: Tensor, residual: Tensor) -> Tensor:
    norm, p = module.LayerNorm, module.dropout.p if module.dropout.training else 0.0
    return add_layer_norm(module.dense(x), residual, norm.weight, norm.bias, float(norm.eps), p)


def _on_cpu(fast: Fast) -> Fast:
    """Make forward(module, x), which calls `fast` on the CPU, and the forward of the module's
    class on other devices, for other arguments and within torch.compile."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        simple = len(args) == _inputs(fast) and not kwargs and args[0].device.type == "cpu"
        simple = simple and not torch.compiler.is_compiling()
        result: Tensor = fast(self, *args) if simple else type(self).forward(self, *args, **kwargs)
        return result

    return forward


def _inputs(fast: Fast) -> int:
    return 2 if fast is _output else 1
