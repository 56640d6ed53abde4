"""What lorakit evaluates and exports is what plain transformers and other loaders compute and
write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from tests.support.plain import EOS, LLAMA, PAD
from tests.support.tiny import VOCABULARY, tokenizer, write_jsonl

MAKES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**LLAMA)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(VOCABULARY),
            n_embd=32,
            n_layer=2,
            n_head=4,
            bos_token_id=None,
            eos_token_id=EOS,
        )
    ),
}
# The pad token of the base's tokenizer.
PADS = {"none": None, "the end token": "[EOS]", "its own": "[PAD]"}
TEXTS = [
    "good film [EOS]",
    "bad",
    "a fine cast [EOS] [EOS] and a joke",
    "warm [EOS] [EOS]",
    "the plot is dull",
    "a slow scene",
]


def base(folder: Path, make: str, pad: str | None, **settings: Any) -> Path:
    """A base model of this make whose tokenizer has this pad token and these settings."""
    torch.manual_seed(0)
    MAKES[make]().save_pretrained(folder)
    tokens = tokenizer(pair=False)
    tokens.pad_token = pad
    tokens.save_pretrained(folder)
    about = folder / "tokenizer_config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | settings))
    return folder


def trained(call: Callable[..., str], folder: Path, model: Path, task: str, **method: Any) -> Path:
    """A run of a few steps over rows that end in the end token, or not."""
    if task == "sequence-classification":
        rows: list[dict[str, object]] = [
            {"text": TEXTS[i % 6] + " film" * (i // 6), "label": i % 2} for i in range(36)
        ]
        rows = [
            {**row, "text": f"{row['text']} [EOS]"} if i % 3 == 0 else row
            for i, row in enumerate(rows)
        ]
    else:
        rows = [
            {"prompt": f"how many eggs {i % 10} ?", "completion": f" {i % 7} eggs"}
            for i in range(36)
        ]
    write_jsonl(folder / "rows.jsonl", rows)
    recipe = {
        "model": {"name_or_path": str(model), "task": task},
        "data": {"name_or_path": str(folder / "rows.jsonl")},
        "method": {"name": "vanilla", "r": 4, "lora_alpha": 8, **method},
        "train": {
            "precision": "fp32",
            "max_steps": 6,
            "learning_rate": 0.02,
            "per_device_train_batch_size": 8,
        },
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    call("train", folder / "recipe.yaml")
    return folder / "run"


@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("make", MAKES)
def test_a_decoder_reads_its_class_where_transformers_does(
    make: str, pad: str, tmp_path: Path, call: Callable[..., str]
) -> None:
    """The loss of an evaluation is that of the merged model, and of PEFT's, over a padded batch and
    row by row."""
    model = base(tmp_path / "base", make, PADS[pad])
    run = trained(call, tmp_path, model, "sequence-classification")
    write_jsonl(
        tmp_path / "other.jsonl", [{"text": text, "label": i % 2} for i, text in enumerate(TEXTS)]
    )
    expected = json.loads(
        call("eval", run, f"data.name_or_path={tmp_path / 'other.jsonl'}", "--json")
    )["metrics"]["loss"]
    call("export", run, "--merge", "--out", tmp_path / "merged")
    call("export", run, "--adapter", "--out", tmp_path / "adapter")
    merged = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "merged", attn_implementation="eager"
    ).eval()
    plain = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=2, attn_implementation="eager"
    )
    plain.config.pad_token_id = merged.config.pad_token_id
    in_peft = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    tokens = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokens.pad_token == PADS[pad]  # the base's own
    tokens.pad_token_id = merged.config.pad_token_id
    labels = torch.arange(len(TEXTS)) % 2
    for found in (merged, in_peft):
        with torch.inference_mode():
            together = found(**tokens(TEXTS, padding=True, return_tensors="pt")).logits
            alone = torch.cat([found(**tokens(text, return_tensors="pt")).logits for text in TEXTS])
        torch.testing.assert_close(
            cross_entropy(together, labels).item(), expected, atol=1e-5, rtol=0
        )
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_a_row_of_nothing_but_the_pad_token_is_told(
    tmp_path: Path, call: Callable[..., str], capfd: Any
) -> None:
    model = base(tmp_path / "base", "llama", "[EOS]")
    write_jsonl(
        tmp_path / "rows.jsonl",
        [{"text": "[EOS]" if i == 2 else "good", "label": i % 2} for i in range(20)],
    )
    recipe = {
        "model": {"name_or_path": str(model), "task": "sequence-classification"},
        "data": {"name_or_path": str(tmp_path / "rows.jsonl")},
        "method": {"name": "vanilla"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.raises(AssertionError, match=r"nothing but the pad token `\[EOS\]`"):
        call("train", tmp_path / "recipe.yaml", f"output_dir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


SETTINGS: dict[str, Any] = {
    "padding_side": "left",
    "truncation_side": "left",
    "model_max_length": 77,
}


@pytest.mark.parametrize("form", ["--merge", "peft-portable", "peft", "lorakit"])
@pytest.mark.parametrize("pad", PADS)
def test_exports_have_the_settings_of_the_base_tokenizer(
    pad: str, form: str, tmp_path: Path, call: Callable[..., str]
) -> None:
    chat = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    model = base(tmp_path / "base", "llama", PADS[pad], chat_template=chat, **SETTINGS)
    run = trained(call, tmp_path, model, "causal-lm")
    kind = ["--merge"] if form == "--merge" else ["--adapter", "--format", form]
    call("export", run, *kind, "--out", tmp_path / "out")
    before, after = (
        AutoTokenizer.from_pretrained(model),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    for name in (
        *SETTINGS,
        "chat_template",
        "special_tokens_map",
        "pad_token",
        "bos_token",
        "eos_token",
        "model_input_names",
    ):
        assert getattr(after, name) == getattr(before, name), name
    assert before.padding_side == "left"
    assert after("a good film")["input_ids"] == before("a good film")["input_ids"]
    if form == "--merge":
        config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
        assert (
            config.pad_token_id == AutoModelForCausalLM.from_pretrained(model).config.pad_token_id
        )


def test_a_merged_model_writes_in_batches_as_the_base_does(
    tmp_path: Path, call: Callable[..., str]
) -> None:
    """Padded on the left, as the base says: else what is written follows padding."""
    model = base(tmp_path / "base", "llama", "[PAD]", padding_side="left")
    run = trained(call, tmp_path, model, "causal-lm")
    call("export", run, "--merge", "--out", tmp_path / "merged")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    prompts = ["how many eggs 3 ?", "eggs", "how many good eggs are left in it ?"]
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    written = merged.generate(**tokens(prompts, padding=True, return_tensors="pt"), **settings)[
        :, -5:
    ]
    for row, prompt in enumerate(prompts):
        alone = merged.generate(**tokens(prompt, return_tensors="pt"), **settings)[0, -5:]
        assert written[row].tolist() == alone.tolist()


def with_scale(model: Any, adapter: Path, scale: Callable[[dict[str, Any], int], float]) -> Any:
    """The base with the adapter added in, by a loader that knows one scale: `scale`(config, rank of
    the tensor)."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    state: dict[str, Tensor] = model.state_dict()
    for key, a in tensors.items():
        if key.endswith("lora_A.weight"):
            assert len(a) <= config["r"]  # or vLLM refuses it
            name = key.removeprefix("base_model.model.").removesuffix("lora_A.weight") + "weight"
            state[name] += scale(config, len(a)) * (tensors[key.replace("lora_A", "lora_B")] @ a)
    model.load_state_dict(state)
    return model.eval()


SCALES: dict[str, Callable[[dict[str, Any], int], float]] = {
    "vLLM: one alpha and one r": lambda config, rank: config["lora_alpha"] / config["r"],
    "llama.cpp: one alpha, the rank of each tensor": lambda config, rank: (
        config["lora_alpha"] / rank
    ),
}
METHODS: dict[str, dict[str, Any]] = {
    "ranks by pattern": {"rank_pattern": {"q_proj": 7, "down_proj": 1, "gate_proj": 2}},
    "ranks that moved": {
        "name": "l1ra",
        "l1_share": 0.6,
        "eta_c": 0.1,
        "rank_update_ratio": 0.2,
        "prune_threshold": 0.7,
    },
    "a residual": {"name": "salor", "base": {"density": 0.5, "criterion": "magnitude", "r_res": 2}},
}


@pytest.mark.parametrize("loader", SCALES)
@pytest.mark.parametrize("method", METHODS)
def test_the_default_export_is_right_in_loaders_that_know_one_rank_and_one_alpha(
    method: str, loader: str, tmp_path: Path, call: Callable[..., str]
) -> None:
    model = base(tmp_path / "base", "llama", "[PAD]")
    run = trained(call, tmp_path, model, "causal-lm", **METHODS[method])
    ranks = json.loads((run / "result.json").read_text())["ranks"]
    assert len(set(ranks.values())) > 1 or method == "a residual", (
        "no rank is another than the others'"
    )
    call("export", run, "--adapter", "--out", tmp_path / "adapter")
    call("export", run, "--merge", "--out", tmp_path / "merged")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    own = Path(config["base_model_name_or_path"])
    found = with_scale(
        AutoModelForCausalLM.from_pretrained(own), tmp_path / "adapter", SCALES[loader]
    )
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        torch.testing.assert_close(found(ids).logits, expected(ids).logits, atol=1e-4, rtol=0)


def test_the_targets_of_the_default_export_are_the_adapted_modules_and_no_others(
    tmp_path: Path, call: Callable[..., str]
) -> None:
    """Also where a part of a name alone would mean modules without an adapter."""
    model = base(tmp_path / "base", "llama", "[PAD]")
    targets = ["layers.0.self_attn.q_proj", "up_proj"]
    run = trained(call, tmp_path, model, "sequence-classification", target_modules=targets)
    call("export", run, "--adapter", "--out", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert isinstance(config["target_modules"], list)
    plain = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    adapted = {name for name, module in loaded.named_modules() if hasattr(module, "lora_A")}
    layers = {"layers.0.self_attn.q_proj", "layers.0.mlp.up_proj", "layers.1.mlp.up_proj"}
    assert adapted == {f"base_model.model.model.{name}" for name in layers}
