"""The key-value cache against its definition, applied literally to every query and every token."""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    MistralConfig,
    PreTrainedTokenizerFast,
)

from lorakit import compat
from lorakit.errors import RunError
from lorakit.inference.kv.policy_cache import PolicyCache
from lorakit.inference.kv.slots import BLOCK, RECENT, SINKS
from lorakit.inference.kv.store import KVStore
from lorakit.kernels.attention import use_attention
from lorakit.kernels.quantise import quantise_int8
from lorakit.methods import KVPolicy as Policy

LAYERS, KV_HEADS, HEADS, WIDTH = 2, 2, 4, 8
LENGTH = 200
WINDOW = 80
PADDING = [0, 9]
POLICIES: list[tuple[Policy, ...]] = [
    ("full",),
    ("int8",),
    ("int4",),
    ("window",),
    ("int8", "int4"),
    ("window", "int4", "int8", "full"),
]


class Literal:
    """The definition: every query looks at every token before it and at that token's policy. Same
    interface as KVStore."""

    def __init__(self, policies: tuple[Policy, ...], window: int = WINDOW) -> None:
        self.policies, self.window, self.length = policies, window, 0
        # per row: (position, policy), None for padding
        self.tokens: list[list[tuple[int, Policy] | None]] = []
        self.states: dict[int, list[Tensor]] = {}

    def begin(self, tiers: NDArray[np.int64], padding: NDArray[np.int64] | None = None) -> None:
        if not self.tokens:
            self.tokens = [[] for _ in tiers]
        for row, (tokens, new) in enumerate(zip(self.tokens, tiers, strict=True)):
            for i, tier in enumerate(new):
                hidden = padding is not None and i < padding[row]
                position = sum(token is not None for token in tokens)
                tokens.append(None if hidden else (position, self.policies[tier]))
        self.length += tiers.shape[1]

    def append(self, layer: int, key: Tensor, value: Tensor) -> None:
        self.states.setdefault(layer, []).append(torch.stack([key, value]).float())

    def attend(self, layer: int, query: Tensor, scaling: float | None = None) -> Tensor:
        states = torch.cat(self.states[layer], 3)  # [2, rows, kv heads, tokens, head_dim]
        groups = query.shape[1] // states.shape[2]
        scaling = query.shape[3] ** -0.5 if scaling is None else scaling
        out = torch.zeros_like(query)
        for row, tokens in enumerate(self.tokens):
            real = [i for i, token in enumerate(tokens) if token]
            policies = [token[1] for token in tokens if token]
            # [2, heads, positions, head_dim]
            full = states[:, row][:, :, real].repeat_interleave(groups, 1)
            rough, ready = self.quantised(full, policies)
            for i in range(query.shape[2]):
                if not tokens[self.length - query.shape[2] + i]:
                    continue
                t = tokens[self.length - query.shape[2] + i][0]  # type: ignore[index]
                near = [p for p in range(t + 1) if p < SINKS or t - p < RECENT]
                for p in set(range(t + 1)) - set(near):
                    seen = {
                        "full": True,
                        "int8": False,
                        "int4": t < ready.get(p, 0),
                        "window": t - p < self.window,
                    }
                    near += [p] * seen[policies[p]]
                far = [p for p in set(range(t + 1)) - set(near) if policies[p] != "window"]
                key, value = torch.cat([full[:, :, near], rough[:, :, far]], 2)
                weights = ((query[row, :, i, None].float() @ key.mT) * scaling).softmax(-1)
                out[row, :, i] = (weights @ value)[:, 0].to(out.dtype)
        return out.transpose(1, 2)

    @staticmethod
    def quantised(full: Tensor, policies: list[Policy]) -> tuple[Tensor, dict[int, float]]:
        """What is seen instead of `full`, and the first position from which blocks of int4 are."""
        rough = full.clone()
        ready: dict[int, float] = {}
        for p, policy in enumerate(policies):
            if policy == "int8":
                scale = full[:, :, p].abs().amax(-1, keepdim=True) / 127
                rough[:, :, p] = (full[:, :, p] / scale).round() * scale
        members = [p for p, policy in enumerate(policies) if policy == "int4" and p >= SINKS]
        for start in range(0, len(members), BLOCK):
            block = members[start : start + BLOCK]
            ready |= dict.fromkeys(block, block[-1] + RECENT if len(block) == BLOCK else math.inf)
            if len(block) == BLOCK:
                # keys per channel over the block, values per token
                for kind, dim in ((0, 1), (1, 2)):
                    x = full[kind][:, block]
                    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
                    step = ((high - low) / 15).half().float()
                    low = low.half().float()
                    rough[kind][:, block] = ((x - low) / step).round().clamp(0, 15) * step + low
        return rough, ready

    def end(self) -> None:
        pass


def pieces(sizes: list[int], length: int = LENGTH) -> Iterator[slice]:
    """Slices of these sizes, the last size again and again."""
    start = 0
    for size in itertools.chain(sizes, itertools.repeat(sizes[-1])):
        if start >= length:
            return
        yield slice(start, min(start + size, length))
        start += size


def states(
    rows: int, length: int = LENGTH, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Random keys, values and queries [layers, rows, heads, length, head_dim]."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(LAYERS, rows, heads, length, WIDTH) for heads in (KV_HEADS, KV_HEADS, HEADS)]
    key, value, query = (torch.randn(shape, generator=generator) for shape in shapes)
    return key.to(dtype), value.to(dtype), query.to(dtype)


def feed(
    store: Any,
    tiers: NDArray[np.int64],
    sizes: list[int],
    padding: list[int] | None = None,
    **changes: Tensor,
) -> Tensor:
    """Run random states through a store in pieces: [layers, rows, length, heads, head_dim]."""
    length = tiers.shape[1]
    key, value, query = states(len(tiers), length)
    key, value = changes.get("key", key), changes.get("value", value)
    outs: list[list[Tensor]] = [[] for _ in range(LAYERS)]
    for piece in pieces(sizes, length):
        store.begin(tiers[:, piece], np.array(padding) if padding and piece.start == 0 else None)
        for layer in range(LAYERS):
            store.append(layer, key[layer, :, :, piece], value[layer, :, :, piece])
            outs[layer].append(store.attend(layer, query[layer, :, :, piece]))
        store.end()
    return torch.stack([torch.cat(out, 1) for out in outs])


def chance_tiers(
    policies: tuple[Policy, ...], rows: int = 2, length: int = LENGTH
) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, len(policies), (rows, length))


@pytest.fixture(scope="module", params=POLICIES, ids="-".join)
def definition(request: pytest.FixtureRequest) -> tuple[tuple[Policy, ...], Tensor]:
    policies = request.param
    return policies, feed(Literal(policies), chance_tiers(policies), [LENGTH], PADDING)


def without_padding(out: Tensor) -> Tensor:
    """[layers, real tokens of all rows, heads, head_dim]"""
    return torch.cat(
        [row[:, padding:] for row, padding in zip(out.unbind(1), PADDING, strict=True)], 1
    )


@pytest.mark.parametrize("sizes", [[LENGTH], [10, 1], [7], [150, 1], [1]], ids=str)
def test_equals_the_definition_whatever_the_pieces(
    definition: tuple[tuple[Policy, ...], Tensor], sizes: list[int]
) -> None:
    policies, expected = definition
    sizes = [10, *sizes] if sizes[0] < PADDING[1] else sizes  # padding is all in the first piece
    out = feed(KVStore(policies, WINDOW), chance_tiers(policies), sizes, PADDING)
    assert out.isfinite().all()
    torch.testing.assert_close(without_padding(out), without_padding(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("policies", [POLICIES[0], POLICIES[1], POLICIES[-1]], ids="-".join)
def test_long_pieces_and_single_tokens_see_the_same(policies: tuple[Policy, ...]) -> None:
    # more than the queries that are attended from at once, more slots than at first
    tiers = chance_tiers(policies, 1, 600)
    whole = feed(KVStore(policies, WINDOW, LAYERS), tiers, [600])
    for sizes in ([270, 290, 1], [1]):
        torch.testing.assert_close(
            feed(KVStore(policies, WINDOW), tiers, sizes), whole, atol=1e-5, rtol=0
        )


def test_what_stands_in_the_padding_does_not_matter() -> None:
    policies: tuple[Policy, ...] = ("window", "int4", "int8", "full")
    key, value, _ = states(2)
    wild_key, wild_value = key.clone(), value.clone()
    wild_key[:, 1, :, : PADDING[1]] = 1e4
    wild_value[:, 1, :, : PADDING[1]] = -1e30
    tiers = chance_tiers(policies)
    plain, wild = KVStore(policies, WINDOW), KVStore(policies, WINDOW)
    expected = feed(plain, tiers, [20, 1], PADDING)
    out = feed(wild, tiers, [20, 1], PADDING, key=wild_key, value=wild_value)
    assert torch.equal(without_padding(out), without_padding(expected))
    assert plain.nbytes_if_full == (2 * LENGTH - sum(PADDING)) * LAYERS * 2 * KV_HEADS * WIDTH * 4


@pytest.mark.parametrize("scale", [1e-30, 1.0, 3e4])
def test_int8_is_off_by_half_a_step_at_most(scale: float) -> None:
    x = torch.randn(5, 7, WIDTH, generator=torch.Generator().manual_seed(0)) * scale
    x[0, 0] = 0
    codes, scales = quantise_int8(x)
    bound = x.abs().amax(-1, keepdim=True) / 254
    assert (x - codes * scales).abs().le(bound * (1 + 1e-5)).all()
    assert codes.abs().max() == 127


# -- bytes -----------------------------------------------------------------------------------------

FULL_TOKEN = 2 * WIDTH * 4  # float32 key and value, of a head
INT8_TOKEN = 2 * (WIDTH + 4)
# codes; minimum and step per channel, per token
INT4_BLOCK = 2 * BLOCK * WIDTH // 2 + 2 * 2 * WIDTH + 2 * 2 * BLOCK


@pytest.mark.parametrize(
    ("policy", "length", "expected"),
    [
        ("full", 200, 200 * FULL_TOKEN),
        ("int8", 67, 67 * FULL_TOKEN),
        # position 68 will not see position 4 at full precision
        ("int8", 68, 67 * FULL_TOKEN + INT8_TOKEN),
        ("int8", 200, 67 * FULL_TOKEN + 133 * INT8_TOKEN),
        ("int4", 98, 98 * FULL_TOKEN),
        # positions 4 to 35, of which the last is 64 from position 99
        ("int4", 99, 67 * FULL_TOKEN + INT4_BLOCK),
        ("int4", 200, (200 - 4 * BLOCK) * FULL_TOKEN + 4 * INT4_BLOCK),
        ("window", 83, 83 * FULL_TOKEN),
        ("window", 84, 83 * FULL_TOKEN),  # position 4 is gone
        ("window", 200, 83 * FULL_TOKEN),
    ],
)
@pytest.mark.parametrize("sizes", [[200], [1]], ids=str)
def test_bytes_by_hand(policy: Policy, length: int, expected: int, sizes: list[int]) -> None:
    store = KVStore([policy], WINDOW)
    feed(store, np.zeros((1, length), np.int64), sizes)
    heads = LAYERS * KV_HEADS
    assert store.nbytes == sum(store.bytes_by_policy().values()) == expected * heads
    assert store.nbytes_if_full == length * FULL_TOKEN * heads
    assert store.length == length


def test_int8_takes_less_than_62_percent_of_bfloat16() -> None:
    store = KVStore(["int8"])
    states = torch.randn(1, 1, 2048, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    store.begin(np.zeros((1, 2048), np.int64))
    store.append(0, states, states)
    store.attend(0, states)
    store.end()
    assert store.nbytes == 2 * (67 * 64 * 2 + 1981 * (64 + 4))
    assert store.nbytes < 0.62 * store.nbytes_if_full


def test_rows_are_counted_by_themselves() -> None:
    policies: tuple[Policy, ...] = ("window", "int4", "int8", "full")
    tiers = chance_tiers(policies)
    both, alone = KVStore(policies, WINDOW), []
    feed(both, tiers, [20, 1], PADDING)
    for row, padding in enumerate(PADDING):
        alone.append(KVStore(policies, WINDOW))
        feed(alone[-1], tiers[row : row + 1, padding:], [LENGTH])
    assert both.bytes_by_policy() == {
        name: sum(store.bytes_by_policy()[name] for store in alone) for name in policies
    }


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(("policies", "window"), [([], None), (["int2"], None), (["window"], None)])
def test_policies_that_are_none(policies: list[Any], window: int | None) -> None:
    with pytest.raises(ValueError, match="polic"):
        KVStore(policies, window)


def test_steps_that_do_not_fit() -> None:
    key, value, query = (part[0] for part in states(2, 3))
    tiers = np.zeros((2, 3), np.int64)
    store = KVStore(["int8"])
    with pytest.raises(RunError, match="layer 0 after"):
        store.append(0, key, value)
    store.begin(tiers)
    with pytest.raises(RunError, match="keys"):
        store.append(0, key[:, :, :2], value)
    with pytest.raises(RunError, match="inference"):
        store.append(0, key.clone().requires_grad_(), value)
    store.append(0, key, value)
    with pytest.raises(RunError, match="another kind"):
        store.append(1, key[:, :1], value[:, :1])
    store.append(1, key, value)
    with pytest.raises(RunError, match="attends before"):
        store.attend(0, query)
    store.attend(1, query)
    store.end()
    with pytest.raises(RunError, match="rows"):
        store.begin(tiers[:1])
    with pytest.raises(RunError, match="padding"):
        store.begin(tiers, np.array([0, 1]))
    store.begin(tiers)
    store.append(0, key, value)
    with pytest.raises(RunError, match="broken off"):
        store.begin(tiers)


# -- in a model ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    return load(request.getfixturevalue(request.param))


def load(folder: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.eval()
    use_attention(model)
    return model


def text(rows: int, length: int) -> Tensor:
    return torch.randint(5, 50, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(
    model: Any, cache: Any, ids: Tensor, sizes: list[int], tiers: NDArray[np.int64] | None = None
) -> Tensor:
    outs = []
    for piece in pieces(sizes, ids.shape[1]):
        if tiers is not None:
            cache.open(tiers[:, piece])
        outs.append(model(ids[:, piece], **compat.cache_argument(model, cache)).logits)
    return torch.cat(outs, 1)


def test_full_is_what_transformers_own_cache_is(model: Any) -> None:
    ids = text(2, 100)
    expected = logits(model, DynamicCache(), ids, [100])
    for sizes in ([100], [1], [30, 7]):
        torch.testing.assert_close(
            logits(model, PolicyCache(model.config, ["full"]), ids, sizes),
            expected,
            atol=1e-5,
            rtol=0,
        )


@pytest.mark.parametrize("policies", [("int8",), ("window", "int4", "int8", "full")], ids="-".join)
def test_a_model_sees_what_the_definition_says(model: Any, policies: tuple[Policy, ...]) -> None:
    ids, tiers = text(2, 120), chance_tiers(policies, 2, 120)
    by_definition = PolicyCache(model.config, policies, WINDOW)
    by_definition.store = Literal(policies)  # type: ignore[assignment]
    expected = logits(model, by_definition, ids, [120], tiers)
    assert (expected - logits(model, DynamicCache(), ids, [120])).abs().max() > 1e-5
    for sizes in ([120], [1], [30, 7]):
        cache = PolicyCache(model.config, policies, WINDOW)
        torch.testing.assert_close(
            logits(model, cache, ids, sizes, tiers), expected, atol=1e-5, rtol=0
        )
        assert 0 < cache.store.nbytes < cache.store.nbytes_if_full


def test_new_tokens_are_of_the_top_tier_unless_it_is_said(model: Any) -> None:
    ids = text(1, 100)
    cache = PolicyCache(model.config, ["int8", "full"])
    logits(model, cache, ids, [100])
    assert cache.store.nbytes == cache.store.nbytes_if_full
    cache = PolicyCache(model.config, ["int8", "full"])
    cache.open(np.zeros((1, 99), np.int64))
    with pytest.raises(RunError, match="tiers"):
        logits(model, cache, ids, [100])


def generate(
    model: Any, ids: Tensor, mask: Tensor | None = None, cache: Any = None, **settings: Any
) -> Tensor:
    result: Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        pad_token_id=0,
        **({} if cache is None else compat.cache_argument(model, cache)),
        **({"max_new_tokens": 30, "do_sample": False, "eos_token_id": None} | settings),
    )
    return result[:, ids.shape[1] :]


@pytest.mark.parametrize("policies", [("full",), ("int8",), ("int4",), ("window",)], ids="-".join)
@pytest.mark.parametrize("told", [False, True])
def test_a_padded_batch_gives_what_each_row_gives_by_itself(
    model: Any, policies: tuple[Policy, ...], told: bool
) -> None:
    ids = text(3, 90)
    mask = torch.ones_like(ids)
    padding = [0, 11, 40]
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    cache = PolicyCache(model.config, policies, 70)
    if told:
        cache.open(np.zeros((3, 90), np.int64), np.array(padding))
    batch = generate(model, ids, mask, cache)
    for row, count in enumerate(padding):
        assert torch.equal(
            batch[row],
            generate(
                model, ids[row : row + 1, count:], None, PolicyCache(model.config, policies, 70)
            )[0],
        )
    assert cache.store.nbytes_if_full % (3 * 119 - sum(padding)) == 0
    if policies == ("full",):
        assert torch.equal(batch, generate(model, ids, mask))


def test_sampling(model: Any) -> None:
    settings: dict[str, Any] = {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 5,
        "num_return_sequences": 2,
    }
    sampled = []
    for cache in (None, PolicyCache(model.config, ["full"])):
        torch.manual_seed(0)
        sampled.append(generate(model, text(2, 40), None, cache, **settings))
    assert torch.equal(*sampled)


def test_stop_strings(model: Any) -> None:
    letters = {letter: i for i, letter in enumerate(string.ascii_letters)}
    backend = Tokenizer(models.WordLevel(letters, unk_token="Z"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend)  # type: ignore[no-untyped-call]
    ids = text(1, 70)

    def sampled(**settings: Any) -> str:
        torch.manual_seed(0)
        cache = PolicyCache(model.config, ["int8"])
        text: str = tokenizer.decode(
            generate(model, ids, None, cache, do_sample=True, tokenizer=tokenizer, **settings)[0]
        )
        return text

    free = sampled()
    stop = max(free, key=free.index)
    assert free.index(stop) > 10
    assert sampled(stop_strings=[stop]) == free[: free.index(stop) + 1]


def test_models_that_it_can_not_serve(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with pytest.raises(RunError, match="sdpa"):
        PolicyCache(model.config, ["int8"])
    ours = {"attn_implementation": "lorakit"}
    for config in (MistralConfig(sliding_window=16, **ours), Gemma2Config(**ours)):
        with pytest.raises(RunError, match="not all of its layers"):
            PolicyCache(config, ["int8"])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_another_attention_is_found_out(tiny_llama: Path, attention: str) -> None:
    model = load(tiny_llama)
    cache = PolicyCache(model.config, ["int8"])
    model.set_attn_implementation(attention)
    with pytest.raises(RunError, match="newest tokens only"):
        logits(model, cache, text(1, 20), [20])


def test_what_it_can_not_do(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    ids = text(2, 20)
    with pytest.raises(RunError, match="beam search"):
        generate(model, ids, None, PolicyCache(model.config, ["int8"]), num_beams=2)
    cache = PolicyCache(model.config, ["int8"])
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("crop", (1,)),
        ("reset", ()),
        ("batch_repeat_interleave", (2,)),
        ("batch_select_indices", (torch.tensor([0]),)),
    ]
    for name, arguments in calls:
        with pytest.raises(RunError, match="not possible"):
            getattr(cache, name)(*arguments)
    padded_right = torch.ones_like(ids)
    padded_right[1, 15:] = 0
    with pytest.raises(RunError, match="mask"), torch.no_grad():
        model(ids, attention_mask=padded_right, **compat.cache_argument(model, cache))
    with pytest.raises(RunError, match="inference"):
        model(ids, **compat.cache_argument(model, PolicyCache(model.config, ["int8"])))


def test_a_cache_may_be_used_in_and_out_of_inference_mode(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    ids = text(1, 100)
    cache = PolicyCache(model.config, ["int8"])
    with torch.inference_mode():
        first = torch.cat(
            [
                model(ids[:, piece], **compat.cache_argument(model, cache)).logits
                for piece in pieces([75, 1], 80)
            ],
            1,
        )
    rest = logits(model, cache, ids[:, 80:], [1])
    expected = logits(model, PolicyCache(model.config, ["int8"]), ids, [100])
    torch.testing.assert_close(torch.cat([first, rest], 1), expected, atol=1e-5, rtol=0)
