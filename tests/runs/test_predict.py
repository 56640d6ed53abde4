"""Predictions against those of transformers' own model with PEFT's adapter."""

from __future__ import annotations

import csv
import io
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import lorakit
from lorakit.errors import LorakitError, UsageError
from lorakit.recipes.recipe import recipe_of
from lorakit.report.progress import Progress
from lorakit.runs import predict as module
from lorakit.runs.predict import predict
from lorakit.runs.train import run_training
from tests.support.tiny import BAD, FILLER, GOOD, write_jsonl

PROGRESS = Progress(Console(file=io.StringIO()))
Call = Callable[..., str]
NAMES = ["bad", "good", "neither nor"]


def texts(count: int, seed: int) -> list[str]:
    """Texts of the classes in turn, of which the first words tell; of many lengths."""
    rng = random.Random(seed)
    telling = (BAD, GOOD, FILLER)
    return [
        " ".join(rng.choices(telling[i % 3], k=3) + rng.choices(FILLER, k=rng.randint(0, 9)))
        for i in range(count)
    ]


def trained(folder: Path, model: Path, rows: list[dict[str, object]]) -> Path:
    folder.mkdir()
    write_jsonl(folder / "rows.jsonl", rows)
    recipe = {
        "model": {"name_or_path": model, "task": "sequence-classification"},
        "data": {"name_or_path": folder / "rows.jsonl", "max_seq_length": 16},
        "method": {"name": "vanilla", "r": 4},
        "train": {"max_steps": 40, "learning_rate": 1e-2, "precision": "fp32"},
        "output_dir": folder / "run",
    }
    run_training(recipe_of(recipe), PROGRESS)
    return folder / "run"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    """A run of three classes."""

    rows: list[dict[str, object]] = [
        {"sentence": text, "label": NAMES[i % 3]} for i, text in enumerate(texts(96, 0))
    ]
    return trained(tmp_path_factory.mktemp("of") / "classes", tiny_bert, rows)


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    """A run of values for pairs."""
    rng = random.Random(1)
    pairs = zip(texts(48, 1), texts(48, 2), strict=True)
    rows: list[dict[str, object]] = [
        {"sentence1": one, "sentence2": other, "label": round(rng.uniform(0, 5), 2)}
        for one, other in pairs
    ]
    return trained(tmp_path_factory.mktemp("of") / "values", tiny_bert, rows)


def by_peft(run: Path, base: Path, labels: int, *columns: list[str]) -> torch.Tensor:
    """Logits [rows, labels], computed one row at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
    model = PeftModel.from_pretrained(model, run / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    found = []
    for row in zip(*columns, strict=True):
        inputs = tokenizer(*row, truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            found.append(model(**inputs).logits[0])
    return torch.stack(found)


def test_probabilities_are_those_of_transformers_and_peft(
    classifier: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    """In the rows' order, though batches are by length; rows need no labels, or may have others."""
    rows = texts(30, 3)
    write_jsonl(
        tmp_path / "rows.jsonl", [{"label": "unheard of", "sentence": text} for text in rows]
    )
    found = predict(classifier, tmp_path / "rows.jsonl", PROGRESS)
    assert found["classes"] == NAMES
    assert [one["row"] for one in found["predictions"]] == list(range(1, 31))
    expected = by_peft(classifier, tiny_bert, 3, rows).softmax(-1)
    shares = [[one["probabilities"][name] for name in NAMES] for one in found["predictions"]]
    torch.testing.assert_close(torch.tensor(shares), expected, atol=1e-5, rtol=0)
    for one, row in zip(found["predictions"], expected, strict=True):
        assert one["label"] == NAMES[int(row.argmax())]
        assert one["probability"] == max(one["probabilities"].values())
    assert len({one["label"] for one in found["predictions"]}) > 1
    (tmp_path / "rows.csv").write_text("sentence\n" + "\n".join(rows) + "\n")
    smaller = predict(
        classifier, tmp_path / "rows.csv", PROGRESS, ["train.per_device_eval_batch_size=1"]
    )
    for one, other in zip(found["predictions"], smaller["predictions"], strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-6)


def test_values_of_pairs_are_those_of_transformers_and_peft(
    scorer: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    first, second = texts(9, 4), texts(9, 5)
    pairs = list(zip(first, second, strict=True))
    write_jsonl(tmp_path / "rows.jsonl", [{"sentence1": a, "sentence2": b} for a, b in pairs])
    expected = by_peft(scorer, tiny_bert, 1, first, second)[:, 0].tolist()
    found = predict(scorer, tmp_path / "rows.jsonl", PROGRESS, out=tmp_path / "found.csv")
    assert [one["value"] for one in found["predictions"]] == pytest.approx(expected, abs=1e-5)
    with (tmp_path / "found.csv").open() as file:
        written = list(csv.reader(file))
    assert written[0] == ["row", "value"]
    assert [float(value) for _, value in written[1:]] == pytest.approx(expected, abs=1e-5)
    run = lorakit.load_run(scorer)
    assert [one.value for one in run.predict(pairs)] == pytest.approx(expected, abs=1e-5)
    assert run.predict(pairs[0])[0].value == pytest.approx(expected[0], abs=1e-5)
    alternating = [text for pair in pairs for text in pair]
    assert [one["value"] for one in predict(scorer, alternating, PROGRESS)["predictions"]] == (
        pytest.approx(expected, abs=1e-5)
    )
    with pytest.raises(UsageError, match="a pair of texts, and these are 3 texts"):
        predict(scorer, alternating[:3], PROGRESS)
    with pytest.raises(UsageError, match="reads a pair of texts a row, not"):
        run.predict("alone")
    write_jsonl(tmp_path / "single.jsonl", [{"sentence": "good"}])
    with pytest.raises(LorakitError, match="a pair of texts, and these are a single text"):
        predict(scorer, tmp_path / "single.jsonl", PROGRESS)


def test_the_command_line(
    classifier: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ["good film", "", "a dull plot"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(rows) + "\n"))
    found = json.loads(call("predict", classifier, "-", "--json", "--top", 2))
    assert [one["row"] for one in found["predictions"]] == [1, 2, 3]
    assert all(len(one["probabilities"]) == 2 for one in found["predictions"])
    by_option = call("predict", classifier, *(part for row in rows for part in ("--text", row)))
    assert [line for line in by_option.splitlines() if " 1 " in line and "good" in line]
    run = lorakit.load_run(classifier)
    for one, same in zip(found["predictions"], run.predict(rows), strict=True):
        assert one["label"] == same.label
        assert one["probability"] == pytest.approx(same.probabilities[same.label], abs=1e-6)
    (tmp_path / "rows.txt").write_text("\n".join(rows[::2]) + "\n")
    out = tmp_path / "found.jsonl"
    more = ("data.text_columns=text", "--out", out)
    assert call("predict", classifier, tmp_path / "rows.txt", *more) == ""
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["label"] for line in lines] == [found["predictions"][i]["label"] for i in (0, 2)]
    assert call("predict", classifier, tmp_path / "rows.txt", "--out", tmp_path / "found.csv") == ""
    head, first, _ = (tmp_path / "found.csv").read_text().splitlines()
    assert head == "row,label,probability," + ",".join(f"probability of {n}" for n in NAMES)
    assert first.split(",")[1] == lines[0]["label"]


def test_rows_that_are_cut_are_said_and_none_is_left_out(
    classifier: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = ["good " * 40, "bad", "dull " * 40]
    write_jsonl(tmp_path / "rows.jsonl", [{"sentence": text} for text in rows])
    found = predict(classifier, tmp_path / "rows.jsonl", PROGRESS)
    assert len(found["predictions"]) == 3
    assert "2 of 3 given rows have more than 16 tokens" in caplog.text
    assert "rows.jsonl:1" in caplog.text


def test_many_rows_take_the_fast_path_to_the_same_probabilities(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"sentence": text} for text in texts(40, 6)])
    plain = predict(classifier, tmp_path / "rows.jsonl", PROGRESS)
    monkeypatch.setattr(module, "SPED_UP", 1)
    fast = predict(classifier, tmp_path / "rows.jsonl", PROGRESS)
    for one, other in zip(plain["predictions"], fast["predictions"], strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)


def test_wrong_use_is_refused_before_anything_is_loaded_or_written(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "saved_model", lambda *_: pytest.fail("the model was loaded"))
    writer = tmp_path / "writer"
    (writer / "adapter").mkdir(parents=True)
    (writer / "recipe.yaml").write_text(
        "model: {name_or_path: ./m, task: causal-lm}\ndata: {name_or_path: ./d}\n"
        "method: {name: vanilla}\n"
    )
    (tmp_path / "empty.jsonl").touch()
    write_jsonl(tmp_path / "rows.jsonl", [{"other": "good"}])
    wrong: list[tuple[str, Path, Any, dict[str, Any]]] = [
        ("it has no classes to predict", writer, ["good"], {}),
        ("can not be set", classifier, ["good"], {"overrides": ["method.r=2"]}),
        ("found.txt", classifier, ["good"], {"out": tmp_path / "found.txt"}),
        ("its folder is not there", classifier, ["good"], {"out": tmp_path / "no/found.csv"}),
        ("is not there", classifier, tmp_path / "none.jsonl", {}),
        ("is a folder", classifier, tmp_path, {}),
        ("is empty", classifier, tmp_path / "empty.jsonl", {}),
        ("no text column", classifier, tmp_path / "rows.jsonl", {}),
        ("there is no text", classifier, [], {}),
    ]
    for said, run, rows, options in wrong:
        with pytest.raises(LorakitError, match=said):
            predict(run, rows, PROGRESS, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "empty.jsonl",
        "rows.jsonl",
        "writer",
    ]
