"""A pruned base from training to every export, with PEFT and plain transformers as the oracles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lorakit.adapters.base import dense_weight
from lorakit.data.batches import Batch
from lorakit.export.sparse import load_sparse_model
from lorakit.files import read_json
from lorakit.methods import config_classes
from lorakit.models.task_model import TaskModel
from lorakit.recipes.recipe import load_recipe
from lorakit.report.progress import Progress
from lorakit.runs.export import export_run
from lorakit.runs.saved import saved_model, saved_recipe
from lorakit.runs.train import run_training

TEXTS = ["good film", "a dull plot and a weak cast .", "how many eggs are left ? 3", "bad"]
KINDS = {"bert": "sequence-classification", "llama": "causal-lm", "gpt2": "causal-lm"}
METHODS = {
    "salor": "{name: salor, r: 4, factors: {density: 0.4}, base: {density: 0.5, r_res: 3}}",
    "l1ra": (
        "{name: l1ra, r: 4, with: [{name: salor, factors: null, base: {criterion: magnitude,"
        " density: 0.5, r_res: 2}}]}"
    ),
}


@pytest.fixture(scope="module")
def run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """run(kind, method): a finished run of a few steps, made once."""
    made: dict[tuple[str, str], Path] = {}

    def get(kind: str, method: str = "salor") -> Path:
        if (kind, method) not in made:
            folder = tmp_path_factory.mktemp(kind)
            data = request.getfixturevalue("sentiment" if kind == "bert" else "sums")
            recipe = folder / "recipe.yaml"
            recipe.write_text(
                f"model: {{name_or_path: {request.getfixturevalue(f'tiny_{kind}')}, task:"
                f" {KINDS[kind]}}}\ndata: {{name_or_path: {data}}}\nmethod:"
                f" {METHODS[method]}\ntrain: {{max_steps: 6, learning_rate: 5e-2, precision: fp32,"
                f" eval_on_start: true}}\noutput_dir: {folder / 'run'}\n"
            )
            run_training(load_recipe(recipe), Progress(Console(stderr=True)))
            made[kind, method] = folder / "run"
        return made[kind, method]

    return get


def export(run: Path, out: Path, form: str) -> list[str]:
    merge = form == "merge"
    return list(
        export_run(
            run,
            merge=merge,
            adapter=not merge,
            form=None if merge else form,
            dtype=None,
            out=out,
            force=False,
        )
    )


@torch.inference_mode()
def answers(model: Any, tokenizer: Any) -> list[Tensor]:
    return [
        model.eval()(**tokenizer(text, return_tensors="pt")).logits[0].float() for text in TEXTS
    ]


@torch.inference_mode()
def own_answers(task_model: TaskModel) -> list[Tensor]:
    found = []
    for text in TEXTS:
        one = task_model.tokenizer(text, return_tensors="pt")
        ids = one["input_ids"]
        none = torch.zeros(1, dtype=torch.long)
        batch = Batch(
            ids,
            one["attention_mask"],
            torch.tensor([ids.shape[1]]),
            none,
            [0],
            one.get("token_type_ids"),
        )
        found.append(task_model.logits(batch)[0].float())
    return found


def expected(run: Path) -> list[Tensor]:
    return own_answers(saved_model(run, saved_recipe(run), torch.float32)[0])


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_a_dense_plain_model_and_says_so(
    run: Callable[..., Path], tmp_path: Path, kind: str, method: str
) -> None:
    folder = run(kind, method)
    lines = export(folder, tmp_path / "merged", "merge")
    assert any("dense again: 50.0% of its weights were zero, 0.0% are" in line for line in lines)
    auto = AutoModelForSequenceClassification if kind == "bert" else AutoModelForCausalLM
    model = auto.from_pretrained(tmp_path / "merged")
    assert_same(
        answers(model, AutoTokenizer.from_pretrained(tmp_path / "merged")), expected(folder)
    )


@pytest.mark.parametrize("form", ["peft", "peft-portable"])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_finds_the_pruned_base_beside_the_adapter(
    run: Callable[..., Path], tmp_path: Path, kind: str, form: str
) -> None:
    folder, out = run(kind), tmp_path / "adapter"
    lines = export(folder, out, form)
    assert any("over the original one it is not valid" in line for line in lines)
    config = read_json(out / "adapter_config.json")
    assert config["base_model_name_or_path"] == str(out / "base")
    auto = AutoPeftModelForSequenceClassification if kind == "bert" else AutoPeftModelForCausalLM
    model = auto.from_pretrained(out, **({"num_labels": 2} if kind == "bert" else {}))
    assert_same(answers(model, AutoTokenizer.from_pretrained(out)), expected(folder))
    # The residual's rank is added to that of the factors.
    assert {len(p) for name, p in model.named_parameters() if "lora_A" in name} == {7}


def test_the_base_beside_the_adapter_is_the_pruned_one(
    run: Callable[..., Path], tmp_path: Path
) -> None:
    export(run("llama"), tmp_path / "adapter", "peft")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter/base")
    recipe = saved_recipe(run("llama"))
    _, method, _ = saved_model(run("llama"), recipe, torch.float32)
    for name, adapter in method.adapters.items():
        assert torch.equal(dense_weight(base.get_submodule(name)), dense_weight(adapter.base))
        assert float((dense_weight(adapter.base) == 0).float().mean()) == pytest.approx(0.5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_sparse_form_is_the_same_model(
    run: Callable[..., Path], tmp_path: Path, kind: str, method: str
) -> None:
    folder = run(kind, method)
    lines = export(folder, tmp_path / "sparse", "sparse")
    assert len(lines) == 1
    assert "and the pruned base" in lines[0]
    assert_same(own_answers(load_sparse_model(tmp_path / "sparse")[0]), expected(folder))


def test_result_and_metrics_tell_the_densities(run: Callable[..., Path]) -> None:
    result = read_json(run("llama") / "result.json")
    assert result["base_density"]["total"] == pytest.approx(0.5)
    assert (
        set(result["base_density"]["modules"])
        == set(result["ranks"])
        == set(result["density"]["modules"])
    )
    assert result["density"]["total"] <= 0.4
    lines = (run("llama") / "metrics.jsonl").read_text().splitlines()
    assert '"step": 0' in lines[0]
    assert "eval_loss" in lines[0]


def test_a_pruned_base_is_not_what_peft_takes_for_a_plain_adapter(run: Callable[..., Path]) -> None:
    assert read_json(run("llama") / "adapter/adapter_config.json")["peft_type"] == "LORAKIT"


def test_magnitude_alone_prunes_less_by_default() -> None:
    def target(**base: object) -> float:
        method = config_classes()["salor"].model_validate({"base": base})
        return float(method.base.target)  # type: ignore[attr-defined]

    assert (
        target() == target(criterion="2:4") == target(criterion="magnitude", structure="2:4") == 0.5
    )
    assert target(criterion="magnitude") == 0.75
    assert target(criterion="magnitude", density=0.3) == 0.3
