"""Benchmark of l1_share, the strength of L1: quality and moved ranks against vanilla on real data.

    python scripts/bench_l1_share.py RECIPE DATA_FOLDER --subsets sst2 cola --epochs 1 3
        --shares 0.3 1 2 --seeds 0 1 2

Runs `lorakit train` for every cell (RECIPE is an l1ra recipe; vanilla runs with the same settings),
`--workers` at a time. Prints a table, paired differences to vanilla with their standard error, and
one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

COMMON = ("r", "lora_alpha", "lora_dropout", "target_modules")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("data")
    parser.add_argument("--subsets", nargs="+", default=["sst2"])
    parser.add_argument("--epochs", nargs="+", type=float, default=[1.0])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.3, 0.65, 1.0, 1.5, 2.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        help="more key=value for every run; l1ra keys go to the l1ra runs alone",
    )
    parser.add_argument("--model", help="model.name_or_path of every run")
    options = parser.parse_args()

    from lorakit.recipes.recipe import load_recipe

    method = load_recipe(options.recipe).method
    vanilla = {"name": "vanilla"} | {key: getattr(method, key) for key in COMMON}
    arms: list[float | None] = [None, *options.shares]
    cells = list(product(options.subsets, options.epochs, arms, options.seeds))
    with tempfile.TemporaryDirectory() as scratch:

        def run(cell: tuple[str, float, float | None, int]) -> dict[str, float]:
            subset, epochs, share, seed = cell
            folder = Path(scratch) / f"{subset}-{epochs}-{share}-{seed}"
            mine = (
                [f"method.l1_share={share}"]
                if share is not None
                else [f"method={json.dumps(vanilla)}"]
            )
            extra = [
                pair for pair in options.set if share is not None or not pair.startswith("method.")
            ]
            extra += [f"model.name_or_path={options.model}"] if options.model else []
            command = [
                sys.executable,
                "-c",
                "from lorakit.cli import main; main()",
                "train",
                str(options.recipe),
            ]
            command += [
                f"data.name_or_path={options.data}",
                f"data.subset={subset}",
                f"train.num_train_epochs={epochs}",
            ]
            command += [
                f"train.seed={seed}",
                "train.eval_steps=null",
                "train.save_steps=null",
                f"output_dir={folder}",
                *mine,
                *extra,
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
            result = json.loads((folder / "result.json").read_text())
            lines = [json.loads(line) for line in (folder / "ranks.jsonl").read_text().splitlines()]
            first, last = lines[0]["ranks"], result["ranks"]
            moved = sum(abs(last[name] - first[name]) for name in first)
            return {
                "metric": next(iter(result["metrics"].values())),
                "moved": moved,
                "ranks": result["rank_total"],
                "steps": result["steps"],
            }

        with ThreadPoolExecutor(options.workers) as pool:
            results = dict(zip(cells, pool.map(run, cells), strict=True))

    rows = []
    for subset, epochs, share in product(options.subsets, options.epochs, arms):
        mine = [results[subset, epochs, share, seed] for seed in options.seeds]
        pairs = [
            r["metric"] - results[subset, epochs, None, seed]["metric"]
            for r, seed in zip(mine, options.seeds, strict=True)
        ]
        error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan
        rows.append(
            {
                "subset": subset,
                "epochs": epochs,
                "steps": mine[0]["steps"],
                "l1_share": share,
                "metric": statistics.mean(r["metric"] for r in mine),
                "difference": statistics.mean(pairs),
                "standard_error": error,
                "moved": statistics.mean(r["moved"] for r in mine),
                "ranks": statistics.mean(r["ranks"] for r in mine),
            }
        )
    head = f"{'subset':8}{'steps':>7}{'l1_share':>10}{'metric':>9}{'- vanilla':>11}"
    print(head + f"{'± s.e.':>9}{'moved':>8}{'ranks':>8}")
    for row in rows:
        share = "vanilla" if row["l1_share"] is None else row["l1_share"]
        print(
            f"{row['subset']:8}{row['steps']:>7}{share:>10}{row['metric']:>9.4f}{row['difference']:>+11.4f}"
            f"{row['standard_error']:>9.4f}{row['moved']:>8.1f}{row['ranks']:>8.1f}"
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
