"""Runs on a base in few bits, by the command line: training, what comes after it, and mistakes."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorakit.errors import RecipeError
from lorakit.recipes.recipe import load_recipe
from lorakit.report.progress import Progress
from lorakit.runs.export import export_run
from lorakit.runs.saved import saved_model, saved_recipe
from lorakit.runs.train import run_training
from tests.support.processes import in_this_process

pytest.importorskip("bitsandbytes")

RECIPE = """\
model: {{name_or_path: {model}, task: causal-lm, quantization: {{bits: 4}}}}
data: {{name_or_path: {data}, prompt: "{{question}}", completion: " {{answer}}"}}
method: {{name: vanilla, r: 4, lora_alpha: 16, target_modules: [q_proj, v_proj, down_proj]}}
train: {{max_steps: 4, per_device_train_batch_size: 8, learning_rate: 1e-2}}
output_dir: {run}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, sums: Path) -> Path:
    folder = tmp_path_factory.mktemp("quantised")
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=tiny_llama, data=sums, run=folder / "run"), "utf-8")
    run_training(load_recipe(recipe), Progress(Console(stderr=True)))
    return folder / "run"


def test_the_result_says_how_the_base_is_kept(run: Path, tiny_llama: Path) -> None:
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    assert result["quantization"] == {
        "bits": 4,
        "backend": "bitsandbytes",
        "quant_type": None,
        "double_quant": None,
    }
    weights = load_file(tiny_llama / "model.safetensors")
    assert result["base_memory_mb"] <= sum(t.numel() * 4 for t in weights.values()) / 2**20
    assert load_recipe(run / "recipe.yaml").model.quantization is not None


def test_a_second_run_has_the_same_bytes_and_the_log_says_what_it_costs(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    command = in_this_process(monkeypatch, capfd)
    done = command("-v", "train", run.parent / "recipe.yaml", f"output_dir={run.parent / 'again'}")
    assert done.code == 0, done.err
    assert "base: 14 layers in 4 bits (nf4 by bitsandbytes, scales quantised too)" in done.err
    if not torch.cuda.is_available():
        assert "on a processor a quantised base saves memory and costs time" in done.err
    place = "adapter/adapter_model.safetensors"
    assert (run / place).read_bytes() == (run.parent / "again" / place).read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_merged_model_is_plain_and_acts_alike(run: Path, tmp_path: Path, dtype: str) -> None:
    settings = {"adapter": False, "form": None, "dtype": dtype, "force": False}
    said = "\n".join(export_run(run, merge=True, out=tmp_path / "merged", **settings))
    assert "its base was in 4 bits (nf4 by bitsandbytes, scales quantised too)" in said
    found, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert "quantization_config" not in (tmp_path / "merged/config.json").read_text("utf-8")
    assert found.dtype == getattr(torch, dtype)
    unmerged, _, _ = saved_model(run, saved_recipe(run), found.dtype)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        gap = (found(ids).logits - unmerged.model(ids).logits).abs().max()
    number = re.search(r"difference to the unmerged model: (\S+) in \w+, mean (\S+), logits", said)
    assert number is not None, said
    assert float(number[2]) <= float(number[1])
    if dtype == "float32":
        assert gap < 1e-4
        assert float(number[1]) < 1e-4
    else:
        rounding = re.search(r"own rounding, unmerged against float32: (\S+), mean (\S+)", said)
        assert rounding is not None, said
        assert 0 < float(number[1]) < 2 * float(rounding[1])
        assert 0 < float(number[2]) < 2 * float(rounding[2])


def test_it_is_evaluated_and_continued_and_converted(
    run: Path, tmp_path: Path, call: Callable[..., str]
) -> None:
    own = json.loads(call("eval", run, "--json"))["metrics"]["loss"]
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    assert own == pytest.approx(result["metrics"]["loss"], rel=1e-5)
    plain = json.loads(call("eval", run, "model.quantization=null", "--json"))["metrics"]["loss"]
    assert plain != own
    assert plain == pytest.approx(own, rel=0.1)
    asked = ("--prompt", "how many hens", "--max-new-tokens", "4", "--json")
    unmerged, _, _ = saved_model(run, saved_recipe(run), torch.float32)
    ids = torch.tensor([unmerged.tokenizer("how many hens")["input_ids"]])
    with torch.no_grad():
        expected = unmerged.model.generate(ids, max_new_tokens=4, do_sample=False)[
            0, ids.shape[1] :
        ]
    text = unmerged.tokenizer.decode(expected, skip_special_tokens=True)
    assert json.loads(call("generate", run, *asked))["texts"][0]["text"].strip() == text.strip()
    said = call("export", run, "--adapter", "--format", "peft", "--out", tmp_path / "peft")
    assert "it was trained on that base in 4 bits" in said
    call("convert", run, "--out", tmp_path / "tiers", "method.ladder=[1,4]")
    converted = json.loads((tmp_path / "tiers/result.json").read_text(encoding="utf-8"))
    assert converted["quantization"]["bits"] == 4


def test_the_estimate_counts_quantised_weights(run: Path, call: Callable[..., str]) -> None:
    arguments = ("estimate", run.parent / "recipe.yaml", "--json", "--seconds", "0.1")
    few, plain = (
        json.loads(call(*arguments, *more)) for more in ((), ("model.quantization=null",))
    )
    assert few["parameters"] == plain["parameters"]
    assert few["quantization"]["bits"] == 4
    assert few["memory_mb"]["base"] < plain["memory_mb"]["base"]


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key", "what"),
    [
        ("model.quantization.bits=3", "model.quantization.bits", "whole number, 3"),
        ("model.quantization={bits: 8, quant_type: nf4}", "model.quantization", "no effect"),
        ("model.quantization={bits: 8, double_quant: true}", "model.quantization", "no effect"),
        ("model.quantization={backend: torchao, quant_type: fp4}", "model.quantization", "no fp4"),
        ("train.torch_compile=true", "train.torch_compile", "would keep the dequantised weights"),
        ("method={name: salor, base: {}}", "method.base", "are not kept by a quantised one"),
        (
            "method={name: l1ra, with: [{name: salor, factors: null, base: {}}]}",
            "method.with.0.base",
            "are not kept by a quantised one",
        ),
    ],
)
def test_what_can_not_be_is_refused_by_its_key(
    run: Path, override: str, key: str, what: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(run.parent / "recipe.yaml", [override])
    (problem,) = caught.value.problems
    assert problem.key == key
    assert what in problem.what


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is installed")
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = run.parent / "recipe.yaml"
    command = in_this_process(monkeypatch, capfd)
    done = command("train", recipe, "model.quantization.backend=torchao", "output_dir=none")
    assert done.code == 2
    assert "needs the package `torchao`, not installed here" in done.err
    assert 'pip install "lorakit[quant-torchao]"' in done.err
    assert not (run.parent / "none").exists()
