"""Commands that need no torch start without it, and in little time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lorakit

HEAVY = ("torch", "transformers", "datasets", "scipy", "sklearn", "matplotlib", "safetensors")
# Runs a command as `lorakit` does, then prints what it imported, and its seconds of processor time.
DRIVER = """
import json, sys, time
from lorakit.__main__ import main
sys.argv[0] = "lorakit"
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
sys.stdout.flush()
sys.stderr.write("\\n" + json.dumps([sorted(sys.modules), time.process_time()]))
"""
RECIPE = """
model: {name_or_path: ./nowhere, task: causal-lm}
data: {name_or_path: ./nothing.jsonl}
method: {name: l1ra, with: [{name: salor}]}
"""
RANKS = {"step": 0, "ranks": {"layers.0.q": 2}, "cost": 2, "pool": 0, "budget": 2}
COMMANDS = (
    ["--help"],
    ["--version"],
    ["train", "--help"],
    ["schema"],
    ["env"],
    ["env", "--json"],
    ["validate", "recipe.yaml"],
    ["validate", "recipe.yaml", "train.max_steps=3", "method.name=salor", "method.with=[]"],
    ["inspect-ranks", "run"],
    ["inspect-ranks", "run", "--json"],
)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a recipe and a run that inspect-ranks can read."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/ranks.jsonl").write_text(json.dumps(RANKS) + "\n")
    return tmp_path


def imported(place: Path, arguments: list[str]) -> tuple[set[str], float]:
    """(the packages that a command imports, its seconds of processor time)."""
    environment = os.environ | {"PYTHONPATH": str(Path(lorakit.__file__).parent.parent)}
    command = [sys.executable, "-c", DRIVER, *arguments]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    modules, seconds = json.loads(done.stderr.splitlines()[-1])
    return {name.partition(".")[0] for name in modules}, seconds


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_it_imports_nothing_heavy(arguments: list[str], place: Path) -> None:
    packages, seconds = imported(place, arguments)
    assert {"lorakit", "typer"} <= packages
    assert packages & set(HEAVY) == set()
    assert seconds < 1.0, "0.2 s is usual; more than the double of 0.5 s is not the machine"
