"""A checkpoint as a RUN: its adapter is in the form of a finished run's, and commands take it."""

from __future__ import annotations

import io
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import lorakit
from lorakit.cli import complete
from lorakit.errors import RunError, UsageError
from lorakit.recipes.recipe import Recipe, load_recipe, recipe_of
from lorakit.report.progress import Progress
from lorakit.runs.evaluate import evaluate_run
from lorakit.runs.export import export_run
from lorakit.runs.import_adapter import run_import
from lorakit.runs.saved import saved_model, saved_recipe
from lorakit.runs.train import run_conversion, run_training
from lorakit.training import checkpoint

PROGRESS = Progress(Console(file=io.StringIO()))
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json", "lorakit.json")
STEP_2 = "checkpoints/step-00000002"


def recipe(model: Path, data: Path, out: Path, task: str, **method: Any) -> Recipe:
    """Four steps, each of which is saved and evaluated."""
    train = {"max_steps": 4, "save_steps": 1, "save_total_limit": None, "eval_steps": 1}
    templates = {"prompt": "{question}", "completion": " {answer}"} if task == "causal-lm" else {}
    return recipe_of(
        {
            "model": {"name_or_path": model, "task": task},
            "data": {"name_or_path": data, **templates},
            "method": {"name": "vanilla", "r": 2, **method},
            "train": {**train, "precision": "fp32", "learning_rate": 1e-2},
            "output_dir": out,
        }
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, sentiment: Path) -> Path:
    """A finished run of a classifier."""
    run = tmp_path_factory.mktemp("place") / "whole"
    run_training(recipe(tiny_bert, sentiment, run, "sequence-classification"), PROGRESS)
    return run


@pytest.fixture(scope="module")
def cut(whole: Path) -> Path:
    """The same run as if it had been killed in its third step."""
    run = whole.with_name("cut")
    shutil.copytree(whole, run)
    shutil.rmtree(run / "adapter")
    (run / "result.json").unlink()
    for step in (3, 4):
        shutil.rmtree(run / f"checkpoints/step-{step:08d}")
    return run


def test_one_of_an_earlier_version_lacks_the_keys_that_came_later(
    cut: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "cut"
    shutil.copytree(cut, run)
    state = run / STEP_2 / "state.json"
    saved = json.loads(state.read_text("utf-8"))
    written = saved["run"]["fingerprint"]["recipe"]
    for key in [key for key in written if key.startswith("distributed.")]:
        del written[key]
    del written["method.init_lora_weights"], saved["run"]["rows_per_step"]
    state.write_text(json.dumps(saved), "utf-8")
    recipe = load_recipe(run / "recipe.yaml", [f"output_dir={run}"])
    run_training(recipe, Progress(Console(stderr=True)), resume="auto")
    name = "adapter/adapter_model.safetensors"
    assert (run / name).read_bytes() == (whole / name).read_bytes()


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    rows = tokenizer(["good film", "a dull plot and a weak cast ."], padding=True)
    ids, mask = (torch.tensor(rows[name]) for name in ("input_ids", "attention_mask"))
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids, attention_mask=mask).logits
    return found


def test_it_holds_the_adapter_as_the_run_does_and_no_tensor_twice(whole: Path) -> None:
    last = whole / "checkpoints/step-00000004"
    for name in ADAPTER_FILES:
        assert (last / name).read_bytes() == (whole / "adapter" / name).read_bytes()
    assert {file.name for file in last.iterdir()} == {
        *ADAPTER_FILES,
        "state.json",
        "state.safetensors",
    }
    shapes = sorted(tuple(t.shape) for t in load_file(last / "adapter_model.safetensors").values())
    rest = load_file(last / "state.safetensors")
    assert {name.partition(".")[0] for name in rest} == {"optimizer", "random"}
    for moment in ("first", "second"):
        of_it = [t for name, t in rest.items() if name.startswith(f"optimizer.{moment}.")]
        assert sorted(tuple(tensor.shape) for tensor in of_it) == shapes
    assert len(list(whole.glob("checkpoints/**/tokenizer.json"))) == 1


def test_peft_loads_it(cut: Path, tiny_bert: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    by_peft = PeftModel.from_pretrained(base, cut / STEP_2)
    ours, _, _ = saved_model(cut / STEP_2, saved_recipe(cut / STEP_2), torch.float32)
    found = logits(by_peft, AutoTokenizer.from_pretrained(tiny_bert))
    torch.testing.assert_close(found, logits(ours.model, ours.tokenizer), atol=1e-5, rtol=0)


def test_it_evaluates_as_the_run_did_at_that_step_and_the_log_says_which(
    whole: Path, cut: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    then = {line["step"]: line for line in lines if "eval_loss" in line}
    caplog.set_level(logging.INFO, "lorakit")
    for run, step in ((cut, 2), (whole / "checkpoints/step-00000001", 1)):
        caplog.clear()
        found = evaluate_run(run, (), PROGRESS)
        expected = {name[5:]: value for name, value in then[step].items() if name != "step"}
        assert found["metrics"] == pytest.approx(expected, abs=1e-6)
        assert found["run"].endswith(f"step-{step:08d}")
        assert f"step {step} of 4" in caplog.text


def test_from_within_its_folder_it_is_found_too(cut: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(cut / STEP_2)
    assert evaluate_run(Path(), (), PROGRESS)["rows"] == 24


@pytest.mark.parametrize(
    ("merge", "form"), [(True, None), *((False, form) for form in ("lorakit", "peft", "sparse"))]
)
def test_it_is_exported_and_the_card_says_what_it_is(
    cut: Path, whole: Path, merge: bool, form: str | None
) -> None:
    options: dict[str, Any] = {"merge": merge, "adapter": not merge, "form": form, "dtype": None}
    list(export_run(cut, out=None, force=False, **options))
    target = cut / f"{'merged' if merge else f'adapter-{form}'}-step-00000002"
    card = (target / "README.md").read_text()
    assert "This is a checkpoint: step 2 of a run of 4." in card
    assert "| accuracy |" in card
    assert (target / "tokenizer.json").is_file()
    assert not (target / "state.safetensors").exists()
    if merge:
        merged = AutoModelForSequenceClassification.from_pretrained(target)
        ours, _, _ = saved_model(whole / STEP_2, saved_recipe(whole / STEP_2), torch.float32)
        found = logits(merged, AutoTokenizer.from_pretrained(target))
        torch.testing.assert_close(found, logits(ours.model, ours.tokenizer), atol=1e-5, rtol=0)
    with pytest.raises(UsageError, match="part of, the run itself"):
        list(export_run(cut / STEP_2, out=cut / STEP_2, force=True, **options))


def test_other_runs_are_made_of_it(
    cut: Path, tiny_bert: Path, sentiment: Path, tmp_path: Path
) -> None:
    converted = run_conversion(cut, ["method.ladder=[1,2]"], tmp_path / "tiers", PROGRESS)
    assert converted["converted_from"] == str(cut / STEP_2)
    imported = run_import(cut / STEP_2, tmp_path / "imported", PROGRESS)
    assert imported["rank_total"] == 24
    task = "sequence-classification"
    for given in (cut, cut / STEP_2):
        more = recipe(tiny_bert, sentiment, tmp_path / given.name, task, init_from=str(given))
        run_training(more, PROGRESS)
        record = json.loads((tmp_path / given.name / "manifest.json").read_text())["init_from"]
        assert record["path"] == str((cut / STEP_2).resolve())


def test_its_ranks_are_those_of_its_step(
    tmp_path: Path, tiny_llama: Path, sums: Path, call: Callable[..., str]
) -> None:
    """And a language model's text is that of its step: the tokenizer comes from the run."""
    gates = {"name": "l1ra", "rank_update_ratio": 0.25, "prune_threshold": 0.95, "eta_c": 0.05}
    run_training(recipe(tiny_llama, sums, tmp_path / "run", "causal-lm", **gates), PROGRESS)
    records = [json.loads(line) for line in (tmp_path / "run/ranks.jsonl").read_text().splitlines()]
    until = [record for record in records if record["step"] <= 2]
    assert 1 < len(until) < len(records)
    shown = json.loads(call("inspect-ranks", tmp_path / "run" / STEP_2, "--json"))
    assert shown["ranks"] == until[-1]["ranks"]
    assert [record["step"] for record in shown["history"]] == [r["step"] for r in until]
    text = call("generate", tmp_path / "run" / STEP_2, "-p", "how many", "--max-new-tokens", 3)
    opened = lorakit.load_run(tmp_path / "run" / STEP_2)
    assert text.rstrip("\n") == opened.generate("how many", max_new_tokens=3)
    assert opened.ranks == until[-1]["ranks"]
    assert opened.result["steps"] == 2
    assert opened.metrics.keys() == {"loss", "perplexity"}


def test_what_has_no_adapter_is_refused(cut: Path, tmp_path: Path) -> None:
    shutil.copytree(cut, tmp_path / "run")
    state = tmp_path / "run" / STEP_2 / "state.json"
    state.write_text(state.read_text().replace('"format": 2', '"format": 1'))
    for read in (checkpoint.read, lambda folder: evaluate_run(folder, (), PROGRESS)):
        with pytest.raises(RunError, match="has format 1, of another version"):
            read(tmp_path / "run" / STEP_2)
    recipe_, goes_on = saved_recipe(cut), tmp_path / "run" / STEP_2
    shutil.rmtree(goes_on)
    with pytest.raises(RunError, match="is gone: its run went on"):
        saved_model(goes_on, recipe_, torch.float32)
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(UsageError, match="no adapter yet, and no checkpoint"):
        evaluate_run(tmp_path / "run", (), PROGRESS)
    shutil.copytree(cut / STEP_2, tmp_path / "step-00000002")
    with pytest.raises(UsageError, match="is not a run"):
        evaluate_run(tmp_path / "step-00000002", (), PROGRESS)


def test_the_shell_completes_it_within_its_run(cut: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(cut.parent)
    Path("runs").symlink_to(".")
    assert "runs/cut" in complete.runs("runs/c")
    assert complete.runs("runs/cut/check") == [
        f"runs/cut/checkpoints/step-0000000{step}" for step in (1, 2)
    ]
