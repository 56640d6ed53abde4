"""Benchmark of the inference cost of sparse adapters: finished runs against each other and against
their base alone, interleaved.

    python scripts/bench_salor_speed.py runs/vanilla runs/salor_rank runs/salor_group --tokens 1 128

The first run is the baseline. All runs have the same model. For every run and number of tokens,
the table has the adapters' multiply-adds per token, the median milliseconds per token of a forward
pass, and the median and quartiles of the paired ratios to the baseline. Prints a table and one JSON
line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lorakit import process
from lorakit.adapters.inject import detach_all
from lorakit.data.batches import Batch
from lorakit.models.load import compute_dtype, default_device
from lorakit.runs.saved import saved_model, saved_recipe


def main() -> None:
    process.take_over()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 128])
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()

    passes: dict[str, Callable[[Batch], None]] = {}
    costs: dict[str, int] = {}
    base: Any = None
    for run in options.runs:
        recipe = saved_recipe(run)
        task_model, method, _ = saved_model(
            run, recipe, compute_dtype(recipe.train.precision, default_device())
        )
        passes[str(run)] = task_model.run_body
        costs[str(run)] = sum(adapter.multiply_adds for adapter in method.adapters.values())
        base = (task_model, method)
    # The last run's model again, without its adapters.
    recipe = saved_recipe(options.runs[-1])
    task_model, method, _ = saved_model(
        options.runs[-1], recipe, compute_dtype(recipe.train.precision, default_device())
    )
    detach_all(task_model.model, method.adapters)
    passes["base alone"], costs["base alone"] = task_model.run_body, 0

    rows = []
    for tokens in options.tokens:
        batch = _batch(tokens, base[0].device)
        seconds: dict[str, list[float]] = {name: [] for name in passes}
        with torch.inference_mode():
            for repeat in range(options.repeats + 3):
                for name, forward in passes.items():
                    started = time.perf_counter()
                    forward(batch)
                    if torch.cuda.is_available():
                        torch.cuda.synchronize()
                    if repeat >= 3:
                        seconds[name].append(time.perf_counter() - started)
        first = seconds[str(options.runs[0])]
        for name, times in seconds.items():
            ratios = [mine / theirs for mine, theirs in zip(times, first, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            row = {"run": name, "tokens": tokens, "multiply_adds": costs[name]}
            row |= {
                "ms_a_token": 1000 * statistics.median(times) / tokens,
                "ratio": middle,
                "quartiles": [low, high],
            }
            rows.append(row)
    width = max(map(len, passes)) + 2
    print(
        f"{'run':{width}}{'tokens':>7}{'multiply-adds':>15}{'ms a token':>12}{'ratio':>8} "
        " quartiles"
    )
    for row in rows:
        low, high = row["quartiles"]
        print(
            f"{row['run']:{width}}{row['tokens']:>7}{row['multiply_adds']:>15,}{row['ms_a_token']:>12.3f}{row['ratio']:>8.3f}"
            f"  {low:.3f} to {high:.3f}"
        )
    print(json.dumps(rows))


def _batch(tokens: int, device: torch.device) -> Batch:
    """Make one row of `tokens` tokens that every vocabulary has."""
    ids = torch.arange(5, 5 + tokens, device=device)[None] % 1000
    return Batch(
        ids,
        torch.ones_like(ids),
        torch.tensor([tokens], device=device),
        torch.zeros(1, dtype=torch.long),
        [0],
    )


if __name__ == "__main__":
    main()
