"""The decoder that runs without the model's modules, against the model itself and against dense
products."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lorakit.adapters.base import PrunedBase
from lorakit.adapters.layer import Adapter, adapters_of
from lorakit.inference.decode_step import narrowed
from lorakit.inference.decoder import Decoder
from lorakit.inference.kv.store import KVStore
from lorakit.kernels.huge_pages import Arena
from lorakit.kernels.tiered_linear import TierPlan
from lorakit.methods import KVPolicy
from tests.support.kernels import watch_calls, why_not

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SCALED = {
    "rope_type": "yarn",
    "factor": 2.0,
    "rope_theta": 100.0,
    "original_max_position_embeddings": 32,
}
MODELS: dict[str, tuple[type, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "llama with biases and yarn": (
        LlamaForCausalLM,
        LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, rope_parameters=SCALED),
    ),
    "mistral": (MistralForCausalLM, MistralConfig(**SHAPE, head_dim=16, sliding_window=None)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=8)),
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# none at up_proj
RANKS = {"q_proj": 6, "k_proj": 3, "v_proj": 0, "o_proj": 5, "gate_proj": 7, "down_proj": 4}
TOKENS = 9
compiled = pytest.mark.skipif(bool(why_not("decode")), reason=why_not("decode"))


class Ladder(Adapter):
    """Two tiers: half of the components, and all."""

    def tier_ends(self) -> list[int]:
        always, everything = super().tier_ends()
        return [always, always + self.rank // 2, everything]


class Dense(nn.Module):
    """An adapter's layer block by block, each with the weight of every token [tokens, blocks]."""

    def __init__(self, adapter: Adapter, weights: Tensor) -> None:
        super().__init__()
        self.base, self.weights = adapter.base.layer, weights
        self.a, self.b, self.ends = adapter.ladder()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + x @ (self.b[:, : self.ends[0]] @ self.a[: self.ends[0]]).T
        for block, (first, last) in enumerate(zip(self.ends, self.ends[1:], strict=False)):
            y = y + self.weights[:, block].view(*x.shape[:-1], 1) * (
                x @ (self.b[:, first:last] @ self.a[first:last]).T
            )
        return y


def random_model(kind: str, exact: bool = False) -> Any:
    """exact: all values are those of bfloat16."""
    torch.manual_seed(0)
    build, config = MODELS[kind]
    model = build(copy.deepcopy(config)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            # ones and zeros would hide that they are left out
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif "proj" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.bfloat16().float() if exact else model


def adapt(model: Any, make: type[Adapter] = Ladder, ranks: dict[str, int] = RANKS) -> Any:
    """Adapters of different ranks, one rank more in the second layer, and a residual at o_proj of
    the first."""
    generator = torch.Generator().manual_seed(1)
    for number, layer in enumerate(model.model.layers):
        for part in (layer.self_attn, layer.mlp):
            for name, rank in ranks.items():
                if hasattr(part, name):
                    adapter = make(getattr(part, name), rank and rank + number, 0.5, 0.0, generator)
                    adapter.lora_B.data.normal_(0, 0.3, generator=generator)
                    setattr(part, name, adapter.eval().requires_grad_(False))
    layer = model.model.layers[0].self_attn
    if "o_proj" in ranks:
        out_features, in_features = layer.o_proj.weight.shape
        pair = torch.randn(2, in_features) * 0.2, torch.randn(out_features, 2) * 0.2
        layer.o_proj.set_base(PrunedBase(layer.o_proj.base.layer, residual=pair))
    return model


def decoder_of(model: Any) -> Decoder:
    decoder, reason = Decoder.build(model, adapters_of(model))
    assert decoder is not None, reason
    return decoder


def tokens(rows: int) -> Tensor:
    return torch.randint(40, (rows, TOKENS), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def dense_logits(model: Any, ids: Tensor, weights: Tensor) -> Tensor:
    """Logits with weights [rows, tokens, blocks] from plain modules, in a copy."""
    model = copy.deepcopy(model)
    for name, adapter in adapters_of(model).items():
        model.set_submodule(name, Dense(adapter, weights.flatten(0, 1)))
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def run(
    decoder: Decoder,
    ids: Tensor,
    pieces: Sequence[int],
    weights: Tensor | None,
    all_logits: bool = True,
) -> Tensor:
    """Logits of tokens that come in pieces of the given sizes; weights [rows, tokens, blocks]."""
    store, logits, start = KVStore(["full"]), [], 0
    for size in pieces:
        piece = slice(start, start + size)
        plan = None if weights is None else TierPlan.of(weights[:, piece].flatten(0, 1))
        positions = torch.arange(TOKENS)[piece].expand(len(ids), -1)
        store.begin(np.zeros((len(ids), size), np.int64))
        got = decoder.forward(ids[:, piece], positions, store, plan, all_logits)
        store.end()
        logits.append(got if all_logits else got[:, None])
        start += size
    return torch.cat(logits, 1)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


PIECES = [[TOKENS], [1] * TOKENS, [4, 1, 1, 3]]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_it_gives_the_models_logits_whatever_the_pieces(
    kind: str, adapted: bool, exact: bool
) -> None:
    model = random_model(kind, exact)
    if adapted:
        adapt(model)
    ids = tokens(1)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    decoder = decoder_of(model)
    for pieces in PIECES:
        close(run(decoder, ids, pieces, None), expected)
    with torch.no_grad():
        close(model(input_ids=ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("tier", [0, 1, 2])
def test_a_uniform_tier_is_the_prefix(kind: str, tier: int) -> None:
    model = adapt(random_model(kind))
    ids = tokens(2)
    weights = (torch.arange(2) < tier).float().expand(2, TOKENS, 2)
    expected, decoder = dense_logits(model, ids, weights), decoder_of(model)
    for pieces in PIECES:
        close(run(decoder, ids, pieces, weights), expected)


@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_have_tiers_and_weights_of_their_own(rows: int) -> None:
    model = adapt(random_model("qwen2"))
    ids = tokens(rows)
    generator = torch.Generator().manual_seed(3)
    weights = torch.rand(rows, TOKENS, 2, generator=generator).cummin(-1).values
    weights[:, 2:4] = torch.tensor([1.0, 0.0])
    weights[:, 5] = 0.0
    expected, decoder = dense_logits(model, ids, weights), decoder_of(model)
    for pieces in PIECES:
        close(run(decoder, ids, pieces, weights), expected)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("pieces", PIECES)
def test_the_last_logits_are_the_last_of_all(rows: int, pieces: list[int]) -> None:
    decoder = decoder_of(adapt(random_model("llama")))
    everything = run(decoder, tokens(rows), pieces, None)
    last = run(decoder, tokens(rows), pieces, None, all_logits=False)
    close(last, everything[:, np.cumsum(pieces) - 1])


def test_a_plain_adapter_has_one_tier_and_at_tier_0_nothing_is_multiplied() -> None:
    ranks = dict.fromkeys(["q_proj", "up_proj"], 4)
    model = adapt(random_model("llama"), Adapter, ranks)
    decoder = decoder_of(model)
    assert [group.ends for group in (decoder.layers[0].qkv, decoder.layers[0].gate_up)] == [
        [0, 4],
        [0, 4],
    ]
    assert decoder.layers[0].qkv.tiers[0].weight.shape == (64, 32)
    assert decoder.layers[0].qkv.tiers[0].ups == []
    base = random_model("llama")
    with torch.no_grad():
        close(
            run(decoder, tokens(1), [4, 1, 1, 3], torch.zeros(1, TOKENS, 1)),
            base(input_ids=tokens(1)).logits,
        )


def test_weights_are_shared_and_the_frozen_model_goes_on_as_before(tiny_llama: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama)
    adapt(model.eval())
    for adapter in adapters_of(model).values():
        adapter.freeze()
    ids = tokens(1)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    decoder = decoder_of(model)
    with torch.no_grad():
        close(model(input_ids=ids).logits, expected)
    storages = {
        tensor.untyped_storage().data_ptr()
        for layer in decoder.layers
        for tensor in (
            layer.qkv.tiers[-1].weight,
            layer.o.tiers[-1].weight,
            layer.gate_up.tiers[-1].weight,
            layer.down.tiers[-1].weight,
        )
    }
    held = {
        p.untyped_storage().data_ptr()
        for name, p in model.named_parameters()
        if "proj" in name and name.endswith("weight")
    }
    assert held == storages
    assert decoder.head.tiers[-1].weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert decoder.embedding.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    frozen = [adapter.frozen for adapter in adapters_of(model).values()]
    assert all(
        layer is None or layer.weight.untyped_storage().data_ptr() in storages for layer in frozen
    )


def test_half_precision_is_close_and_leaves_onednn_as_it_was() -> None:
    model = adapt(random_model("llama"))
    with torch.no_grad():
        expected = model(input_ids=tokens(1)).logits
    model = model.bfloat16()
    before = torch.backends.mkldnn.enabled
    got = run(decoder_of(model), tokens(1), [4, 1, 1, 3], None)
    assert torch.backends.mkldnn.enabled == before
    assert (got.float() - expected).norm() < 0.05 * expected.norm()


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_token_is_one_call_in_c(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoder_of(adapt(random_model("llama")).to(dtype))
    called = watch_calls(monkeypatch, "decode")
    run(decoder, tokens(1), [4, 1, 1, 3], None)
    assert len(called) == 2


def steps(decoder: Decoder, policy: KVPolicy, threads: int = 1) -> Tensor:
    """Logits of single tokens after a prompt, with tiers and weights, and more tokens than are kept
    at full precision."""
    count, prompt, before, logits = 200, 150, torch.get_num_threads(), []
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(61, (1, count), generator=generator)
    weights = torch.rand(count, 2, generator=generator).cummin(-1).values
    store = KVStore([policy], 80)
    try:
        torch.set_num_threads(1)  # torch's own products depend on it
        for piece in (slice(0, prompt), *(slice(i, i + 1) for i in range(prompt, count))):
            store.begin(np.zeros(ids[:, piece].shape, np.int64))
            at, plan = torch.arange(count)[None, piece], TierPlan.of(weights[piece])
            logits.append(decoder.forward(ids[:, piece], at, store, plan))
            store.end()
            torch.set_num_threads(threads)
    finally:
        torch.set_num_threads(before)
    return torch.cat(logits[1:])


@compiled
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("policy", ["full", "int8", "int4", "window"])
def test_steps_in_c_are_those_of_torch_under_every_cache_policy(
    policy: KVPolicy, exact: bool
) -> None:
    decoder = decoder_of(adapt(random_model("qwen3", exact)))
    ours, decoder.step = steps(decoder, policy), None
    close(ours, steps(decoder, policy))


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("policy", ["full", "int4"])
def test_logits_do_not_depend_on_the_number_of_threads(
    policy: KVPolicy, dtype: torch.dtype
) -> None:
    decoder = decoder_of(adapt(random_model("llama", exact=True)).to(dtype))
    one = steps(decoder, policy)
    assert all(torch.equal(steps(decoder, policy, threads), one) for threads in (2, 3, 7))


def test_only_weights_that_are_exact_in_bfloat16_are_read_so() -> None:
    weight = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0))
    assert narrowed(weight, Arena()) is weight
    exact = weight.bfloat16().float()
    copied = narrowed(exact, Arena())
    assert copied.dtype == torch.bfloat16
    assert torch.equal(copied.float(), exact)
    for changed in (1 + 2**-8, 2.0**-149, 3.4e38, float("nan")):
        almost = exact.clone()
        almost[4999, 2] = changed
        assert narrowed(almost, Arena()) is almost
    assert narrowed(copied, Arena()) is copied


class Twice(nn.Module):
    """A feed-forward part of the same make that computes something else."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            mlp.act_fn,
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))
        return y


def test_what_it_does_not_compute_is_refused_with_the_reason(tiny_gpt2: Path) -> None:
    refused: dict[str, Any] = {"consists of": AutoModelForCausalLM.from_pretrained(tiny_gpt2)}
    refused["sliding_window is 8"] = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=8))
    refused["training mode"] = random_model("llama")
    refused["activation is"] = LlamaForCausalLM(LlamaConfig(**SHAPE, hidden_act="gelu"))
    mixed = refused["numbers of tiers"] = adapt(random_model("llama"), Ladder, {"q_proj": 4})
    adapt(mixed, Adapter, {"up_proj": 4})
    changed = refused["they differ by"] = random_model("llama")
    changed.model.layers[1].mlp = Twice(changed.model.layers[1].mlp)
    extra = refused["a layer ("] = random_model("llama")
    extra.model.layers[0].extra = nn.Linear(2, 2)
    refused["one floating type"] = random_model("llama")
    refused["one floating type"].model.layers[0].mlp.up_proj.double()
    for reason, model in refused.items():
        model.train(reason == "training mode")
        decoder, told = Decoder.build(model, adapters_of(model))
        assert decoder is None
        assert reason in told, (reason, told)
