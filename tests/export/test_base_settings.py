"""Exports carry what the base says of itself: its tokenizer's files, its settings of generation,
its name and commit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
)

from lorakit.data.labels import Labels
from lorakit.export.native import AdapterFacts
from lorakit.export.peft import target_list
from lorakit.models.load import load_model
from lorakit.models.spec import ModelSpec
from lorakit.models.tokenizer import load_tokenizer, save_tokenizer
from lorakit.sources.catalogue import BUILTINS
from lorakit.sources.resolve import Source
from tests.support.exports import RANKS, as_if_trained, export
from tests.support.tiny import VOCABULARY, tokenizer

SPEC = ModelSpec.model_validate({"name_or_path": "x", "task": "causal-lm"})


def local(folder: Path) -> Source:
    return Source(str(folder), str(folder), "local", str(folder))


def sentencepiece_like() -> Tokenizer:
    """A byte-pair tokenizer as Llama's: ▁ for blanks, a token to begin with, truncation and padding
    of its own."""
    words = ["<unk>", "<s>", "</s>", "<pad>", "▁", "a", "b", "▁a", "ab", "▁ab", "Ġ", "Ġa"]
    merges = [("a", "b"), ("▁", "a"), ("▁a", "b"), ("Ġ", "a")]
    made = Tokenizer(
        models.BPE(
            vocab={word: i for i, word in enumerate(words)}, merges=merges, unk_token="<unk>"
        )
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    made.add_special_tokens(words[:4])
    made.enable_truncation(9)
    made.enable_padding(length=9)
    return made


# -- tokenizers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [LlamaConfig, GPT2Config, MistralConfig, Qwen2Config])
@pytest.mark.parametrize(
    "named",
    [None, "LlamaTokenizer", "LlamaTokenizerFast", "GPT2TokenizerFast", "PreTrainedTokenizerFast"],
)
def test_a_saved_tokenizer_is_the_one_that_was_loaded(
    named: str | None, config: type, tmp_path: Path
) -> None:
    """transformers chooses the class by the files of the tokenizer and by the configuration beside
    them, which adapters lack."""
    base = tmp_path / "base"
    config().save_pretrained(base)
    sentencepiece_like().save(str(base / "tokenizer.json"))
    about: dict[str, Any] = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 77,
    }
    about |= {
        "padding_side": "left",
        "truncation_side": "left",
        "add_bos_token": True,
        "chat_template": "{{ messages }}",
    }
    about |= {} if named is None else {"tokenizer_class": named}
    (base / "tokenizer_config.json").write_text(json.dumps(about))
    (base / "tokenizer.model").write_bytes(b"what converters read")
    before, used = AutoTokenizer.from_pretrained(base), load_tokenizer(local(base), SPEC)
    used(["ab ab ab", "a"], truncation=True, max_length=2)
    for kind in ("adapter", "merged"):
        folder = tmp_path / kind
        folder.mkdir()
        if kind == "merged":
            config().save_pretrained(folder)
        save_tokenizer(used, folder)
        after = AutoTokenizer.from_pretrained(folder)
        assert_same_tokenizer(after, before)
        for name in ("tokenizer.json", "tokenizer.model"):
            assert (folder / name).read_bytes() == (base / name).read_bytes()
        written = json.loads((folder / "tokenizer_config.json").read_text())
        assert {name: written[name] for name in about if name != "tokenizer_class"} == {
            name: value for name, value in about.items() if name != "tokenizer_class"
        }


def assert_same_tokenizer(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> None:
    assert type(a) is type(b)
    # the object inside, and where it was loaded from
    own = {"_tokenizer", "name_or_path", "init_kwargs", "vocab_file"}
    assert {k: v for k, v in vars(a).items() if k not in own} == {
        k: v for k, v in vars(b).items() if k not in own
    }
    for text in ("ab a<s> b", " ab", "x", ""):
        assert a(text)["input_ids"] == b(text)["input_ids"]


def test_several_chat_templates_are_kept(tmp_path: Path) -> None:
    own = tokenizer(pair=False)
    own.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    own.save_pretrained(tmp_path / "base")
    save_tokenizer(load_tokenizer(local(tmp_path / "base"), SPEC), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == own.chat_template


def test_a_tokenizer_without_files_is_saved_as_it_is(tmp_path: Path) -> None:
    save_tokenizer(tokenizer(pair=False), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("good film")["input_ids"] == [5, 19]


@pytest.mark.parametrize("pad", [3, 10**6, None])
def test_padding_has_an_embedding(pad: int | None, tiny_llama: Path, tmp_path: Path) -> None:
    """A pad token beyond the embeddings is never looked up."""
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    tokens = load_tokenizer(local(base), SPEC)
    task_model, _ = load_model(local(base), SPEC, tokens, None, torch.float32)
    task_model.model.config.pad_token_id = pad
    assert task_model.pad_id == (3 if pad == 3 else VOCABULARY["[EOS]"])
    assert tokens.pad_token is None


def test_where_an_encoder_reads_its_class_has_nothing_to_do_with_padding(
    tiny_bert: Path, tiny_gpt2: Path
) -> None:
    spec = ModelSpec.model_validate({"name_or_path": "x", "task": "sequence-classification"})
    for folder, at_pad in ((tiny_bert, False), (tiny_gpt2, True)):
        config = AutoModelForSequenceClassification.from_pretrained(folder).config
        tokens = load_tokenizer(local(folder), spec)
        task_model, _ = load_model(local(folder), spec, tokens, Labels(["a", "b"]), torch.float32)
        assert task_model.reads_at_pad is at_pad
        assert task_model.model.config.pad_token_id == (
            VOCABULARY["[EOS]"] if at_pad else config.pad_token_id
        )


# -- generation ------------------------------------------------------------------------------------


def test_settings_of_generation_are_the_bases_own(
    tiny_llama: Path, sums: Path, tmp_path: Path
) -> None:
    """Byte for byte, also where transformers refuses to save what it loads; a text that is trained
    to end elsewhere is told."""
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    own = '{"temperature": 0.5, "do_sample": false, "eos_token_id": [7, 9], "top_p": 0.9}'
    (base / "generation_config.json").write_text(own)
    run = as_if_trained(tmp_path / "runs/x", base, sums, "vanilla", RANKS["ragged"], "causal-lm")
    for form in (None, "peft-portable"):
        said = export(run.run, tmp_path / f"out-{form}", form)
        assert "does not end a text at `[EOS]`" in said
        assert f"eos_token_id={sorted([7, 9, VOCABULARY['[EOS]']])}" in said
    assert (tmp_path / "out-None/generation_config.json").read_text() == own
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out-None")
    assert found.generation_config.eos_token_id == [7, 9]


def test_nothing_is_said_of_ends_that_the_base_names(
    tiny_llama: Path, sums: Path, tmp_path: Path
) -> None:
    run = as_if_trained(
        tmp_path / "runs/x", tiny_llama, sums, "vanilla", RANKS["ragged"], "causal-lm"
    )
    assert "does not end a text" not in export(run.run, tmp_path / "out")
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_llama, tmp_path / "out")
    )
    assert after.generation_config.to_dict() == before.generation_config.to_dict()
    assert after.config.pad_token_id is before.config.pad_token_id is None


# -- classifiers -----------------------------------------------------------------------------------


def test_what_a_classifier_needs_in_plain_transformers_is_said(
    tiny_gpt2: Path, sentiment: Path, tmp_path: Path
) -> None:
    end = VOCABULARY["[EOS]"]
    run = as_if_trained(
        tmp_path / "runs/x",
        tiny_gpt2,
        sentiment,
        "vanilla",
        RANKS["ragged"],
        "sequence-classification",
    )
    merged, adapter = (
        export(run.run, tmp_path / "merged"),
        export(run.run, tmp_path / "adapter", "peft-portable"),
    )
    assert f"set model.config.pad_token_id = {end} on the base" in adapter
    assert "model.config" not in merged
    for said in (merged, adapter):
        assert "set tokenizer.pad_token = '[EOS]'" in said
    assert (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").config.pad_token_id
        == end
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").pad_token is None
    assert "heads that were trained in full (score)" in adapter


# -- the base's name -------------------------------------------------------------------------------

SOURCES = {
    "the hub": (
        Source("owner/name", "owner/name", "hub", "owner/name", revision="c0ffee"),
        ("owner/name", "c0ffee", "at the commit c0ffee"),
    ),
    "the hub's cache": (
        Source(
            "owner/name", "owner/name", "hub-cache", "/cache/models--owner--name/snapshots/c0ffee"
        ),
        ("owner/name", "c0ffee", "at the commit c0ffee"),
    ),
    "a builtin": (
        Source("builtin/minilm-l6", "builtin/minilm-l6", "builtin", "/cache/minilm"),
        (
            "sentence-transformers/all-MiniLM-L6-v2",
            None,
            "the very same weights lie in /cache/minilm",
        ),
    ),
    "a stand-in": (
        Source(
            "owner/other",
            "builtin/smollm2-135m-instruct",
            "builtin",
            "/cache/smollm2",
            stand_in=True,
        ),
        (
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            None,
            "quantised to 4 bits once and back, lie in /cache/smollm2",
        ),
    ),
    "a folder": (
        Source("models/x", "models/x", "local", "/home/me/models/x"),
        ("/home/me/models/x", None, "of this machine"),
    ),
    "a folder that stands in": (
        Source("owner/name", "models/x", "local", "/home/me/models/x", stand_in=True),
        ("/home/me/models/x", None, "of this machine"),
    ),
}


@pytest.mark.parametrize("origin", SOURCES)
def test_the_base_of_an_adapter_is_the_model_whose_weights_it_was_trained_on(origin: str) -> None:
    source, (base, revision, words) = SOURCES[origin]
    facts = AdapterFacts({}, "causal-lm", None, source)
    assert (facts.base, facts.revision) == (base, revision)
    assert words in " ".join(facts.base_in_words())


def test_every_builtin_model_names_the_hubs() -> None:
    assert all(builtin.hub for builtin in BUILTINS.values() if builtin.kind == "model")


@pytest.mark.parametrize("form", ["peft-portable", "peft"])
def test_peft_reads_base_and_commit(
    form: str, tiny_llama: Path, sums: Path, tmp_path: Path
) -> None:
    run = as_if_trained(
        tmp_path / "runs/x", tiny_llama, sums, "vanilla", RANKS["ragged"], "causal-lm"
    )
    facts_file = run.run / "adapter/lorakit.json"
    facts = json.loads(facts_file.read_text())
    # the files stay where they are
    facts["source"] |= {"kind": "hub-cache", "requested": "owner/name"}
    facts_file.write_text(json.dumps(facts))
    said = export(run.run, tmp_path / "out", form)
    config = PeftConfig.from_pretrained(tmp_path / "out")
    assert isinstance(config, LoraConfig)
    assert (config.base_model_name_or_path, config.revision) == ("owner/name", tiny_llama.name)
    assert f"its base is owner/name at the commit {tiny_llama.name}" in said
    assert config.inference_mode


# -- targets ---------------------------------------------------------------------------------------


class Tree(nn.Module):
    """Linear layers under these names."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            place: nn.Module = self
            *parents, last = name.split(".")
            for parent in parents:
                if parent not in dict(place.named_children()):
                    place.add_module(parent, nn.Module())
                place = place.get_submodule(parent)
            place.add_module(last, nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("adapted", "others", "targets"),
    [
        (["h.0.q", "h.1.q", "h.0.up", "h.1.up"], ["head"], ["q", "up"]),
        (["h.0.q", "h.1.q"], ["head.q"], ["h.0.q", "h.1.q"]),
        (["h.0.attn.out.dense", "h.0.mlp.dense"], ["head.dense"], ["out.dense", "mlp.dense"]),
        (["h.1.q"], ["h.0.q", "h.11.q"], ["h.1.q"]),
        (["h.0.q"], ["aux.h.0.q"], r"h\.0\.q"),  # its full name is the end of the other's
    ],
)
def test_targets_mean_the_adapted_modules_alone(
    adapted: list[str], others: list[str], targets: list[str] | str
) -> None:
    found = target_list(Tree(*adapted, *others), dict.fromkeys(adapted))  # type: ignore[arg-type]
    assert found == targets
    from_peft = PeftModel(Tree(*adapted, *others), LoraConfig(target_modules=found, r=2))  # type: ignore[arg-type]
    hit = [name for name, module in from_peft.named_modules() if hasattr(module, "lora_A")]
    assert sorted(hit) == sorted(f"base_model.model.{name}" for name in adapted)
