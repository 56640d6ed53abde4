"""Tiny random models of many architectures, made from the configuration classes of transformers."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from lorakit.cli import main
from tests.support.tiny import VOCABULARY, tokenizer, write_jsonl

PAD, EOS = VOCABULARY["[PAD]"], VOCABULARY["[EOS]"]
# What a configuration calls its sizes, and what they are here. No two are alike, so that a
# transposed matrix shows.
SIZES: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "embedding_size", "d_embed"), 32
    ),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "d_ff",
            "hidden_dim",
            "encoder_ffn_dim",
            "decoder_ffn_dim",
            "ffn_hidden_size",
        ),
        48,
    ),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "mlp_hidden_size"), 40
    ),
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "encoder_layers",
            "decoder_layers",
            "num_layers",
        ),
        2,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "encoder_attention_heads",
            "decoder_attention_heads",
            "num_heads",
        ),
        4,
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length"), 66
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    "head_dim": 8,
    "d_kv": 8,
    "rotary_dim": 4,
    "max_window_layers": 1,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "decoder_start_token_id": EOS,
    "forced_eos_token_id": None,
    "forced_bos_token_id": None,
}
DEEPSEEK = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
}
# What some configurations want beside.
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "attn_layer_indices": [1]},
    "cwm": {"bos_token_id": 1},
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "esmc": {"num_key_value_heads": 4},
    "funnel": {"block_sizes": [1, 1], "d_head": 8, "d_inner": 48},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 6,
    },
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8, "visual_embed": False},
    "luke": {"entity_vocab_size": 8, "entity_emb_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "minicpm3": {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "modernbert-decoder": {"bos_token_id": 1},
    "prophetnet": {
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
    },
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention"]},
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "xmod": {"default_language": "en_XX"},
}
TASKS = ("sequence-classification", "causal-lm")
AUTO = {
    "sequence-classification": AutoModelForSequenceClassification,
    "causal-lm": AutoModelForCausalLM,
}


def tiny_config(kind: str, **own: Any) -> Any:
    """The configuration of a tiny model. kind: `model_type` of transformers; own: what differs from
    SIZES."""
    known = AutoConfig.for_model(kind)
    # that follow from others
    fixed = {key for key in SIZES if isinstance(getattr(type(known), key, None), property)}
    sizes = {
        key: SIZES[key]
        for key in SIZES.keys() - fixed
        if key.endswith("token_id") or hasattr(known, key)
    }
    return AutoConfig.for_model(kind, **sizes | OWN.get(kind, {}) | own)


def tiny_model(kind: str, task: str, **own: Any) -> Any:
    """A random model in float32; every parameter is drawn, so that nothing is hidden by a zero."""
    torch.manual_seed(0)
    model = AUTO[task].from_config(tiny_config(kind, **{"num_labels": 2} | own))
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        if "bias" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


TEXTS = [
    "good film",
    "bad",
    "a fine cast and a joke",
    "warm",
    "the plot is dull",
    "a slow scene and a flat song .",
]
PROMPTS = [(f"how many eggs {i} ?", f" {i % 7} eggs" + " and hens" * (i % 3)) for i in range(10)]


def save_base(folder: Path, kind: str, task: str, **own: Any) -> Path:
    """A folder as the hub has it: the tiny model and a tokenizer, which ends texts in the end token
    where the model reads its class there."""
    model = tiny_model(kind, task, **own)
    model.save_pretrained(folder)
    tokens = tokenizer(pair=task == "sequence-classification")
    tokens.model_max_length = 10**30  # the model alone says how much it reads
    tokens.add_special_tokens({"pad_token": "[PAD]", "eos_token": "[EOS]"})
    if getattr(model.config, "is_encoder_decoder", False):
        tokens.backend_tokenizer.post_processor = TemplateProcessing(
            "$A [EOS]", "$A [EOS] $B [EOS]", [("[EOS]", EOS)]
        )
    tokens.save_pretrained(folder)
    return folder


def recipe(folder: Path, base: Path, task: str) -> Path:
    """A recipe for a few steps over a few rows, and other rows to evaluate on (`other.jsonl`)."""
    if task == "causal-lm":
        rows = [{"prompt": prompt, "completion": completion} for prompt, completion in PROMPTS * 3]
        other = rows[3:9]
    else:
        rows = [
            {"text": text + " film" * (i % 4), "label": i % 2} for i, text in enumerate(TEXTS * 4)
        ]
        other = [{"text": text, "label": i % 2} for i, text in enumerate(TEXTS)]
    write_jsonl(folder / "rows.jsonl", rows)
    write_jsonl(folder / "other.jsonl", other)
    settings = {
        "model": {"name_or_path": str(base), "task": task},
        "data": {"name_or_path": str(folder / "rows.jsonl"), "max_seq_length": 32},
        "method": {"name": "vanilla", "r": 4, "lora_alpha": 8},
        "train": {
            "precision": "fp32",
            "max_steps": 3,
            "learning_rate": 0.02,
            "per_device_train_batch_size": 8,
        },
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(json.dumps(settings))
    return folder / "recipe.yaml"


def batch(task: str, folder: Path) -> dict[str, Tensor]:
    """The other rows as one padded batch with labels, made by plain transformers."""
    tokens = AutoTokenizer.from_pretrained(folder)
    if task == "sequence-classification":
        return {
            **tokens(TEXTS, padding=True, return_tensors="pt"),
            "labels": torch.arange(len(TEXTS)) % 2,
        }
    rows = (PROMPTS * 3)[3:9]
    asked = [len(tokens(prompt, add_special_tokens=False).input_ids) for prompt, _ in rows]
    ids = [
        torch.tensor([*tokens(prompt + answer, add_special_tokens=False).input_ids, EOS])
        for prompt, answer in rows
    ]
    labels = [
        torch.cat([torch.full((n,), -100), row[n:]]) for n, row in zip(asked, ids, strict=True)
    ]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=PAD),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


@dataclass
class Found:
    """Losses over the same rows: of `lorakit eval`, of the exported adapter in PEFT, of the merged
    model in transformers, and of the untrained base; or the message that the recipe was refused
    with."""

    lorakit: float = nan
    not_for_peft: str = ""
    peft: float = nan
    merged: float = nan
    base: float = nan
    refused: str = ""
    log: str = ""


def compared(kind: str, task: str, folder: Path, **own: Any) -> Found:
    """Train, evaluate and export a tiny model with lorakit's commands, and compute its loss
    elsewhere."""
    base = save_base(folder / "base", kind, task, **own)
    code, out, log = command("train", recipe(folder, base, task))
    if code:
        assert code == 2, log
        assert not (folder / "run").exists()
        return Found(refused=log)
    done, out, more = command(
        "eval", folder / "run", f"data.name_or_path={folder / 'other.jsonl'}", "--json"
    )
    assert not done, more
    done, _, more = command("export", folder / "run", "--merge", "--out", folder / "merged")
    assert not done, more
    # BART saves no 2, and means 3
    classes = {"num_labels": 2} if task == "sequence-classification" else {}
    model = AUTO[task].from_pretrained(base, **classes).eval()
    inputs = batch(task, base)
    found = Found(json.loads(out)["metrics"]["loss"], log=log, base=loss(model, task, inputs))
    found.merged = loss(AUTO[task].from_pretrained(folder / "merged").eval(), task, inputs)
    done, _, more = command("export", folder / "run", "--adapter", "--out", folder / "adapter")
    if done:
        assert done == 2, more
        assert "PEFT does not load" in log
        found.not_for_peft = more
    else:
        found.peft = loss(PeftModel.from_pretrained(model, folder / "adapter").eval(), task, inputs)
    return found


@torch.no_grad()
def loss(model: Any, task: str, inputs: dict[str, Tensor]) -> float:
    """The mean loss of a padded batch. Of next tokens it is computed from the logits, as some
    models do not shift the labels."""
    if task == "sequence-classification":
        return float(model(**inputs).loss)
    labels = inputs.pop("labels")
    logits = model(**inputs).logits
    inputs["labels"] = labels
    return float(cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


def command(*arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command that runs in this process."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["lorakit", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as exit_:
        return int(exit_.code or 0), out.getvalue(), err.getvalue()
    finally:
        sys.argv = before
    raise AssertionError("a command always exits")
