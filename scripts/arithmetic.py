"""The arithmetic of a training step, for profile_step.py and bench_training.py: FLOP per token, and
FLOP per second of its matrix products.

Of rows of n tokens with t targets, these are counted:

    each linear layer in -> out of the blocks    2 in out n forward; the same for the gradient of
                                                 its input, where anything below is trained (not
                                                 for the layers that read the embeddings)
    its adapter of rank r                        2 r (in + out) n forward, 4 r (in + out) n backward
                                                 (less 2 r in n where its input needs no gradient)
    attention of each block, width w             4 w pairs forward, 8 w pairs backward; pairs of
                                                 query and key: n², or n (n + 1) / 2 if causal
    the output embedding, h -> v                 4 h v t (forward and the gradient of its input;
                                                 frozen)
    a classifier's layers, in -> out             6 in out per row (trained in full)

averaged over the training rows. Additional work of a run (padding, recomputing) is not counted. The
rate is measured on these products (x [2048, in] and its gradient [2048, out] times the weight, in
the run's precision, the median of many), weighted by their FLOP; the rate of a product of two
4096 x 4096 matrices is printed beside it.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from lorakit.adapters.base import in_out
from lorakit.adapters.inject import linear_layers, match_targets
from lorakit.models.load import compute_dtype, default_device
from lorakit.models.positions import skeleton
from lorakit.models.tasks import task_named
from lorakit.recipes.recipe import load_recipe
from lorakit.report.progress import Progress
from lorakit.runs.session import find_sources, read_inputs


def limit(recipe_file: Path, overrides: list[str]) -> dict[str, float]:
    """Compute the FLOP of a token and the FLOP per second of the products, as described in the
    module's docstring."""
    recipe = load_recipe(recipe_file, overrides)
    source, data_sources = find_sources(recipe)
    inputs = read_inputs(recipe, source, data_sources, Progress(Console(stderr=True)))
    model = skeleton(inputs.config, recipe.model, inputs.labels)
    heads = task_named(recipe.model.task).head_names(model)
    ranks = match_targets(model, recipe.method, heads)
    lengths = torch.from_numpy(inputs.train.lengths).double()
    tokens = lengths.mean().item()
    # {(in, out) of a weight: FLOP of a row}
    layers, products = linear_layers(model), Counter[tuple[int, int]]()

    flop = 0.0
    needs_gradient = reached(model, list(ranks))
    for name, rank in ranks.items():
        in_features, out_features = in_out(layers[name])
        passes = 1 + needs_gradient[name]
        products[in_features, out_features] += 2 * in_features * out_features * tokens * passes
        flop += 2 * rank * (3 * out_features + (1 + passes) * in_features) * tokens
    config = inputs.config.get_text_config()
    head_width = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    causal = task_named(recipe.model.task).predicts_tokens or hasattr(model, "score")
    pairs = (lengths * (lengths + 1) / 2 if causal else lengths**2).mean().item()
    flop += 12 * config.num_hidden_layers * config.num_attention_heads * head_width * pairs
    for name, layer in layers.items():
        if any(name == head or name.startswith(f"{head}.") for head in heads):
            flop += 6 * layer.weight.numel()  # type: ignore[operator,union-attr]
    if inputs.train.targets is not None:
        marks = inputs.train.targets
        targets = float(marks.sum() - marks[inputs.train.offsets[:-1]].sum()) / len(inputs.train)
        in_features, out_features = in_out(model.get_output_embeddings())
        products[in_features, out_features] += 4 * in_features * out_features * targets

    dtype = compute_dtype(recipe.train.precision, default_device())
    seconds = sum(count / rate(2048, *shape, dtype) for shape, count in products.items())
    return {
        "flop_per_token": (flop + sum(products.values())) / tokens,
        "flop_per_second": sum(products.values()) / seconds,
        "square_flop_per_second": rate(4096, 4096, 4096, dtype),
    }


def reached(model: Any, targets: list[str]) -> dict[str, bool]:
    """{layer: True if its input depends on an adapter}, from a pass through the model without
    weights."""
    model.requires_grad_(False)
    found = {}

    def note(name: str, x: Tensor) -> None:
        found[name] = x.requires_grad

    for name in targets:
        layer = model.get_submodule(name)
        # like an adapter, it makes later values need gradients
        layer.weight.requires_grad_(True)
        layer.register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs[0]))
    model(input_ids=torch.ones(1, 8, dtype=torch.long, device="meta"))
    return found


def rate(tokens: int, in_features: int, out_features: int, dtype: torch.dtype) -> float:
    """Measure the FLOP per second of x W^T and y W, equally weighted, for x [tokens, in], y
    [tokens, out] and W [out, in]."""
    x, y, weight = (
        torch.randn(shape, device=default_device()).to(dtype)
        for shape in ((tokens, in_features), (tokens, out_features), (out_features, in_features))
    )
    halves = [
        statistics.median(timed(product))
        for product in (lambda: nn.functional.linear(x, weight), lambda: y @ weight)
    ]
    return 4 * tokens * in_features * out_features / sum(halves)


def timed(call: Callable[[], Tensor]) -> list[float]:
    """Measure the seconds of each call, after two calls to warm up: at least 5 calls, and as many
    as fit into half a second."""
    begun, seconds = time.perf_counter(), []
    while len(seconds) < 7 or time.perf_counter() - begun < 0.5:
        before = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - before)
    return seconds[2:]
