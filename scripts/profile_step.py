"""Profile of a training step: its time by kind of operation, compared with the time that the
arithmetic alone would take.

    python scripts/profile_step.py RECIPE [key=value …] [--steps 10] [--limit]

Runs the real loop, first unchanged, for the speed, then under torch.profiler. The self time of
every operation is assigned to one kind: by the module or call that it runs in (backward: by that of
its forward); else, for matrix products, by shape (with a dimension of the vocabulary: head;
batched: attention; with a dimension that is at most four times the largest rank and is no layer's:
low-rank; else base); else by its name or that of an enclosing operation. Time outside all
operations is Python, and kernels of lorakit's that the profiler does not know. GFLOP/s refer to
products with known shapes, padding included, not to those by AMX kernels. Profiling slows a step
down, so the shares are more reliable than the milliseconds. CPU only. Prints a table and one JSON
line.

--limit prints only the arithmetic, as one JSON line: FLOP per token, and FLOP per second of its
matrix products (arithmetic.py says what is counted).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arithmetic import limit
from step_time import Started, start
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from lorakit import process
from lorakit.adapters.base import in_out
from lorakit.adapters.layer import Adapter
from lorakit.kernels.dropout import FastDropout
from lorakit.kernels.in_c import Library
from lorakit.training.loop import StepReport

BASE, LOW_RANK, ATTENTION, HEAD = "base products", "low-rank products", "attention", "head and loss"
NORMS, ACTIVATIONS, DROPOUT, OPTIMIZER = "norms", "activations", "dropout", "optimizer"
COPIES, OTHER, PYTHON = "copies and casts", "other operations", "Python, own kernels"
KINDS = (
    BASE,
    LOW_RANK,
    ATTENTION,
    HEAD,
    NORMS,
    ACTIVATIONS,
    DROPOUT,
    OPTIMIZER,
    COPIES,
    OTHER,
    PYTHON,
)
# {kind: pattern of operation names}; the first match counts. lorakit's autograd functions are
# operations with the names of their classes.
NAMES = {
    # AMX kernels, in which the low-rank product is a few more steps of the base's
    BASE: r"_Native(Lora|Frozen)Linear",
    DROPOUT: r"dropout|bernoulli",
    HEAD: r"cross_?entropy|log_?softmax|nll_?loss|mse_?loss",
    ATTENTION: r"softmax|attention|rotary",
    NORMS: r"norm|rsqrt",
    ACTIVATIONS: r"gelu|silu|relu|tanh|sigmoid|activation",
    OPTIMIZER: r"adam|_foreach",
}
COPYING = (
    r"aten::(.*copy|clone|contiguous|cat|fill_|.*zero|.*empty|.*to$|gather|.*index"
    r"|repeat_interleave|expand)"
)
MODULES = {NORMS: r"Norm$", ACTIVATIONS: r"Activation|GELU|SiLU|Tanh|ReLU", ATTENTION: r"Rotary"}
PRODUCTS = {
    "aten::mm": 0,
    "aten::addmm": 1,
    "aten::addmm_": 1,
    "aten::bmm": 0,
    "aten::baddbmm": 1,
    "aten::baddbmm_": 1,
}
LABEL = "lorakit: "


def main() -> None:
    process.take_over()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument(
        "--limit", action="store_true", help="only what the arithmetic alone would take"
    )
    options = parser.parse_intermixed_args()
    if options.limit:
        print(json.dumps(limit(options.recipe, options.overrides)))
        return
    started = start(
        options.recipe,
        [*options.overrides, f"train.max_steps={options.warmup + 2 * options.steps}"],
    )
    if started.session.task_model.device.type != "cpu":
        parser.error("on a GPU operations return before they are done: use a profiler for it")
    list(itertools.islice(started.steps, options.warmup))
    plain = list(itertools.islice(started.steps, options.steps))
    label(started)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        profiled = list(started.steps)
    show(
        breakdown(started, profiler.events(), profiled),
        plain,
        profiled,
        limit(options.recipe, options.overrides),
    )


# -- where the time goes ---------------------------------------------------------------------------


def label(started: Started) -> None:
    """Wrap modules and calls of known kinds in a profiler label."""
    task_model = started.session.task_model
    for name, module in task_model.model.named_modules():
        kinds = [
            kind for kind, pattern in MODULES.items() if re.search(pattern, type(module).__name__)
        ]
        if isinstance(module, nn.Dropout | FastDropout):
            kinds = [DROPOUT]
        if name in task_model.heads:
            kinds = [HEAD]
        if kinds and not isinstance(module, Adapter):
            module.forward = labelled(module.forward, kinds[0])  # type: ignore[method-assign]
    # Kernels in C, which the operation of a whole block calls in turn.
    Library.call = labelled_by_name(Library.call)  # type: ignore[method-assign]
    for name in ("clip_grad_norm", "step", "zero_grad"):
        setattr(started.optimizer, name, labelled(getattr(started.optimizer, name), OPTIMIZER))
    for name in ("before_step", "after_step"):
        setattr(
            started.session.method, name, labelled(getattr(started.session.method, name), OPTIMIZER)
        )


def labelled(call: Callable[..., Any], kind: str) -> Callable[..., Any]:
    def wrapped(*arguments: Any, **settings: Any) -> Any:
        with record_function(LABEL + kind):
            return call(*arguments, **settings)

    return wrapped


LIBRARIES = {"linear": BASE, "masks": OPTIMIZER} | dict.fromkeys(
    ("attention", "attention_tiles"), ATTENTION
)


def labelled_by_name(call: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(library: Library, name: str, *arguments: Any) -> Any:
        kind = LIBRARIES.get(library.name) or named(name) or OTHER
        return labelled(call, kind)(library, name, *arguments)

    return wrapped


def breakdown(started: Started, events: Any, reports: list[StepReport]) -> dict[str, Any]:
    """Compute {kind: milliseconds per step}, {kind: FLOP per step} of products, and the names with
    the most time of the last kinds."""
    model, adapters = started.session.task_model.model, started.session.method.adapters.values()
    ranks = range(4 * max(len(adapter.effective()[0]) for adapter in adapters) + 1)
    low = set(ranks).difference(*(in_out(adapter.base) for adapter in adapters))
    vocabulary = model.config.get_text_config().vocab_size
    # By autograd's sequence number of the forward operation. An operation that makes no node has
    # the number of the next one, so the last counts.
    labels = {
        event.sequence_nr: within(event)
        for event in events
        if event.sequence_nr >= 0 and event.scope == 0
    }
    milliseconds: Counter[str] = Counter()
    flop: Counter[str] = Counter()
    names: dict[str, Counter[str]] = defaultdict(Counter)
    for event in events:
        own = event.self_cpu_time_total / 1000 / len(reports)
        sizes = product_sizes(event)
        kind = within(event, labels) or (
            by_shape(sizes, low, vocabulary) if sizes else by_name(event)
        )
        milliseconds[kind] += own
        flop[kind] += 2 * math.prod(sizes) / len(reports) if sizes else 0
        names[kind][event.name] += own
    whole = 1000 * sum(report.seconds for report in reports) / len(reports)
    milliseconds[PYTHON] += whole - sum(milliseconds.values())
    top = {kind: dict(names[kind].most_common(6)) for kind in (COPIES, OTHER, PYTHON)}
    return {"milliseconds": milliseconds, "flop": flop, "names": top}


def within(event: Any, labels: dict[int, str | None] | None = None) -> str | None:
    """The kind of the innermost label around an event or, for a backward event, around its forward
    operation."""
    while event is not None:
        if event.name.startswith(LABEL):
            return str(event.name[len(LABEL) :])
        if labels and event.scope == 1 and (kind := labels.get(event.sequence_nr)):
            return kind
        event = event.cpu_parent
    return None


def product_sizes(event: Any) -> list[int]:
    """The sizes [batch,] m, k, n of a matrix product; [] for other operations."""
    if event.name not in PRODUCTS:
        return []
    a, b = event.input_shapes[PRODUCTS[event.name] :][:2]
    return [*a, b[-1]]


def by_shape(sizes: list[int], low: set[int], vocabulary: int) -> str:
    if len(sizes) == 4:
        return ATTENTION
    if vocabulary in sizes:
        return HEAD
    return LOW_RANK if min(sizes) in low else BASE


def by_name(event: Any) -> str:
    around = event
    while around is not None:
        if kind := named(around.name):
            return kind
        around = around.cpu_parent
    if re.match(COPYING, event.name):
        return COPIES
    return OTHER if event.name.startswith("aten::") else PYTHON


@functools.cache
def named(name: str) -> str | None:
    return next(
        (kind for kind, pattern in NAMES.items() if re.search(pattern, name, re.IGNORECASE)), None
    )


def show(
    found: dict[str, Any],
    plain: list[StepReport],
    profiled: list[StepReport],
    bound: dict[str, float],
) -> None:
    tokens, seconds = (
        sum(getattr(report, name) for report in plain) for name in ("tokens", "seconds")
    )
    slower = sum(r.seconds for r in profiled) / sum(r.tokens for r in profiled) * tokens / seconds
    whole = sum(found["milliseconds"].values())
    rows = []
    print(f"{'kind':24}{'ms a step':>11}{'share':>8}{'GFLOP/s':>9}")
    for kind in KINDS:
        ms, flop = found["milliseconds"][kind], found["flop"][kind]
        rate = flop / ms / 1e6 if flop else None
        print(f"{kind:24}{ms:>11.2f}{ms / whole:>8.1%}" + (f"{rate:>9,.0f}" if rate else ""))
        rows.append(
            {
                "kind": kind,
                "ms": ms,
                "share": ms / whole,
                "gflop": flop / 1e9,
                "gflop_per_second": rate,
            }
        )
    for kind, names in found["names"].items():
        print(
            f"{kind}: "
            + ", ".join(f"{name.removeprefix('aten::')} {ms:.2f}" for name, ms in names.items())
        )
    share = tokens / seconds * bound["flop_per_token"] / bound["flop_per_second"]
    print(
        f"without the profiler: {1000 * seconds / len(plain):.1f} ms a step,"
        f" {tokens / seconds:,.0f} tokens/s, {share:.1%} of the arithmetic limit; a profiled token"
        f" takes {slower:.2f} times as long"
    )
    speed = {
        "ms_a_step": 1000 * seconds / len(plain),
        "tokens_per_second": tokens / seconds,
        "share": share,
        "slower": slower,
    }
    print(
        json.dumps(
            {"steps": len(plain), **speed, "limit": bound, "kinds": rows, "names": found["names"]}
        )
    )


if __name__ == "__main__":
    main()
