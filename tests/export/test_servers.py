"""Exports as servers read them: loaders that know one alpha and one rank, and llama.cpp's GGUF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorakit.errors import UsageError
from lorakit.export.gguf.adapter import read_gguf
from lorakit.export.gguf.architectures import side_by_side
from lorakit.export.peft import portable_factors
from lorakit.runs.saved import saved_model, saved_recipe
from tests.support.exports import RANKS, Trained, as_if_trained, assert_same, export, inputs


def trained(folder: Path, base: Path, data: Path, *overrides: str) -> Trained:
    return as_if_trained(
        folder / "runs/x", base, data, "l1ra", RANKS["ragged"], "causal-lm", *overrides
    )


def merged_by(base: Path, updates: dict[str, Tensor]) -> list[Tensor]:
    """What the base says with these dense updates {module: [out, in]}."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.inference_mode():
        for name, update in updates.items():
            layer: Any = model.get_submodule(name)
            layer.weight += update
        tokenizer = AutoTokenizer.from_pretrained(base)
        return [model(**one).logits[0].float() for one in inputs(tokenizer)]


@pytest.mark.parametrize("overrides", [[], ["method.use_rslora=true"]], ids=["", "rslora"])
def test_a_loader_that_knows_alpha_and_r_alone_says_what_the_run_says(
    tmp_path: Path, tiny_llama: Path, sums: Path, overrides: list[str]
) -> None:
    """As vLLM scales, of an adapter whose ranks moved: lora_alpha / r for every module."""
    run = trained(tmp_path, tiny_llama, sums, *overrides)
    assert len(set(run.ranks.values())) > 2
    export(run.run, tmp_path / "out", "peft-portable")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    scale, updates = config["lora_alpha"] / config["r"], {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[key.replace("lora_A", "lora_B")]
            assert len(a) == b.shape[1] == config["r"]
            assert name.rpartition(".")[2] in config["target_modules"]
            updates[name] = scale * b @ a
    assert_same(merged_by(tiny_llama, updates), run.logits, 1e-3)
    assert config["base_model_name_or_path"] == str(tiny_llama.resolve())
    assert config.keys() >= {"revision", "task_type", "peft_version"}
    assert config["inference_mode"] is True
    assert set(config["target_modules"]) == {name.rpartition(".")[2] for name in run.ranks}
    assert config["modules_to_save"] is None


def test_the_portable_form_is_what_an_export_writes(
    tmp_path: Path, tiny_llama: Path, sums: Path, call: Any
) -> None:
    run = trained(tmp_path, tiny_llama, sums)
    said = call("export", run.run, "--adapter")
    assert "vLLM" in said
    config = json.loads((run.run / "adapter-peft-portable/adapter_config.json").read_text())
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    said = call("export", run.run, "--adapter", "--format", "peft")
    assert "PEFT reads them" in said


# -- GGUF ------------------------------------------------------------------------------------------


def undone(b: Tensor, heads: int) -> Tensor:
    """Rows 2 i and 2 i + 1 of every head to where transformers has them, i and i + half."""
    half = len(b) // heads // 2
    order = [
        head * 2 * half + 2 * i + second
        for head in range(heads)
        for second in range(2)
        for i in range(half)
    ]
    return b[order]


NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_gguf_adapter_read_as_llama_cpp_does_says_what_the_run_says(
    tmp_path: Path, tiny_llama: Path, sums: Path, dtype: str
) -> None:
    run = trained(tmp_path, tiny_llama, sums)
    assert "llama-server" in export(run.run, tmp_path / "out", "gguf", dtype)
    reader = gguf.GGUFReader(tmp_path / "out/adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == "llama"
    alpha, tensors = read_gguf(tmp_path / "out/adapter.gguf")
    assert alpha == fields["adapter.lora.alpha"]
    assert len(tensors) == 2 * len(run.ranks)
    updates = {}
    for name, a in tensors.items():
        assert a.dtype == np.dtype(dtype)
        block, number, part, weight, side = name.split(".")
        assert (block, weight) == ("blk", "weight")
        if side == "lora_a":
            b = torch.tensor(tensors[name.replace("lora_a", "lora_b")]).float()
            if part in ("attn_q", "attn_k"):
                b = undone(b, {"attn_q": 4, "attn_k": 2}[part])
            update = alpha / b.shape[1] * b @ torch.tensor(a).float()
            updates[f"model.layers.{number}.{NAMES[part]}"] = update
    assert updates.keys() == run.ranks.keys()
    assert_same(merged_by(tiny_llama, updates), run.logits, 1e-3 if dtype == "float32" else 1e-1)
    task_model, method, _ = saved_model(run.run, saved_recipe(run.run), torch.float32)
    assert alpha == portable_factors(method).alpha
    del task_model


def test_a_gguf_file_of_a_whole_model_holds_q_and_k_in_the_same_order() -> None:
    """The builtin's own reader undoes what the export does."""
    b = torch.randn(2 * 8, 3)
    order = side_by_side(b, 2)
    assert torch.equal(undone(order, 2), b)
    there = order.view(2, -1, 2, 3).transpose(1, 2).reshape(b.shape)  # as lorakit.sources.gguf
    assert torch.equal(there, b)


def refused(run: Path, out: Path, words: str, dtype: str | None = None) -> None:
    with pytest.raises(UsageError, match=words):
        export(run, out, "gguf", dtype)
    assert not out.exists()


def test_what_gguf_can_not_hold_is_refused(
    tmp_path: Path, tiny_llama: Path, tiny_gpt2: Path, tiny_bert: Path, sums: Path, sentiment: Path
) -> None:
    out = tmp_path / "out"
    run = trained(tmp_path / "a", tiny_gpt2, sums)
    refused(run.run, out, "architecture `gpt2`")
    run = as_if_trained(
        tmp_path / "b/runs/x", tiny_bert, sentiment, "vanilla", RANKS["ragged"],
        "sequence-classification",
    )  # fmt: skip
    refused(run.run, out, "no head")
    run = trained(tmp_path / "c", tiny_llama, sums)
    refused(run.run, out, "float32 or float16", "bfloat16")


# -- the model card --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [None, "peft", "peft-portable", "gguf", "lorakit", "sparse"])
def test_every_export_has_a_model_card(
    tmp_path: Path, tiny_llama: Path, sums: Path, form: str | None
) -> None:
    run = trained(tmp_path, tiny_llama, sums)
    ranks, metrics = {"ranks": run.ranks}, {"metrics": {"loss": 1.25}, "steps": 7, "tokens": 99}
    (run.run / "result.json").write_text(json.dumps(ranks | metrics))
    manifest = {"data": {"kind": "hub", "used": "openai/gsm8k", "train_rows": 12}}
    (run.run / "manifest.json").write_text(json.dumps(manifest))
    export(run.run, tmp_path / "out", form)
    text = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---\n")[1])
    libraries = {None: "transformers", "peft": "peft", "peft-portable": "peft", "gguf": "llama.cpp"}
    assert front["library_name"] == libraries.get(form, "lorakit")
    assert front["datasets"] == ["openai/gsm8k"]
    assert front["tags"] == ["lora", "lorakit", "l1ra"]
    assert "base_model" not in front, "a folder of this machine"
    assert str(tmp_path) not in text
    assert "| loss | 1.2500 |" in text
    assert "| down_proj | 2 |" in text
    loader = {None: "from_pretrained", "peft": "PeftModel", "peft-portable": "vllm serve"}
    assert loader.get(form, "llama-server" if form == "gguf" else "lorakit") in text
