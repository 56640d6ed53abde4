"""Step time of one recipe's method against another's, steps interleaved in one process on the same batches.

    python scripts/bench_step_time.py recipes/vanilla_glue.yaml recipes/l1ra_glue.yaml --steps 60 data.name_or_path=…

The first recipe is the baseline. Prints the median seconds of a step, the median of the paired ratios with its
quartiles, and one JSON line. Overrides go to every recipe.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from rich.console import Console

from lorakit.assemble import assemble
from lorakit.loop import build_optimizer, count_steps, train
from lorakit.recipe import load_recipe
from lorakit.report.progress import Progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", help="recipe files, then key=value overrides")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=5)
    options = parser.parse_intermixed_args()
    files = [Path(name) for name in options.recipes if "=" not in name]
    overrides = [name for name in options.recipes if "=" in name] + [f"train.max_steps={options.steps + options.warmup}"]

    loops = []
    for file in files:
        session = assemble(load_recipe(file, overrides), Progress(Console(stderr=True)))
        optimizer = build_optimizer(session.method, session.heads, session.recipe.train)
        session.method.begin(optimizer, count_steps(len(session.train), session.recipe.train))
        loops.append(train(session.task_model, session.method, optimizer, session.train, session.recipe.train))
    # zip takes one step of every recipe in turn: whatever else the machine does hits all of them alike.
    seconds = [[report.seconds for report in reports] for reports in zip(*loops, strict=True)][options.warmup :]

    rows = []
    for place, file in enumerate(files):
        ratios = [step[place] / step[0] for step in seconds]
        low, _, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "recipe": file.name,
                "median_seconds": statistics.median(step[place] for step in seconds),
                "ratio": statistics.median(ratios),
                "quartiles": [low, high],
                "steps": len(seconds),
            }
        )
    print(f"{'recipe':28}{'s/step':>9}{'ratio':>8}{'quartiles':>16}")
    for row in rows:
        low, high = row["quartiles"]
        print(f"{row['recipe']:28}{row['median_seconds']:>9.4f}{row['ratio']:>8.3f}{low:>9.3f} {high:.3f}")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
