"""CPU kernels for the operations between a training step's matrix products: activations, softmax, norms, cross-entropy.

Each is one pass over memory in C (csrc/elementwise.c) where torch takes several, computed in float32 whatever the type of the
tensors. The kernels take contiguous bfloat16 and float32 tensors on the CPU; for everything else, and where there is no compiler,
torch's own operations do the same. Neither form can be differentiated twice.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import activations

from lorakit.kernels.dropout import (
    FastDropout,
    draw_seed,
    fast_dropout,
    is_native,
    keep_mask,
    levels_dropped,
    run_native,
    use_fast_dropout,
)

LONGEST = 2**16  # keys of one row of scores that the kernel in C keeps on its stack


def _is_bf16(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16


# ---- activations


def activation_in_c(name: str, x: Tensor) -> Tensor:
    """The activation of that name in csrc/elementwise.c, without autograd; x contiguous."""
    y = torch.empty_like(x)
    run_native(name, x, y, x.numel(), _is_bf16(x))
    return y


def activation_backward_in_c(name: str, x: Tensor, grad_y: Tensor, grad_x: Tensor) -> None:
    """Fills grad_x, which may be x or grad_y."""
    run_native(f"{name}_backward", x, grad_y, grad_x, x.numel(), _is_bf16(x))


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.name = name
        return activation_in_c(name, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        activation_backward_in_c(ctx.name, x, grads[0].contiguous(), grad_x)
        return grad_x, None


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """x Φ(x), or its tanh form with approximate="tanh" (Hendrycks & Gimpel, arXiv 1606.08415, section 2). Any shape."""
    if not is_native(x):
        return functional.gelu(x, approximate=approximate)
    y: Tensor = _Activation.apply(x, "gelu_tanh" if approximate == "tanh" else "gelu")  # type: ignore[no-untyped-call]
    return y


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x)) (Hendrycks & Gimpel, arXiv 1606.08415, section 2). Any shape."""
    if not is_native(x):
        return functional.silu(x)
    y: Tensor = _Activation.apply(x, "silu")  # type: ignore[no-untyped-call]
    return y


def silu_mul_in_c(gate: Tensor, up: Tensor) -> Tensor:
    """`silu_mul` of [rows, width] whose rows are contiguous, without autograd."""
    y = gate.new_empty(gate.shape)
    run_native("silu_mul", gate, up, y, *gate.shape, gate.stride(0), up.stride(0), _is_bf16(gate))
    return y


def silu_mul_backward_in_c(gate: Tensor, up: Tensor, grad_y: Tensor, grad_gate: Tensor, grad_up: Tensor) -> None:
    """Fills the gradients of gate and up [rows, width], of equal strides; they may be gate and up themselves."""
    strides = (gate.stride(0), up.stride(0), grad_gate.stride(0))
    run_native("silu_mul_backward", gate, up, grad_y, grad_gate, grad_up, *gate.shape, *strides, _is_bf16(gate))


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu_mul_in_c(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_y = grads[0].contiguous()
        # Side by side: whoever made gate and up as one product takes the two gradients as one.
        grad_gate, grad_up = grad_y.new_empty(len(grad_y), 2 * grad_y.shape[1]).chunk(2, 1)
        silu_mul_backward_in_c(gate, up, grad_y, grad_gate, grad_up)
        return grad_gate, grad_up


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both [..., width] (Shazeer, arXiv 2002.05202, eq. 6). They may be halves of one tensor [..., 2 width]."""
    rows = [_rows(x) for x in (gate, up)] if gate.shape == up.shape else [None, None]
    if rows[0] is None or rows[1] is None or not is_native(rows[0][:0], rows[1][:0]):
        return functional.silu(gate) * up
    y: Tensor = _SiluMul.apply(rows[0], rows[1])  # type: ignore[no-untyped-call]
    return y.view(gate.shape)


def _rows(x: Tensor) -> Tensor | None:
    """x [..., width] as a view [rows, width] whose rows are contiguous, or None where there is none."""
    if x.dim() == 0 or x.numel() == 0 or x.stride(-1) != 1:
        return None
    try:
        return x.view(-1, x.shape[-1])
    except RuntimeError:
        return None


# ---- softmax of attention scores


def softmax_forward(scores: Tensor, keys: Tensor, causal: bool, p: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(the weights after dropout, those before it) of attention scores [rows, heads, queries, keys_longest], no autograd.

    `scores` is overwritten with the weights before dropout, and without dropout the two are one tensor. keys [rows] int32: how
    many keys of each row are real; the others weigh exactly 0, and a query without keys has only zeros. causal: query i sees the
    keys up to i + keys_longest - queries. Dropout with probability 0 <= p < 1 is decided by the seed (`draw_seed`).
    """
    if _softmax_is_native(scores, keys):
        dropped = torch.empty_like(scores) if p else scores
        run_native("softmax_forward", scores, dropped if p else None, keys, *_softmax_options(scores, causal, p, seed))
        return dropped, scores
    unseen = ~_seen(scores, keys, causal)
    raw = scores.float().masked_fill(unseen, -torch.inf)
    exact = raw.softmax(-1).masked_fill(unseen | (raw == -torch.inf).all(-1, keepdim=True), 0)
    return (exact * _drop_factor(scores, p, seed)).to(scores.dtype) if p else scores.copy_(exact), scores.copy_(exact)


def softmax_backward(weights: Tensor, grad: Tensor, keys: Tensor, causal: bool, p: float = 0.0, seed: int = 0) -> Tensor:
    """The gradient of the scores, from the weights before dropout and the gradient of those after it, which it overwrites.

    The other arguments are those of `softmax_forward`. With g the gradient of the weights before dropout: w (g - sum(w g)).
    """
    if _softmax_is_native(weights, keys) and is_native(weights, grad):
        run_native("softmax_backward", weights, grad, keys, *_softmax_options(weights, causal, p, seed))
        return grad
    before = grad.float() * _drop_factor(weights, p, seed) if p else grad.float()
    before = before.masked_fill(~_seen(weights, keys, causal), 0)
    exact = weights.float()
    return grad.copy_(exact * (before - (exact * before).sum(-1, keepdim=True)))


def _softmax_is_native(scores: Tensor, keys: Tensor) -> bool:
    return 0 < scores.shape[-1] <= LONGEST and is_native(scores) and keys.dtype == torch.int32 and keys.is_contiguous()


def _softmax_options(scores: Tensor, causal: bool, p: float, seed: int) -> tuple[int | float, ...]:
    return *scores.shape, causal, seed, *levels_dropped(p), _is_bf16(scores)


def _seen(scores: Tensor, keys: Tensor, causal: bool) -> Tensor:
    """[rows, 1, 1 or queries, keys_longest], True where a query sees a key."""
    queries, longest = scores.shape[-2:]
    place = torch.arange(longest, device=scores.device)
    seen = place < keys.view(-1, 1, 1, 1)
    return seen & (place <= torch.arange(longest - queries, longest, device=scores.device)[:, None]) if causal else seen


def _drop_factor(scores: Tensor, p: float, seed: int) -> Tensor:
    """Factor by which dropout multiplies the weights, 0 or 1 / (1 - p); float32, of scores' shape."""
    mask, kept = keep_mask(scores.shape, p, torch.Generator().manual_seed(seed))
    return mask.to(scores.device).float().div_(kept)


# ---- norms


def rms_norm_in_c(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(`rms_norm` of x, 1 / the root of each row's mean square) without autograd; x is contiguous, the weight float32."""
    y, rstd = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    run_native("rms_norm", x, weight, y, rstd, rstd.numel(), x.shape[-1], eps, _is_bf16(x))
    return y, rstd


def rms_norm_backward_in_c(
    x: Tensor, weight: Tensor, grad_y: Tensor, rstd: Tensor, grad_x: Tensor, residual: Tensor | None = None
) -> None:
    """Fills grad_x, which may be grad_y, with the gradient of x, plus the residual; all contiguous."""
    run_native("rms_norm_backward", x, weight, grad_y, residual, grad_x, rstd, rstd.numel(), x.shape[-1], _is_bf16(x))


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = rms_norm_in_c(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, weight, rstd = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        rms_norm_backward_in_c(x, weight, grads[0].contiguous(), rstd, grad_x)
        return grad_x, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * (x / sqrt(mean(x²) + eps)) over the last dimension (Zhang & Sennrich, arXiv 1910.07467, eq. 4).

    x [..., width], weight [width]. As in transformers' Llama: normalised in float32, cast to x's type, then times the weight.
    """
    if weight.dtype == x.dtype and is_native(x, weight) and not _trained(weight):
        y: Tensor = _RmsNorm.apply(x, weight.float(), eps)  # type: ignore[no-untyped-call]
        return y
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        y, statistics = torch.empty_like(x), torch.empty(2, *x.shape[:-1])
        rows, width = statistics[0].numel(), x.shape[-1]
        run_native("layer_norm", x, weight, bias, y, statistics[0], statistics[1], rows, width, eps, _is_bf16(x))
        ctx.save_for_backward(x, weight, statistics)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight, (mean, rstd) = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        grad_y = grads[0].contiguous()
        run_native("layer_norm_backward", x, weight, grad_y, grad_x, mean, rstd, mean.numel(), x.shape[-1], _is_bf16(x))
        return grad_x, None, None, None


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """weight * (x - mean) / sqrt(variance + eps) + bias over the last dimension (Ba et al., arXiv 1607.06450, eq. 4).

    x [..., width], weight and bias [width] or None; weight and bias may be float32 where x is not.
    """
    if weight is None or _trained(weight, bias) or not is_native(x):
        return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    shift = None if bias is None else bias.float()
    y: Tensor = _LayerNorm.apply(x, weight.float(), shift, eps)  # type: ignore[no-untyped-call]
    return y


Drop = tuple[int, int, float]  # (seed, of 65536 levels how many are dropped, the factor for what is kept)


def add_layer_norm_in_c(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, drop: Drop, z: Tensor
) -> tuple[Tensor, Tensor]:
    """(`add_layer_norm`, mean and 1 / deviation of each row [2, rows]) without autograd, of contiguous tensors; fills z, which
    may be x, with what is normed. Weight and bias in float32."""
    y, statistics = torch.empty_like(x), x.new_empty(2, *x.shape[:-1], dtype=torch.float32)
    options = statistics[0].numel(), x.shape[-1], eps, *drop, _is_bf16(x)
    run_native("add_layer_norm", x, residual, weight, bias, z, y, statistics[0], statistics[1], *options)
    return y, statistics


def add_layer_norm_backward_in_c(
    z: Tensor, weight: Tensor, grad_y: Tensor, statistics: Tensor, drop: Drop
) -> tuple[Tensor, Tensor]:
    """The gradients of (the residual, x); one and the same without dropout."""
    grad_z = torch.empty_like(z)
    grad_x = torch.empty_like(z) if drop[1] else grad_z
    (mean, rstd), options = statistics, (z.numel() // z.shape[-1], z.shape[-1], *drop, _is_bf16(z))
    run_native("add_layer_norm_backward", z, weight, grad_y, grad_z, grad_x, mean, rstd, *options)
    return grad_z, grad_x


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, p: float) -> Tensor:
        z, ctx.drop = torch.empty_like(x), (draw_seed() if p else 0, *levels_dropped(p))
        y, statistics = add_layer_norm_in_c(x, residual, weight, bias, eps, ctx.drop, z)
        ctx.save_for_backward(z, weight, statistics)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, statistics = ctx.saved_tensors
        grad_z, grad_x = add_layer_norm_backward_in_c(z, weight, grads[0].contiguous(), statistics, ctx.drop)
        return grad_x, grad_z, None, None, None, None


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, p: float = 0.0) -> Tensor:
    """`layer_norm` of residual + dropout(x), both [..., width]; p is the probability of the dropout."""
    if x.shape != residual.shape or _trained(weight, bias) or not is_native(x, residual):
        return layer_norm(residual + fast_dropout(x, p), weight, bias, eps)
    shift = None if bias is None else bias.float()
    y: Tensor = _AddLayerNorm.apply(x, residual, weight.float(), shift, eps, p)  # type: ignore[no-untyped-call]
    return y


def _trained(*parameters: Tensor | None) -> bool:
    """True if a gradient for any of them is wanted, which the kernels do not give."""
    return torch.is_grad_enabled() and any(parameter is not None and parameter.requires_grad for parameter in parameters)


# ---- cross-entropy


def cross_entropy_tile(logits: Tensor, maxima: Tensor, sums: Tensor) -> Tensor:
    """One tile of an online softmax over the vocabulary (Milakov & Gimelshein, arXiv 1805.02867, algorithm 3), no autograd.

    logits [tokens, tile] are overwritten with exp(logit - new maximum); maxima and sums [tokens] float32, at first -inf and 0,
    are updated. Returns exp(old maximum - new maximum) [tokens], the factor for whatever was accumulated with the old maxima.
    """
    if is_native(logits) and is_native(maxima, sums) and maxima.dtype == torch.float32:
        factors = torch.empty_like(maxima)
        run_native("cross_entropy_tile", logits, maxima, sums, factors, *logits.shape, _is_bf16(logits))
        return factors
    wide = logits.float()
    tops = torch.maximum(maxima, wide.amax(-1))
    base = tops.masked_fill(tops == -torch.inf, 0)  # nothing but -inf so far: exp(-inf), not exp(inf - inf)
    exact = wide.sub_(base[:, None]).exp_()
    factors = (maxima - base).exp_()
    sums.mul_(factors).add_(exact.sum(-1))
    maxima.copy_(tops)
    logits.copy_(exact)
    return factors


# ---- the modules of a model

Fast = Callable[..., Tensor]  # (module, its one or two inputs)

ACTIVATIONS: dict[type[nn.Module], str] = {
    activations.GELUActivation: "gelu",
    activations.NewGELUActivation: "gelu_tanh",
    activations.GELUTanh: "gelu_tanh",
    activations.SiLUActivation: "silu",
    nn.SiLU: "silu",
}
PROBE_ROWS, PROBE_WIDTH = 3, 16  # of random input, on which a kernel must agree with the module that it stands in for


def use_fast_elementwise(model: nn.Module) -> list[str]:
    """Let the model's activations, gated feed-forward layers, norms and dropouts use these kernels on the CPU.

    The modules stay what they are: only `forward` of the instance changes (and nn.Dropout becomes its subclass FastDropout).
    What is not known by its exact class is changed only if it gives what its own forward gives on random input, so that a
    class which means something else by its name or attributes is left alone. Returns the names of the modules changed.
    """
    changed = use_fast_dropout(model)
    agrees: dict[tuple[Any, ...], bool] = {}
    for name, module in model.named_modules():
        fast = _fast_forward(module)
        if fast is None or "forward" in vars(module) or any(p.device.type != "cpu" for p in module.parameters()):
            continue
        # One of a kind is tried: those of a class whose settings are the same. A feed-forward layer may hold a gigabyte.
        settings = sorted((n, v) for n, v in vars(module).items() if isinstance(v, bool | int | float | str) and n != "training")
        kind = type(module), *settings
        if kind not in agrees:
            agrees[kind] = _agrees(module, fast)
        if agrees[kind]:
            module.forward = types.MethodType(_on_cpu(fast), module)
            changed.append(name)
    return changed


def _fast_forward(module: nn.Module) -> Fast | None:
    """Candidate for the module's forward, or None: chosen by its exact class, or by name and attributes, as each family of models
    has its own RMS norm, its own gated feed-forward layer and its own end of a block."""
    name, parts = type(module).__name__, dict(module.named_children())
    if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
        return lambda module, x: layer_norm(x, module.weight, module.bias, float(module.eps))
    if name.endswith("RMSNorm") and isinstance(getattr(module, "weight", None), nn.Parameter):
        eps = next((eps for eps in ("variance_epsilon", "eps") if isinstance(getattr(module, eps, None), float)), None)
        return None if eps is None else lambda module, x: rms_norm(x, module.weight, getattr(module, eps))
    if name.endswith("MLP") and type(parts.get("act_fn")) in (nn.SiLU, activations.SiLUActivation):
        layers = [parts.get(layer) for layer in ("gate_proj", "up_proj", "down_proj")]
        return _gated_mlp if all(type(layer) is nn.Linear for layer in layers) else None
    if name.endswith("Output") and {part: type(parts[part]) for part in sorted(parts)} == OUTPUT:
        return _output if parts["LayerNorm"].weight is not None else None
    kernel = activation_kernel(module)
    return None if kernel is None else lambda module, x: _activation(x, kernel)


def activation_kernel(module: nn.Module) -> str | None:
    """The name of the kernel that does what the module does."""
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return ACTIVATIONS.get(type(module))


def _activation(x: Tensor, kernel: str) -> Tensor:
    return silu(x) if kernel == "silu" else gelu(x, "tanh" if kernel == "gelu_tanh" else "none")


def _gated_mlp(module: Any, x: Tensor) -> Tensor:
    y: Tensor = module.down_proj(silu_mul(module.gate_proj(x), module.up_proj(x)))
    return y


# BERT's end of a block.
OUTPUT: dict[str, type[nn.Module]] = {"LayerNorm": nn.LayerNorm, "dense": nn.Linear, "dropout": FastDropout}


def _output(module: Any, x: Tensor, residual: Tensor) -> Tensor:
    norm, p = module.LayerNorm, module.dropout.p if module.dropout.training else 0.0
    return add_layer_norm(module.dense(x), residual, norm.weight, norm.bias, float(norm.eps), p)


def _on_cpu(fast: Fast) -> Fast:
    """forward(module, x): fast on the CPU, that of the module's class elsewhere, for other arguments and within torch.compile."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        simple = len(args) == _inputs(fast) and not kwargs and args[0].device.type == "cpu"
        simple = simple and not torch.compiler.is_compiling()
        result: Tensor = fast(self, *args) if simple else type(self).forward(self, *args, **kwargs)
        return result

    return forward


def _inputs(fast: Fast) -> int:
    return 2 if fast is _output else 1


@torch.no_grad()
def _agrees(module: nn.Module, fast: Fast) -> bool:
    """True if fast gives what the module gives, but for roundings, on random input."""
    like = module.get_parameter("dense.weight") if fast is _output else next(module.parameters(), torch.empty(PROBE_WIDTH))
    rng = torch.Generator().manual_seed(0)
    widths = (like.shape[-1], like.shape[0])[: _inputs(fast)]
    inputs = [4 * torch.randn(PROBE_ROWS, width, generator=rng).to(like.dtype) for width in widths]
    mode = module.training
    try:
        ours, theirs = fast(module.eval(), *inputs), module(*inputs)
    except Exception:  # a module that has the parts of a known one and puts them together in another way
        return False
    finally:
        module.train(mode)
    roundings = 4 * torch.finfo(theirs.dtype).eps
    return ours.dtype == theirs.dtype and bool((ours - theirs).norm() <= roundings * theirs.norm())
