"""Arms of bench_training.py: lorakit's runs and the peers' scripts, each in a fresh process."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from at_level import AtLevel
from fresh import fresh

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


def model_folder(name: str) -> str:
    """The folder of a model that is named by a builtin or a path."""
    return str(folder(name) if name.startswith(PREFIX) else Path(name).resolve())


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


class Bench:
    """The arms of one comparison at one level, each a function of the round's number and seed, run
    in the folder `scratch`, which exists."""

    def __init__(self, options: argparse.Namespace, task: Task, at: AtLevel, scratch: Path) -> None:
        self.options, self.task, self.at, self.scratch = options, task, at, scratch
        self.environment = at.environment()
        self.model = model_folder(options.model)
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
            "warmup_steps": task.warmup_steps,
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
        done = fresh(command, self.scratch, self.environment)
        found: dict[str, float] = json.loads(done.output.splitlines()[-1])
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
        command += [f"output_dir={run}", *self.options.set]
        done = fresh(command, self.scratch, self.environment, run / "metrics.jsonl")
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
        if PEERS[arm] and self.at.precision != "auto":
            # Its own choice looks at the processor, whose instructions may be capped.
            command += ["--precision", self.at.precision]
        done = fresh(command, self.scratch, self.environment)
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
