"""Step times in one process, for bench_training.py. profile_step.py also uses `start`, which
prepares a recipe's loop."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorakit import process
from lorakit.adapters.optimizer import AdamW
from lorakit.recipes.recipe import load_recipe
from lorakit.report.progress import Progress
from lorakit.runs.session import Session, assemble, calibration
from lorakit.training.loop import StepReport, build_optimizer, count_steps, train

TEXT = "the quick brown fox jumps over a lazy dog"


@dataclass
class Started:
    """A recipe's training loop; its iterator makes one step at a time."""

    session: Session
    optimizer: AdamW
    steps: Iterator[StepReport]


def start(recipe: Path, overrides: Sequence[str]) -> Started:
    """Do everything that `lorakit train` does before its first step, without writing files."""
    process.take_over()
    progress = Progress(Console(stderr=True))
    session = assemble(load_recipe(recipe, overrides), progress)
    spec = session.recipe.train
    session.method.prepare(calibration(session, progress.stage))
    optimizer = build_optimizer(session.method, session.heads, spec)
    session.method.begin(optimizer, count_steps(len(session.train), spec))
    torch.manual_seed(spec.seed)
    return Started(
        session,
        optimizer,
        train(session.task_model, session.method, optimizer, session.train, spec),
    )


def in_turns(
    loops: list[Iterator[StepReport]], options: argparse.Namespace
) -> list[list[StepReport]]:
    """Run one step of every loop in turn, with another loop first each time, and return the
    reports [step][loop] after the warm-up. So other load and the state of caches affect all loops
    alike."""
    reports = []
    for step in range(options.warmup + options.steps):
        places = [(step + i) % len(loops) for i in range(len(loops))]
        done = {place: next(loops[place]) for place in places}
        reports.append([done[place] for place in range(len(loops))])
    return reports[options.warmup :]


def methods(options: argparse.Namespace) -> None:
    files = [Path(name) for name in options.recipes if "=" not in name]
    overrides = [name for name in options.recipes if "=" in name] + [
        f"train.max_steps={options.steps + options.warmup}"
    ]
    reports = in_turns([start(file, overrides).steps for file in files], options)
    rows = []
    print(f"{'recipe':28}{'s/step':>9}{'ratio':>8}{'quartiles':>16}")
    for place, file in enumerate(files):
        low, middle, high = statistics.quantiles(
            [step[place].seconds / step[0].seconds for step in reports], n=4
        )
        seconds = statistics.median(step[place].seconds for step in reports)
        print(f"{file.name:28}{seconds:>9.4f}{middle:>8.3f}{low:>9.3f} {high:.3f}")
        rows.append(
            {
                "recipe": file.name,
                "median_seconds": seconds,
                "ratio": middle,
                "quartiles": [low, high],
            }
        )
    print(json.dumps({"steps": len(reports), "recipes": rows}))


def scaling(options: argparse.Namespace) -> None:
    cells = list(itertools.product(options.layers, options.lengths))
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch, "text.txt")
        text.write_text(f"{TEXT}\n" * 8_000, encoding="utf-8")
        steps = []
        for layers, length in cells:
            recipe = {
                "model": {
                    "name_or_path": str(random_llama(Path(scratch, str(layers)), layers)),
                    "task": "causal-lm",
                },
                "data": {
                    "name_or_path": str(text),
                    "format": "text",
                    "max_seq_length": length,
                    "max_eval_samples": 1,
                },
                "method": {"name": "vanilla"},
                "train": {
                    "max_steps": options.steps + options.warmup,
                    "per_device_train_batch_size": 8,
                },
            }
            file = Path(scratch, "recipe.yaml")
            file.write_text(json.dumps(recipe), encoding="utf-8")
            steps.append(start(file, []).steps)
        reports = in_turns(steps, options)
    seconds = {
        cell: statistics.median(step[place].seconds for step in reports)
        for place, cell in enumerate(cells)
    }
    tokens = {cell: reports[0][place].tokens for place, cell in enumerate(cells)}

    print(
        "milliseconds a step of 8 rows; growth: the exponent p of time ~ size^p, 1 for linear,"
        " fitted over the row or column"
    )
    print(
        f"{'layers':>8}"
        + "".join(f"{length:>8} tok" for length in options.lengths)
        + f"{'growth':>9}"
    )
    by_tokens, by_layers = {}, {}
    for layers in options.layers:
        by_tokens[layers] = exponent(
            [(tokens[layers, n], seconds[layers, n]) for n in options.lengths]
        )
        cells_ = "".join(f"{1000 * seconds[layers, n]:>12.1f}" for n in options.lengths)
        print(f"{layers:>8}{cells_}{by_tokens[layers]:>9.2f}")
    for n in options.lengths:
        by_layers[n] = exponent([(layers, seconds[layers, n]) for layers in options.layers])
    print(f"{'growth':>8}" + "".join(f"{by_layers[n]:>12.2f}" for n in options.lengths))
    # The distance from a straight line with an intercept: a step's constant cost is not growth.
    worst = (
        max(
            off_the_line([(tokens[layers, n], seconds[layers, n]) for n in options.lengths])
            for layers in options.layers
        ),
        max(
            off_the_line([(layers, seconds[layers, n]) for layers in options.layers])
            for n in options.lengths
        ),
    )
    print(
        f"farthest from a straight line: {worst[0]:.1%} of the time over tokens, {worst[1]:.1%}"
        " over layers"
    )
    found = [
        {"layers": c[0], "length": c[1], "tokens": tokens[c], "seconds": s}
        for c, s in seconds.items()
    ]
    print(
        json.dumps(
            {
                "cells": found,
                "growth_by_tokens": by_tokens,
                "growth_by_layers": by_layers,
                "off_the_line": worst,
            }
        )
    )


def exponent(points: list[tuple[float, float]]) -> float:
    """The exponent of the power law through (size, time), by least squares of the logarithms."""
    return statistics.linear_regression(
        [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    ).slope


def off_the_line(points: list[tuple[float, float]]) -> float:
    """The largest distance of a time from the least-squares line, relative to the line."""
    slope, intercept = statistics.linear_regression([x for x, _ in points], [y for _, y in points])
    return max(abs(y - slope * x - intercept) / y for x, y in points)


def random_llama(folder: Path, layers: int) -> Path:
    """Make a folder with a random Llama, of 10 M parameters with 8 layers, and a tokenizer of
    words."""
    words = {word: i for i, word in enumerate(["[UNK]", "[EOS]", *TEXT.split()])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", eos_token="[EOS]"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=320,
        intermediate_size=960,
        num_hidden_layers=layers,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
