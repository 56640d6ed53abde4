"""Chains of element-wise operations for bench_compile.py, in a process of their own: each by
torch's operations, by torch.compile, and by lorakit's kernels in C."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit import process

process.take_over()  # before anything imports torch, as the command line does

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional  # noqa: E402

from lorakit.kernels import activations, native, norms, rotary  # noqa: E402
from lorakit.kernels.dropout import fast_dropout  # noqa: E402
from lorakit.models.load import compute_dtype  # noqa: E402

EPS = 1e-6
WARMUP = 5
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCE = {"bf16": 2e-2, "fp32": 1e-5}
LIBRARIES = ("activations", "norms", "dropout", "rotary")
Operation = Callable[..., Any]


@dataclass(frozen=True)
class Chain:
    """One chain. inputs: tensors that get a gradient; constants: tensors that follow them; plain
    and in_c: functions of both. outputs: the number of results, which have the shapes of the first
    inputs."""

    name: str
    inputs: Sequence[Tensor]
    constants: Sequence[Any]
    plain: Operation
    in_c: Operation
    outputs: int = 1


# -- the chains ------------------------------------------------------------------------------------


def gelu(dtype: torch.dtype, p: float) -> Chain:
    return Chain(
        "gelu [800, 1536]", [normal(800, 1536, dtype)], [], functional.gelu, activations.gelu
    )


def silu_mul(dtype: torch.dtype, p: float) -> Chain:
    def plain(gate: Tensor, up: Tensor) -> Tensor:
        return functional.silu(gate) * up

    both = [normal(1600, 1536, dtype), normal(1600, 1536, dtype)]
    return Chain("silu_mul [1600, 1536]", both, [], plain, activations.silu_mul)


def add_layer_norm(dtype: torch.dtype, p: float) -> Chain:
    def plain(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        z = residual + functional.dropout(x, p)
        return functional.layer_norm(z, z.shape[-1:], weight, bias, EPS)

    def in_c(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return norms.add_layer_norm(x, residual, weight, bias, EPS, p)

    both = [normal(800, 384, dtype), normal(800, 384, dtype)]
    name = f"add, {'dropout, ' if p else ''}layer norm [800, 384]"
    return Chain(name, both, [normal(384, dtype), normal(384, dtype)], plain, in_c)


def rms_norm(dtype: torch.dtype, p: float) -> Chain:
    def plain(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)

    def in_c(x: Tensor, weight: Tensor) -> Tensor:
        return norms.rms_norm(x, weight, EPS)

    name = "rms norm [1600, 576]"
    return Chain(name, [normal(1600, 576, dtype)], [normal(576, dtype)], plain, in_c)


def dropout(dtype: torch.dtype, p: float) -> Chain:
    def plain(x: Tensor) -> Tensor:
        return functional.dropout(x, p)

    def in_c(x: Tensor) -> Tensor:
        return fast_dropout(x, p)

    return Chain("dropout [800, 384]", [normal(800, 384, dtype)], [], plain, in_c)


def rotary_embedding(dtype: torch.dtype, p: float) -> Chain:
    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin

    def plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return turned(q, cos[:, None], sin[:, None]), turned(k, cos[:, None], sin[:, None])

    # [1, heads, tokens, head_dim], as a product leaves them: tokens outside heads in memory
    q, k = (normal(1, 1600, heads, 64, dtype).detach().transpose(1, 2) for heads in (9, 3))
    angles = torch.arange(1600)[:, None] * 1e4 ** -torch.linspace(0, 1, 32).repeat(2)
    tables = [angles.cos().to(dtype)[None], angles.sin().to(dtype)[None]]
    both = [q.requires_grad_(), k.requires_grad_()]
    return Chain("rotary, 9 + 3 heads [1600, 64]", both, tables, plain, rotary.faster(plain), 2)


# (chain, probability of dropout)
CHAINS: list[tuple[Callable[[torch.dtype, float], Chain], float]] = [
    (gelu, 0.0),
    (silu_mul, 0.0),
    (add_layer_norm, 0.1),
    (add_layer_norm, 0.0),
    (rms_norm, 0.0),
    (dropout, 0.1),
    (rotary_embedding, 0.0),
]


def normal(*shape: Any) -> Tensor:
    """Draw a tensor that needs a gradient; the last argument is its type."""
    *sizes, dtype = shape
    return torch.randn(sizes).to(dtype).requires_grad_(len(sizes) > 1)


# -- measuring -------------------------------------------------------------------------------------


def measured(options: argparse.Namespace, timing: bool) -> dict[str, Any]:
    """Measure all chains; without `timing` only the seconds of compiling."""
    process.keep_freed_memory()  # as training does
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    started = time.perf_counter()
    if None in [native.load(name) for name in LIBRARIES]:
        raise SystemExit("the kernels in C do not load; `lorakit env` says why")
    found: dict[str, Any] = {"c_s": time.perf_counter() - started, "rows": []}
    # What torch.compile does once in a process is not counted for the first chain.
    trivial = Chain("", [normal(2, 8, torch.float32)], [], torch.neg, torch.neg)
    found["start_s"] = passes(trivial, torch.compile(trivial.plain, dynamic=True))
    own = "bf16" if compute_dtype("auto", torch.device("cpu")) == torch.bfloat16 else "fp32"
    for name in options.dtypes or dict.fromkeys((own, "fp32")):
        for make, p in CHAINS:
            if options.chains and not make.__name__.startswith(tuple(options.chains)):
                continue
            chain = make(DTYPES[name], p)
            torch._dynamo.reset()
            compiled = torch.compile(chain.plain, dynamic=True)
            row = {"chain": chain.name, "dtype": name, "compile_s": passes(chain, compiled)}
            if timing:
                row |= timed(chain, compiled, options.rounds)
                check(make(DTYPES[name], 0.0), TOLERANCE[name])
            found["rows"].append(row)
    return found | {"threads": torch.get_num_threads()}


def timed(chain: Chain, compiled: Operation, rounds: int) -> dict[str, Any]:
    """Milliseconds of each arm and ratios within a round (quartile, median, quartile)."""
    arms = {"eager": chain.plain, "compiled": compiled, "c": chain.in_c}
    names, before = list(arms), [x.detach().clone() for x in chain.inputs]
    # With one thread the processor's time is what other work on the machine disturbs least.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(WARMUP + rounds):
        for place in range(len(arms)):
            name = names[(number + place) % len(arms)]
            took = passes(chain, arms[name], clock)
            restore(chain, before)
            if number >= WARMUP:
                times[name].append(took)
    found: dict[str, Any] = {
        f"{name}_ms": 1000 * statistics.median(took) for name, took in times.items()
    }
    for name in ("compiled", "eager"):
        ratios = [a / b for a, b in zip(times[name], times["c"], strict=True)]
        found[f"{name} / c"] = statistics.quantiles(ratios, n=4)
    return found


def passes(chain: Chain, call: Operation, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one forward and backward pass."""
    grads = [torch.ones_like(x) for x in chain.inputs[: chain.outputs]]
    started = clock()
    torch.autograd.grad(call(*chain.inputs, *chain.constants), chain.inputs, grads)
    return clock() - started


def check(chain: Chain, tolerance: float) -> None:
    """Stop unless torch.compile and C give the results and gradients of torch's operations."""
    before = [x.detach().clone() for x in chain.inputs]
    exact = results(chain, chain.plain)
    compiled = torch.compile(chain.plain, dynamic=True)
    for name, call in (("torch.compile", compiled), ("C", chain.in_c)):
        for ours, one in zip(results(chain, call), exact, strict=True):
            error = float((ours - one).norm() / one.norm())
            if not error <= tolerance:
                raise SystemExit(f"{chain.name} by {name} differs by {error:.1e}")
        restore(chain, before)


def results(chain: Chain, call: Operation) -> list[Tensor]:
    """Outputs and gradients in float32, in copies."""
    y = call(*chain.inputs, *chain.constants)
    ys = y if isinstance(y, tuple) else (y,)
    kept = [one.detach().float().clone() for one in ys]
    rng = torch.Generator().manual_seed(0)
    grads = [torch.randn(one.shape, generator=rng).to(one.dtype) for one in ys]
    return [*kept, *(grad.float() for grad in torch.autograd.grad(ys, chain.inputs, grads))]


def restore(chain: Chain, values: Sequence[Tensor]) -> None:
    """Write these values into the inputs, which a kernel may have overwritten."""
    with torch.no_grad():
        for x, value in zip(chain.inputs, values, strict=True):
            x.copy_(value)
