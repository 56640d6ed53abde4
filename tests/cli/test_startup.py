"""Commands that need no torch start without it, and import little beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lorakit

HEAVY = ("torch", "transformers", "datasets", "scipy", "sklearn", "matplotlib", "safetensors")
# 240 to 600, by command and by the packages' versions; torch alone brings more than 1 000.
MOST_MODULES = 800
# Runs a command as `lorakit` does, then prints what it imported.
DRIVER = """
import json, sys
from lorakit.__main__ import main
sys.argv[0] = "lorakit"
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
sys.stdout.flush()
sys.stderr.write("\\n" + json.dumps(sorted(sys.modules)))
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
    ["init"],
    ["init", "vanilla_glue"],
    ["validate", "recipe.yaml"],
    ["validate", "recipe.yaml", "train.max_steps=3", "method.name=salor", "method.with=[]"],
    ["inspect-ranks", "run"],
    ["inspect-ranks", "run", "--json"],
    ["compare", "run", "other"],
    ["compare", "run", "other", "--json"],
)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a recipe and two runs that inspect-ranks and compare can read."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    for run in ("run", "other"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "ranks.jsonl").write_text(json.dumps(RANKS) + "\n")
        (tmp_path / run / "recipe.yaml").write_text(RECIPE)
        (tmp_path / run / "result.json").write_text('{"metrics": {"loss": 0.5}}')
    return tmp_path


def imported(place: Path, arguments: list[str]) -> list[str]:
    """The modules that a command imports."""
    environment = os.environ | {"PYTHONPATH": str(Path(lorakit.__file__).parent.parent)}
    command = [sys.executable, "-c", DRIVER, *arguments]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    modules: list[str] = json.loads(done.stderr.splitlines()[-1])
    return modules


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_it_imports_nothing_heavy(arguments: list[str], place: Path) -> None:
    modules = imported(place, arguments)
    packages = {name.partition(".")[0] for name in modules}
    assert {"lorakit", "typer"} <= packages
    assert packages & set(HEAVY) == set()
    # What a start takes is its imports. Their number is the same on every machine; seconds are not.
    assert len(modules) < MOST_MODULES
