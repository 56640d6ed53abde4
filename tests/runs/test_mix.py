"""Runs on several data sets: trained, resumed, evaluated, and told of."""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorakit.errors import LorakitError, RecipeError, UsageError
from lorakit.files import read_json
from lorakit.recipes.recipe import Recipe, recipe_of
from lorakit.report.card import Exported, model_card
from lorakit.report.logged import logged_progress
from lorakit.report.preview_json import as_json
from lorakit.runs.answer import evaluate_answers
from lorakit.runs.dry_run import dry_run
from lorakit.runs.evaluate import evaluate_run
from lorakit.runs.preview import preview
from lorakit.runs.session import find_sources, read_inputs
from lorakit.runs.train import run_training
from lorakit.training.loop import step_order
from tests.support.tiny import BAD, FILLER, GOOD, write_jsonl

WEIGHTS = "adapter/adapter_model.safetensors"


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(FILLER) for _ in range(count))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sums.jsonl (20 rows: question, answer), talks.jsonl (12: messages) and
    texts.jsonl (16: text)."""
    folder, rng = tmp_path_factory.mktemp("sets"), random.Random(0)
    sums = [
        {"question": f"how many hens {words(rng, i % 4)} {i % 7} ?", "answer": f"{i % 7} hens ."}
        for i in range(20)
    ]
    talks = [
        {
            "messages": [
                {"role": "user", "content": words(rng, 1 + i % 5)},
                {"role": "assistant", "content": words(rng, 3)},
            ]
        }
        for i in range(12)
    ]
    write_jsonl(folder / "sums.jsonl", [dict(row) for row in sums])
    write_jsonl(folder / "talks.jsonl", [dict(row) for row in talks])
    write_jsonl(folder / "texts.jsonl", [{"text": words(rng, 9)} for _ in range(16)])
    return folder


def mix_of(model: Path, sets: Path, folder: Path, *overrides: str, **data: Any) -> Recipe:
    """Three sets of three formats, two epochs of seven steps."""
    mix = [
        {
            "name_or_path": sets / "sums.jsonl",
            "prompt": "{question}",
            "completion": " {answer}",
            "weight": 3,
        },
        {"name_or_path": sets / "talks.jsonl", "weight": 1, "validation_split": 0.25},
        {"name_or_path": sets / "texts.jsonl", "name": "books", "weight": 2},
    ]
    return recipe_of(
        {
            "model": {"name_or_path": model, "task": "causal-lm"},
            "data": {"chat_template": "chatml", "max_seq_length": 32, "mix": mix} | data,
            "method": {"name": "vanilla", "r": 2, "lora_dropout": 0.1},
            "train": {
                "num_train_epochs": 2,
                "per_device_train_batch_size": 5,
                "eval_steps": 4,
                "save_steps": 1,
                "save_total_limit": None,
                "learning_rate": 1e-2,
            },
            "output_dir": folder,
        },
        overrides,
    )


@pytest.fixture(scope="module")
def run(tiny_llama: Path, sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mix") / "run"
    run_training(mix_of(tiny_llama, sets, folder), logged_progress())
    return folder


def evaluated(run: Path, *overrides: str) -> dict[str, Any]:
    return evaluate_run(run, overrides, logged_progress())


def test_each_step_trains_the_rows_of_the_documented_order(
    run: Path, tiny_llama: Path, sets: Path
) -> None:
    recipe = mix_of(tiny_llama, sets, run)
    inputs = read_inputs(recipe, *find_sources(recipe), logged_progress())
    sizes = [len(one.train.unit_lengths) for one in inputs.sets]
    total = sum(sizes)
    shares = [round(total * weight / 6) for weight in (3, 1, 2)]
    assert sum(shares) == total  # nothing to round by remainders
    lengths = [one.train.unit_lengths for one in inputs.sets]
    tokens = []
    for epoch in range(2):
        drawn = []
        for number, (size, share) in enumerate(zip(sizes, shares, strict=True)):
            passes = [
                np.random.default_rng((0, number, one, 1)).permutation(size) for one in range(9)
            ]
            wanted = np.concatenate(passes)[epoch * share : (epoch + 1) * share]
            drawn += lengths[number][wanted].tolist()
        order = np.random.default_rng((0, epoch)).permutation(total)
        shuffled = [drawn[i] for i in order]
        tokens += [sum(shuffled[start : start + 5]) for start in range(0, total, 5)]
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert [line["tokens"] for line in lines if "tokens" in line] == tokens


@pytest.mark.parametrize("step", [3, 7, 10])
def test_a_resumed_run_ends_with_the_same_bytes(
    run: Path, tiny_llama: Path, sets: Path, tmp_path: Path, step: int
) -> None:
    per_epoch = read_json(run / "result.json")["steps"] // 2
    assert per_epoch == 7
    folder = tmp_path / "resumed"
    recipe = mix_of(tiny_llama, sets, folder)
    saved = run / "checkpoints" / f"step-{step:08d}"
    result = run_training(recipe, logged_progress(), resume=str(saved))
    assert (folder / WEIGHTS).read_bytes() == (run / WEIGHTS).read_bytes()
    before = read_json(run / "result.json")
    assert [result[key] for key in ("metrics", "metrics_by_set", "data")] == [
        before[key] for key in ("metrics", "metrics_by_set", "data")
    ]


def test_a_changed_set_is_named_when_a_run_is_resumed(
    run: Path, tiny_llama: Path, sets: Path, tmp_path: Path
) -> None:
    there = sets / "texts.jsonl"
    text = there.read_text()
    try:
        there.write_text(text.replace("the", "is", 1))
        recipe = mix_of(tiny_llama, sets, tmp_path / "again")
        with pytest.raises(UsageError, match=r"data of books is not what .* was trained with"):
            run_training(
                recipe, logged_progress(), resume=str(run / "checkpoints" / "step-00000003")
            )
    finally:
        there.write_text(text)
    changed = mix_of(tiny_llama, sets, run, "data.mix.0.weight=2")
    with pytest.raises(UsageError, match=r"data\.mix\.0\.weight: 3\.0 → 2\.0"):
        run_training(changed, logged_progress(), resume="auto")


@pytest.mark.parametrize("name", ["sums", "talks", "books"])
def test_a_set_is_evaluated_as_if_alone(run: Path, name: str) -> None:
    found, alone = evaluated(run), evaluated(run, f"data.name_or_path={name}")
    assert alone["metrics"] == found["metrics_by_set"][name]
    assert alone["rows"] == found["rows_by_set"][name]
    assert "metrics_by_set" not in alone


def test_the_whole_is_over_all_targets(run: Path, tiny_llama: Path, sets: Path) -> None:
    recipe, found = mix_of(tiny_llama, sets, run), evaluated(run)
    inputs = read_inputs(recipe, *find_sources(recipe), logged_progress())
    losses, targets = [], []
    for one in inputs.sets:
        assert one.validation is not None
        assert one.validation.targets is not None
        marks = one.validation.targets.copy()
        marks[one.validation.offsets[:-1]] = False
        targets.append(int(marks.sum()))
        losses.append(found["metrics_by_set"][one.name]["loss"])
    assert found["metrics"]["loss"] == pytest.approx(np.average(losses, weights=targets))
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["eval_loss"] == pytest.approx(found["metrics"]["loss"])
    by_set = [line[f"eval_{one.name}_loss"] for one in inputs.sets]
    assert by_set == pytest.approx(losses)
    result = read_json(run / "result.json")
    assert [one["loss"] for one in result["metrics_by_set"].values()] == by_set


def test_other_data_takes_the_place_of_the_mix(run: Path, sets: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text((sets / "sums.jsonl").read_text())
    given = ("data.prompt={question}", "data.completion= {answer}")
    found = evaluated(run, f"data.name_or_path={other}", *given)
    assert found["rows"] == 20  # nothing is held out of data that was not trained on
    assert found["data"]["name"] == str(other)
    answers = evaluate_answers(run, [], ["f1"], 2, None, None, logged_progress())
    assert answers["metrics_by_set"].keys() == {"sums", "talks"}  # books have no prompts


def test_the_records_name_each_set(run: Path, sets: Path) -> None:
    manifest, result = read_json(run / "manifest.json")["data"], read_json(run / "result.json")
    names = ["sums", "talks", "books"]
    assert [one["name"] for one in manifest["sets"]] == names
    assert [one["shape"]["format"] for one in manifest["sets"]] == [
        "prompt-completion",
        "chat",
        "text",
    ]
    assert len({one["train_sha256"] for one in manifest["sets"]}) == 3
    assert manifest["train_rows"] == sum(one["train_rows"] for one in manifest["sets"])
    assert [one["share_of_rows"] for one in result["data"]["sets"]] == pytest.approx(
        [1 / 2, 1 / 6, 1 / 3], abs=0.02
    )
    recipe = {
        "method": {"name": "vanilla"},
        "model": {},
        "train": {"seed": 0, "precision": "fp32"},
        "data": {"mix": [{"name_or_path": str(sets / f"{name}.jsonl")} for name in names]},
    }
    card = model_card(
        Exported("peft", "x", recipe, result, {"data": manifest}, "b", True, None, True)
    )
    assert "- data: `sums.jsonl`, 18 rows, " in card
    assert "| metric | value | sums | talks | books |" in card
    assert str(sets) not in card


def test_a_mix_without_weights_is_the_rows_of_all_sets(tiny_llama: Path, sets: Path) -> None:
    mix = [{"name_or_path": sets / "texts.jsonl", "validation_split": 0} for _ in range(2)]
    mix.append({"name_or_path": sets / "sums.jsonl", "format": "text", "text_columns": "answer"})
    given = {"mix": mix, "packing": False, "chat_template": None}
    recipe = mix_of(tiny_llama, sets, Path("x"), **given)
    inputs = read_inputs(recipe, *find_sources(recipe), logged_progress())
    assert [one.name for one in inputs.sets][:2] != ["texts", "texts"]
    assert [len(one.train) for one in inputs.sets] == [16, 16, 18]
    assert [one.validation and len(one.validation) for one in inputs.sets] == [None, None, 2]
    order = step_order(inputs.train.unit_lengths, recipe.train, inputs.train.drawn)  # type: ignore[union-attr]
    epoch = np.concatenate([order.of_step(step) for step in range(1, 11)])
    assert sorted(epoch.tolist()) == list(range(50))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["data.mix.1.validation_split=dev"], "data.mix.1.validation_split: a single file has no"),
        (["data.mix.0.prompt={quest}"], "data.mix.0.prompt: .*quest"),
        (["data.packing=false", "data.stride=4"], "data: stride is for"),
        (["data.label_column=x"], "data.label_column: `label_column` has no effect: the sets are"),
        (["data.mix.2.weight=0.01"], "data.mix.2.weight: the weight 0.01 of 4.01 is none of"),
        ([f"data.mix.{i}.validation_split=0" for i in range(3)], "no set has validation rows"),
        (["data.mix.0.format=chat"], "data.mix.0"),
    ],
)
def test_errors_have_the_key_of_the_set(
    tiny_llama: Path, sets: Path, changed: list[str], said: str
) -> None:
    with pytest.raises(LorakitError) as caught:
        list(dry_run(mix_of(tiny_llama, sets, Path("x"), *changed), logged_progress()))
    assert isinstance(caught.value, RecipeError)
    found = " ".join(f"{one.key}: {one.what}" for one in caught.value.problems)
    assert re.search(said, re.sub(r"(data\S*:) \w+: ", r"\1 ", found)), found


def test_warnings_begin_with_the_name_of_the_set(
    tiny_llama: Path, sets: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = mix_of(tiny_llama, sets, Path("x"), "data.max_seq_length=10")
    with caplog.at_level(logging.INFO, "lorakit"):
        lines = list(dry_run(recipe, logged_progress()))
    long = [text for text in caplog.messages if "have more than 10 tokens" in text]
    assert any(text.startswith("sums: ") and "sums.jsonl:" in text for text in long)
    (heads,) = [line.split() for line in lines if "passes an epoch" in line]
    assert heads[:2] == ["data", "set"]
    assert [line.split()[0] for line in lines if "%" in line] == ["sums", "talks", "books"]


def test_a_preview_has_rows_of_each_set_and_compares_them(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"how many {i}", "completion": f"{i} hens"} for i in range(8)]
    write_jsonl(tmp_path / "one.jsonl", [dict(row) for row in rows])
    (tmp_path / "two").mkdir()
    write_jsonl(tmp_path / "two" / "train.jsonl", [dict(row) for row in rows[:3]])
    other = [{"prompt": "how many 5", "completion": "left"}, {"prompt": "a", "completion": "the"}]
    write_jsonl(tmp_path / "two" / "validation.jsonl", [dict(row) for row in other])
    mix = [
        {"name_or_path": tmp_path / "one.jsonl", "validation_split": 0},
        {"name_or_path": tmp_path / "two"},
    ]
    recipe = mix_of(tiny_llama, tmp_path, tmp_path / "x", mix=mix, chat_template=None)
    found = preview(recipe, logged_progress(), rows=2)
    here = f"({tmp_path}/"
    assert [row.place.replace(here, "(") for row in found.rows] == [
        "one: row 1 (one.jsonl:1)",
        "one: row 8 (one.jsonl:8)",
        "two: row 1 (two/train.jsonl:1)",
        "two: row 3 (two/train.jsonl:3)",
    ]
    assert (found.examples, found.available) == (11, 11)
    texts = {finding.mark: finding.text.replace(here, "(") for finding in found.findings}
    first = "(the first is row 1 (two/train.jsonl:1), like row 1 (one.jsonl:1))"
    assert texts["duplicate"].startswith(f"two: 3 of 3 training rows {first}")
    assert texts["in training"].startswith(
        "two: 1 of 2 validation rows (the first is row 1 (two/validation.jsonl:1), like row 6 (one"
    )
    assert [one["name"] for one in as_json(found)["sets"]] == ["one", "two"]
    only = preview(recipe, logged_progress(), row=7)
    assert [row.place.replace(here, "(") for row in only.rows] == ["one: row 7 (one.jsonl:7)"]
    with pytest.raises(UsageError, match="row 9 is none of the 11 training rows"):
        preview(recipe, logged_progress(), row=9)


# -- classification --------------------------------------------------------------------------------


def reviews(folder: Path, name: str, labels: list[Any]) -> Path:
    rng, path = random.Random(name), folder / name
    rows = [
        {
            "text": f"{rng.choice((BAD, GOOD)[i % 2])} {words(rng, 3)}",
            "label": labels[i % len(labels)],
        }
        for i in range(20)
    ]
    write_jsonl(path, [dict(row) for row in rows])
    return path


def classes(model: Path, *files: Path) -> Recipe:
    return recipe_of(
        {
            "model": {"name_or_path": model, "task": "sequence-classification"},
            "data": {"mix": [{"name_or_path": file} for file in files]},
            "method": {"name": "vanilla", "r": 2},
            "train": {"max_steps": 2},
            "output_dir": files[0].parent / "run",
        }
    )


def test_classes_have_one_list_in_whatever_order_sets_name_them(
    tiny_bert: Path, tmp_path: Path
) -> None:
    one = reviews(tmp_path, "one.jsonl", ["bad", "good"])
    two = reviews(tmp_path, "two.jsonl", ["good", "bad"])
    result = run_training(classes(tiny_bert, one, two), logged_progress())
    names = ("accuracy", "f1", "matthews_correlation", "loss")
    assert tuple(result["metrics"]) == tuple(result["metrics_by_set"]["two"]) == names
    by_set = [result["metrics_by_set"][name]["accuracy"] for name in ("one", "two")]
    assert result["metrics"]["accuracy"] == pytest.approx(np.mean(by_set))  # as many rows in both


def test_classes_that_differ_are_refused_with_both_lists(tiny_bert: Path, tmp_path: Path) -> None:
    one = reviews(tmp_path, "one.jsonl", ["bad", "good"])
    three = reviews(tmp_path, "three.jsonl", [0, 1, 2])
    with pytest.raises(RecipeError) as caught:
        run_training(classes(tiny_bert, one, three), logged_progress())
    (problem,) = caught.value.problems
    assert problem.key == "data.mix.1.label_column"
    assert "one are the classes bad, good, those of three the classes 0, 1, 2" in problem.what
    numbers = reviews(tmp_path, "numbers.jsonl", [0.5, 1.25, 2.0])
    with pytest.raises(RecipeError, match="those of numbers numbers"):
        run_training(classes(tiny_bert, one, numbers), logged_progress())


def test_the_command_shows_each_set(run: Path, call: Callable[..., str]) -> None:
    shown = call("eval", run)
    assert {"sums", "talks", "books"} <= set(shown.split())
