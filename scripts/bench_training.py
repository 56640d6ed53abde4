"""Benchmark of training: speed, quality and memory of lorakit's methods against PEFT + Trainer, and
the growth of the step time.

    python scripts/bench_training.py classification --train sst2/train.jsonl
        --dev sst2/validation.jsonl --peers DIR
    python scripts/bench_training.py causal-lm --train gsm8k/train.jsonl --rows 256 --peers DIR
    python scripts/bench_training.py methods recipes/vanilla_glue.yaml recipes/l1ra_glue.yaml
        [key=value …]
    python scripts/bench_training.py scaling

classification, causal-lm: every arm is a fresh process. Arms are interleaved, with another one
first in every round; round i uses the i-th of --seeds. Arms: lorakit's methods; peer (its defaults:
float32, random order) and peer-best (length grouping, bf16 autocast), which are
peer_classification.py and peer_causal_lm.py of the folder --peers. Without that folder lorakit runs
alone. Learning rate, schedule, warm-up, batch, rank, alpha = 2 r, targets and dropout are the
peer's; its learning rate starts at 0 and lags lorakit's by a step. The peer draws batches in its
own order, or groups rows by length. peer-same-order has the settings of peer-best but lorakit's
batches in lorakit's order, to compare losses; its additional padding slows it down, so its speed is
not the one to beat.

tokens/s: real tokens per second of training, as reported by the arm. clock: seconds from lorakit's
first to its last step as seen from outside the process, divided by the seconds it reports for the
same steps. wall: seconds of the whole process. peak: its largest resident set, by wait4. share:
tokens/s x FLOP per token of vanilla / the rate of the model's matrix products in the same session
(the formula is in profile_step.py). loss: mean training loss of the last quarter of the steps.
Values, and ratios within a round, are given as median (minimum to maximum); accuracy and loss as
mean ± standard error.

methods: step time of each recipe relative to the first one's, with steps interleaved in one process
on the same batches. scaling: the same for random Llamas of 2, 4 and 8 layers on rows of 64, 128 and
256 tokens. Each prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.data.batches import StepOrder
from lorakit.sources.builtin import folder
from lorakit.sources.catalogue import PREFIX

PEERS = {"peer": [], "peer-best": ["--best"], "peer-same-order": ["--best"]}
# The peer's script with one change: its rows come in the order of the file.
IN_ORDER = """import runpy, sys, transformers, torch
transformers.Trainer._get_train_sampler  # else its rows would come in an order of chance
in_order = torch.utils.data.SequentialSampler
transformers.Trainer._get_train_sampler = lambda self, *_: in_order(self.train_dataset)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")"""


@dataclass(frozen=True)
class Task:
    """The settings of the peer's script for a task."""

    name: str
    peer: str
    model: str
    r: int
    lr: float
    batch: int
    schedule: str
    warmup_steps: int
    quality: str
    arms: tuple[str, ...]


CLASSIFICATION = ("sequence-classification", "peer_classification.py", "builtin/minilm-l6")
CAUSAL = ("causal-lm", "peer_causal_lm.py", "builtin/smollm2-135m-instruct")
TASKS = {
    "classification": Task(
        *CLASSIFICATION, 8, 1e-3, 32, "cosine", 10, "accuracy", ("vanilla", "peer", "peer-best")
    ),
    "causal-lm": Task(
        *CAUSAL, 16, 2e-4, 8, "linear", 0, "loss", ("vanilla", "peer-best", "peer-same-order")
    ),
}
METHOD_KEYS: dict[str, dict[str, Any]] = {"salor": {"factors": {"density": 0.5}}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, task in TASKS.items():
        command = commands.add_parser(name)
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
        command.add_argument(
            "--set", nargs="*", default=[], help="more key=value for lorakit's runs"
        )
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


# -- against the peers -----------------------------------------------------------------------------


def against_peers(options: argparse.Namespace) -> None:
    task = TASKS[options.command]
    arms = options.arms
    if options.peers is None and any(arm in PEERS for arm in arms):
        print("no --peers DIR: the peers' arms are left out, lorakit runs alone", file=sys.stderr)
        arms = [arm for arm in arms if arm not in PEERS]
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options, task, Path(scratch))
        runs, limits = [], []
        for i in range(options.repeats):
            limits.append(bench.limit())
            for place in range(len(arms)):
                runs.append(
                    bench.run(
                        arms[(i + place) % len(arms)], i, options.seeds[i % len(options.seeds)]
                    )
                )
                print(json.dumps(runs[-1]), file=sys.stderr)
    rows = [summary(arm, runs, limits, task.quality) for arm in arms]
    show(rows, limits, task)
    check(runs)
    print(
        json.dumps(
            {
                "command": options.command,
                "model": options.model,
                "limits": limits,
                "arms": rows,
                "runs": runs,
            }
        )
    )


class Bench:
    """The arms of one comparison, each a function of the round's number and seed, run in the
    folder `scratch`."""

    def __init__(self, options: argparse.Namespace, task: Task, scratch: Path) -> None:
        self.options, self.task, self.scratch = options, task, scratch
        self.model = str(
            folder(options.model)
            if options.model.startswith(PREFIX)
            else Path(options.model).resolve()
        )
        lines = options.train.read_text(encoding="utf-8").splitlines()
        self.lines = lines[: options.rows]
        # The peer of causal-lm does not evaluate, but lorakit needs a row for evaluation.
        dev = options.dev.read_text(encoding="utf-8").splitlines() if options.dev else lines[-1:]
        self.data = scratch / "data"
        self.data.mkdir()
        for name, rows in (("train", self.lines), ("validation", dev)):
            (self.data / f"{name}.jsonl").write_text(
                "".join(f"{row}\n" for row in rows), encoding="utf-8"
            )
        self.steps = math.ceil(len(self.lines) / options.batch)

    def recipe(self, method: str, seed: int) -> Path:
        """Write lorakit's recipe with the peer's settings, as JSON, which is valid YAML."""
        options, task = self.options, self.task
        data: dict[str, Any] = {"name_or_path": str(self.data)}
        if task.name == "sequence-classification":
            data |= {"format": "classification", "max_seq_length": 128}
        else:
            asked = "question" in json.loads(self.lines[0])
            prompt, completion = (
                ("Question: {question}\nAnswer: ", "{answer}")
                if asked
                else ("{prompt}\n", "{completion}")
            )
            data |= {"format": "prompt-completion", "prompt": prompt, "completion": completion}
        train = {
            "per_device_train_batch_size": options.batch,
            "learning_rate": options.lr,
            "lr_scheduler_type": task.schedule,
            # lorakit rounds the ratio up to whole steps.
            "warmup_ratio": max(0.0, min(1.0, (task.warmup_steps - 0.5) / self.steps)),
            "seed": seed,
        }
        keys = {"name": method, "r": options.r, "lora_alpha": 2 * options.r} | METHOD_KEYS.get(
            method, {}
        )
        whole = {
            "model": {"name_or_path": self.model, "task": task.name},
            "data": data,
            "method": keys,
            "train": train,
        }
        file = self.scratch / f"{method}.yaml"
        file.write_text(json.dumps(whole), encoding="utf-8")
        return file

    def limit(self) -> dict[str, float]:
        """Measure the FLOP of a token and the rates of matrix products in a separate process."""
        script = Path(__file__).resolve().with_name("profile_step.py")
        command = [
            sys.executable,
            str(script),
            str(self.recipe("vanilla", 0)),
            "--limit",
            *self.options.set,
        ]
        found: dict[str, float] = json.loads(fresh(command, self.scratch).output.splitlines()[-1])
        return found

    def run(self, arm: str, number: int, seed: int) -> dict[str, Any]:
        found = self.peer(arm, seed) if arm in PEERS else self.ours(arm, number, seed)
        return {"arm": arm, "round": number, "seed": seed} | found

    def ours(self, method: str, number: int, seed: int) -> dict[str, Any]:
        run = self.scratch / f"{method}-{number}"
        command = [
            sys.executable,
            "-c",
            "from lorakit.cli import main; main()",
            "train",
            str(self.recipe(method, seed)),
        ]
        done = fresh(
            [*command, f"output_dir={run}", *self.options.set], self.scratch, run / "metrics.jsonl"
        )
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
        steps = [
            line
            for line in map(json.loads, (run / "metrics.jsonl").open(encoding="utf-8"))
            if "loss" in line
        ]
        (first, begun), (final, ended) = done.seen[0], done.seen[-1]
        between = [step["seconds"] for step in steps if first < step["step"] <= final]
        # As the peer does: means of four whole steps, then the last quarter of these means.
        losses = [step["loss"] for step in steps]
        fours = [statistics.fmean(losses[i : i + 4]) for i in range(0, max(1, len(losses) - 3), 4)]
        return {
            "train_seconds": result["train_seconds"],
            "tokens": result["tokens"],
            "tokens_per_second": result["tokens"] / result["train_seconds"],
            "wall_seconds": done.seconds,
            "clock": (ended - begun) / sum(between) if between else None,
            "peak_mb": done.peak_mb,
            "trainable": result["trainable_parameters"],
            "accuracy": result["metrics"].get("accuracy"),
            "loss": statistics.fmean(fours[-max(1, len(fours) // 4) :]),
            "precision": result["precision"],
        }

    def peer(self, arm: str, seed: int) -> dict[str, Any]:
        options = self.options
        script, train = options.peers.resolve() / self.task.peer, self.data / "train.jsonl"
        command = [sys.executable, str(script)]
        if arm == "peer-same-order":
            command[1:1] = ["-c", IN_ORDER]
            steps = StepOrder(len(self.lines), options.batch, seed)
            order = itertools.chain.from_iterable(
                steps.of_step(step + 1) for step in range(self.steps)
            )
            train = self.scratch / "ordered.jsonl"
            train.write_text("".join(f"{self.lines[row]}\n" for row in order), encoding="utf-8")
        command += ["--model", self.model, "--train", str(train), "--seed", str(seed), *PEERS[arm]]
        command += ["--r", str(options.r), "--lr", str(options.lr), "--batch", str(options.batch)]
        command += (
            ["--dev", str(self.data / "validation.jsonl")]
            if options.dev and self.task.quality == "accuracy"
            else []
        )
        command += ["--rows", str(len(self.lines))] if self.task.quality == "loss" else []
        done = fresh(command, self.scratch)
        result = json.loads(done.output.splitlines()[-1])
        return {
            "train_seconds": result["train_seconds"],
            # The peer reports only its seconds and its rate, both rounded.
            "tokens": result["train_seconds"] * result["tokens_per_second"],
            "tokens_error": 0.5 * result["train_seconds"] + 0.005 * result["tokens_per_second"],
            "tokens_per_second": result["tokens_per_second"],
            "wall_seconds": done.seconds,
            "clock": None,
            "peak_mb": done.peak_mb,
            "trainable": result.get("trainable"),
            "accuracy": result.get("accuracy"),
            "loss": result.get("loss_last_quarter"),
            "precision": "bf16 autocast" if result.get("bf16", bool(PEERS[arm])) else "fp32",
        }


@dataclass
class Process:
    """A finished process: its stdout, duration in seconds, largest resident set, and observed
    (steps, time) pairs."""

    output: str
    seconds: float
    peak_mb: float
    seen: list[tuple[int, float]]


def fresh(command: list[str], scratch: Path, metrics: Path | None = None) -> Process:
    """Run a command to its end while reading its metrics.jsonl 50 times a second. Ends this
    program if the command fails."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=scratch, stdout=out, stderr=err)
        seen: list[tuple[int, float]] = []
        ended = 0
        while not ended:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            # The line of an evaluation has no step loss and comes after the last step.
            if metrics is not None and metrics.is_file():
                now, steps = (
                    time.perf_counter(),
                    metrics.read_text(encoding="utf-8").count('"grad_norm"'),
                )
                if steps > (seen[-1][0] if seen else 0):
                    seen.append((steps, now))
            time.sleep(0.02)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        out.seek(0)
        err.seek(0)
        if process.returncode:
            sys.exit(f"{' '.join(command)}\nended with {process.returncode}:\n{err.read()[-4000:]}")
        # A process starts with the size of its parent, so a smaller peak could not be measured.
        assert usage.ru_maxrss > resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, (
            "this process is the larger one"
        )
        return Process(
            out.read(),
            seconds,
            usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10),
            seen,
        )


def summary(
    arm: str, runs: list[dict[str, Any]], limits: list[dict[str, float]], quality: str
) -> dict[str, Any]:
    """Compute medians over the arm's runs, and the paired ratios to each of the peers and to
    vanilla."""
    mine = {run["round"]: run for run in runs if run["arm"] == arm}
    row: dict[str, Any] = {"arm": arm}
    for key in ("tokens_per_second", "train_seconds", "wall_seconds", "clock", "peak_mb"):
        values = [run[key] for run in mine.values() if run[key] is not None]
        row[key] = spread(values) if values else None
    # tokens a second
    bounds = [found["flop_per_second"] / found["flop_per_token"] for found in limits]
    row["share"] = spread([run["tokens_per_second"] / bounds[i] for i, run in mine.items()])
    for other in ("peer", "peer-best", "peer-same-order", "vanilla"):
        theirs = {run["round"]: run for run in runs if run["arm"] == other}
        if not theirs or other == arm:
            continue
        for key in ("tokens_per_second", "peak_mb", *(["loss"] if quality == "loss" else [])):
            row[f"{key} / {other}"] = spread([mine[i][key] / theirs[i][key] for i in mine])
        if quality == "accuracy":
            row[f"accuracy - {other}"] = mean(
                [mine[i]["accuracy"] - theirs[i]["accuracy"] for i in mine]
            )
    row[quality] = mean([run[quality] for run in mine.values()])
    return row


def spread(values: list[float]) -> tuple[float, float, float]:
    """(median, minimum, maximum)."""
    return statistics.median(values), min(values), max(values)


def mean(values: list[float]) -> tuple[float, float | None]:
    """(mean, its standard error)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def show(rows: list[dict[str, Any]], limits: list[dict[str, float]], task: Task) -> None:
    def one(value: Any, form: str) -> str:
        return (
            "" if value is None else f"{value[0]:{form}} ({value[1]:{form}} to {value[2]:{form}})"
        )

    def error(value: Any, form: str) -> str:
        return (
            ""
            if value is None
            else f"{value[0]:{form}}" + ("" if value[1] is None else f" ± {value[1]:.4f}")
        )

    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "arm": lambda row: row["arm"],
        "tokens/s": lambda row: one(row["tokens_per_second"], ",.0f"),
        "share": lambda row: one(row["share"], ".1%"),
        "train s": lambda row: one(row["train_seconds"], ".1f"),
        "wall s": lambda row: one(row["wall_seconds"], ".1f"),
        "clock": lambda row: one(row["clock"], ".3f"),
        "peak MB": lambda row: one(row["peak_mb"], ",.0f"),
        task.quality: lambda row: error(row[task.quality], ".4f"),
    }
    others = [row["arm"] for row in rows if row["arm"] in PEERS or row["arm"] == "vanilla"]
    for other in others:
        if other != "peer-same-order":
            columns[f"tokens/s / {other}"] = lambda row, key=f"tokens_per_second / {other}": one(
                row.get(key), ".2f"
            )
            columns[f"peak / {other}"] = lambda row, key=f"peak_mb / {other}": one(
                row.get(key), ".2f"
            )
        if task.quality == "loss":
            columns[f"loss / {other}"] = lambda row, key=f"loss / {other}": one(row.get(key), ".3f")
        else:
            columns[f"accuracy - {other}"] = lambda row, key=f"accuracy - {other}": error(
                row.get(key), "+.4f"
            )
    # One line per column, so that values to compare are below each other for any number of peers.
    cells = [[name, *(cell(row) for row in rows)] for name, cell in columns.items()]
    widths = [max(map(len, column)) + 2 for column in zip(*cells, strict=True)]
    for line in filter(lambda line: any(line[1:]), cells):
        print("".join(f"{text:{width}}" for text, width in zip(line, widths, strict=True)).rstrip())
    own, square = (
        spread([found[key] / 1e9 for found in limits])
        for key in ("flop_per_second", "square_flop_per_second")
    )
    print(
        f"limit: {limits[0]['flop_per_token'] / 1e6:,.1f} MFLOP a token; GFLOP/s {one(own, ',.0f')}"
        " on the model's own shapes,"
    )
    print(f"       {one(square, ',.0f')} on a product of 4096 x 4096 matrices")


def check(runs: list[dict[str, Any]]) -> None:
    """Report if all arms saw the same tokens, and what they trained. The peer's number of tokens
    is known up to rounding."""
    first = next((run for run in runs if run["arm"] not in PEERS), runs[0])
    others = {
        f"{run['arm']} {run['tokens']:,.0f}"
        for run in runs
        if abs(run["tokens"] - first["tokens"]) > run.get("tokens_error", 0)
    }
    print(
        f"tokens: {first['tokens']:,.0f} in every run"
        + (f" BUT {', '.join(sorted(others))}" if others else "")
    )
    trained = {run["arm"]: run["trainable"] for run in runs if run["trainable"] is not None}
    print("trained parameters: " + ", ".join(f"{arm} {count:,}" for arm, count in trained.items()))


if __name__ == "__main__":
    main()
