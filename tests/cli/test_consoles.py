"""Consoles of every kind: ASCII, narrow, without colour, closed, gone. Real processes: streams
belong to one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import PATIENCE_S
from tests.support.tiny import write_jsonl
from tests.support.warm import AVAILABLE, WarmProcess

LORAKIT = [sys.executable, "-m", "lorakit"]
# What makes Python believe that there is only ASCII; LC_ALL=C alone it does not believe.
ASCII = {
    "POSIX": {"LC_ALL": "POSIX"},
    "C, no UTF-8 mode": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
}
UNICODE_ASIDE = "C, no UTF-8 mode"
RECIPE = """\
model: {{name_or_path: {model}, task: {task}}}
data: {{name_or_path: {data}}}
method: {{name: {method}, r: 4}}
train: {{max_steps: 4, per_device_train_batch_size: 4, precision: fp32}}
"""


def run(
    folder: Path,
    *arguments: object,
    encoding: str = "utf-8",
    new: bool = False,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """A command in this environment; new: by an interpreter of its own, which imports all anew."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("LC_", "LANG", "COLUMNS"))
    }
    command = [*LORAKIT, *map(str, arguments)]
    if AVAILABLE and not new:
        process = WarmProcess(command[3:], folder, kept | environment, encoding=encoding)
        out, err = process.communicate(PATIENCE_S)
        return subprocess.CompletedProcess(command, process.returncode or 0, out, err)
    done = subprocess.run(
        command, cwd=folder, env=kept | environment, capture_output=True, check=False
    )
    return subprocess.CompletedProcess(
        command, done.returncode, done.stdout.decode(encoding), done.stderr.decode(encoding)
    )


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, tiny_llama: Path, sentiment: Path
) -> Path:
    """A finished l1ra run of a classifier, and a finished chunkwise run of a language model over
    text beyond ASCII."""
    folder = tmp_path_factory.mktemp("consoles")
    rows = [{"prompt": f"Größe {i} 你好", "completion": f"größer 😀 {i}"} for i in range(12)]
    write_jsonl(folder / "größe.jsonl", rows)  # type: ignore[arg-type]
    c = RECIPE.format(
        model=tiny_bert, task="sequence-classification", data=sentiment, method="l1ra"
    )
    (folder / "c.yaml").write_text(c, encoding="utf-8")
    lm = RECIPE.format(model=tiny_llama, task="causal-lm", data="größe.jsonl", method="chunkwise")
    (folder / "lm.yaml").write_text(lm, encoding="utf-8")
    for name in ("c", "lm"):
        done = run(folder, "train", f"{name}.yaml")
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("console", ASCII)
def test_every_command_ends_as_it_should_without_unicode(
    console: str, place: Path, tmp_path: Path
) -> None:
    commands: list[tuple[object, ...]] = [
        ("train", "c.yaml", f"output_dir={tmp_path / 'c'}"),
        ("train", "c.yaml", "--dry-run"),
        ("inspect-ranks", "runs/c"),
        ("inspect-ranks", "runs/c", "--history"),
        ("inspect-ranks", "runs/c", "--plot", tmp_path / "c.png"),
        ("inspect-ranks", "runs/lm", "--json"),
        ("eval", "runs/c"),
        (
            "generate",
            "runs/lm",
            "--prompt",
            "Größe 你好 good",
            "--max-new-tokens",
            "3",
            "--show-chunks",
        ),
        ("generate", "runs/lm", "--prompt", "Größe 你好 good", "--max-new-tokens", "3", "--json"),
        ("estimate", "c.yaml", "--seconds", "0"),
        ("export", "runs/c", "--merge", "--out", tmp_path / "merged"),
        ("convert", "runs/c", "--out", tmp_path / "converted"),
        ("env",),
        ("validate", "c.yaml"),
        ("schema",),
        ("--help",),
        ("train", "--help"),
    ]
    # POSIX is UTF-8 to Python 3.11, and latin-1 shows more: a few commands tell.
    if console != UNICODE_ASIDE:
        commands = commands[:3]
    encoding = "latin-1" if console == "latin-1" else "utf-8" if console == "POSIX" else "ascii"
    for command in commands:
        done = run(place, *command, encoding=encoding, **ASCII[console])
        assert done.returncode == 0, (command, done.stderr)
        assert "Traceback" not in done.stderr
        assert "Error" not in done.stderr, done.stderr
        if "--json" in command or command == ("schema",):
            json.loads(done.stdout)
    key = "train.größe=1"
    wrong = run(place, "validate", "lm.yaml", key, encoding=encoding, new=True, **ASCII[console])
    assert wrong.returncode == 2
    assert "unknown key `train.gr" not in wrong.stderr  # the key alone, in its section
    assert "unknown key `gr" in wrong.stderr


def test_a_file_that_the_locale_can_not_name_is_an_error_of_its_own(place: Path) -> None:
    done = run(place, "train", "lm.yaml", "--dry-run", **ASCII[UNICODE_ASIDE])
    assert done.returncode == 2
    assert "PYTHONUTF8=1" in done.stderr or "gr" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_in_a_locale_that_can_not_name_the_run_says_what_to_set(place: Path) -> None:
    (place / "größe").mkdir(exist_ok=True)
    for command in (("eval", "größe"), ("train", "lm.yaml", "data.name_or_path=größe/x.jsonl")):
        done = run(place, *command, **ASCII[UNICODE_ASIDE])
        assert done.returncode == 2
        assert "PYTHONUTF8=1" in done.stderr
        assert "PYTHONUTF8" not in run(place, *command).stderr


def test_json_is_the_same_whatever_the_console_can_show(place: Path) -> None:
    command = (
        "generate",
        "runs/lm",
        "--prompt",
        "Größe 你好 good",
        "--max-new-tokens",
        "3",
        "--json",
    )

    def text(**environment: str) -> str:
        found: str = json.loads(run(place, *command, **environment).stdout)["texts"][0]["text"]
        return found

    assert text() == text(PYTHONIOENCODING="ascii") == text(**ASCII[UNICODE_ASIDE])


@pytest.mark.parametrize(
    "environment", [{"COLUMNS": "20"}, {"COLUMNS": "1"}, {"NO_COLOR": "1"}, {"TERM": "dumb"}]
)
def test_narrow_and_plain_terminals(environment: dict[str, str], place: Path) -> None:
    for command in (
        ("inspect-ranks", "runs/c"),
        ("env",),
        ("--help",),
        ("inspect-ranks", "runs/lm"),
    ):
        done = run(place, *command, **environment)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert "\x1b" not in done.stdout


def shell(command: str, place: Path) -> str:
    """stdout and stderr of a line of bash in which $LORAKIT is the command."""
    environment = os.environ | {"LORAKIT": f"{sys.executable} -m lorakit"}
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("command", ["schema", "inspect-ranks runs/c", "env", "--help"])
def test_a_reader_that_goes_away_is_no_error(command: str, place: Path) -> None:
    said = shell(
        f"$LORAKIT {command} | head -c 1 >/dev/null; echo codes ${{PIPESTATUS[0]}}; $LORAKIT"
        f" {command} | true",
        place,
    )
    assert "codes 0" in said
    assert "Traceback" not in said
    assert "rror" not in said


def test_a_run_whose_log_is_not_read_to_the_end_still_ends(place: Path, tmp_path: Path) -> None:
    train = (
        f"$LORAKIT train c.yaml output_dir={tmp_path / 'run'} train.max_steps=30"
        " train.logging_steps=1"
    )
    said = shell(f"{train} 2>&1 | head -1; echo codes ${{PIPESTATUS[0]}}", place)
    assert "codes 0" in said
    assert (tmp_path / "run/result.json").is_file()


def test_closed_streams_are_no_error(place: Path, tmp_path: Path) -> None:
    said = shell(
        f"$LORAKIT train c.yaml output_dir={tmp_path / 'run'} >&- 2>&-; echo codes $?", place
    )
    assert "codes 0" in said
    assert (tmp_path / "run/result.json").is_file()


@pytest.mark.parametrize(
    ("option", "key"),
    [
        ("--lr", "train.learning_rate"),
        ("--gradient-accumulation", "train.gradient_accumulation_steps"),
        ("--zzz", "train.max_steps"),
    ],
)
def test_an_option_that_is_a_key_says_how_keys_are_set(option: str, key: str, place: Path) -> None:
    done = run(place, "train", "c.yaml", option, "3")
    assert done.returncode == 2
    assert f"Keys of a recipe are set without dashes, as {key}=…" in done.stderr


def test_files_that_can_not_be_written_are_told_of_before_the_model_is_loaded(place: Path) -> None:
    for options in (
        ("eval", "runs/lm", "--generate", "--answers", "runs"),
        ("generate", "runs/lm", "--prompt", "good", "--plot", "lm.yaml/x.png"),
    ):
        done = run(place, *options)
        assert done.returncode == 2, done.stderr
        assert "can not be written" in done.stderr
        assert "loading" not in done.stderr
