"""Runs whose factors begin by what the layers read, or by what quantisation lost."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM

from lorakit.errors import RecipeError
from lorakit.methods import method_names, prepare
from lorakit.recipes.recipe import Recipe, recipe_of
from lorakit.report.progress import Progress
from lorakit.runs.session import Session, assemble, calibration
from lorakit.runs.train import run_training
from lorakit.training.trained import read_trained

PROGRESS = Progress(Console(stderr=True))
QUANTISED = {"quantization": {"bits": 4}}


def recipe(base: Path, data: Path, start: str, model: dict[str, Any], **method: Any) -> Recipe:
    method = {"name": "vanilla", "r": 4, "init_lora_weights": start} | method
    if method["name"] == "chunkwise":
        method["ladder"] = [2, 4]
    train = {"precision": "fp32", "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4}
    return recipe_of(
        {
            "model": {"name_or_path": str(base), "task": "causal-lm"} | model,
            "data": {"name_or_path": str(data)},
            "method": method,
            "train": train,
            "output_dir": str(base.parent / "never"),
        }
    )


@contextlib.contextmanager
def stage(description: str) -> Iterator[Any]:
    yield lambda done, total: None


def begun(recipe: Recipe) -> tuple[Session, dict[str, Tensor]]:
    """A session at its first step, and what its layers read of the rows that calibrate."""
    session = assemble(recipe, PROGRESS)
    read: dict[str, list[Tensor]] = {name: [] for name in session.method.adapters}
    how = calibration(session, stage)
    hooks = [
        adapter.register_forward_pre_hook(lambda module, x, name=name: read[name].append(x[0]))
        for name, adapter in session.method.adapters.items()
    ]
    real = []
    for batch in how.batches(64):
        real.append(batch.attention_mask.bool())
        how.forward(batch)
    for hook in hooks:
        hook.remove()
    inputs = {
        name: torch.cat([x[mask] for x, mask in zip(found, real, strict=True)])
        for name, found in read.items()
    }
    prepare(session.method, how)
    return session, inputs


@pytest.mark.parametrize("method", method_names())
def test_eva_begins_along_what_each_layer_reads(tiny_llama: Path, sums: Path, method: str) -> None:
    session, inputs = begun(recipe(tiny_llama, sums, "eva", {}, name=method))
    for name, adapter in session.method.adapters.items():
        _, values, vh = np.linalg.svd(inputs[name].double().numpy(), full_matrices=False)
        rows = adapter.lora_A.detach().double().numpy()
        assert np.allclose(rows @ rows.T, np.eye(4), atol=1e-4), name
        assert not adapter.delta().any()
        # directions of nearly the same size may turn into each other
        held = np.linalg.norm(inputs[name].double().numpy() @ rows.T) / np.linalg.norm(values[:4])
        assert held == pytest.approx(1, abs=1e-3), name
        if values[0] > 1.2 * values[1]:
            assert abs(rows[0] @ vh[0]) == pytest.approx(1, abs=1e-3), name


def test_more_rank_than_directions_is_said(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "same.jsonl"
    data.write_text('{"text": "hens hens"}\n' * 8, encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        session, _ = begun(recipe(tiny_llama, data, "eva", {}, r=8))
    assert "read fewer directions than their rank" in caplog.text
    for adapter in session.method.adapters.values():
        assert bool((adapter.lora_A.norm(dim=1) > 0.1).all())


@pytest.mark.parametrize("method", method_names())
def test_qera_begins_at_the_best_part_of_what_was_lost(
    tiny_llama: Path, sums: Path, method: str
) -> None:
    pytest.importorskip("bitsandbytes")
    session, inputs = begun(recipe(tiny_llama, sums, "qera", QUANTISED, name=method))
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for name, adapter in session.method.adapters.items():
        lost = (dense.get_submodule(name).weight.detach() - adapter.base.weight).double()
        x = inputs[name].double()
        # The optimum, by another root of the second moment: the SVD of the outputs' error itself.
        values = torch.linalg.svdvals(x @ lost.T)
        left = float((x @ (lost - adapter.delta().detach().double()).T).norm())
        assert left == pytest.approx(float(values[4:].norm()), rel=0.02), name
        assert left < 0.95 * float(values.norm())


def test_qera_brings_the_outputs_nearer_to_the_dense_model(tiny_llama: Path, sums: Path) -> None:
    pytest.importorskip("bitsandbytes")
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    ids = torch.arange(5, 25)[None]
    gaps = []
    for start in ("kaiming", "qera"):
        session, _ = begun(recipe(tiny_llama, sums, start, QUANTISED, r=16))
        with torch.no_grad():
            gaps.append(float((session.task_model.model(ids).logits - dense(ids).logits).norm()))
    assert gaps[1] < 0.8 * gaps[0], gaps


@pytest.mark.parametrize(("start", "model"), [("eva", {}), ("qera", QUANTISED)])
def test_a_resumed_run_ends_with_the_same_bytes(
    tiny_llama: Path, sums: Path, tmp_path: Path, start: str, model: dict[str, Any]
) -> None:
    if model:
        pytest.importorskip("bitsandbytes")
    whole = recipe(tiny_llama, sums, start, model, lora_dropout=0.1)
    whole = replace(whole, output_dir=str(tmp_path / "run"))
    run_training(whole, PROGRESS)
    before, _ = read_trained(tmp_path / "run/adapter")
    run_training(whole, PROGRESS, resume=str(tmp_path / "run/checkpoints/step-00000002"))
    after, _ = read_trained(tmp_path / "run/adapter")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("start", "more", "what"),
    [
        ("qera", {}, "nothing is quantised"),
        ("eva", {"init_from": "somewhere"}, "are two starts"),
        ("pissa", {}, "eva"),
    ],
)
def test_a_start_that_can_not_be_is_refused(
    tiny_llama: Path, sums: Path, start: str, more: dict[str, Any], what: str
) -> None:
    with pytest.raises(RecipeError, match=what) as error:
        recipe(tiny_llama, sums, start, {}, **more)
    assert error.value.problems[0].key == "method.init_lora_weights"
