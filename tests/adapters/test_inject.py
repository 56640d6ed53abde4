"""Which layers get an adapter, of which rank, and what is said when that can not be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    GemmaConfig,
    PretrainedConfig,
    Qwen2Config,
    RobertaConfig,
    T5Config,
)

from lorakit.adapters.inject import inject, match_targets, merge_all
from lorakit.adapters.layer import Adapter
from lorakit.errors import Problem, RecipeError
from lorakit.methods import Method, MethodConfig
from lorakit.models.tasks import task_named

CLASSES = {
    "sequence-classification": AutoModelForSequenceClassification,
    "causal-lm": AutoModelForCausalLM,
}


def config(**settings: Any) -> MethodConfig:
    return MethodConfig.model_validate({"name": "any"} | settings)


def adapt(model: nn.Module, **settings: Any) -> dict[str, Adapter]:
    chosen = config(**settings)
    return inject(model, Method(chosen), match_targets(model, chosen))


def problems(model: nn.Module, heads: list[str] | None = None, **settings: Any) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        match_targets(model, config(**settings), heads or [])
    return caught.value.problems


@pytest.fixture
def bert(tiny_bert: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(tiny_bert)


@pytest.fixture
def llama(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama)


@pytest.fixture
def gpt2(tiny_gpt2: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_gpt2)


# -- all-linear ------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
LLAMA_LIKE = [
    "mlp.down_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    *(f"self_attn.{x}_proj" for x in "koqv"),
]
BERT_LIKE = [
    "attention.output.dense",
    *(f"attention.self.{x}" for x in ("key", "query", "value")),
    "intermediate.dense",
    "output.dense",
]
FAMILIES: dict[str, tuple[PretrainedConfig, str, list[str]]] = {
    # family: (configuration, prefix of a block, the layers of a block)
    "roberta": (
        RobertaConfig(**SMALL, max_position_embeddings=40),
        "roberta.encoder.layer.{}.",
        BERT_LIKE,
    ),
    "distilbert": (
        DistilBertConfig(vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=24),
        "distilbert.transformer.layer.{}.",
        [*(f"attention.{x}_lin" for x in ("k", "out", "q", "v")), "ffn.lin1", "ffn.lin2"],
    ),
    "qwen2": (Qwen2Config(**SMALL, num_key_value_heads=1), "model.layers.{}.", LLAMA_LIKE),
    "gemma": (
        GemmaConfig(**SMALL, num_key_value_heads=1, head_dim=8),
        "model.layers.{}.",
        LLAMA_LIKE,
    ),
}


def block_names(prefix: str, layers: list[str], blocks: int = 2) -> set[str]:
    return {prefix.format(i) + layer for i in range(blocks) for layer in layers}


@pytest.mark.parametrize(
    ("family", "task"),
    [(family, "sequence-classification") for family in FAMILIES]
    + [("qwen2", "causal-lm"), ("gemma", "causal-lm")],
)
def test_all_linear_means_the_blocks_of_every_family_and_the_heads_are_known(
    family: str, task: str
) -> None:
    settings, prefix, layers = FAMILIES[family]
    model = CLASSES[task].from_config(settings)
    heads = task_named(task).head_names(model)
    assert set(match_targets(model, config(), heads)) == block_names(prefix, layers)
    in_blocks = {name for name in dict(model.named_parameters()) if prefix.format(0)[:-2] in name}
    trained = {
        name
        for name in dict(model.named_parameters())
        if name.startswith(tuple(f"{head}." for head in heads))
    }
    assert not in_blocks & trained
    expected = {"roberta": ["classifier"], "distilbert": ["pre_classifier", "classifier"]}
    assert heads == ([] if task == "causal-lm" else expected.get(family, ["score"]))


def test_all_linear_leaves_out_berts_pooler_classifier_and_embeddings(bert: Any) -> None:
    heads = task_named("sequence-classification").head_names(bert)
    assert heads == ["bert.pooler", "classifier"]
    ranks = match_targets(bert, config(r=3), heads)
    assert set(ranks) == block_names("bert.encoder.layer.{}.", BERT_LIKE)
    assert set(ranks.values()) == {3}


def test_all_linear_leaves_out_a_head_that_is_itself_a_block(llama: Any) -> None:
    ranks = match_targets(llama, config(), heads=["model.layers.1"])
    assert set(ranks) == block_names("model.layers.{}.", LLAMA_LIKE, blocks=1)


def test_all_linear_leaves_out_llamas_language_model_head(llama: Any) -> None:
    assert set(match_targets(llama, config())) == block_names("model.layers.{}.", LLAMA_LIKE)


def test_all_linear_finds_gpt2s_conv1d(gpt2: Any) -> None:
    layers = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert set(match_targets(gpt2, config())) == block_names("transformer.h.{}.", layers)


def test_all_linear_covers_t5s_encoder_and_decoder() -> None:
    settings = T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, pad_token_id=0
    )
    model = AutoModelForSequenceClassification.from_config(settings)
    heads = task_named("sequence-classification").head_names(model)
    assert heads == ["classification_head"]
    found = set(match_targets(model, config(), heads))
    attention, dense = (
        [f"SelfAttention.{x}" for x in "kovq"],
        ["DenseReluDense.wi", "DenseReluDense.wo"],
    )
    encoder = block_names("transformer.encoder.block.{}.layer.0.", attention) | block_names(
        "transformer.encoder.block.{}.layer.1.", dense
    )
    decoder = (
        block_names("transformer.decoder.block.{}.layer.0.", attention)
        | block_names(
            "transformer.decoder.block.{}.layer.1.",
            [name.replace("Self", "EncDec") for name in attention],
        )
        | block_names("transformer.decoder.block.{}.layer.2.", dense)
    )
    assert found == encoder | decoder


# -- names and patterns ----------------------------------------------------------------------------


def test_a_list_of_last_names_matches_whole_parts_only(llama: Any) -> None:
    names = match_targets(llama, config(target_modules=["q_proj", "v_proj"]))
    # the model's order
    assert list(names) == [f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qv"]
    [problem] = problems(llama, target_modules=["proj"])
    assert "`proj`" in problem.what


def test_a_full_name_means_one_module(llama: Any) -> None:
    name = "model.layers.1.mlp.up_proj"
    assert list(match_targets(llama, config(target_modules=[name]))) == [name]


def test_a_string_is_a_regular_expression(llama: Any) -> None:
    found = match_targets(llama, config(target_modules=r"layers\.0\..*(q|k)_proj"))
    assert list(found) == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]


def test_a_layer_outside_the_blocks_can_be_named(llama: Any) -> None:
    assert list(match_targets(llama, config(target_modules=["lm_head"]))) == ["lm_head"]


def test_exclude_modules_takes_away_what_target_modules_gave(llama: Any) -> None:
    found = match_targets(llama, config(exclude_modules=["q_proj", r"layers\.1\.mlp\..*"]))
    everything = block_names("model.layers.{}.", LLAMA_LIKE)
    left_out = {
        name
        for name in everything
        if name.endswith("q_proj") or name.startswith("model.layers.1.mlp.")
    }
    assert len(left_out) == 5
    assert set(found) == everything - left_out


def test_the_first_rank_pattern_that_matches_decides_and_0_is_allowed(llama: Any) -> None:
    patterns = {"layers.0.self_attn.q_proj": 1, "q_proj": 5, ".*mlp.*": 0, "up_proj": 7}
    ranks = match_targets(llama, config(r=2, rank_pattern=patterns))
    assert ranks["model.layers.0.self_attn.q_proj"] == 1
    assert ranks["model.layers.1.self_attn.q_proj"] == 5
    assert ranks["model.layers.0.mlp.up_proj"] == 0
    assert ranks["model.layers.0.self_attn.k_proj"] == 2
    adapters = inject(llama, Method(config()), ranks)
    assert {name: adapter.rank for name, adapter in adapters.items()} == ranks


def test_a_rank_pattern_outside_the_targets_changes_nothing(llama: Any) -> None:
    ranks = match_targets(
        llama, config(r=2, target_modules=["q_proj"], rank_pattern={"up_proj": 7})
    )
    assert set(ranks.values()) == {2}


def test_the_largest_possible_rank_is_allowed(llama: Any) -> None:
    ranks = match_targets(llama, config(r=16, target_modules=["k_proj"]))  # 32 → 16
    assert set(ranks.values()) == {16}


# -- the swap --------------------------------------------------------------------------------------


def test_inject_freezes_all_but_the_adapters_and_merge_all_puts_the_layers_back(gpt2: Any) -> None:
    before = dict(gpt2.named_modules())
    adapters = adapt(gpt2, r=2, target_modules=["c_attn", "c_fc"])
    assert len(adapters) == 4
    trained = {name for name, p in gpt2.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.{part}" for name in adapters for part in ("lora_A", "lora_B")}
    for name, adapter in adapters.items():
        assert gpt2.get_submodule(name) is adapter
        assert adapter.base.layer is before[name]
    merge_all(gpt2, adapters)
    assert dict(gpt2.named_modules()) == before


def test_two_layers_of_like_shape_start_from_different_factors(llama: Any) -> None:
    adapters = adapt(llama, r=2)
    starts = [adapter.lora_A for adapter in adapters.values() if adapter.lora_A.shape == (2, 32)]
    assert len(starts) > 2
    assert len({tuple(a.flatten().tolist()) for a in starts}) == len(starts)


# -- errors ----------------------------------------------------------------------------------------


def test_a_target_that_matches_nothing_lists_the_candidates_and_the_nearest(llama: Any) -> None:
    [problem] = problems(llama, target_modules=["q_prj"])
    assert problem.key == "method.target_modules"
    assert "`q_prj`" in problem.what
    assert problem.expected is not None
    for name in ["all-linear", *LLAMA_LIKE]:
        assert name in problem.expected
    assert "lm_head" not in problem.expected
    assert problem.nearest == "q_proj"


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"target_modules": ["nothing"]}, "method.target_modules"),
        ({"target_modules": "nothing"}, "method.target_modules"),
        ({"exclude_modules": ["nothing"]}, "method.exclude_modules"),
        ({"rank_pattern": {"nothing": 2}}, "method.rank_pattern.nothing"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error_at_its_key(
    llama: Any, settings: dict[str, Any], key: str
) -> None:
    [problem] = problems(llama, **settings)
    assert problem.key == key
    assert "`nothing`" in problem.what


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"target_modules": "q_proj("}, "method.target_modules"),
        ({"exclude_modules": ["q_proj("]}, "method.exclude_modules"),
        ({"rank_pattern": {"q_proj(": 2}}, "method.rank_pattern.q_proj("),
    ],
)
def test_a_broken_regular_expression_is_an_error_at_its_key(
    llama: Any, settings: dict[str, Any], key: str
) -> None:
    [problem] = problems(llama, **settings)
    assert problem.key == key
    assert "`q_proj(` is not a regular expression" in problem.what


def test_a_rank_larger_than_a_layer_names_the_narrowest_layer_and_its_key(llama: Any) -> None:
    [problem] = problems(llama, r=17)
    assert problem.key == "method.r"
    assert "17" in problem.what
    assert "`model.layers.0.self_attn.k_proj` is 32 → 16" in problem.what
    assert problem.expected == "at most 16"


def test_a_rank_pattern_larger_than_its_layer_is_an_error_at_the_pattern(llama: Any) -> None:
    [problem] = problems(llama, r=2, rank_pattern={"up_proj": 33})
    assert problem.key == "method.rank_pattern.up_proj"
    assert "`model.layers.0.mlp.up_proj` is 32 → 48" in problem.what
    assert problem.expected == "at most 32"


def test_a_rank_pattern_spares_a_narrow_layer_a_large_r(llama: Any) -> None:
    ranks = match_targets(llama, config(r=32, rank_pattern={"(k|v)_proj": 16}))
    assert sorted(set(ranks.values())) == [16, 32]


def test_a_head_can_not_be_a_target(bert: Any) -> None:
    heads = task_named("sequence-classification").head_names(bert)
    found = problems(bert, heads, target_modules=["classifier", "query", "bert.pooler.dense"])
    assert [problem.key for problem in found] == ["method.target_modules"] * 2
    assert ["`bert.pooler.dense`" in found[0].what, "`classifier`" in found[1].what] == [True, True]
    assert all("trained in full" in problem.what for problem in found)


def test_a_tied_language_model_head_can_not_be_a_target(gpt2: Any) -> None:
    [problem] = problems(gpt2, target_modules=["lm_head"])
    assert problem.key == "method.target_modules"
    assert "`lm_head` shares its weight with the input embeddings" in problem.what


def test_leaving_out_every_layer_is_an_error(llama: Any) -> None:
    [problem] = problems(llama, target_modules=["q_proj"], exclude_modules=["q_proj"])
    assert problem.key == "method.exclude_modules"
    assert "no layer is left" in problem.what


def test_every_problem_is_reported_at_once(gpt2: Any) -> None:
    found = problems(
        gpt2,
        target_modules=["c_attn", "lm_head", "c_atn", "x("],
        rank_pattern={"nothing": 2, "c_attn": 99},
    )
    assert {problem.key for problem in found} == {
        "method.target_modules",
        "method.rank_pattern.nothing",
        "method.rank_pattern.c_attn",
    }
    assert len(found) == 5


def test_errors_leave_the_model_as_it_was(llama: Any) -> None:
    before = [(name, id(module)) for name, module in llama.named_modules()]
    problems(llama, r=17)
    assert [(name, id(module)) for name, module in llama.named_modules()] == before
    assert all(p.requires_grad for p in llama.parameters())
    assert isinstance(llama.model.layers[0].mlp.up_proj, torch.nn.Linear)
