"""Runs that start from a trained adapter, with PEFT as the oracle."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from lorakit.errors import LorakitError, RecipeError
from lorakit.methods import method_names
from lorakit.recipes.recipe import Recipe, recipe_of
from lorakit.report.progress import Progress
from lorakit.runs.init_from import given_adapter, start_from
from lorakit.runs.session import Session, assemble
from lorakit.runs.train import run_training
from tests.support.exports import RANKS, as_if_trained, assert_same, inputs
from tests.support.peft_adapters import make_peft

PROGRESS = Progress(Console(stderr=True))


def recipe(
    base: Path, data: Path, given: Path, out: Path, task: str = "causal-lm", **method: Any
) -> Recipe:
    method = {"name": "vanilla", "r": 4, "init_from": str(given)} | method
    if method["name"] == "chunkwise":
        method["ladder"] = [2, method["r"]]
    keys: dict[str, Any] = {
        "model": {"name_or_path": str(base), "task": task},
        "data": {"name_or_path": str(data)},
        "method": method,
        "train": {"precision": "fp32", "max_steps": 4, "save_steps": 2, "logging_steps": 1},
        "output_dir": str(out),
    }
    return recipe_of(keys)


def begun(recipe: Recipe) -> Session:
    given = given_adapter(recipe)
    assert given is not None
    session = assemble(recipe, PROGRESS)
    start_from(session, given)
    return session


def answers(model: Any, tokenizer: Any) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [model.eval()(**one).logits[0].float() for one in inputs(tokenizer)]


@pytest.mark.parametrize("r", [4, 7])
@pytest.mark.parametrize("method", method_names())
def test_step_0_is_the_given_adapter(
    tmp_path: Path, tiny_llama: Path, sums: Path, method: str, r: int
) -> None:
    """Another alpha, more modules, and a larger rank change nothing."""
    keys = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 5}}
    model = make_peft(tmp_path / "given", tiny_llama, **keys)
    session = begun(
        recipe(tiny_llama, sums, tmp_path / "given", tmp_path / "run", name=method, r=r)
    )
    tokenizer = session.task_model.tokenizer
    assert_same(answers(session.task_model.model, tokenizer), answers(model, tokenizer), 1e-5)
    assert {adapter.rank for adapter in session.method.adapters.values()} == {r}


def test_factors_of_the_same_rank_and_scale_are_copied(
    tmp_path: Path, tiny_llama: Path, sums: Path
) -> None:
    make_peft(tmp_path / "given", tiny_llama, torch.bfloat16)
    session = begun(recipe(tiny_llama, sums, tmp_path / "given", tmp_path / "run", lora_alpha=9.0))
    given = load_file(tmp_path / "given/adapter_model.safetensors")
    for name, adapter in session.method.adapters.items():
        a = given.get(f"base_model.model.{name}.lora_A.weight")
        if a is None:
            assert not adapter.lora_B.any()
            continue
        assert torch.equal(adapter.lora_A, a.float())
        b = given[f"base_model.model.{name}.lora_B.weight"]
        assert torch.equal(adapter.lora_B, b.float())


def test_a_lower_rank_gets_the_best_approximation_with_a_warning(
    tmp_path: Path, tiny_llama: Path, sums: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_peft(tmp_path / "given", tiny_llama)
    session = begun(recipe(tiny_llama, sums, tmp_path / "given", tmp_path / "run", r=2))
    assert "lower rank" in caplog.text
    given = load_file(tmp_path / "given/adapter_model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    a, b = (given[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    u, values, vh = torch.linalg.svd(9 / 4 * b @ a)
    best = u[:, :2] @ values[:2].diag() @ vh[:2]
    torch.testing.assert_close(
        session.method.adapters[name].delta().detach(), best, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("method", ["l1ra", "adalora", "vanilla"])
def test_a_run_of_lorakit_goes_on_with_its_head(
    tmp_path: Path, tiny_bert: Path, sentiment: Path, method: str
) -> None:
    run = as_if_trained(
        tmp_path / "first", tiny_bert, sentiment, method, RANKS["ragged"], "sequence-classification"
    )
    for place in (run.run, run.run / "adapter"):
        written = recipe(
            tiny_bert, sentiment, place, tmp_path / "run", "sequence-classification", r=6
        )
        session = begun(written)
        found = answers(session.task_model.model, session.task_model.tokenizer)
        assert_same(found, [logits[None][0] for logits in run.logits], 1e-4)


def test_training_starts_there_and_a_resumed_run_does_not_read_it_again(
    tmp_path: Path, tiny_llama: Path, sums: Path
) -> None:
    make_peft(tmp_path / "given", tiny_llama)
    for name in ("whole", "cut"):
        run_training(recipe(tiny_llama, sums, tmp_path / "given", tmp_path / name), PROGRESS)
    record = json.loads((tmp_path / "whole/manifest.json").read_text())["init_from"]
    assert record["path"] == str((tmp_path / "given").resolve())
    assert len(record["sha256"]) == 64
    for path in (tmp_path / "cut/checkpoints/step-00000004", tmp_path / "cut/adapter"):
        shutil.rmtree(path)
    (tmp_path / "cut/result.json").unlink()
    shutil.rmtree(tmp_path / "given")
    run_training(
        recipe(tiny_llama, sums, tmp_path / "given", tmp_path / "cut"), PROGRESS, resume="auto"
    )
    assert json.loads((tmp_path / "cut/manifest.json").read_text())["init_from"] == record
    one, other = (
        load_file(tmp_path / name / "adapter/adapter_model.safetensors")
        for name in ("whole", "cut")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_what_does_not_fit_is_said_before_anything_is_written(
    tmp_path: Path, tiny_llama: Path, tiny_gpt2: Path, sums: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_peft(tmp_path / "given", tiny_llama)
    with pytest.raises(RecipeError, match=r"not-there.*no folder") as error:
        run_training(recipe(tiny_llama, sums, tmp_path / "not-there", tmp_path / "run"), PROGRESS)
    assert error.value.problems[0].key == "method.init_from"
    with pytest.raises(RecipeError, match=r"layers without one here.*nearest.*o_proj"):
        begun(
            recipe(
                tiny_llama, sums, tmp_path / "given", tmp_path / "run", target_modules=["o_proj"]
            )
        )
    with pytest.raises(LorakitError, match="layers without one here"):
        run_training(recipe(tiny_gpt2, sums, tmp_path / "given", tmp_path / "run"), PROGRESS)
    assert not (tmp_path / "run").exists()
    moved = Path(shutil.copytree(tiny_llama, tmp_path / "moved"))
    caplog.set_level(logging.WARNING)
    begun(recipe(moved, sums, tmp_path / "given", tmp_path / "run"))
    assert "was trained on" in caplog.text
