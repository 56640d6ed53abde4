"""Names that look like rich's markup, or need a shell's quotes, are shown as they are by every
command."""

from __future__ import annotations

import ast
import io
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import lorakit
from lorakit.cli import common, main
from lorakit.report.progress import Progress
from tests.support.tiny import write_jsonl

RUN = "a=b [c] [/b] :fire: é"
DATA = "[bold] x.jsonl"
ROOT = Path(lorakit.__file__).parent


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    """`main` in this process; returns stdout and stderr of a command that succeeds."""

    def run(*arguments: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["lorakit", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capfd.readouterr()
        assert not exit_.value.code, captured.err
        return captured.out, captured.err

    return run


def recipe(place: Path, model: Path, task: str, rows: list[dict[str, object]]) -> Path:
    write_jsonl(place / DATA, rows)
    sections = {
        "model": {"name_or_path": str(model), "task": task},
        "data": {"name_or_path": str(place / DATA)},
        "method": {"name": "vanilla", "r": 2},
        "train": {"max_steps": 1, "per_device_train_batch_size": 4, "precision": "fp32"},
        "output_dir": str(place / "runs" / RUN),
    }
    path = place / "[i] r.yaml"
    path.write_text(json.dumps(sections), encoding="utf-8")  # JSON is YAML
    return path


def test_commands_of_a_classifier_show_names_as_they_are(
    tmp_path: Path, tiny_bert: Path, call: Callable[..., tuple[str, str]]
) -> None:
    rows: list[dict[str, object]] = [
        {"sentence": f"good film {i}", "label": "[/b] x" if i % 2 else "[c]"} for i in range(20)
    ]
    path, folder = (
        recipe(tmp_path, tiny_bert, "sequence-classification", rows),
        tmp_path / "runs" / RUN,
    )
    assert "[/b] x: 9 training, 1 validation" in call("train", path, "--dry-run")[0]
    call("estimate", path, "--seconds", "0")
    _, err = call("train", path)
    assert (
        f"saved {folder}/adapter · see also: lorakit inspect-ranks '{folder}' · lorakit export"
        f" '{folder}' --merge\n" in err
    )
    assert f"run {folder}\n" in call("inspect-ranks", folder)[1]
    assert f"{folder} on {tmp_path / DATA}, 2 rows\n" in call("eval", folder)[0]
    assert str(folder / "merged") in call("export", folder, "--merge")[0]
    plot = tmp_path / "[red] p.png"
    assert f"plot written to {plot}\n" in call("inspect-ranks", folder, "--plot", plot)[1]


def test_commands_of_a_language_model_show_names_as_they_are(
    tmp_path: Path, tiny_llama: Path, call: Callable[..., tuple[str, str]]
) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": f"how many hens {i} ?", "completion": f"{i} hens"} for i in range(10)
    ] * 2
    path, folder = recipe(tmp_path, tiny_llama, "causal-lm", rows), tmp_path / "runs" / RUN
    call("train", path)
    call("generate", folder, "--prompt", "[/b] how many", "--max-new-tokens", "2")
    out = tmp_path / "runs" / f"{RUN} 2"
    _, err = call("convert", folder, "method.ladder=[1,2]", "--out", out)
    assert f"saved {out}/adapter · see also: lorakit generate '{out}' --prompt …\n" in err
    _, err = call("generate", out, "--prompt", "how many", "--max-new-tokens", "2", "--show-chunks")
    assert "mean rank" in err


def test_an_error_shows_names_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lorakit", "inspect-ranks", str(tmp_path / RUN)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert str(tmp_path / RUN) in capsys.readouterr().err


def test_consoles_bars_and_the_log_show_names_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    live = common.console(file=shown, force_terminal=True, width=200, color_system=None)
    with Progress(live).stage(RUN) as advance:
        advance(1, 2)
    assert RUN in shown.getvalue()
    out, err = common.consoles()
    for console in (out, err):
        with console.capture() as captured:
            console.print(RUN, soft_wrap=True)
        assert captured.get() == f"{RUN}\n"
    with err.capture() as captured:
        logging.getLogger("lorakit").warning("%s is there", RUN * 5)
    assert captured.get() == f"warning: {RUN * 5} is there\n"


def test_consoles_are_made_in_one_place_and_columns_of_bars_read_no_markup() -> None:
    made = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if name == "Console":
                    made.add(path.relative_to(ROOT).as_posix())
                if name == "TextColumn":
                    assert "markup=False" in ast.unparse(node), path
                assert not name.endswith("from_markup"), path
    # That of builtins shows a bar with a name of lorakit's own.
    assert made == {"cli/common.py", "sources/builtin.py"}
