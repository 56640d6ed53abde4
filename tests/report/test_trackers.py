"""Trackers: real event files and databases of runs that were trained, resumed, or went on without a
tracker."""

from __future__ import annotations

import json
import shutil
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import RecipeError
from lorakit.recipes.recipe import load_recipe
from lorakit.report.trackers import TRACKERS, Trackers, Watched, check_installed, step_values
from lorakit.training.spec import TrackerName

RECIPE = """\
model: {{name_or_path: {model}, task: sequence-classification}}
data: {{name_or_path: {data}}}
method: {{name: vanilla, r: 2}}
train: {{max_steps: 4, eval_steps: 2, save_steps: 2, precision: fp32}}
output_dir: {run}
"""


@pytest.fixture
def recipe(tmp_path: Path, tiny_bert: Path, sentiment: Path) -> Path:
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE.format(model=tiny_bert, data=sentiment, run=tmp_path / "run"))
    return file


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def events(folder: Path) -> Any:
    """The event files of a folder, read back by TensorBoard's own reader."""
    reason = "tensorboard is not installed: pip install lorakit[tensorboard]"
    module = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason=reason
    )
    found = module.EventAccumulator(str(folder))
    found.Reload()
    return found


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(folder).Scalars(tag)]


def test_every_name_of_a_recipe_is_a_tracker() -> None:
    assert set(TRACKERS) == set(typing.get_args(TrackerName))


def test_a_name_alone_and_none_are_what_transformers_takes_them_for(recipe: Path) -> None:
    assert load_recipe(recipe).train.report_to == ()
    assert load_recipe(recipe, ["train.report_to=wandb"]).train.report_to == ("wandb",)
    assert load_recipe(recipe, ["train.report_to=none"]).train.report_to == ()
    both = load_recipe(recipe, ["train.report_to=[mlflow,trackio]"]).train.report_to
    assert both == ("mlflow", "trackio")
    with pytest.raises(RecipeError, match="one of tensorboard, trackio, wandb, mlflow"):
        load_recipe(recipe, ["train.report_to=[comet]"])


def test_a_package_that_is_not_there_is_an_error_with_the_command_that_installs_it() -> None:
    with pytest.raises(RecipeError, match="needs the package `no_such_tracker`") as caught:
        check_installed(["json", "no_such_tracker"])
    assert 'pip install "lorakit[no_such_tracker]"' in str(caught.value)


def test_a_folder_of_that_name_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some_output").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RecipeError, match="some_output"):
        check_installed(["some_output"])


def test_values_are_named_by_train_and_eval() -> None:
    step = {"step": 3, "epoch": 0.5, "loss": 0.7, "learning_rate": 0.1, "tokens": 20, "seconds": 2}
    assert step_values(step) == {
        "train/epoch": 0.5,
        "train/loss": 0.7,
        "train/learning_rate": 0.1,
        "train/tokens": 20.0,
        "train/tokens_per_second": 10.0,
    }
    assert step_values({"step": 3, "eval_accuracy": 0.9}) == {"eval/accuracy": 0.9}


def test_tensorboard_gets_the_numbers_of_metrics_jsonl_and_a_resumed_run_goes_on(
    recipe: Path, tmp_path: Path, call: Callable[..., str]
) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    run = tmp_path / "run"
    out = call("train", recipe, "train.report_to=[tensorboard]", "train.save_total_limit=null")
    assert out.startswith("╭")
    folder = run / "tensorboard"
    found = events(folder)
    assert {"train/loss", "train/learning_rate", "eval/accuracy"} <= set(found.Tags()["scalars"])
    assert b"method.name" in found.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0]
    written = lines(run / "metrics.jsonl")
    losses = {line["step"]: line["loss"] for line in written if "loss" in line}
    assert dict(scalars(folder, "train/loss")) == pytest.approx(losses)
    assert [step for step, _ in scalars(folder, "eval/accuracy")] == [2, 4]

    # From the middle: what comes after it is made again, in the same folder.
    middle = tmp_path / "step-00000002"
    shutil.copytree(run / "checkpoints/step-00000002", middle)
    call("train", recipe, "train.report_to=[tensorboard]", "--resume", middle)
    assert len(list(folder.iterdir())) == 2
    assert scalars(folder, "train/loss") == [
        (step, pytest.approx(loss)) for step, loss in losses.items()
    ]


def test_report_to_may_change_when_a_run_is_resumed(
    recipe: Path, tmp_path: Path, call: Callable[..., str]
) -> None:
    call("train", recipe)
    (tmp_path / "run/result.json").unlink()
    call("train", recipe, "train.report_to=none", "--resume", "auto")
    assert (tmp_path / "run/result.json").is_file()


def test_trackio_keeps_the_numbers_of_both_parts_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("TRACKIO_PROJECT", "project")
    pytest.importorskip("trackio", reason="trackio is not installed: pip install lorakit[trackio]")
    for first in (0, 2):
        with Trackers(["trackio"]) as trackers:
            trackers.start(Watched(tmp_path, "ab" * 16, first), {"train.seed": 0})
            assert list(trackers.watching) == ["trackio"]
            for step in (first + 1, first + 2):
                trackers.log(step, {"train/loss": 1 / step})
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    (name,) = storage.get_runs("project")
    assert name == f"{tmp_path.name}-ababab"
    logs = storage.get_logs("project", name)
    assert [(line["step"], line["train/loss"]) for line in logs] == [
        (step, pytest.approx(1 / step)) for step in (1, 2, 3, 4)
    ]
    assert capfd.readouterr().out == ""


def test_a_tracker_that_fails_is_reported_once_and_the_run_goes_on(
    recipe: Path, tmp_path: Path, call: Callable[..., str]
) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    run = tmp_path / "run"
    call("train", recipe, "train.max_steps=2", "--overwrite")
    (run / "tensorboard").write_text("a file where the folder should be")
    (run / "result.json").unlink()
    resumed = ("train", recipe, "train.max_steps=2", "--resume", "auto")
    call(*resumed, "train.report_to=[tensorboard]")
    assert json.loads((run / "result.json").read_text())["steps"] == 2
    failed = [line["message"] for line in lines(run / "warnings.jsonl")]
    assert sum("tensorboard failed and gets no more values" in line for line in failed) == 1


class Failing:
    """A tracker whose server goes away."""

    def __init__(self, run: Watched) -> None:
        self.steps = 0

    def start(self, config: Any) -> None: ...

    def log(self, step: int, values: Any) -> None:
        print("sent")
        if step == 2:
            raise ConnectionError("the server is gone\nmore")

    def finish(self, result: Any) -> None:
        raise AssertionError("it was left out")


def test_one_that_fails_during_the_steps_is_left_out_and_prints_nothing_to_stdout(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(TRACKERS, "failing", Failing)  # type: ignore[arg-type]
    with Trackers(["failing"]) as trackers:
        trackers.start(Watched(Path(), "0" * 32), {})
        for step in range(1, 5):
            trackers.log(step, {"train/loss": 0.5})
    assert caplog.messages == [
        "failing failed and gets no more values: ConnectionError: the server is gone"
    ]
    assert capsys.readouterr() == ("", "sent\nsent\n")


def test_warnings_are_kept_beside_the_run(
    recipe: Path, tmp_path: Path, tiny_bert: Path, call: Callable[..., str]
) -> None:
    rows = [{"sentence": f"good zzz{i}", "label": i % 2} for i in range(40)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    call("train", recipe, f"data.name_or_path={data}", "train.max_steps=2")
    messages = [line["message"] for line in lines(tmp_path / "run/warnings.jsonl")]
    assert any("unknown token" in message for message in messages)
