"""Weights that are not finite are neither saved nor used."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.processes import WEIGHTS, Done, in_this_process

RECIPE = """\
model: {{name_or_path: {model}, task: {task}}}
data: {{name_or_path: {data}}}
method: {{name: {method}, r: 4}}
train: {{max_steps: 3, learning_rate: 1e-3, precision: fp32, save_steps: 1, save_total_limit: null}}
"""
Call = Callable[..., Done]
FAR = "train.learning_rate=1e39"  # one step of it is beyond float32


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    return in_this_process(monkeypatch, capfd)


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Path, sums: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """run.yaml of three steps, in a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "500")
    path = tmp_path / "run.yaml"
    path.write_text(
        RECIPE.format(model=tiny_llama, task="causal-lm", data=sums, method="vanilla"),
        encoding="utf-8",
    )
    return path


def spoil(path: Path, name: str, value: float = float("nan")) -> None:
    """Put the value into the first tensor whose key has the name."""
    tensors = load_file(path)
    key = next(key for key in tensors if name in key)
    tensors[key].view(-1)[:2] = value
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("method", ["vanilla", "l1ra", "salor", "chunkwise"])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_step_that_ruins_the_weights_is_not_saved(
    recipe: Path, call: Call, method: str, steps: int
) -> None:
    """The first step is saved, or the second stops before it: no row is blamed."""
    keys = f"method.name={method}", f"train.max_steps={steps}", FAR
    for saved in ("train.save_steps=1", "train.save_steps=null"):
        done = call("train", recipe, *keys, saved, f"output_dir=runs/{saved[-1]}")
        assert done.code == 1, done.err
        assert "not finite" in done.err
        assert "lora_" in done.err or method == "salor"  # which sees it first, in its scores
        assert "learning_rate" in done.err
        assert "Traceback" not in done.err
        assert "; training row" not in done.err
        run = recipe.parent / f"runs/{saved[-1]}"
        assert not (run / "adapter").exists()
        assert not (run / "result.json").exists()
        assert not [*(run / "checkpoints").glob("step-*")]


def test_a_base_that_is_not_finite_is_named_by_its_layer(
    recipe: Path, call: Call, tiny_llama: Path
) -> None:
    base = shutil.copytree(tiny_llama, recipe.parent / "base")
    spoil(base / "model.safetensors", "layers.1.mlp.up_proj", float("inf"))
    done = call("train", recipe, f"model.name_or_path={base}")
    assert done.code == 1
    assert "weights of the base are not finite" in done.err
    assert "layers.1.mlp.up_proj" in done.err
    assert "2 of 1536" in done.err
    assert "; training row" not in done.err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_refused_everywhere(
    recipe: Path, call: Call, value: float
) -> None:
    assert call("train", recipe).code == 0
    run = recipe.parent / "runs/run"
    spoil(run / WEIGHTS, "up_proj.lora_B", value)
    for command in (
        ["eval", run],
        ["eval", run, "--json"],
        ["generate", run, "--prompt", "how many"],
        ["export", run, "--merge", "--out", "out"],
        ["export", run, "--adapter", "--out", "out"],
        ["export", run, "--adapter", "--format", "lorakit", "--out", "out"],
        ["convert", run, "--out", "out"],
        ["train", recipe, f"method.init_from={run}", "output_dir=out"],
        ["import", run / "adapter", "--out", "out"],
    ):
        done = call(*command)
        assert done.code in (1, 2), (command, done.err)
        assert "not finite" in done.err, (command, done.err)
        assert "up_proj.lora_B" in done.err
        assert "NaN" not in done.out
        assert not Path("out").exists(), command


def test_an_adapter_without_tensors_is_not_exported(recipe: Path, call: Call) -> None:
    assert call("train", recipe).code == 0
    run = recipe.parent / "runs/run"
    save_file({}, run / WEIGHTS)
    done = call("export", run, "--adapter", "--format", "lorakit", "--out", "out")
    assert done.code == 1
    assert "has no tensors" in done.err
    assert not Path("out").exists()


def test_a_checkpoint_that_is_not_finite_is_not_resumed(recipe: Path, call: Call) -> None:
    assert call("train", recipe).code == 0
    newest = recipe.parent / "runs/run/checkpoints/step-00000003"
    spoil(newest / "adapter_model.safetensors", "q_proj.lora_A")
    done = call("train", recipe, "--resume", newest, "train.max_steps=4")
    assert done.code == 1
    assert "not finite" in done.err
    assert "q_proj.lora_A" in done.err
    assert torch.isfinite(load_file(recipe.parent / "runs/run" / WEIGHTS).popitem()[1]).all()
