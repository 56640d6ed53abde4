"""`lorakit eval` of a run on other data than its own, and from another folder."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit.cli import main
from tests.support.tiny import BAD, GOOD, write_jsonl

Call = Callable[..., tuple[int, str, str]]
RECIPE = """\
model: {{name_or_path: {model}, task: {task}}}
data: {{name_or_path: data, {data}}}
method: {{name: vanilla, r: 2}}
train: {{max_steps: 2, per_device_train_batch_size: 4, precision: fp32}}
"""


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lorakit", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        return (exit_.value.code or 0, *capfd.readouterr())  # type: ignore[return-value]

    return run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, tiny_llama: Path) -> Path:
    """A folder with the recipes of a classifier, a regression and a language model, all over
    relative paths, and other data."""
    folder = tmp_path_factory.mktemp("elsewhere")
    rows: list[dict[str, Any]] = [
        {"text": f"{(BAD, GOOD)[i % 2][i % 7]} film {i % 10}", "label": i % 2} for i in range(50)
    ]
    for name, label in (
        ("classes", lambda row: row["label"]),
        ("scores", lambda row: row["label"] + 0.5),
    ):
        (folder / name / "data").mkdir(parents=True)
        for split in ("train", "dev"):
            write_jsonl(
                folder / name / f"data/{split}.jsonl",
                [row | {"label": label(row)} for row in rows[:20]],
            )
        split = "max_eval_samples: 5, validation_split: dev"
        text = RECIPE.format(model=tiny_bert, task="sequence-classification", data=split)
        (folder / name / "a.yaml").write_text(text)
    (folder / "lm/data").mkdir(parents=True)
    write_jsonl(
        folder / "lm/data/train.jsonl",
        [{"prompt": f"how many {i % 10}", "completion": "eggs"} for i in range(20)],
    )
    (folder / "lm/a.yaml").write_text(
        RECIPE.format(model=tiny_llama, task="causal-lm", data="max_seq_length: 32")
    )
    write_jsonl(folder / "other.jsonl", rows)
    write_jsonl(folder / "fractions.jsonl", [row | {"label": row["label"] + 0.25} for row in rows])
    write_jsonl(
        folder / "named.jsonl", [row | {"label": ("bad", "good")[row["label"]]} for row in rows]
    )
    write_jsonl(
        folder / "pairs.jsonl",
        [{"sentence1": row["text"], "sentence2": "film", "label": row["label"]} for row in rows],
    )
    write_jsonl(
        folder / "more.jsonl",
        [row | {"sentence": "film", "labels": 1 - row["label"]} for row in rows],
    )
    write_jsonl(
        folder / "reviews.jsonl", [{"review": row["text"], "labels": row["label"]} for row in rows]
    )
    asked = [{"prompt": f"how many {i % 10}", "completion": "eggs"} for i in range(10)]
    write_jsonl(folder / "asked.jsonl", asked)
    write_jsonl(
        folder / "asked_more.jsonl",
        [row | {"passage": "bad film", "text": "flat"} for row in asked],
    )
    write_jsonl(
        folder / "asked_else.jsonl",
        [{"question": row["prompt"], "answer": row["completion"]} for row in asked],
    )
    write_jsonl(
        folder / "questions.jsonl", [{"topic": "hens", "reply": f"{i % 10}"} for i in range(10)]
    )
    return folder


@pytest.fixture
def trained(place: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    def run(name: str) -> Path:
        found = place / name / "runs/a=b"
        if not found.is_dir():
            monkeypatch.chdir(place / name)
            code, _, err = call("train", "a.yaml", "output_dir=runs/a=b")
            assert code == 0, err
        monkeypatch.chdir(place)
        return found

    return run


def test_all_rows_of_another_file_are_evaluated_and_what_is_left_out_of_the_recipe_is_said(
    trained: Callable[[str], Path], call: Call
) -> None:
    run = trained("classes")
    code, out, err = call("eval", run, "data.name_or_path=other.jsonl", "--json")
    assert code == 0, err
    assert json.loads(out)["rows"] == 50
    assert (
        "other data than the run's: without its validation_split: dev, max_eval_samples: 5" in err
    )
    code, out, err = call(
        "eval", run, "data.name_or_path=other.jsonl", "data.max_eval_samples=7", "--json"
    )
    assert json.loads(out)["rows"] == 7
    assert "max_eval_samples" not in err


def test_the_runs_own_data_is_found_from_another_folder(
    trained: Callable[[str], Path], call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained("classes")
    monkeypatch.chdir(tmp_path)
    code, out, err = call("eval", run, "--json")
    assert code == 0, err
    assert json.loads(out)["rows"] == 5
    assert json.loads(out)["metrics"] == pytest.approx(
        json.loads((run / "result.json").read_text())["metrics"], abs=1e-5
    )
    # What is typed is meant from here, and is not the run's `data`.
    (tmp_path / "data").mkdir()
    write_jsonl(
        tmp_path / "data/train.jsonl",
        [{"text": "good film", "label": 1}, {"text": "bad film", "label": 0}],
    )
    code, out, err = call("eval", run, "data.name_or_path=data", "--json")
    assert code == 0, err
    assert json.loads(out)["rows"] <= 2


def test_a_run_folder_with_an_equals_sign_is_a_run(
    trained: Callable[[str], Path], call: Call
) -> None:
    trained("classes")
    assert call("eval", "classes/runs/a=b", "--json")[0] == 0
    code, _, err = call("eval", "classes/runs/a=c")
    assert code == 2
    assert "not there" in err
    assert "classes/runs/a=c" in err


@pytest.mark.parametrize(
    ("run", "data", "words"),
    [
        (
            "classes",
            "pairs.jsonl",
            (
                "trained on a single text (text)",
                "a pair of texts (sentence1, sentence2)",
                "data.text_columns",
            ),
        ),
        ("classes", "fractions.jsonl", ("tells classes apart (0, 1)", "fractions")),
        ("scores", "named.jsonl", ("predicts a number", "bad, good")),
        ("classes", "named.jsonl", ("'bad'", "0, 1")),
        ("lm", "questions.jsonl", ("topic, reply", "data.prompt")),
        ("lm", "other.jsonl", ("trained on prompt-completion", "text")),
    ],
)
def test_data_of_another_shape_is_refused(
    run: str, data: str, words: tuple[str, ...], trained: Callable[[str], Path], call: Call
) -> None:
    code, out, err = call("eval", trained(run), f"data.name_or_path={data}")
    assert code == 2
    assert out == ""
    for word in words:
        assert word in err, err
    assert err.count("error:") == 1


def test_one_column_of_a_pair_can_be_named(trained: Callable[[str], Path], call: Call) -> None:
    run = trained("classes")
    code, out, err = call(
        "eval", run, "data.name_or_path=pairs.jsonl", "data.text_columns=sentence1", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["rows"] == 50
    code, out, err = call(
        "eval",
        trained("lm"),
        "data.name_or_path=questions.jsonl",
        "data.prompt={topic} ",
        "data.completion={reply}",
    )
    assert code == 0, err


def metrics(call: Call, run: Path, data: str, *overrides: str) -> tuple[dict[str, float], str]:
    """(metrics, what was said) of an evaluation on other data."""
    code, out, err = call("eval", run, f"data.name_or_path={data}", *overrides, "--json")
    assert code == 0, err
    return json.loads(out)["metrics"], " ".join(err.split())


def test_other_data_is_read_from_the_columns_that_were_trained_on(
    trained: Callable[[str], Path], call: Call
) -> None:
    run = trained("classes")
    shape = json.loads((run / "manifest.json").read_text())["data"]["shape"]
    assert (shape["format"], shape["columns"], shape["label_column"]) == (
        "classification",
        ["text"],
        "label",
    )
    expected, err = metrics(call, run, "other.jsonl")
    assert "nothing reads" not in err
    found, err = metrics(call, run, "more.jsonl")
    assert found == expected
    assert "columns with text that nothing reads: sentence (read: text, label;" in err
    assert "trained on" not in err
    found, err = metrics(call, run, "reviews.jsonl")
    assert found == expected
    assert "the run was trained on `text`, which this data does not have: `review` stands in" in err
    assert (
        "the run was trained on `label`, which this data does not have: `labels` stands in" in err
    )


def test_columns_on_the_command_line_come_first(trained: Callable[[str], Path], call: Call) -> None:
    run = trained("classes")
    expected, _ = metrics(call, run, "other.jsonl")
    other, err = metrics(
        call, run, "more.jsonl", "data.text_columns=sentence", "data.label_column=labels"
    )
    assert "stands in" not in err
    assert other != expected
    # All rows have the same text, and half of them each of the two labels.
    assert other["accuracy"] == 0.5
    usual, _ = metrics(call, run, "more.jsonl", "data.text_columns=null")
    assert usual == metrics(call, run, "more.jsonl", "data.text_columns=sentence")[0]


def test_other_data_is_read_by_the_template_that_was_trained_on(
    trained: Callable[[str], Path], call: Call
) -> None:
    run = trained("lm")
    expected, _ = metrics(call, run, "asked.jsonl")
    found, err = metrics(call, run, "asked_more.jsonl")
    assert found == expected
    assert "nothing reads: passage, text (read: prompt, completion;" in err
    found, err = metrics(call, run, "asked_else.jsonl")
    assert found == expected
    assert (
        "the run was trained on `{prompt}`, which this data does not have: `{question}` stands in"
        in err
    )
    generated = [
        call(
            "eval",
            run,
            f"data.name_or_path={data}",
            "--generate",
            "--max-new-tokens",
            2,
            "--answers",
            f"{data}.a",
        )
        for data in ("asked.jsonl", "asked_more.jsonl")
    ]
    assert [code for code, _, _ in generated] == [0, 0]
    assert Path("asked.jsonl.a").read_text() == Path("asked_more.jsonl.a").read_text()


@pytest.mark.parametrize("shape", [None, {"format": "classification", "columns": ["text"]}])
def test_a_run_without_the_record_is_evaluated(
    shape: dict[str, Any] | None, trained: Callable[[str], Path], call: Call, tmp_path: Path
) -> None:
    run = trained("classes")
    before = shutil.copytree(run, tmp_path / "before")
    manifest = json.loads((before / "manifest.json").read_text())
    del manifest["data"]["shape"]
    if shape is not None:
        manifest["data"]["shape"] = shape
    (before / "manifest.json").write_text(json.dumps(manifest))
    expected, _ = metrics(call, run, "other.jsonl")
    assert metrics(call, before, "other.jsonl")[0] == expected
    if shape is not None:  # the text was recorded, the label was not
        assert metrics(call, before, "more.jsonl")[0] == expected
    code, out, err = call("eval", before, "--json")
    assert code == 0, err
    assert json.loads(out)["rows"] == 5
