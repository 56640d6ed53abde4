"""The loss of `lorakit eval` is what the merged model computes in plain transformers, labels given,
over a padded batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
)

from tests.support.plain import EOS, LLAMA, PAD, SIZES
from tests.support.tiny import VOCABULARY, tokenizer, write_jsonl

FLAT = {**SIZES, "intermediate_size": 48}
BLOCKS = {
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}
WIDE = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64}
SPECIAL = {
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "decoder_start_token_id": EOS,
}
CLASSIFIERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**FLAT, max_position_embeddings=64)),
    "roberta": lambda: RobertaForSequenceClassification(
        RobertaConfig(**FLAT, max_position_embeddings=66, pad_token_id=PAD)
    ),
    "bart": lambda: BartForSequenceClassification(
        BartConfig(
            vocab_size=len(VOCABULARY), **BLOCKS, **WIDE, **SPECIAL, forced_eos_token_id=None
        )
    ),
    "t5": lambda: T5ForSequenceClassification(
        T5Config(
            vocab_size=len(VOCABULARY),
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=1,
            num_heads=4,
            **SPECIAL,
        )
    ),
}
DECODERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**LLAMA)),
}
TEXTS = [
    "good film",
    "bad",
    "a fine cast and a joke",
    "warm",
    "the plot is dull",
    "a slow scene and a flat song .",
]


def saved(folder: Path, model: Any, pair: bool, **settings: Any) -> Path:
    """A base; `pair`: its tokenizer is BERT's, else one that ends a text in the end token."""
    model.save_pretrained(folder)
    tokens = tokenizer(pair)
    if not pair:
        tokens.backend_tokenizer.post_processor = TemplateProcessing(
            "$A [EOS]", "$A [EOS] $B [EOS]", [("[EOS]", EOS)]
        )
        tokens.pad_token = "[PAD]"
    tokens.save_pretrained(folder)
    about = folder / "tokenizer_config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | settings))
    return folder


def evaluated(
    call: Callable[..., str],
    folder: Path,
    model: Path,
    task: str,
    rows: list[dict[str, Any]],
    other: list[dict[str, Any]],
) -> tuple[float, Path]:
    """(the loss over `other` of a run that was trained on `rows`, its merged model)."""
    write_jsonl(folder / "rows.jsonl", rows)
    write_jsonl(folder / "other.jsonl", other)
    recipe = {
        "model": {"name_or_path": str(model), "task": task},
        "data": {"name_or_path": str(folder / "rows.jsonl")},
        "method": {"name": "vanilla", "r": 4, "lora_alpha": 8},
        "train": {
            "precision": "fp32",
            "max_steps": 4,
            "learning_rate": 0.02,
            "per_device_train_batch_size": 8,
        },
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    call("train", folder / "recipe.yaml")
    found = json.loads(
        call("eval", folder / "run", f"data.name_or_path={folder / 'other.jsonl'}", "--json")
    )
    call("export", folder / "run", "--merge", "--out", folder / "merged")
    return found["metrics"]["loss"], folder / "merged"


@pytest.mark.parametrize("regression", [False, True])
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_the_loss_of_a_classifier(
    kind: str, regression: bool, tmp_path: Path, call: Callable[..., str]
) -> None:
    torch.manual_seed(0)
    model = saved(tmp_path / "base", CLASSIFIERS[kind](), pair=kind in ("bert", "roberta"))
    labels = [(0.25 + i % 5 / 2 if regression else i % 2) for i in range(36)]
    rows = [{"text": TEXTS[i % 6] + " film" * (i // 6), "label": labels[i]} for i in range(36)]
    other = [{"text": text, "label": labels[i]} for i, text in enumerate(TEXTS)]
    expected, merged = evaluated(call, tmp_path, model, "sequence-classification", rows, other)
    plain = AutoModelForSequenceClassification.from_pretrained(merged).eval()
    tokens = AutoTokenizer.from_pretrained(merged)
    with torch.inference_mode():
        batch = tokens(TEXTS, padding=True, return_tensors="pt")
        loss = plain(**batch, labels=torch.tensor(labels[:6])).loss
    assert loss.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", DECODERS)
def test_the_loss_of_a_decoder_that_classifies_wherever_others_pad(
    kind: str, side: str, tmp_path: Path, call: Callable[..., str]
) -> None:
    """The base's tokenizer closes each text with the token that it also pads with."""
    torch.manual_seed(0)
    model = saved(
        tmp_path / "base", DECODERS[kind](), pair=False, padding_side=side, pad_token="[EOS]"
    )
    rows = [{"text": TEXTS[i % 6] + " film" * (i // 6), "label": i % 2} for i in range(36)]
    other = [{"text": text, "label": i % 2} for i, text in enumerate(TEXTS)]
    expected, merged = evaluated(call, tmp_path, model, "sequence-classification", rows, other)
    plain = AutoModelForSequenceClassification.from_pretrained(merged).eval()
    tokens = AutoTokenizer.from_pretrained(merged)
    assert (tokens.padding_side, tokens.pad_token_id, plain.config.pad_token_id) == (side, EOS, EOS)
    with torch.inference_mode():
        batch = tokens(TEXTS, padding=True, return_tensors="pt")
        assert batch["input_ids"][1].tolist().count(EOS) > 1
        loss = plain(**batch, labels=torch.arange(6) % 2).loss
    assert loss.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", DECODERS)
def test_the_loss_of_completions(kind: str, tmp_path: Path, call: Callable[..., str]) -> None:
    torch.manual_seed(0)
    model = saved(tmp_path / "base", DECODERS[kind](), pair=False)
    rows = [
        {
            "prompt": f"how many eggs {i % 10} ?",
            "completion": f" {i % 7} eggs" + " and hens" * (i % 3),
        }
        for i in range(36)
    ]
    other = rows[3:9]
    expected, merged = evaluated(call, tmp_path, model, "causal-lm", rows, other)
    asked = [[VOCABULARY[word] for word in row["prompt"].split()] for row in other]
    answered = [[VOCABULARY[word] for word in row["completion"].split()] + [EOS] for row in other]
    ids = [torch.tensor(a + b) for a, b in zip(asked, answered, strict=True)]
    labels = [torch.tensor([-100] * len(a) + b) for a, b in zip(asked, answered, strict=True)]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=PAD),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }
    with torch.inference_mode():
        loss = AutoModelForCausalLM.from_pretrained(merged).eval()(**batch).loss
    assert loss.item() == pytest.approx(expected, abs=1e-5)
