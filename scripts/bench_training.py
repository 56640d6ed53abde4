"""Benchmark of training: speed, quality and memory of lorakit's methods against PEFT + Trainer, and
the growth of the step time.

    python scripts/bench_training.py classification --train sst2/train.jsonl
        --dev sst2/validation.jsonl --peers DIR [--levels avx2 avx512 amx]
    python scripts/bench_training.py causal-lm --train gsm8k/train.jsonl --rows 256 --peers DIR
        [--levels all]
    python scripts/bench_training.py methods recipes/vanilla_glue.yaml recipes/l1ra_glue.yaml
        [key=value …]
    python scripts/bench_training.py scaling

classification, causal-lm: every arm is a fresh process. Arms are interleaved, with another one
first in every round; round i uses the i-th of --seeds. Arms: lorakit's methods; peer (its defaults:
float32, random order) and peer-best (length grouping, bf16 autocast where it is fast), which are
peer_classification.py and peer_causal_lm.py of the folder --peers. Without that folder lorakit runs
alone. Learning rate, schedule, warm-up, batch, rank, alpha = 2 r, targets and dropout are the
peer's; its learning rate starts at 0 and lags lorakit's by a step. The peer draws batches in its
own order, or groups rows by length. peer-same-order has the settings of peer-best but lorakit's
batches in lorakit's order, to compare losses; its additional padding slows it down, so its speed is
not the one to beat.

--levels: one table for each of these processor levels. Every arm of a table runs in the environment
that stands in for the level (at_level.py), the peers' too, and the peers at their best are told to
use bf16 where the level has its instructions, else float32. Levels that the machine lacks are left
out, with a line that says so. `torch` is lorakit without its kernels, with torch as the processor
allows. By default there is one table, of the machine's own level, with the environment as it is.

tokens/s: real tokens per second of training, as reported by the arm. clock: seconds from lorakit's
first to its last step as seen from outside the process, divided by the seconds it reports for the
same steps. wall: seconds of the whole process. peak: its largest resident set, by wait4. share:
tokens/s x FLOP per token of vanilla / the rate of the model's matrix products in the same session
and environment (the formula is in arithmetic.py). loss: mean training loss of the last quarter of
the steps. Values, and ratios within a round, are given as median (minimum to maximum); accuracy and
loss as mean ± standard error.

methods: step time of each recipe relative to the first one's, with steps interleaved in one process
on the same batches. scaling: the same for random Llamas of 2, 4 and 8 layers on rows of 64, 128 and
256 tokens. Each prints a table and one JSON line; the JSON line of classification and causal-lm has
a list with one object for each level.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import at_level
from arms import PEERS, TASKS, Bench, Task
from at_level import AtLevel
from tables import check, show, summary


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, task in TASKS.items():
        add_comparison(commands.add_parser(name), name, task)
    command = commands.add_parser("methods")
    command.add_argument(
        "recipes",
        nargs="+",
        help="recipe files, then key=value overrides, which go to every recipe",
    )
    scaling = commands.add_parser("scaling")
    scaling.add_argument("--layers", nargs="+", type=int, default=[2, 4, 8])
    scaling.add_argument("--lengths", nargs="+", type=int, default=[64, 128, 256])
    for parser_, steps in ((command, 60), (scaling, 12)):
        parser_.add_argument("--steps", type=int, default=steps)
        parser_.add_argument("--warmup", type=int, default=5)
    options = parser.parse_args()
    if unknown := [
        arm for arm in getattr(options, "arms", []) if arm.startswith("peer") and arm not in PEERS
    ]:
        parser.error(f"there is no arm {', '.join(unknown)}; the peers are {', '.join(PEERS)}")
    if options.command in TASKS:
        against_peers(options)
        return
    # Imported here, since fresh processes start with the memory size of this one: see `fresh`.
    import step_time

    {"methods": step_time.methods, "scaling": step_time.scaling}[options.command](options)


def add_comparison(command: argparse.ArgumentParser, name: str, task: Task) -> None:
    command.add_argument("--model", default=task.model, help="a builtin or a folder")
    command.add_argument("--train", type=Path, required=True)
    command.add_argument("--dev", type=Path, required=name == "classification")
    command.add_argument("--rows", type=int, help="only the first so many training rows")
    command.add_argument("--peers", type=Path, help="the folder of the peers' scripts")
    command.add_argument(
        "--arms", nargs="+", default=task.arms, help="methods, and any of " + ", ".join(PEERS)
    )
    command.add_argument("--repeats", type=int, default=3)
    command.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    command.add_argument("--r", type=int, default=task.r)
    command.add_argument("--lr", type=float, default=task.lr)
    command.add_argument("--batch", type=int, default=task.batch)
    command.add_argument("--set", nargs="*", default=[], help="more key=value for lorakit's runs")
    at_level.add_option(command)


def against_peers(options: argparse.Namespace) -> None:
    """Print a table for each level, and one JSON line."""
    arms = options.arms
    if options.peers is None and any(arm in PEERS for arm in arms):
        print("no --peers DIR: the peers' arms are left out, lorakit runs alone", file=sys.stderr)
        arms = [arm for arm in arms if arm not in PEERS]
    wanted, left_out = at_level.chosen(options.levels)
    if left_out:
        print(left_out)
    found = [compared(options, arms, at) for at in wanted]
    print(
        json.dumps(
            {
                "command": options.command,
                "model": options.model,
                "left_out": left_out,
                "levels": found,
            }
        )
    )


def compared(options: argparse.Namespace, arms: list[str], at: AtLevel) -> dict[str, Any]:
    """Run all rounds at one level and print their table."""
    task = TASKS[options.command]
    runs: list[dict[str, Any]] = []
    limits = []
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options, task, at, Path(scratch))
        for i in range(options.repeats):
            limits.append(bench.limit())
            for place in range(len(arms)):
                seed = options.seeds[i % len(options.seeds)]
                runs.append(bench.run(arms[(i + place) % len(arms)], i, seed))
                print(json.dumps(runs[-1]), file=sys.stderr)
    rows = [summary(arm, runs, limits, task.quality) for arm in arms]
    print(at.heading())
    show(rows, limits, task)
    check(runs)
    print(flush=True)
    return at.facts() | {"limits": limits, "arms": rows, "runs": runs}


if __name__ == "__main__":
    main()
