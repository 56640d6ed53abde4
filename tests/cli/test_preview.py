"""`lorakit preview` from outside: what goes where, and what is refused before anything is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.processes import end, start
from tests.support.tiny import write_jsonl


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path) -> Path:
    """A folder with mine.yaml, whose rows are partly too long, and nowhere.yaml, whose model does
    not exist."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": "how many hens ?", "completion": " there are 2 hens ."},
        {"prompt": "how many eggs ?", "completion": " 3"},
        {"prompt": "how many eggs ?", "completion": " 3"},
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows * 3)
    recipe = (
        "model: {name_or_path: MODEL, task: causal-lm}\n"
        "data: {name_or_path: rows.jsonl, max_seq_length: 8}\n"
        "method: {name: vanilla}\n"
    )
    (tmp_path / "mine.yaml").write_text(recipe.replace("MODEL", str(tiny_llama)))
    (tmp_path / "nowhere.yaml").write_text(recipe.replace("MODEL", "./nowhere"))
    return tmp_path


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_tables_go_to_stdout_and_each_warning_is_printed_once(here: Path) -> None:
    done = end(start(here, "preview", "mine.yaml", "--rows", "2"))
    assert done.code == 0, done.err
    assert "how·many·hens·?{+·there·are·2·hens+}[-·.⟨[EOS]⟩-]" in done.out
    assert "warning: " in done.out
    assert "are the same to the model as an earlier row" in done.out
    both = done.out + done.err
    assert both.count("training rows have more than 8 tokens") == 1
    assert "training rows have more than 8 tokens" in done.err
    assert "\x1b" not in both
    assert files(here) == ["mine.yaml", "nowhere.yaml", "rows.jsonl"]


def test_json_is_one_object_and_nothing_else(here: Path, call: Callable[..., str]) -> None:
    found = json.loads(call("preview", "mine.yaml", "data.max_seq_length=6", "--json", "--row", 1))
    assert found["max_seq_length"] == 6
    (row,) = found["rows"]
    roles = [token["role"] for token in row["tokens"]]
    assert roles == ["context"] * 4 + ["target"] * 2 + ["cut"] * 4
    assert any("more than 6 tokens" in warning["text"] for warning in found["warnings"])


def test_a_page_is_written_beside_the_tables(here: Path, call: Callable[..., str]) -> None:
    out = call("preview", "mine.yaml", "--html", "pages/mine.html", "--rows", 0)
    assert "max_seq_length 8" in out
    text = (here / "pages/mine.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert text.count("<article") == 8
    assert files(here / "pages") == ["mine.html"]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["nowhere.yaml", "data.max_seq_lenght=5"], "did you mean `max_seq_length`?"),
        (["nowhere.yaml", "--html", "rows.jsonl/page.html"], "can not be written"),
        (["nowhere.yaml", "--html", "."], "can not be written"),
        (["nowhere.yaml", "--split", "test"], "there is no split `test`"),
        (["nowhere.yaml"], "./nowhere"),
        (["mine.yaml", "--row", "99"], "row 99 is none of the"),
        (["mine.yaml", "--rows", "-1"], "--rows"),
        (["missing.yaml"], "missing.yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_command_lines(here: Path, arguments: list[str], what: str) -> None:
    """Those with nowhere.yaml are refused before its model is looked for."""
    done = end(start(here, "preview", *arguments))
    assert done.code == 2, done.err
    assert what in done.err
    assert "Traceback" not in done.err
    assert done.out == ""
    assert files(here) == ["mine.yaml", "nowhere.yaml", "rows.jsonl"]
