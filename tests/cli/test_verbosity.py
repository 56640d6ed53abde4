"""-v and -q, before or after the command: how much goes to stderr. What a command is asked for goes
to stdout whatever they say."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.cli import common
from tests.support.processes import Done, in_this_process
from tests.support.tiny import write_jsonl


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Done]:
    monkeypatch.chdir(tmp_path)

    return in_this_process(monkeypatch, capfd)


@pytest.fixture
def recipe(tmp_path: Path, tiny_bert: Path) -> Path:
    rows = [{"sentence": f"good film {i}", "label": i % 2, "more": "unread"} for i in range(20)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    sections = {
        "model": {"name_or_path": str(tiny_bert), "task": "sequence-classification"},
        "data": {"name_or_path": str(tmp_path / "rows.jsonl")},
        "method": {"name": "vanilla", "r": 2},
        "train": {"max_steps": 1, "per_device_train_batch_size": 4, "precision": "fp32"},
        "output_dir": str(tmp_path / "runs/x"),
    }
    path = tmp_path / "x.yaml"
    path.write_text(json.dumps(sections), encoding="utf-8")
    return path


def test_quiet_leaves_warnings_and_the_result(recipe: Path, call: Callable[..., Done]) -> None:
    plain = call("train", recipe)
    assert plain.code == 0, plain.err
    assert "step 1/1" in plain.err
    assert "see also" in plain.err
    warnings = [line for line in plain.err.splitlines() if line.startswith("warning: ")]
    assert warnings, "the column that nothing reads"
    for arguments in (["-q", "train", recipe], ["train", recipe, "--quiet"]):
        quiet = call(*arguments, "--overwrite")
        assert quiet.code == 0
        assert quiet.err.splitlines() == warnings
        assert "accuracy" in quiet.out
    assert call("inspect-ranks", "-q").err == ""
    # The value of another option is not an option.
    assert "`none` is not there" in call("generate", "none", "--prompt", "-q").err
    wrong = call("train", "none.yaml", "-q")
    assert wrong.code == 2
    assert wrong.err.startswith("error: none.yaml: there is no such recipe")


def test_verbose_shows_the_log_s_details(recipe: Path, call: Callable[..., Done]) -> None:
    for arguments, level in (
        (["validate", recipe], logging.INFO),
        (["-v", "validate", recipe], logging.DEBUG),
        (["validate", recipe, "--verbose"], logging.DEBUG),
        (["validate", "-q", recipe], logging.WARNING),
    ):
        assert call(*arguments).out == f"{recipe}: valid\n"
        _, err = common.consoles()
        assert logging.getLogger("lorakit").level == level
        assert err.quiet == (level == logging.WARNING)


def test_both_at_once_are_an_error(call: Callable[..., Done]) -> None:
    done = call("-q", "env", "-v")
    assert done.code == 2
    assert done.out == ""
    assert "--verbose and --quiet are opposites" in done.err


def test_the_help_names_them_once(call: Callable[..., Done]) -> None:
    shown = call("--help").out
    for option in ("--verbose", "--quiet", "--install-completion", "--show-completion"):
        assert shown.count(f"{option} ") == 1
    assert "--verbose" not in call("train", "--help").out
