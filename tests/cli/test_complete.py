"""Completion in a shell: a process that is asked as the shell asks it. And help: the words that an
option takes are those that its reader knows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import lorakit
from lorakit.cli import complete, export, generate, main, preview
from lorakit.cli import evaluate as eval_
from lorakit.recipes.shipped import shipped
from lorakit.runs.export import GGUF_TYPES
from lorakit.runs.export_adapter import FORMS
from lorakit.runs.generate import KVPolicy
from lorakit.runs.preview import SPLITS
from lorakit.training.answer_metrics import METRICS

HEAVY = {"torch", "transformers", "datasets", "matplotlib", "rich.progress"}
# Completes as the command does, then tells what was imported.
DRIVER = """
import json, sys
from lorakit.__main__ import main
sys.argv[0] = "lorakit"
try:
    main()
finally:
    sys.stdout.flush()
    sys.stderr.write(json.dumps(sorted(sys.modules)))
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with recipes, other files and two runs."""
    for name in ("mine.yaml", "recipes/old.yml", "recipes/new one.yaml", "data.jsonl", "no.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in ("runs/a", "runs/more/b"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "recipe.yaml").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("lorakit train ", ["mine.yaml", "recipes/new one.yaml", "recipes/old.yml"]),
        ("lorakit validate recipes/o", ["recipes/old.yml"]),
        ("lorakit estimate ./m", ["./mine.yaml"]),
        ("lorakit init l1ra_g", ["l1ra_glue", "l1ra_gsm8k"]),
        ("lorakit eval ", ["runs/a", "runs/more/b"]),
        ("lorakit compare runs/a runs/", ["runs/a", "runs/more/b"]),
        ("lorakit inspect-ranks runs/m", ["runs/more/b"]),
        ("lorakit export --format p", ["peft", "peft-portable"]),
        ("lorakit generate --kv int", ["int4", "int8"]),
        ("lorakit export --dt", ["--dtype"]),
        ("lorakit insp", ["inspect-ranks"]),
    ],
)
def test_the_shell_completes(line: str, expected: list[str], place: Path) -> None:
    environment = os.environ | {
        "PYTHONPATH": str(Path(lorakit.__file__).parent.parent),
        "_LORAKIT_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split(" ")) - 1),
    }
    command = [sys.executable, "-c", DRIVER]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert done.stdout.split("\n")[:-1] == expected, done.stderr
    modules = set(json.loads(done.stderr))
    assert modules & HEAVY == set()


def test_recipe_files_of_other_folders(place: Path) -> None:
    assert complete.recipe_files(f"{place}/mi") == [f"{place}/mine.yaml"]
    assert complete.recipe_files("/nowhere/x") == []
    assert complete.shipped_recipes("") == list(shipped())


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (export.FORMAT, FORMS),
        (export.DTYPE, GGUF_TYPES),
        (generate.KV, get_args(KVPolicy)),
        (eval_.METRIC, METRICS),
        (preview.SPLIT, SPLITS),
    ],
)
def test_help_lists_the_words_that_an_option_takes(option: object, words: list[str]) -> None:
    assert sorted(re.findall(r"[\w-]+", option.metavar)) == sorted(words)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["export", "run", "--adapter", "--format", "pefft"], "peft"),
        (["export", "run", "--merge", "--dtype", "bfloat"], "bfloat16"),
        (["generate", "run", "--prompt", "x", "--kv", "int9"], "int8"),
        (["eval", "run", "--generate", "--metric", "exact-match"], "exact_match"),
    ],
)
def test_a_word_that_there_is_not_names_the_nearest(
    arguments: list[str],
    nearest: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lorakit", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    shown = capsys.readouterr().err
    assert f"Did you mean `{nearest}`?" in shown
    assert shown.count("error:") == 1
