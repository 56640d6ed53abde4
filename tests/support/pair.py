"""One of several processes that train every recipe of a folder, one after the other."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from rich.console import Console

from lorakit.recipes.recipe import load_recipe
from lorakit.report.progress import Progress
from lorakit.runs.train import run_training
from lorakit.training.distributed import joined


def main() -> None:
    torch.set_num_threads(1)
    with joined(20):
        for path in sorted(Path(sys.argv[1]).glob("*.yaml")):
            run_training(load_recipe(path), Progress(Console(stderr=True)))


if __name__ == "__main__":
    main()
