"""The scale of the update and the learning rates of A and B, with PEFT as the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import AutoModelForCausalLM

from lorakit.adapters.inject import match_targets
from lorakit.errors import RecipeError
from lorakit.methods import config_classes, method_names
from lorakit.training.loop import build_optimizer
from lorakit.training.spec import TrainSpec
from lorakit.training.trained import trainable
from tests.support.contract import Case
from tests.support.exports import RANKS, as_if_trained, export

PATTERNS: dict[str, Any] = {
    "rank_pattern": {r"layers\.0\..*down_proj": 6, "q_proj": 2},
    "alpha_pattern": {"down_proj": 5.0, r"layers\.1\.self_attn\.q_proj": 3.0},
}


def in_peft(base: Path, **keys: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=9, target_modules=names, **keys))


def scales(model: Any) -> dict[str, float]:
    return {
        name.removeprefix("base_model.model."): module.scaling["default"]
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("method", method_names())
def test_scales_are_those_of_peft(tiny_llama: Path, method: str, use_rslora: bool) -> None:
    keys = {"lora_alpha": 9.0, "use_rslora": use_rslora}
    built = Case(method, "llama", tiny_llama).build(**keys, **PATTERNS)
    ours = {name: adapter.scale for name, adapter in built.adapters.items()}
    assert ours == scales(in_peft(tiny_llama, use_rslora=use_rslora, **PATTERNS))
    assert len(set(ours.values())) == 5


def test_an_alpha_pattern_that_matches_nothing_is_named(tiny_llama: Path) -> None:
    config = config_classes()["vanilla"].model_validate({"alpha_pattern": {"q_prj": 3.0}})
    with pytest.raises(RecipeError, match="q_prj") as error:
        match_targets(AutoModelForCausalLM.from_pretrained(tiny_llama), config)
    assert error.value.problems[0].key == "method.alpha_pattern.q_prj"
    with pytest.raises(ValueError, match="not above 0"):
        config_classes()["vanilla"].model_validate({"alpha_pattern": {"q_proj": 0.0}})


@pytest.mark.parametrize("method", ["vanilla", "l1ra"])
@pytest.mark.parametrize("form", ["peft", "peft-portable"])
def test_an_exported_rslora_adapter_has_the_runs_scale(
    tmp_path: Path, tiny_llama: Path, sums: Path, method: str, form: str
) -> None:
    run = as_if_trained(
        tmp_path / "runs/x", tiny_llama, sums, method, RANKS["ragged"], "causal-lm",
        "method.use_rslora=true",
    )  # fmt: skip
    export(run.run, tmp_path / "out", form)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    found = PeftModel.from_pretrained(base, tmp_path / "out")
    if form == "peft":
        assert scales(found) == pytest.approx(dict.fromkeys(run.ranks, 8 / 4**0.5), rel=1e-12)
    else:
        assert set(scales(found).values()) == {1.0}


@pytest.mark.parametrize("method", method_names())
def test_b_learns_faster_than_a_as_in_pefts_lora_plus(tiny_llama: Path, method: str) -> None:
    built = Case(method, "llama", tiny_llama).build()
    settings = TrainSpec.model_validate({"learning_rate": 1e-3, "lora_plus_ratio": 16.0})
    optimizer = build_optimizer(built.method, built.heads, settings)
    rates = {
        id(p): 1e-3 * group.lr_factor
        for group in optimizer.groups
        if group.lr is None
        for p in group.params
    }
    names = trainable(built.model)
    ours = {name: rates[id(p)] for name, p in names.items() if id(p) in rates}
    gates = {name: rate for name, rate in ours.items() if name.endswith(".gate")}
    assert set(gates.values()) <= {1e-3}
    model = in_peft(tiny_llama)
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    by_id = {id(p): group["lr"] for group in theirs.param_groups for p in group["params"]}
    assert {name: rate for name, rate in ours.items() if name not in gates} == {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): by_id[id(p)]
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def test_without_a_ratio_the_groups_are_the_methods(tiny_llama: Path) -> None:
    built = Case("vanilla", "llama", tiny_llama).build()
    optimizer = build_optimizer(built.method, built.heads, TrainSpec.model_validate({}))
    assert {group.lr_factor for group in optimizer.groups} == {1.0}
    assert len(optimizer.groups) == 2
