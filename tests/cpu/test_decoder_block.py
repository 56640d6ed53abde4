"""Llama's blocks as one operation; what they have in common with others is in test_whole_block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    Ernie4_5Config,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OlmoConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from lorakit import compat
from tests.support.batches import batch_of
from tests.support.blocks import (
    DTYPE,
    LLAMA,
    LLAMA_SIZES,
    RAGGED,
    Case,
    build,
    close,
    compare_with_float64,
    llama_config,
    watch,
)

WIDE_HEADS: dict[str, Any] = LLAMA_SIZES | {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
}


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return watch(monkeypatch, LLAMA)


NO_ATTENTION = dict.fromkeys(("q_proj", "k_proj", "v_proj"), 0)
CASES = {
    "grouped queries": Case(llama_config()),
    "heads of 64": Case(LlamaConfig(**WIDE_HEADS)),
    "biases": Case(llama_config(attention_bias=True, mlp_bias=True)),
    "qwen2": Case(Qwen2Config(**LLAMA_SIZES)),
    "mistral": Case(MistralConfig(**LLAMA_SIZES, sliding_window=None)),
    "ranks": Case(
        llama_config(),
        {
            "rank_pattern": {
                "k_proj": 0,
                "o_proj": 1,
                "gate_proj": 17,
                "up_proj": 40,
                "down_proj": 33,
            }
        },
    ),
    "none for the attention": Case(
        llama_config(attention_bias=True), {"rank_pattern": NO_ATTENTION | {"o_proj": 0}}
    ),
    "none at all": Case(llama_config(), {"rank_pattern": {r".*_proj": 0}}),
    "gates": Case(llama_config(), {"method": "l1ra", "rank_pattern": {"v_proj": 0, "up_proj": 7}}),
    "residual": Case(
        llama_config(), {"residual": True, "rank_pattern": {"q_proj": 0, "down_proj": 0}}
    ),
    "gates and residual": Case(llama_config(), {"method": "l1ra", "residual": True}),
}


@pytest.mark.parametrize("lengths", [RAGGED, (31,), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_results_are_as_near_to_float64_as_those_of_the_modules(
    name: str, lengths: tuple[int, ...], whole: list[int]
) -> None:
    case = CASES[name]
    compare_with_float64(build(case.config, **case.settings), lengths, whole)


def test_generation_with_a_cache_goes_through_the_modules(whole: list[int]) -> None:
    tiny = build(llama_config())
    tiny.model.eval()
    batch = batch_of((12,), "causal-lm")
    whole.clear()
    with torch.no_grad():
        logits = tiny.model(batch.input_ids).logits[:, -1]
        first = tiny.model(batch.input_ids[:, :7], use_cache=True)
        later = tiny.model(
            batch.input_ids[:, 7:],
            **compat.cache_argument(tiny.model, compat.cache_of(first)),
            use_cache=True,
        ).logits[:, -1]
    assert not whole
    torch.testing.assert_close(later.float(), logits.float(), rtol=0.05, atol=0.1)


def test_a_model_that_is_cast_afterwards_still_runs(whole: list[int]) -> None:
    tiny = build(llama_config())
    expected = tiny.gradients()
    tiny.model.double()
    whole.clear()
    close({name: x.float() for name, x in tiny.gradients().items()}, expected)
    tiny.model.to(DTYPE)  # factors too: nothing reads these
    close({name: x.float() for name, x in tiny.gradients().items()}, expected, 0.08)
    assert not whole


# -- models that are not taken ---------------------------------------------------------------------

FEW: dict[str, Any] = {
    "vocab_size": 48,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 96,
    "initializer_range": 0.12,
}
REFUSED = {
    "gemma": GemmaConfig(**LLAMA_SIZES),
    "gemma with silu": GemmaConfig(**LLAMA_SIZES, hidden_act="silu"),
    "gemma2": Gemma2Config(**LLAMA_SIZES),
    "gpt2": GPT2Config(**FEW),
    "granite": GraniteConfig(**LLAMA_SIZES, residual_multiplier=0.99),
    "neighbours turned, weights near zero": Ernie4_5Config(
        **LLAMA_SIZES | {"initializer_range": 0.02}
    ),
    "mistral with a window": MistralConfig(**LLAMA_SIZES, sliding_window=20),
    "olmo": OlmoConfig(**LLAMA_SIZES),
    "qwen3": Qwen3Config(**LLAMA_SIZES),
    "smollm3": SmolLM3Config(**LLAMA_SIZES, no_rope_layers=[1, 0]),
    "heads of 24": llama_config(head_dim=24),
    "odd widths": llama_config(intermediate_size=72),
    "another activation": llama_config(hidden_act="gelu"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_of_another_make_go_through_their_modules(name: str, whole: list[int]) -> None:
    tiny = build(REFUSED[name])
    assert not any(tiny.is_whole)
    whole.clear()
    found = tiny.gradients((12, 3, 1))
    assert not whole
    assert all(value.isfinite().all() and value.any() for value in found.values())
