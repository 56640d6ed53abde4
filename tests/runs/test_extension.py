"""A run that is resumed with more steps than it had."""

from __future__ import annotations

import io
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lorakit.errors import UsageError
from lorakit.recipes.recipe import Recipe, recipe_of
from lorakit.report.progress import Progress
from lorakit.runs import training_run
from lorakit.runs.evaluate import evaluate_run
from lorakit.runs.train import run_training

PROGRESS = Progress(Console(file=io.StringIO()))
WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture
def recipe(tiny_bert: Path, sentiment: Path, tmp_path: Path) -> Any:
    """Function that makes a recipe of constant learning rate; saved after every second step."""

    def made(name: str, method: dict[str, Any] | None = None, **train: Any) -> Recipe:
        usual = {"save_steps": 2, "save_total_limit": None, "lr_scheduler_type": "constant"}
        return recipe_of(
            {
                "model": {"name_or_path": tiny_bert, "task": "sequence-classification"},
                "data": {"name_or_path": sentiment, "max_eval_samples": 8},
                "method": {"name": "vanilla", "r": 4, "lora_dropout": 0.1, **(method or {})},
                "train": {"precision": "fp32", "learning_rate": 1e-2, **usual, **train},
                "output_dir": tmp_path / name,
            }
        )

    return made


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{key: value for key, value in one.items() if key != "seconds"} for one in found]


def scored_by(losses: Iterator[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every evaluation gives the next of the losses, whatever the model."""
    real = training_run.evaluate

    def evaluate(*args: Any) -> Any:
        found = real(*args)
        found.metrics["loss"] = next(losses)
        return found

    monkeypatch.setattr(training_run, "evaluate", evaluate)


def test_it_ends_as_a_run_of_that_many_steps_also_when_it_is_killed(
    recipe: Any, tmp_path: Path
) -> None:
    """Half epochs of 12 steps: the second half of the first, and a part of the second epoch."""
    parts = {"per_device_train_batch_size": 8, "eval_steps": 4}
    run_training(recipe("whole", num_train_epochs=1.5, **parts), PROGRESS)
    first = run_training(recipe("more", num_train_epochs=0.5, **parts), PROGRESS)
    assert first["steps"] == 6
    weights = (tmp_path / "more" / WEIGHTS).read_bytes()
    evaluated = evaluate_run(tmp_path / "more", (), PROGRESS)["metrics"]
    longer = recipe("more", num_train_epochs=1.5, **parts)
    for _ in ("extended", "killed in the extension"):
        result = run_training(longer, PROGRESS, resume="auto")
        assert (tmp_path / "more" / WEIGHTS).read_bytes() == (
            tmp_path / "whole" / WEIGHTS
        ).read_bytes()
        assert lines(tmp_path / "more") == lines(tmp_path / "whole")
        assert result["extended"] == [{"step": 6, "from": 6, "to": 18}]
        manifest = json.loads((tmp_path / "more/manifest.json").read_text())
        assert manifest["extended"] == result["extended"]
        for name in ("adapter", "checkpoints/step-00000016", "checkpoints/step-00000018"):
            shutil.rmtree(tmp_path / "more" / name)
        (tmp_path / "more/result.json").unlink()
    kept = tmp_path / "more/ended-at-00000006"
    assert (kept / WEIGHTS).read_bytes() == weights
    assert json.loads((kept / "result.json").read_text()) == first
    assert evaluate_run(kept, (), PROGRESS)["metrics"] == evaluated


def test_the_learning_rate_goes_on_as_of_the_new_total_and_the_log_says_so(
    recipe: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cosine = {"lr_scheduler_type": "cosine", "warmup_ratio": 0.25}
    for name, steps in (("whole", 8), ("more", 4)):
        run_training(recipe(name, max_steps=steps, **cosine), PROGRESS)
    caplog.set_level(logging.INFO, "lorakit")
    run_training(recipe("more", max_steps=8, **cosine), PROGRESS, resume="auto")
    whole, more = (
        {line["step"]: line["learning_rate"] for line in lines(tmp_path / name) if "loss" in line}
        for name in ("whole", "more")
    )
    assert [more[step] for step in range(5, 9)] == [whole[step] for step in range(5, 9)]
    assert more[4] < more[5]
    told = f"8 steps instead of 4; the learning rate, {more[4]:.3g}, is now {more[5]:.3g}"
    assert told in caplog.text


def test_a_kill_before_its_first_checkpoint_leaves_both_ways_open(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_training(recipe("run", max_steps=3), PROGRESS)
    run, weights = tmp_path / "run", (tmp_path / "run" / WEIGHTS).read_bytes()
    with monkeypatch.context() as patch:

        def killed(*_: Any, **__: Any) -> Iterator[None]:
            raise MemoryError("no room")

        patch.setattr(training_run, "train", killed)
        with pytest.raises(MemoryError):
            run_training(recipe("run", max_steps=5), PROGRESS, resume="auto")
    assert not (run / "result.json").exists()
    assert (run / "ended-at-00000003" / WEIGHTS).read_bytes() == weights
    again = run_training(recipe("run", max_steps=3), PROGRESS, resume="auto")
    assert (run / WEIGHTS).read_bytes() == weights
    assert again["metrics"] == first["metrics"]
    assert "extended" not in again
    assert run_training(recipe("run", max_steps=5), PROGRESS, resume="auto")["steps"] == 5


def test_what_can_not_be_right_is_refused(recipe: Any, tmp_path: Path) -> None:
    run_training(recipe("run", max_steps=4), PROGRESS)
    before = (tmp_path / "run/result.json").read_bytes()
    with pytest.raises(UsageError, match=r"of a run of 4 steps, and 3 are fewer"):
        run_training(recipe("run", max_steps=3), PROGRESS, resume="auto")
    with pytest.raises(UsageError, match=r"train.learning_rate: 0.01 → 0.02"):
        run_training(recipe("run", max_steps=8, learning_rate=2e-2), PROGRESS, resume="auto")
    # max_steps decides, whatever num_train_epochs says.
    same = recipe("run", max_steps=4, num_train_epochs=3)
    assert run_training(same, PROGRESS, resume="auto")["steps"] == 4
    assert (tmp_path / "run/result.json").read_bytes() == before
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(UsageError, match="no checkpoint to go on from"):
        run_training(recipe("run", max_steps=8), PROGRESS, resume="auto")
    assert (tmp_path / "run/result.json").read_bytes() == before


L1RA = {"name": "l1ra", "budget": {"end": 0.5}, "rank_update_ratio": 0.25}
SPARSE = {"name": "salor", "factors": {"density": 0.5}}
SMALLER = {"name": "salor", "factors": {"density": 0.5, "structure": "rank"}}
ADALORA = {"name": "adalora", "begin": 0.25, "end": 0.5, "target_r": 2}
TIERS = {"name": "chunkwise", "ladder": [2, 4], "training": "nested"}


@pytest.mark.parametrize(
    ("method", "at"),
    [(L1RA, 8), (L1RA, 4), (SPARSE, 8), (SPARSE, 4), (SMALLER, 4), (ADALORA, 8), (TIERS, 8)],
    ids=lambda part: part["name"] if isinstance(part, dict) else part,
)
def test_what_a_method_has_given_up_does_not_come_back(
    recipe: Any, tmp_path: Path, method: dict[str, Any], at: int
) -> None:
    """Extended at its end, or in the midst of the method's ramp."""
    first = run_training(recipe("run", method, max_steps=8), PROGRESS)
    run = tmp_path / "run"
    resume = "auto" if at == 8 else str(run / f"checkpoints/step-{at:08d}")
    result = run_training(recipe("run", method, max_steps=40), PROGRESS, resume=resume)
    assert result["steps"] == 40
    assert result["extended"] == [{"step": at, "from": 8, "to": 40}]
    assert result["rank_total"] <= first["rank_total"]
    assert result.get("budget") == first.get("budget")
    assert result["density"]["total"] == pytest.approx(first["density"]["total"], abs=1e-3)
    for name, file in (("budget", "ranks.jsonl"), ("density", "metrics.jsonl")):
        found = [line[name] for line in lines(run, file) if name in line]
        assert found == sorted(found, reverse=True)
    assert (run / "ended-at-00000008").is_dir()


def test_a_ramp_that_has_ended_has_ended(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the model of an extended run is in its final form from the first step on, and may be the
    best one, though the ramp of a run of that many steps would go on."""
    scored_by(iter((9.0, 8.0, 1.0, 2.0, 3.0, 4.0)), monkeypatch)
    more = {"eval_steps": 8, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    assert run_training(recipe("run", SPARSE, max_steps=8, **more), PROGRESS)["best_step"] == 8
    longer = recipe("run", SPARSE, max_steps=40, **more)
    # Resuming evaluates step 8 again, with the second loss.
    assert run_training(longer, PROGRESS, resume="auto")["best_step"] == 16


def test_patience_that_had_run_out_is_counted_anew(
    recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored_by(map(float, range(100)), monkeypatch)
    more = {"eval_steps": 1, "early_stopping_patience": 2, "metric_for_best_model": "loss"}
    assert run_training(recipe("run", max_steps=8, **more), PROGRESS)["steps"] == 3
    longer = run_training(recipe("run", max_steps=9, **more), PROGRESS, resume="auto")
    assert longer["steps"] == 5


def test_the_last_evaluation_stays_the_best_one(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It came after the last checkpoint, at a step at which the longer run does not evaluate."""
    scored_by(iter((3.0, 1.0, 2.0, 2.5)), monkeypatch)
    more = {"eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    run_training(recipe("run", max_steps=3, **more), PROGRESS)
    weights = (tmp_path / "run" / WEIGHTS).read_bytes()
    result = run_training(recipe("run", max_steps=5, **more), PROGRESS, resume="auto")
    assert result["best_step"] == 3
    assert result["metrics"]["loss"] == 1.0
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == weights
