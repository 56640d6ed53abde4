"""The command line from outside: real processes where signals, streams or start-up matter, `main`
itself elsewhere."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.cli import main
from lorakit.errors import RecipeError
from lorakit.runs import training_run as run_module
from lorakit.training.metrics import Evaluation
from tests.support.processes import (
    WEIGHTS,
    Done,
    checkpoints,
    end,
    in_this_process,
    start,
    wait_for,
)
from tests.support.tiny import write_jsonl

# DESIGN.md, section 3.
RESULT_KEYS = {
    *(
        "method",
        "task",
        "metrics",
        "train_seconds",
        "wall_seconds",
        "tokens",
        "tokens_per_second",
        "peak_memory_mb",
    ),
    *(
        "trainable_parameters",
        "adapter_bytes",
        "rank_total",
        "ranks",
        "steps",
        "seed",
        "precision",
        "data",
    ),
}

# fp32, since oneDNN compiles a kernel for each new shape in bf16, which is all that such a short
# run would do.
RECIPE = """\
model:
  name_or_path: {model}
  task: sequence-classification
data:
  name_or_path: {data}
method:
  name: {method}
  r: 4
  lora_alpha: 8
train:
  max_steps: {steps}
  per_device_train_batch_size: 8
  learning_rate: 5e-3
  precision: fp32
  save_steps: 25
  save_total_limit: null
"""
# Gates close early and often: the ranks move all along the run.
RESTLESS = ("method.l1_share=6", "method.rank_update_ratio=0.05")
Call = Callable[..., Done]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    return in_this_process(monkeypatch, capfd)


def write_recipe(
    path: Path, model: Path, data: Path, method: str = "vanilla", steps: int = 10, more: str = ""
) -> Path:
    path.write_text(
        RECIPE.format(model=model, data=data, method=method, steps=steps) + more, encoding="utf-8"
    )
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_times(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines(path)]


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size)
        for p in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, sentiment: Path) -> Path:
    """A folder with two recipes and their finished runs, runs/vanilla and then runs/l1ra, each by a
    process of its own."""
    folder = tmp_path_factory.mktemp("place")
    write_recipe(folder / "vanilla.yaml", tiny_bert, sentiment, steps=30, more="  eval_steps: 10\n")
    write_recipe(folder / "l1ra.yaml", tiny_bert, sentiment, "l1ra", steps=400)
    both = [start(folder, "train", "vanilla.yaml"), start(folder, "train", "l1ra.yaml", *RESTLESS)]
    for done in map(end, both):
        assert done.code == 0, done.err
    os.utime(folder / "runs/l1ra/ranks.jsonl")
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def small(
    tmp_path: Path, tiny_bert: Path, sentiment: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The recipe small.yaml of ten steps, in a working folder of its own; its run would be
    runs/small."""
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path / "small.yaml", tiny_bert, sentiment)
    return tmp_path


# -- help ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", ["train", "inspect-ranks", "export", "eval", "validate", "schema", "env"]
)
def test_every_command_has_help(command: str, call: Call) -> None:
    done = call(command, "--help")
    assert done.code == 0
    assert command in done.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["trian"]),
        (["train"], ["RECIPE"]),
        (["train", "x.yaml", "--resum", "auto"], ["--resum"]),
        (["train", "x.yaml"], ["no such recipe"]),
        (["inspect-ranks"], ["no run"]),
        (["eval", "runs/none"], ["runs/none", "not there"]),
        (["eval", "train.seed=1"], ["no run"]),
        (["export", "runs/none", "--merge"], ["not there"]),
        (["validate", "."], ["folder"]),
    ],
)
def test_wrong_command_lines_exit_2_and_write_nothing(
    arguments: list[str],
    words: list[str],
    call: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert "Traceback" not in done.err
    for word in words:
        assert word in done.err
    assert not any(tmp_path.iterdir())


def test_debug_anywhere_on_the_line_lets_the_error_through(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "Traceback" not in call("validate", "no.yaml").err
    monkeypatch.setattr(sys, "argv", ["lorakit", "validate", "no.yaml", "--debug"])
    with pytest.raises(RecipeError):
        main()


# -- what a run leaves -----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "steps"), [("vanilla", 30), ("l1ra", 400)])
def test_a_run_leaves_all_that_the_design_lists(place: Path, name: str, steps: int) -> None:
    run = place / "runs" / name
    result = json.loads((run / "result.json").read_text())
    assert result.keys() >= RESULT_KEYS
    assert result["method"] == name
    assert result["steps"] == steps
    assert result["data"]["stand_in"] is False
    assert result["group_by_length"] is False
    assert {"accuracy", "f1", "matthews_correlation", "loss"} <= result["metrics"].keys()
    assert result["rank_total"] == sum(result["ranks"].values())
    assert result["adapter_bytes"] == (run / WEIGHTS).stat().st_size
    assert 0 < result["train_seconds"] <= result["wall_seconds"]
    assert result["tokens_per_second"] == pytest.approx(
        result["tokens"] / result["train_seconds"], rel=0.01
    )
    manifest = json.loads((run / "manifest.json").read_text())
    assert {"versions", "machine", "model", "data"} <= manifest.keys()
    assert {"adapter_config.json", "tokenizer.json"} <= {
        path.name for path in (run / "adapter").iterdir()
    }
    assert not [path for path in run.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".pth")]
    assert not list(run.rglob(".*")), "half-written files were left"


@pytest.mark.parametrize("name", ["vanilla", "l1ra"])
def test_metrics_have_one_line_a_step(place: Path, name: str) -> None:
    result = json.loads((place / f"runs/{name}/result.json").read_text())
    found = lines(place / f"runs/{name}/metrics.jsonl")
    steps = [line for line in found if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, result["steps"] + 1))
    assert sum(line["tokens"] for line in steps) == result["tokens"]
    evaluations = [line for line in found if "eval_accuracy" in line]
    assert [line["step"] for line in evaluations] == ([10, 20, 30] if name == "vanilla" else [400])
    assert result["metrics"] == {
        key[5:]: value for key, value in evaluations[-1].items() if key != "step"
    }


@pytest.mark.parametrize("name", ["vanilla", "l1ra"])
def test_cost_and_pool_are_the_budget_in_every_line(place: Path, name: str) -> None:
    found = lines(place / f"runs/{name}/ranks.jsonl")
    for line in found:
        assert line["cost"] + line["pool"] == line["budget"] == 48
        assert line["cost"] == sum(line["ranks"].values())
        assert min(line["ranks"].values()) >= 0
    assert found[0]["step"] == 0
    assert set(found[0]["ranks"].values()) == {4}
    assert all(a["ranks"] != b["ranks"] or a["pool"] != b["pool"] for a, b in pairwise(found))
    result = json.loads((place / f"runs/{name}/result.json").read_text())
    assert found[-1]["ranks"] == result["ranks"]
    assert len(found) == 1 if name == "vanilla" else len(found) > 5


def test_the_saved_recipe_is_the_whole_run_again(here: Path, call: Call) -> None:
    assert call("validate", "runs/l1ra/recipe.yaml").code == 0
    done = call("train", "runs/vanilla/recipe.yaml", "output_dir=runs-again/vanilla")
    assert done.code == 0, done.err
    again = json.loads((here / "runs-again/vanilla/result.json").read_text())
    first = json.loads((here / "runs/vanilla/result.json").read_text())
    assert again["ranks"] == first["ranks"]
    assert again["metrics"] == pytest.approx(first["metrics"], abs=1e-5)


# -- looking at a run ------------------------------------------------------------------------------


def test_inspect_ranks_shows_the_newest_run_or_the_one_named(here: Path, call: Call) -> None:
    newest, named = call("inspect-ranks"), call("inspect-ranks", "runs/l1ra")
    assert newest.code == named.code == 0
    assert newest.out == named.out
    last = lines(here / "runs/l1ra/ranks.jsonl")[-1]
    assert f"total {sum(last['ranks'].values())} · budget 48 · pool {last['pool']}" in " ".join(
        newest.out.split()
    )
    assert "query" in newest.out
    assert "runs/l1ra" in newest.err
    assert "budget  most that all ranks may cost" in newest.out
    other = call("inspect-ranks", "runs/vanilla")
    assert other.out.strip() == "12 modules in 2 layers, rank 4 each, 48 in all; none moved"
    assert "0 of 12 modules moved" in call("inspect-ranks", "runs/vanilla", "--full").out


def test_inspect_ranks_history_has_a_row_for_every_record(here: Path, call: Call) -> None:
    done = call("inspect-ranks", "--history")
    assert done.code == 0
    shown = [
        int(found[1])
        for line in done.out.splitlines()
        if (found := re.match(r" *(\d+) +\d+ +\d+ +\d+ ", line))
    ]
    assert shown == [line["step"] for line in lines(here / "runs/l1ra/ranks.jsonl")]


def test_inspect_ranks_json_is_the_only_output(here: Path, call: Call) -> None:
    done = call("inspect-ranks", "--json", "--plot", here / "ranks.png")
    assert done.err == ""
    last = lines(here / "runs/l1ra/ranks.jsonl")[-1]
    assert done.json()["ranks"] == last["ranks"]
    assert done.json()["pool"] == last["pool"]
    assert len(done.out.splitlines()) == 1


def test_inspect_ranks_plots_png_and_html_and_refuses_others(here: Path, call: Call) -> None:
    assert call("inspect-ranks", "--plot", "plot.png").code == 0
    assert (here / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert call("inspect-ranks", "runs/vanilla", "--plot", "plot.html").code == 0
    assert (
        "<svg" in (here / "plot.html").read_text()
        or "data:image/" in (here / "plot.html").read_text()
    )
    wrong = call("inspect-ranks", "--plot", "plot.gif")
    assert wrong.code == 2
    assert ".png" in wrong.err
    assert not (here / "plot.gif").exists()


def test_eval_gives_the_result_of_the_run_again(here: Path, call: Call) -> None:
    done = call("eval", "runs/l1ra", "--json")
    assert done.code == 0, done.err
    found = done.json()
    assert found["rows"] == 24
    assert found["metrics"] == pytest.approx(
        json.loads((here / "runs/l1ra/result.json").read_text())["metrics"], abs=1e-5
    )
    cut = call("eval", "runs/l1ra", "--json", "train.max_tokens_per_micro_batch=9")
    assert cut.code == 0, cut.err
    assert cut.json()["metrics"] == pytest.approx(found["metrics"], abs=1e-5)
    table = call("eval")
    assert "runs/l1ra" in table.out
    assert f"{found['metrics']['accuracy']:.4f}" in table.out


def test_eval_takes_other_data_with_the_labels_of_the_run(
    here: Path, call: Call, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    # All of one label: counted from this data alone, there would be but one class.
    for split in ("train", "validation"):
        write_jsonl(
            other / f"{split}.jsonl",
            [{"text": f"good lovely film {i % 10}", "label": 1} for i in range(20)],
        )
    done = call("eval", "runs/l1ra", f"data.name_or_path={other}", "--json")
    assert done.code == 0, done.err
    assert done.json()["rows"] == 20
    assert done.json()["data"]["name"] == str(other)
    assert done.json()["metrics"]["accuracy"] > 0.8


def test_eval_takes_all_rows_of_another_file(here: Path, call: Call, tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "test.jsonl",
        [{"text": f"good lovely film {i % 10}", "label": 1} for i in range(20)],
    )
    done = call("eval", "runs/l1ra", f"data.name_or_path={tmp_path / 'test.jsonl'}", "--json")
    assert done.code == 0, done.err
    assert done.json()["rows"] == 20


def test_eval_refuses_what_would_make_it_another_run(here: Path, call: Call) -> None:
    for override in ("method.r=8", "train.seed=1", "output_dir=x", "model.name_or_path=x"):
        done = call("eval", "runs/l1ra", override)
        assert done.code == 2
        assert override in done.err
    assert call("eval", "runs/l1ra", "runs/vanilla").code == 2
    assert call("eval", "runs/l1ra", "data.name_or_path=./none").code == 2


def test_looking_at_a_run_changes_nothing_in_it(here: Path, call: Call) -> None:
    before = tree(here / "runs")
    for command in ("inspect-ranks", "eval"):
        assert call(command, "runs/vanilla").code == 0
    assert tree(here / "runs") == before


def test_validate_says_which_recipe_is_valid(here: Path, call: Call) -> None:
    done = call("validate", "l1ra.yaml", *RESTLESS)
    assert done.code == 0
    assert done.out == "l1ra.yaml: valid\n"
    assert call("validate", "l1ra.yaml", "method.l1_shar=6").code == 2


def test_schema_is_one_json_object_that_knows_the_methods(call: Call) -> None:
    done = call("schema")
    assert done.code == 0
    assert done.err == ""
    assert done.json()["$schema"].startswith("https://json-schema.org/")
    assert {"l1ra", "vanilla"} <= done.json()["properties"]["method"]["discriminator"][
        "mapping"
    ].keys()


def test_env_json_is_the_only_output(tmp_path: Path) -> None:
    done = end(start(tmp_path, "env", "--json"))
    assert done.code == 0
    assert done.err == ""
    assert {"versions", "devices", "cache", "builtins"} <= done.json().keys()
    assert {"minilm-l6", "smollm2-135m-instruct", "movie-snippets"} <= done.json()[
        "builtins"
    ].keys()
    assert done.json()["versions"]["torch"].startswith(torch.__version__.split("+")[0])


# -- where a run may be written --------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_refused_then_overwritten_on_demand(
    small: Path, call: Call
) -> None:
    assert call("train", "small.yaml", "train.max_steps=2").code == 0
    (small / "runs/small/merged").mkdir()
    before = tree(small)
    refused = call("train", "small.yaml", "train.max_steps=3")
    assert refused.code == 2
    for word in ("runs/small", "--resume", "--overwrite"):
        assert word in refused.err
    both = call("train", "small.yaml", "--resume", "auto", "--overwrite")
    assert both.code == 2
    assert tree(small) == before
    assert call("train", "small.yaml", "train.max_steps=3", "--overwrite").code == 0
    assert json.loads((small / "runs/small/result.json").read_text())["steps"] == 3
    assert len([line for line in lines(small / "runs/small/metrics.jsonl") if "loss" in line]) == 3
    assert not (small / "runs/small/merged").exists(), (
        "an export of the old run was left in the new one"
    )


@pytest.mark.parametrize("option", [(), ("--overwrite",), ("--resume", "auto")])
@pytest.mark.parametrize("foreign", ["thesis.txt", "recipe.yaml"])
def test_a_folder_of_other_files_is_never_touched(
    small: Path, call: Call, foreign: str, option: tuple[str, ...]
) -> None:
    mine = small / "mine"
    mine.mkdir()
    (mine / foreign).write_text("years of work")
    (mine / "data").mkdir()
    before = tree(small)
    done = call("train", "small.yaml", "output_dir=mine", *option)
    assert done.code == 2
    assert "mine" in done.err
    assert tree(small) == before


def test_the_folder_that_one_works_in_is_never_overwritten(small: Path, call: Call) -> None:
    (small / "small.yaml").rename(small / "recipe.yaml")
    before = tree(small)
    assert call("train", "recipe.yaml", "output_dir=.", "--overwrite").code == 2
    assert tree(small) == before


def test_a_failing_overwrite_keeps_the_old_run(small: Path, call: Call) -> None:
    assert call("train", "small.yaml", "train.max_steps=2").code == 0
    before = tree(small)
    assert call("train", "small.yaml", "method.target_modules=[nothing]", "--overwrite").code == 2
    assert tree(small) == before


# -- resuming --------------------------------------------------------------------------------------


def unfinished(small: Path, call: Call, steps: int = 30) -> Path:
    """A run that looks like one killed after its last checkpoint, of step 25."""
    assert call("train", "small.yaml", f"train.max_steps={steps}").code == 0
    run = small / "runs/small"
    (run / "result.json").unlink()
    for file in (run / "adapter").iterdir():
        file.unlink()
    (run / "adapter").rmdir()
    shutil.rmtree(run / f"checkpoints/step-{steps:08d}")
    return run


def test_resume_auto_with_nothing_there_starts(small: Path, call: Call) -> None:
    done = call("train", "small.yaml", "train.max_steps=2", "--resume", "auto")
    assert done.code == 0
    assert (small / "runs/small/result.json").exists()


def test_resuming_a_finished_run_does_nothing(small: Path, call: Call) -> None:
    assert call("train", "small.yaml", "train.max_steps=2").code == 0
    before = tree(small)
    done = call("train", "small.yaml", "train.max_steps=2", "--resume", "auto")
    assert done.code == 0
    assert "finished" in done.err
    assert tree(small) == before


def test_resume_with_a_changed_recipe_is_refused_by_name(small: Path, call: Call) -> None:
    unfinished(small, call)
    before = tree(small)
    done = call(
        "train",
        "small.yaml",
        "train.max_steps=30",
        "--resume",
        "auto",
        "train.learning_rate=1e-4",
        "method.r=2",
    )
    assert done.code == 2
    assert "train.learning_rate: 0.005 → 0.0001" in done.err
    assert "method.r: 4 → 2" in done.err
    assert "train.seed" not in done.err
    assert tree(small) == before
    # These change nothing of what is computed.
    done = call(
        "train",
        "small.yaml",
        "train.max_steps=30",
        "--resume",
        "auto",
        "train.logging_steps=1",
        "train.save_steps=7",
    )
    assert done.code == 0, done.err
    assert "after step 25" in done.err


def test_resume_with_changed_data_is_refused(small: Path, call: Call, sentiment: Path) -> None:
    copy = small / "data"
    copy.mkdir()
    for file in sentiment.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    arguments = ("train", "small.yaml", "data.name_or_path=./data", "train.max_steps=30")
    assert call(*arguments).code == 0
    (small / "runs/small/result.json").unlink()
    (copy / "train.jsonl").write_text((copy / "train.jsonl").read_text().replace("good", "dull"))
    done = call(*arguments, "--resume", "auto")
    assert done.code == 2
    assert "training" in done.err or "train data" in done.err


def test_resume_over_another_base_is_refused(small: Path, call: Call, tiny_bert: Path) -> None:
    shutil.copytree(tiny_bert, small / "base")
    arguments = (
        "train",
        "small.yaml",
        "model.name_or_path=./base",
        "train.max_steps=5",
        "train.save_steps=2",
    )
    assert call(*arguments).code == 0
    (small / "runs/small/result.json").unlink()
    weights = load_file(small / "base/model.safetensors")
    save_file(
        {name: tensor + 0.01 for name, tensor in weights.items()},
        small / "base/model.safetensors",
        {"format": "pt"},
    )
    done = call(*arguments, "--resume", "auto")
    assert done.code == 2
    assert "base model" in done.err


def test_a_crash_in_the_last_evaluation_loses_no_step(
    small: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            "lorakit.runs.training_run.evaluate",
            lambda *_: (_ for _ in ()).throw(MemoryError("no room")),
        )
        assert call("train", "small.yaml", "train.max_steps=5", "train.save_steps=null").code == 1
    done = call(
        "train", "small.yaml", "train.max_steps=5", "train.save_steps=null", "--resume", "auto"
    )
    assert done.code == 0, done.err
    assert "after step 5" in done.err
    assert (small / "runs/small/result.json").exists()


def test_dry_run_shows_brackets_as_they_are(
    small: Path, call: Call, tiny_llama: Path, sums: Path
) -> None:
    where = (
        f"model.name_or_path={tiny_llama}",
        "model.task=causal-lm",
        f"data.name_or_path={sums}",
    )
    templates = ('data.prompt="[/INST] [user] {question}"', 'data.completion="{answer}"')
    done = call("train", "small.yaml", *where, *templates, "--dry-run")
    assert done.code == 0, done.err
    assert "[/INST] [user] {question}" in done.out
    assert "14 layers" in done.out
    assert not (small / "runs").exists()


def test_dry_run_counts_the_rows_of_each_class(small: Path, call: Call) -> None:
    write_jsonl(
        small / "sorted.jsonl",
        [{"text": f"good film {i}", "label": "ab"[i >= 30]} for i in range(40)],
    )
    done = call("train", "small.yaml", "data.name_or_path=sorted.jsonl", "--dry-run")
    assert done.code == 0, done.err
    assert "a: 27 training, 3 validation" in done.out
    assert "b: 9 training, 1 validation" in done.out
    assert "no validation row" not in done.err
    done = call(
        "train",
        "small.yaml",
        "data.name_or_path=sorted.jsonl",
        "data.max_eval_samples=1",
        "--dry-run",
    )
    assert done.code == 0, done.err
    assert "no validation row has the label b" in done.err


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("adapter_model.safetensors", "tensors cut"),
        ("state.safetensors", "tensors cut"),
        ("state.safetensors", "tensors gone"),
        ("", "state cut"),
        ("", "state of another kind"),
        ("", "state not text"),
    ],
)
def test_a_broken_checkpoint_exits_1_with_a_remedy(
    small: Path, call: Call, file: str, damage: str
) -> None:
    run = unfinished(small, call)
    tensors, state = (run / "checkpoints/step-00000025" / name for name in (file, "state.json"))
    if damage == "tensors cut":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif damage == "tensors gone":
        tensors.unlink()
    elif damage == "state cut":
        state.write_text(state.read_text()[:-20])
    elif damage == "state not text":
        state.write_bytes(b"\xff\xfe\x00")
    else:
        state.write_text("[]")
    done = call("train", "small.yaml", "train.max_steps=30", "--resume", "auto")
    assert done.code == 1
    assert "step-00000025" in done.err
    assert "--overwrite" in done.err
    assert "Traceback" not in done.err


def test_resume_from_a_named_checkpoint_ends_the_same(small: Path, call: Call) -> None:
    recipe = ("train", "small.yaml", "train.max_steps=30", "train.save_steps=10")
    assert call(*recipe).code == 0
    run = small / "runs/small"
    first, log = (run / WEIGHTS).read_bytes(), without_times(run / "metrics.jsonl")
    done = call(*recipe, "--resume", run / "checkpoints/step-00000010")
    assert done.code == 0, done.err
    assert (run / WEIGHTS).read_bytes() == first
    assert without_times(run / "metrics.jsonl") == log
    missing = call(*recipe, "--resume", "runs/small/checkpoints/step-00000011")
    assert missing.code == 2
    assert "step-00000020" in missing.err


def test_a_run_resumed_from_a_named_checkpoint_counts_as_unfinished(
    small: Path, call: Call
) -> None:
    """Else an interruption of it would leave the old result, and `--resume auto` would have nothing
    to do."""
    recipe = ("train", "small.yaml", "train.max_steps=300")
    assert call(*recipe).code == 0
    run = small / "runs/small"
    first, log = (run / WEIGHTS).read_bytes(), without_times(run / "metrics.jsonl")
    process = start(small, *recipe, "--resume", run / "checkpoints/step-00000025")
    wait_for(process, "the log is cut", lambda: len(lines(run / "metrics.jsonl")) < 200)
    wait_for(
        process, "steps go on", lambda: len((run / "metrics.jsonl").read_bytes().splitlines()) > 40
    )
    process.send_signal(signal.SIGINT)
    assert end(process).code == 130
    assert not (run / "result.json").exists()
    assert 40 < len(lines(run / "metrics.jsonl")) < 300
    done = call(*recipe, "--resume", "auto")
    assert done.code == 0, done.err
    assert (run / WEIGHTS).read_bytes() == first
    assert without_times(run / "metrics.jsonl") == log


# -- interruptions ---------------------------------------------------------------------------------


def test_interrupted_at_any_moment_a_resumed_run_ends_with_the_same_bytes(place: Path) -> None:
    whole, run = place / "runs/l1ra", place / "cut/l1ra"
    arguments = ("train", "l1ra.yaml", *RESTLESS, f"output_dir={run}", "--resume", "auto")
    rng = random.Random(0)
    cuts = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGINT):
        known = checkpoints(run)
        process = start(place, *arguments)
        wait_for(
            process,
            "a checkpoint of its own",
            lambda known=known: len(checkpoints(run)) > len(known),
        )
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(number)
        done = end(process)
        assert not (run / "result.json").exists(), "the signal came too late to show anything"
        if number == signal.SIGKILL:
            assert done.code == -signal.SIGKILL
        else:
            assert done.code == 130
            assert "Traceback" not in done.err
            saved = re.search(r"stopped after step (\d+) of 400; saved (\S+)", done.err)
            assert saved, done.err
            assert Path(saved[2]).is_dir()
            assert "--resume auto" in done.err
        cuts.append(int(checkpoints(run)[-1].removeprefix("step-")))
    done = end(start(place, *arguments))
    assert done.code == 0, done.err
    assert f"after step {cuts[-1]} of 400" in done.err
    assert (run / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert (run / "ranks.jsonl").read_bytes() == (whole / "ranks.jsonl").read_bytes()
    assert without_times(run / "metrics.jsonl") == without_times(whole / "metrics.jsonl")
    moved = [line["step"] for line in lines(run / "ranks.jsonl")][1:]
    for cut in cuts:
        assert cut < moved[-1]  # ranks still moved after it
    assert any(moved[0] < cut < moved[-1] for cut in cuts), (cuts, moved)
    results = [json.loads((folder / "result.json").read_text()) for folder in (run, whole)]
    same = RESULT_KEYS - {"train_seconds", "wall_seconds", "tokens_per_second", "peak_memory_mb"}
    assert {key: results[0][key] for key in same} == {key: results[1][key] for key in same}


def test_a_killed_run_with_other_batches_resumes_to_the_same_bytes(small: Path, call: Call) -> None:
    """Grouped by length, in micro-batches of varying number: killed in its third epoch of six
    steps."""
    options = (
        "train.group_by_length=true",
        "train.max_tokens_per_micro_batch=40",
        "train.gradient_accumulation_steps=2",
    )
    arguments = (
        "train",
        "small.yaml",
        *RESTLESS,
        *options,
        "method.name=l1ra",
        "train.max_steps=60",
        "train.save_steps=5",
    )
    whole, run, plain = small / "whole", small / "cut", small / "plain"
    process = start(small, *arguments, f"output_dir={run}")
    wait_for(process, "its third checkpoint", lambda: len(checkpoints(run)) >= 3)
    process.kill()
    end(process)
    assert not (run / "result.json").exists(), "the signal came too late to show anything"
    for folder, more in (
        (run, ["--resume", "auto"]),
        (whole, []),
        (plain, ["train.group_by_length=false", "train.train_sampling_strategy=sequential"]),
    ):
        done = call(*arguments, f"output_dir={folder}", *more)
        assert done.code == 0, done.err
        assert ("resuming" in done.err) == (folder == run)
    assert (run / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert (run / "ranks.jsonl").read_bytes() == (whole / "ranks.jsonl").read_bytes()
    assert without_times(run / "metrics.jsonl") == without_times(whole / "metrics.jsonl")
    assert (plain / WEIGHTS).read_bytes() != (whole / WEIGHTS).read_bytes()
    assert [
        json.loads((found / "result.json").read_text())["group_by_length"] for found in (run, plain)
    ] == [True, False]
    assert [
        json.loads((found / "result.json").read_text())["train_sampling_strategy"]
        for found in (run, plain)
    ] == ["group_by_length", "sequential"]
    refused = call(
        *arguments, "train.group_by_length=false", f"output_dir={whole}", "--resume", "auto"
    )
    assert refused.code == 2
    assert "train.group_by_length: True → False" in refused.err


@pytest.fixture(scope="module")
def slow_evaluation(tmp_path_factory: pytest.TempPathFactory, sentiment: Path) -> Path:
    """Data whose validation takes a while when it is read a row at a time."""
    folder = tmp_path_factory.mktemp("slow")
    (folder / "train.jsonl").write_bytes((sentiment / "train.jsonl").read_bytes())
    rows = lines(sentiment / "validation.jsonl")
    write_jsonl(folder / "validation.jsonl", [rows[i % len(rows)] for i in range(200)])
    return folder


def test_best_model_and_early_stopping_survive_an_interrupted_evaluation(
    tmp_path: Path, tiny_bert: Path, slow_evaluation: Path
) -> None:
    more = (
        "  per_device_eval_batch_size: 1\n  eval_steps: 20\n  load_best_model_at_end: true\n "
        " early_stopping_patience: 3\n"
    )
    write_recipe(tmp_path / "best.yaml", tiny_bert, slow_evaluation, "l1ra", 400, more)
    arguments = (
        "train",
        "best.yaml",
        *RESTLESS,
        "train.learning_rate=2e-2",
        "train.lr_scheduler_type=constant",
    )
    whole, run = tmp_path / "whole", tmp_path / "cut"
    reference = start(tmp_path, *arguments, f"output_dir={whole}")
    process = start(tmp_path, *arguments, f"output_dir={run}")

    def evaluating(step: int) -> Callable[[], bool]:
        return lambda: (
            (run / "metrics.jsonl").exists()
            and f'{{"step": {step}, "epoch"' in (run / "metrics.jsonl").read_text()
        )

    # Twice, in the first evaluation and in the third: before and after something was the best.
    for step in (20, 60):
        wait_for(process, f"step {step}", evaluating(step))
        process.send_signal(signal.SIGINT)
        done = end(process)
        assert done.code == 130
        assert f"stopped after step {step} of 400" in done.err
        evaluated = [line["step"] for line in lines(run / "metrics.jsonl") if "eval_loss" in line]
        assert evaluated == list(range(20, step, 20)), (
            "the signal did not come in the middle of the evaluation"
        )
        process = start(tmp_path, *arguments, f"output_dir={run}", "--resume", "auto")
    done = end(process)
    assert done.code == 0, done.err
    assert end(reference).code == 0
    assert (run / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert (run / "ranks.jsonl").read_bytes() == (whole / "ranks.jsonl").read_bytes()
    assert without_times(run / "metrics.jsonl") == without_times(whole / "metrics.jsonl")

    result = json.loads((run / "result.json").read_text())
    evaluations = {
        line["step"]: line for line in lines(run / "metrics.jsonl") if "eval_loss" in line
    }
    best = max(evaluations, key=lambda step: (evaluations[step]["eval_accuracy"], -step))
    assert result["best_step"] == best
    assert result["steps"] == max(evaluations) == best + 60 < 400, (
        "patience of 3 ends the run three evaluations after the best"
    )
    assert "stopping early" in done.err
    assert result["metrics"] == {
        key[5:]: value for key, value in evaluations[best].items() if key != "step"
    }
    # The adapter is the best one, with the ranks it had then.
    checkpoint = run / f"checkpoints/best/step-{best:08d}/adapter_model.safetensors"
    assert (run / WEIGHTS).read_bytes() == checkpoint.read_bytes()
    final = load_file(run / WEIGHTS)
    ranks = {
        name[17:-14]: len(tensor)
        for name, tensor in final.items()
        if name.endswith("lora_A.weight")
    }
    assert ranks == result["ranks"] == lines(run / "ranks.jsonl")[-1]["ranks"]


def test_a_second_signal_stops_at_once(place: Path) -> None:
    run = place / "twice"
    more = (
        "data.max_eval_samples=1",
        f"output_dir={run}",
        "train.max_steps=100000",
        "train.save_steps=null",
    )
    process = start(place, "train", "vanilla.yaml", "train.eval_steps=null", *more)
    wait_for(
        process,
        "some steps",
        lambda: (
            (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_bytes()) > 2000
        ),
    )
    process.send_signal(signal.SIGINT)
    time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    done = end(process)
    assert done.code == 130
    assert "Traceback" not in done.err
    assert not list(run.rglob(".*"))


# -- a ramp, and what is evaluated along it --------------------------------------------------------

# At step 42 of 60 all but a hundredth of A and B goes at once.
RAMP = (
    *(
        "method.name=salor",
        "method.factors.density=0.01",
        "method.factors.shape=one-shot",
        "train.max_steps=60",
    ),
    *(
        "train.learning_rate=1e-2",
        "train.lr_scheduler_type=constant",
        "train.metric_for_best_model=loss",
        "train.eval_steps=5",
    ),
)


def evaluations(run: Path) -> dict[int, float]:
    return {
        line["step"]: line["eval_loss"]
        for line in lines(run / "metrics.jsonl")
        if "eval_loss" in line
    }


# What validation loss it would have: better and worse before the ramp's end than ever after.
BEFORE_THE_END = {5: 2.0, 10: 0.1, 15: 0.2, 20: 0.3, 25: 0.4, 30: 0.5, 35: 0.6, 40: 0.7}
AFTER_THE_END = {45: 5.0, 50: 4.0, 55: 4.5, 60: 4.4}


@pytest.fixture
def set_losses(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Every evaluation gives the next of these, whatever the model: where a run ends must not hang
    on its roundings."""
    losses = BEFORE_THE_END | AFTER_THE_END
    following = iter(losses.values())
    real = run_module.evaluate

    def evaluate(*args: Any) -> Evaluation:
        found = real(*args)
        return replace(found, metrics=found.metrics | {"loss": next(following)})

    monkeypatch.setattr(run_module, "evaluate", evaluate)
    return losses


def test_the_best_model_is_never_one_from_before_the_end_of_the_ramp(
    small: Path, call: Call, set_losses: dict[int, float]
) -> None:
    done = call("train", "small.yaml", *RAMP, "train.load_best_model_at_end=true")
    assert done.code == 0, done.err
    run = small / "runs/small"
    result = json.loads((run / "result.json").read_text())
    assert evaluations(run) == set_losses
    assert result["best_step"] == 50
    assert result["metrics"]["loss"] == set_losses[50]
    assert 0 < result["density"]["total"] <= 0.01
    weights = [t for name, t in load_file(run / WEIGHTS).items() if "lora_" in name]
    live, entries = sum(int(t.count_nonzero()) for t in weights), sum(t.numel() for t in weights)
    assert result["density"]["total"] == pytest.approx(live / entries, abs=1e-6)
    assert [line["density"] for line in lines(run / "metrics.jsonl") if "loss" in line] == [
        1.0
    ] * 41 + [pytest.approx(live / entries, abs=1e-6)] * 19


@pytest.mark.parametrize(("patience", "last"), [(1, 55), (2, 60)])
def test_no_evaluation_before_the_end_of_the_ramp_stops_a_run(
    patience: int, last: int, small: Path, call: Call, set_losses: dict[int, float]
) -> None:
    done = call("train", "small.yaml", *RAMP, f"train.early_stopping_patience={patience}")
    assert done.code == 0, done.err
    found = evaluations(small / "runs/small")
    assert found == {step: loss for step, loss in set_losses.items() if step <= last}
    assert f"no better loss in {patience} evaluations" in done.err


def test_eval_on_start_is_a_line_of_step_0_and_there_once_also_after_a_resumption(
    small: Path, call: Call
) -> None:
    settings = ("train.eval_on_start=true", "train.save_steps=5")
    assert call("train", "small.yaml", *settings).code == 0
    run = small / "runs/small"
    first, found = lines(run / "metrics.jsonl")[0], evaluations(run)
    assert first["step"] == 0
    assert first.keys() == {"step"} | {key for key in first if key.startswith("eval_")}
    assert "eval_accuracy" in first
    assert list(found) == [0, 10]
    before = without_times(run / "metrics.jsonl")
    assert (
        call("train", "small.yaml", *settings, "--resume", run / "checkpoints/step-00000005").code
        == 0
    )
    assert without_times(run / "metrics.jsonl") == before
    assert call("train", "small.yaml", "--overwrite").code == 0
    assert list(evaluations(run)) == [10]


@pytest.mark.parametrize("factor", ["0.1", "0"])
def test_a_run_over_a_pruned_base_resumes_to_the_same_bytes_and_evaluates_the_same(
    factor: str, small: Path, call: Call
) -> None:
    settings = (
        "method.name=salor",
        "method.base.r_res=4",
        f"method.base.residual_lr_factor={factor}",
        "train.save_steps=4",
    )
    done = call("train", "small.yaml", *settings)
    assert done.code == 0, done.err
    assert "base pruned to density 0.5 in 12 layers" in done.err
    run = small / "runs/small"
    before, result = (run / WEIGHTS).read_bytes(), json.loads((run / "result.json").read_text())
    assert result["base_density"]["total"] == 0.5
    assert result["density"]["total"] <= 0.5
    again = call("train", "small.yaml", *settings, "--resume", run / "checkpoints/step-00000004")
    assert again.code == 0, again.err
    assert "base pruned" not in again.err, "what is pruned already is not pruned again"
    assert (run / WEIGHTS).read_bytes() == before
    assert call("eval", "--json").json()["metrics"] == pytest.approx(result["metrics"], abs=1e-6)


def test_a_structure_on_the_command_line_is_no_time_of_the_day(small: Path, call: Call) -> None:
    """YAML 1.1 reads 2:4 as 124, in a file as on the command line."""
    done = call(
        "train",
        "small.yaml",
        "method.name=salor",
        "method.factors.structure=2:4",
        "method.base.criterion=2:4",
    )
    assert done.code == 0, done.err
    recipe = (small / "runs/small/recipe.yaml").read_text()
    assert recipe.count("2:4") == 2
    result = json.loads((small / "runs/small/result.json").read_text())
    assert result["density"]["total"] == result["base_density"]["total"] == 0.5
    assert call("train", "runs/small/recipe.yaml", "output_dir=runs/again").code == 0
    assert (small / "runs/again" / WEIGHTS).read_bytes() == (
        small / "runs/small" / WEIGHTS
    ).read_bytes()


# -- failures --------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_step_and_rows_and_leaves_no_adapter(
    small: Path, call: Call
) -> None:
    rows: list[dict[str, object]] = [
        {"sentence": f"good film {i % 10}", "label": i / 10} for i in range(40)
    ]
    rows[17]["label"] = 1e30
    write_jsonl(small / "train.jsonl", rows)
    settings = (
        "data.name_or_path=train.jsonl",
        "data.problem_type=regression",
        "train.save_steps=1",
    )
    done = call("train", "small.yaml", *settings)
    assert done.code == 1
    found = re.search(r"before optimizer step (\d+): the loss is inf; training row 18,", done.err)
    assert found, done.err
    assert "Traceback" not in done.err
    run = small / "runs/small"
    assert not (run / "adapter").exists()
    assert not (run / "result.json").exists()
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == list(range(1, int(found[1])))


def test_a_diverging_run_exits_1_before_the_step_that_would_ruin_it(
    small: Path, call: Call
) -> None:
    done = call(
        "train", "small.yaml", "train.learning_rate=1e30", "train.lr_scheduler_type=constant"
    )
    assert done.code == 1
    assert re.search(
        r"stopped before optimizer step \d+: (the loss is nan|the loss is inf|a gradient is not"
        r" finite); training rows? ",
        done.err,
    )
    assert not (small / "runs/small/adapter").exists()


def test_an_overflowing_gradient_is_seen_without_clipping(small: Path, call: Call) -> None:
    settings = (
        "train.learning_rate=1e18",
        "train.max_grad_norm=null",
        "train.lr_scheduler_type=constant",
    )
    done = call("train", "small.yaml", *settings)
    assert done.code == 1
    assert "stopped before optimizer step" in done.err


def test_a_reader_that_goes_away_is_no_error(place: Path) -> None:
    command = (
        f"{sys.executable} -c 'from lorakit.cli import main; main()' schema | head -c 10; echo"
        " ${PIPESTATUS[0]}"
    )
    done = subprocess.run(
        ["bash", "-c", command], cwd=place, capture_output=True, text=True, check=False
    )
    assert done.stdout.endswith("0\n"), done
    assert "Traceback" not in done.stderr
