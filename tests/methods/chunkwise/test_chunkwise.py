"""Chunkwise on real models: the ladder, what a token's tier may depend on, and that every way to
run a text is the same."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import dropout, linear
from transformers import DynamicCache, OPTConfig, OPTForCausalLM

from lorakit import compat
from lorakit.adapters.base import dense_weight
from lorakit.data.batches import Batch, collate
from lorakit.data.examples import Examples
from lorakit.errors import RecipeError, RunError, UsageError
from lorakit.export.native import AdapterFacts, load_native, save_native
from lorakit.kernels.tiered_linear import TierPlan
from lorakit.methods.chunkwise.chunking import ChunkStream, chunk
from lorakit.methods.chunkwise.method import Chunkwise
from lorakit.methods.chunkwise.scheduler import ChunkScheduler, predicted
from lorakit.recipes.recipe import load_recipe
from lorakit.report.progress import Progress
from lorakit.runs.saved import saved_model, saved_recipe
from lorakit.runs.train import run_conversion, run_training
from lorakit.training import checkpoint
from lorakit.training.checkpoint import RunState
from lorakit.training.loop import build_optimizer, train
from lorakit.training.trained import TABLES_FILE, head_tensors, load_trained, trained_tensors
from tests.support.contract import (
    LABELS,
    TASKS,
    Built,
    Case,
    assert_equal_tensors,
    scramble,
    spec,
    started,
    steps,
    without_dropout,
)
from tests.support.processes import WEIGHTS, checkpoints, end, start, wait_for
from tests.support.tiny import VOCABULARY, tokenizer

# Chunks short enough for the tests' texts.
SETTINGS: dict[str, Any] = {
    "r": 4,
    "ladder": [1, 2, 4],
    "rank_target": 2.2,
    "min_len": 2,
    "max_len": 8,
    "tau": 0.15,
    "trailing": 2,
    "fade": 2,
}
RANKS = {
    "llama": {"q_proj": 3, "down_proj": 1, "o_proj": 0},
    "gpt2": {"c_fc": 3},
    "bert": {"query": 3, "value": 0},
}
TEXT = 48  # tokens


@pytest.fixture(params=["llama", "gpt2", "bert"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(
        "chunkwise", request.param, request.getfixturevalue(f"tiny_{request.param}"), SETTINGS
    )


@pytest.fixture(params=["llama", "gpt2"])
def writer(request: pytest.FixtureRequest) -> Case:
    return Case(
        "chunkwise", request.param, request.getfixturevalue(f"tiny_{request.param}"), SETTINGS
    )


@pytest.fixture
def llama(tiny_llama: Path) -> Case:
    return Case("chunkwise", "llama", tiny_llama, SETTINGS)


def text(n: int = TEXT, seed: int = 0) -> np.ndarray[Any, Any]:
    """Tokens of which some follow each other often, in stretches."""
    rng = np.random.default_rng((seed, 77))
    ids = rng.integers(5, 45, n)
    for start_ in range(0, n - 6, 12):
        ids[start_ : start_ + 6] = (np.arange(6) + rng.integers(0, 3)) % 6 + 10
    return ids


def texts(case: Case, rows: int = 12) -> Examples:
    tokens = [text(20 + 3 * row % 28, seed=row) for row in range(rows)]
    return Examples(
        tokens=np.concatenate(tokens).astype(np.int32),
        offsets=np.cumsum([0, *map(len, tokens)]),
        row_ids=np.arange(rows),
        labels=np.arange(rows) % 2 if case.task == "sequence-classification" else None,
        targets=np.ones(sum(map(len, tokens)), bool) if case.task == "causal-lm" else None,
    )


def trained(case: Case, **settings: Any) -> Built:
    """As after the last step of training, with factors that matter."""
    built = case.build(**settings)
    built.examples = texts(case)
    built.prepare()
    scramble(built)
    built.model.eval()
    return built


def concluded(case: Case, **settings: Any) -> Built:
    built = trained(case, **settings)
    assert built.method.conclude(built.calibration())
    built.model.eval()
    return built


def chunkwise(built: Built) -> Chunkwise:
    method = getattr(built.method, "main", built.method)
    assert isinstance(method, Chunkwise)
    return method


def rows(*of: Sequence[int]) -> Tensor:
    return torch.tensor(np.stack(of))


@torch.no_grad()
def logits(built: Built, ids: Tensor, cache: Any = None, **more: Any) -> Tensor:
    cached = {} if cache is None else compat.cache_argument(built.model, cache)
    found: Tensor = built.model(input_ids=ids, **cached, **more).logits
    return found


def new_scheduler(built: Built) -> ChunkScheduler:
    found = chunkwise(built).scheduler()
    assert isinstance(found, ChunkScheduler)
    return found


def tiers(built: Built, ids: Tensor) -> list[list[int]]:
    schedule = new_scheduler(built).prompt(ids, torch.ones_like(ids, dtype=torch.bool))
    return schedule.tiers.tolist()


def close(ours: Tensor, theirs: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


# -- the ladder ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [False, True], ids=["one rank", "rank_pattern"])
def test_the_ladder_leaves_the_whole_model_as_it_was_and_its_prefixes_are_optimal(
    case: Case, pattern: bool
) -> None:
    built = trained(case, rank_pattern=RANKS[case.kind] if pattern else {})
    batch, dense = (
        case.batch(),
        {name: adapter.delta().double() for name, adapter in built.adapters.items()},
    )
    with built.method.tiers.full_rank():
        before = built.logits(batch)
    assert built.method.conclude(built.calibration())
    with built.method.tiers.full_rank():
        close(built.logits(batch), before)
    for name, adapter in built.adapters.items():
        u, values, vh = torch.linalg.svd(dense[name], full_matrices=False)
        a, b, ends = adapter.ladder()
        assert ends == [0, *(-(-adapter.rank * step // 4) for step in (1, 2, 4))]
        for end_ in ends:
            best = (u[:, :end_] * values[:end_]) @ vh[:end_]
            torch.testing.assert_close(
                b[:, :end_].double() @ a[:end_].double(), best, rtol=1e-5, atol=1e-5, msg=name
            )


def merged_at(case: Case, built: Built, tier: int, ladder: list[int]) -> Any:
    """The bare model with the dense update of the tier's components added to its weights."""
    bare = case.bare()
    modules = dict(bare.model.named_modules())
    for name, adapter in built.adapters.items():
        a, b = adapter.factors()
        count = -(-adapter.rank * ladder[tier] // ladder[-1])
        with torch.no_grad():
            dense_weight(modules[name]).add_(adapter.scale * b[:, :count] @ a[:count])
    for name, tensor in head_tensors(built.model).items():
        bare.model.get_parameter(name).data.copy_(tensor)
    bare.model.eval()
    return bare


@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
@pytest.mark.parametrize("ladder", [[1, 2, 4], [0, 3, 4], [4]], ids=str)
def test_at_every_fixed_tier_the_model_is_that_of_its_merged_prefix(
    case: Case, ladder: list[int], frozen: bool
) -> None:
    target = 4 if len(ladder) == 1 else 2.2
    built, batch = (
        concluded(case, ladder=ladder, rank_target=target, rank_pattern=RANKS[case.kind]),
        case.batch(),
    )
    if frozen:
        for adapter in built.adapters.values():
            adapter.freeze()
    found = []
    for tier in range(len(ladder)):
        with chunkwise(built).at_tier(tier):
            found.append(built.logits(batch))
        with torch.no_grad():
            close(found[-1], merged_at(case, built, tier, ladder).logits(batch), 2e-5)
    assert all((one - other).abs().max() > 1e-3 for one, other in pairwise(found))
    with built.method.tiers.full_rank():
        close(built.logits(batch), found[-1])


def test_tier_0_of_a_ladder_from_0_is_the_base_and_the_top_is_plain_lora(case: Case) -> None:
    built, batch = concluded(case, ladder=[0, 2, 4]), case.batch()
    bare = merged_at(case, built, 0, [0, 2, 4])
    with chunkwise(built).at_tier(0), torch.no_grad():
        close(built.logits(batch), bare.logits(batch))
    plain = Case("vanilla", case.kind, case.folder, {"r": 4}).build()
    for name, adapter in plain.adapters.items():
        adapter.load_tensors(built.adapters[name].own_tensors())
    load_trained(plain.model, trained_tensors(built.model), "the test")
    with chunkwise(built).at_tier(2):
        close(built.logits(batch), plain.logits(batch))


def test_all_chunks_at_the_top_are_plain_lora(writer: Case) -> None:
    """A rank_target at the top, through the scheduler: thresholds that no difficulty stays
    below."""
    built = concluded(writer, rank_target=4.0)
    ids = rows(text())
    assert tiers(built, ids) == [[2] * TEXT]
    chunked = logits(built, ids)
    with built.method.tiers.full_rank():
        close(chunked, logits(built, ids))


def test_a_pass_at_chosen_tiers_gives_every_token_its_own_prefix(llama: Case) -> None:
    """One layer: what tokens of a batch get is what each tier gives, weighted in a fade."""
    built = concluded(llama)
    adapter = built.adapters["model.layers.0.self_attn.q_proj"]
    method = chunkwise(built)
    x = torch.randn(1, TEXT, 32, generator=torch.Generator().manual_seed(0))
    plan = new_scheduler(built).prompt(rows(text()), torch.ones(1, TEXT, dtype=torch.bool)).plan
    assert ((plan.weights > 0) & (plan.weights < 1)).any()
    method.current.plan = plan
    with torch.no_grad():
        found = adapter(x)
        method.current.plan = None
        parts = adapter.lora_B[:, None] * linear(x, adapter.lora_A)[0]  # [out, tokens, rank]
        share = plan.weights[:, [0, 1, 2, 2]]
        close(found, adapter.base.layer(x) + adapter.scale * (parts * share).sum(-1).T)


def test_the_residual_of_a_pruned_base_acts_at_every_tier(llama: Case) -> None:
    pruned = {"name": "salor", "factors": None, "base": {"criterion": "magnitude", "r_res": 3}}
    built = concluded(llama, ladder=[0, 2, 4], **{"with": [pruned]})
    batch = llama.batch()
    with torch.no_grad():
        for tier in range(3):
            with chunkwise(built).at_tier(tier):
                found = built.logits(batch)
            bare = llama.bare()
            modules = dict(bare.model.named_modules())
            for name, adapter in built.adapters.items():
                residual = adapter.base.components()
                assert adapter.tier_ends() == [3, 3 + 2, 3 + 4]
                count = [0, 2, 4][tier]
                update = (
                    residual["residual_B"] @ residual["residual_A"]
                    + adapter.scale * adapter.lora_B[:, :count] @ adapter.lora_A[:count]
                )
                modules[name].weight.copy_(adapter.weight + update)
            bare.model.eval()
            close(found, bare.logits(batch), 2e-5)


def test_a_layer_outside_of_the_blocks_is_refused(llama: Case) -> None:
    """An output head may be given a few positions alone, of which the plan of the pass does not
    know."""
    with pytest.raises(RecipeError, match="lm_head"):
        llama.build(target_modules=["q_proj", "lm_head"])


# -- calibration -----------------------------------------------------------------------------------


def test_the_target_is_met_on_held_out_text_and_by_the_model_itself(writer: Case) -> None:
    built = concluded(writer, rank_target=2.5)
    tables = chunkwise(built).tables
    assert tables is not None
    assert tables.mean_rank == pytest.approx(2.5, abs=0.2)
    assert sum(tables.shares) == pytest.approx(1.0)
    examples, found = texts(writer), []
    for row in range(12):
        batch = collate(examples, np.array([row]), 0)
        found += tiers(built, batch.input_ids)[0]
    assert np.mean(np.array([1, 2, 4])[found]) == pytest.approx(tables.mean_rank)
    summary = built.method.summary()
    assert [tier["rank"] for tier in summary["tiers"]] == [1, 2, 4]
    assert summary["table_bytes"] == sum(
        tensor.nbytes for tensor in built.method.tensors().values()
    )


def test_an_encoder_has_no_cache_policies(tiny_bert: Path, llama: Case) -> None:
    built = concluded(Case("chunkwise", "bert", tiny_bert, SETTINGS))
    assert [tier["kv"] for tier in built.method.summary()["tiers"]] == [None] * 3
    assert built.method.tiers.kv_policies().by_tier == ("full",)
    assert concluded(llama).method.tiers.kv_policies().by_tier == ("int8",) * 3


# -- causality -------------------------------------------------------------------------------------

CUTS = (1, 9, 23, 47)


def halves(cut: int) -> tuple[Tensor, Tensor]:
    """Two texts that are equal up to the cut."""
    first, other = text(), text(seed=5)
    assert (first[cut:] != other[cut:]).any()
    return rows(first), rows(np.concatenate([first[:cut], other[cut:]]))


def in_pieces(built: Built, ids: Tensor, size: int) -> Tensor:
    cache = DynamicCache()
    parts = [logits(built, part, cache=cache, use_cache=True) for part in ids.split(size, 1)]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("cut", CUTS)
def test_nothing_depends_on_later_tokens(writer: Case, cut: int) -> None:
    built = concluded(writer)
    one, other = halves(cut)
    assert [t[:cut] for t in tiers(built, one)] == [t[:cut] for t in tiers(built, other)]
    close(
        logits(built, one, use_cache=False)[:, :cut], logits(built, other, use_cache=False)[:, :cut]
    )
    prefilled = [logits(built, ids, cache=DynamicCache(), use_cache=True) for ids in (one, other)]
    close(prefilled[0][:, :cut], prefilled[1][:, :cut])
    close(in_pieces(built, one, 1)[:, :cut], in_pieces(built, other, 1)[:, :cut])
    assert (prefilled[0][:, cut:] - prefilled[1][:, cut:]).abs().max() > 1e-2


@pytest.mark.parametrize("cut", CUTS)
def test_nothing_depends_on_later_tokens_where_a_base_pass_scores_the_prompt(
    writer: Case, cut: int
) -> None:
    """The first token's difficulty too must not follow from the row."""
    built = concluded(writer, difficulty={"source": "model", "score_prompt": True})
    one, other = halves(cut)
    schedulers = [new_scheduler(built) for _ in range(2)]
    found = [
        s.prompt(ids, ids > 0).tiers[0, :cut].tolist()
        for s, ids in zip(schedulers, (one, other), strict=True)
    ]
    difficulty = [[token.difficulty for token in s.traces[0][:cut]] for s in schedulers]
    assert difficulty[0] == pytest.approx(difficulty[1], abs=2 / 2**16)
    assert found[0] == found[1]
    close(logits(built, one)[:, :cut], logits(built, other)[:, :cut])


# -- one pass, a prompt and then tokens, pieces ----------------------------------------------------


@pytest.mark.parametrize("ladder", [[1, 2, 4], [0, 2, 4]], ids=str)
def test_a_text_is_the_same_in_whatever_pieces_it_comes(writer: Case, ladder: list[int]) -> None:
    built = concluded(writer, ladder=ladder)
    ids = rows(text(), text(seed=3))
    assert len({tier for row in tiers(built, ids) for tier in row}) == 3
    whole = logits(built, ids, use_cache=False)
    for size in (TEXT, 1, 7, 20):
        close(in_pieces(built, ids, size), whole, 1e-4)
    # It is the tiers that are compared: a cut that lost the chunks would show.
    with built.method.tiers.full_rank():
        assert (logits(built, ids, use_cache=False) - whole).abs().max() > 1e-2


def test_a_cache_knows_what_its_tokens_got(writer: Case) -> None:
    built = concluded(writer)
    ids, cache = rows(text()), DynamicCache()
    for part in ids.split([20, 1, 1, 26], 1):
        logits(built, part, cache=cache, use_cache=True)
    scheduler = built.method.tiers.scheduler(cache)
    assert scheduler is not None
    assert [token.tier for token in scheduler.traces[0]] == tiers(built, ids)[0]
    assert built.method.tiers.scheduler(DynamicCache()) is None


def test_a_model_that_goes_around_its_body_is_chunked_too_or_refused(
    tmp_path: Path, llama: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OPTForCausalLM calls the decoder in its body itself, past the body."""
    monkeypatch.setitem(TASKS, "opt", "causal-lm")
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
    }
    OPTForCausalLM(
        OPTConfig(vocab_size=len(VOCABULARY), max_position_embeddings=128, **sizes)
    ).save_pretrained(tmp_path)
    tokenizer(pair=False).save_pretrained(tmp_path)
    try:
        built = concluded(Case("chunkwise", "opt", tmp_path, SETTINGS))
    except RunError:
        return
    ids = rows(text())
    with built.method.tiers.full_rank():
        whole = logits(built, ids)
    with chunkwise(built).at_tier(0):
        assert (logits(built, ids) - whole).abs().max() > 1e-3
    assert (logits(built, ids) - whole).abs().max() > 1e-3


def test_a_cache_that_the_model_makes_itself_can_be_gone_on_from(writer: Case) -> None:
    built = concluded(writer)
    ids = rows(text())
    with torch.no_grad():
        output = built.model(input_ids=ids[:, :20])
        assert compat.cache_of(output).get_seq_length() == 20
        rest = built.model(
            input_ids=ids[:, 20:], **compat.cache_argument(built.model, compat.cache_of(output))
        ).logits
    close(torch.cat([output.logits, rest], 1), logits(built, ids, use_cache=False), 1e-4)


def test_generate_of_transformers_goes_through_the_tiers(writer: Case) -> None:
    built = concluded(writer)
    ids = rows(text(24))
    written = built.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=None,
    )
    assert written.shape == (1, 40)
    close(
        logits(built, written, use_cache=False)[0, 23:-1].argmax(-1).float(),
        written[0, 24:].float(),
    )


def padded(side: str, pad: int = 0) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """(rows, ids, mask, positions) of a batch of three rows of different lengths."""
    own = [rows(text(n, seed=n)) for n in (31, TEXT, 5)]
    ids, mask = torch.full((3, TEXT), pad), torch.zeros(3, TEXT, dtype=torch.long)
    for row, one in enumerate(own):
        part = slice(0, one.shape[1]) if side == "right" else slice(TEXT - one.shape[1], TEXT)
        ids[row, part], mask[row, part] = one[0], 1
    return own, ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_batch_are_what_each_is_by_itself(case: Case, side: str) -> None:
    built = concluded(case)
    own, ids, mask, positions = padded(side)
    if case.task == "sequence-classification" and side == "left":
        pytest.skip("classifiers are padded on the right")
    found = logits(built, ids, attention_mask=mask, position_ids=positions)
    for row, one in enumerate(own):
        alone = logits(built, one)
        kept = (
            found[row] if case.task == "sequence-classification" else found[row][mask[row].bool()]
        )
        close(kept, alone[0], 2e-5)


def test_rows_padded_on_the_left_go_on_together_as_each_by_itself(writer: Case) -> None:
    built = concluded(writer)
    own, ids, mask, positions = padded("left")
    cache, more = DynamicCache(), rows(*(text(10, seed=20 + row) for row in range(3)))
    found = [
        logits(
            built, ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True
        )[:, -1:]
    ]
    for j in range(10):
        mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
        here = mask.sum(1, keepdim=True) - 1
        found.append(
            logits(
                built,
                more[:, j : j + 1],
                attention_mask=mask,
                position_ids=here,
                cache=cache,
                use_cache=True,
            )
        )
    together = torch.cat(found, 1)
    for row, one in enumerate(own):
        alone = logits(built, torch.cat([one, more[row : row + 1]], 1), use_cache=False)
        close(together[row], alone[0, -11:], 1e-4)


def test_rows_padded_on_the_left_are_the_same_in_pieces(writer: Case) -> None:
    """Padding may reach into the second piece."""
    built = concluded(writer)
    own, ids, mask, positions = padded("left")
    cache, found = DynamicCache(), []
    for start_ in range(0, TEXT, 12):
        part = slice(start_, start_ + 12)
        settings = {
            "attention_mask": mask[:, : part.stop],
            "position_ids": positions[:, part],
            "cache": cache,
        }
        found.append(logits(built, ids[:, part], use_cache=True, **settings))
    together = torch.cat(found, 1)
    for row, one in enumerate(own):
        close(together[row][mask[row].bool()], logits(built, one, use_cache=False)[0], 1e-4)


@pytest.mark.parametrize("change", ["rows swapped", "cropped"])
def test_a_cache_that_was_changed_from_outside_is_followed_or_refused(
    writer: Case, change: str
) -> None:
    """Beam search swaps the rows of a cache and assisted decoding crops it."""
    built = concluded(writer)
    ids, cache = rows(text(), text(seed=3)), DynamicCache()
    logits(built, ids[:, :30], cache=cache, use_cache=True)
    try:
        if change == "cropped":
            cache.crop(-20)
            begun = 10
        else:
            cache.reorder_cache(torch.tensor([1, 0]))
            ids, begun = ids.flip(0), 30
        rest = logits(built, ids[:, begun:], cache=cache, use_cache=True)
    except RunError:
        return
    close(rest, logits(built, ids, use_cache=False)[:, begun:], 1e-4)


def test_embeddings_and_caches_of_others_are_refused(writer: Case) -> None:
    built = concluded(writer)
    ids = rows(text())
    with pytest.raises(RunError, match="token ids"):
        built.model(inputs_embeds=built.model.get_input_embeddings()(ids))
    cache = DynamicCache()
    bare = writer.bare()
    with torch.no_grad():
        bare.model(
            input_ids=ids[:, :10], **compat.cache_argument(bare.model, cache), use_cache=True
        )
        with pytest.raises(RunError, match="another model"):
            built.model(
                input_ids=ids[:, 10:], **compat.cache_argument(built.model, cache), use_cache=True
            )
        assert chunkwise(built).current.plan is None
        # Whole, it is any plain model.
        with built.method.tiers.full_rank():
            built.model(inputs_embeds=built.model.get_input_embeddings()(ids))
            built.model(
                input_ids=ids[:, 10:], **compat.cache_argument(built.model, cache), use_cache=True
            )


def test_tokens_that_an_architecture_moves_about_are_refused(llama: Case) -> None:
    built = concluded(llama)
    chunkwise(built).current.plan = TierPlan.uniform_at(1, 3, 10)
    with pytest.raises(RunError, match="9 tokens reach a layer of a batch of 10"):
        next(iter(built.adapters.values()))(torch.zeros(9, 32))


def test_no_plan_is_left_after_a_pass_not_even_one_that_fails(llama: Case) -> None:
    built = concluded(llama)
    logits(built, rows(text()))
    assert chunkwise(built).current.plan is None
    with pytest.raises(IndexError), torch.no_grad():
        built.model(input_ids=torch.tensor([[10_000]]))
    assert chunkwise(built).current.plan is None
    with pytest.raises(RuntimeError), torch.no_grad():  # within the layers
        built.model(
            input_ids=rows(text()),
            attention_mask=torch.ones(1, TEXT),
            position_ids=torch.zeros(7, 3, dtype=torch.long),
        )
    assert chunkwise(built).current.plan is None


# -- difficulty from the model itself --------------------------------------------------------------


def test_an_unscored_prompt_is_at_the_top_and_new_tokens_are_measured_by_the_logits_they_came_from(
    writer: Case,
) -> None:
    built = concluded(writer, difficulty={"source": "model"})
    method = chunkwise(built)
    ids, cache, begun = rows(text(), text(seed=4)), DynamicCache(), 20
    found = logits(built, ids[:, :begun], cache=cache, use_cache=True)
    with built.method.tiers.full_rank():
        close(found, logits(built, ids[:, :begun], use_cache=False))
    came_from = [found[:, -1]]
    for j in range(begun, TEXT):
        came_from.append(logits(built, ids[:, j : j + 1], cache=cache, use_cache=True)[:, -1])
    scheduler = built.method.tiers.scheduler(cache)
    assert scheduler is not None
    assert method.tables is not None
    difficulty, thresholds = method.tables.by_pass[""]
    config = method.config
    for row, trace in enumerate(scheduler.traces):
        assert [token.tier for token in trace[:begun]] == [2] * begun
        assert np.isnan([token.difficulty for token in trace[:begun]]).all()
        log_p = torch.stack(came_from[:-1])[:, row].log_softmax(-1)
        surprisal = -log_p[torch.arange(TEXT - begun), ids[row, begun:]]
        entropy = -(log_p.exp() * log_p).sum(-1)
        expected = difficulty({"surprisal": surprisal.numpy(), "entropy": entropy.numpy()})
        values = [token.difficulty for token in trace[begun:]]
        assert values == pytest.approx(expected, abs=1e-4)
        stream = ChunkStream(config.form.rule, thresholds, config.blocks_of, 3, config.fade, 2)
        assert [token.tier for token in trace[begun:]] == [
            stream.push(value).tier for value in values
        ]
    assert len({token.tier for trace in scheduler.traces for token in trace[begun:]}) > 1


def test_a_scored_prompt_is_measured_by_a_pass_of_the_base(writer: Case) -> None:
    built = concluded(writer, difficulty={"source": "model", "score_prompt": True})
    method = chunkwise(built)
    ids, bare = rows(text()), writer.bare()
    bare.model.eval()
    with torch.no_grad():
        log_p = bare.model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    surprisal, entropy = -log_p.gather(1, ids[0, 1:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    assert method.tables is not None
    assert set(method.tables.by_pass) == {"", "base."}
    measure, thresholds = method.tables.by_pass["base."]
    expected = measure({"surprisal": surprisal.numpy(), "entropy": entropy.numpy()})
    scheduler = new_scheduler(built)
    schedule = scheduler.prompt(ids, torch.ones_like(ids, dtype=torch.bool))
    values = np.array([token.difficulty for token in scheduler.traces[0]])
    assert values[1:] == pytest.approx(expected, abs=1e-4)
    assert (
        schedule.tiers[0].tolist()
        == chunk(values, method.config.form.rule, thresholds).token_tiers.tolist()
    )
    # Then it goes on in the same stream.
    cache = DynamicCache()
    logits(built, ids, cache=cache, use_cache=True)
    logits(built, ids[:, :1], cache=cache, use_cache=True)
    found = built.method.tiers.scheduler(cache)
    assert found is not None
    assert len(found.traces[0]) == TEXT + 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_scored_prompt_in_a_batch_is_scored_as_by_itself(writer: Case, side: str) -> None:
    built = concluded(writer, difficulty={"source": "model", "score_prompt": True})
    own, ids, mask, positions = padded(side)
    found = logits(built, ids, attention_mask=mask, position_ids=positions)
    for row, one in enumerate(own):
        close(found[row][mask[row].bool()], logits(built, one)[0], 2e-5)


def test_several_new_tokens_without_logits_are_refused(writer: Case) -> None:
    built = concluded(writer, difficulty={"source": "model"})
    ids, cache = rows(text()), DynamicCache()
    logits(built, ids[:, :10], cache=cache, use_cache=True)
    with pytest.raises(RunError, match="no logits that each was chosen from"):
        logits(built, ids[:, 10:13], cache=cache, use_cache=True)


def test_surprisal_and_entropy_by_hand() -> None:
    given = torch.randn(600, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids = torch.arange(600) % 7
    surprisal, entropy = predicted(given, ids)
    p = given.double().softmax(-1)
    close(surprisal.double(), -p[torch.arange(600), ids].log(), 1e-5)
    close(entropy.double(), -(p * p.log()).sum(-1), 1e-5)
    assert surprisal.dtype == entropy.dtype == torch.float32
    assert [len(part) for part in predicted(given[:0], ids[:0])] == [0, 0]


# -- nested training -------------------------------------------------------------------------------

NESTED = {"training": "nested"}


def drawn(built: Built, batch: Batch, step: int = 1) -> list[int]:
    """How many blocks each row of the batch was given in a step."""
    built.method.before_forward(replace(batch, step=step))
    plan = chunkwise(built).sampled
    assert plan is not None
    weights = plan.weights.view(*batch.input_ids.shape, -1)
    assert (weights == weights[:, :1]).all()  # one tier a sequence
    assert set(weights.unique().tolist()) <= {0.0, 1.0}
    return [int(count) for count in weights[:, 0].sum(-1)]


def test_sequences_draw_tiers_evenly_by_seed_step_and_place(case: Case) -> None:
    batch = case.batch()
    built = case.build(**NESTED)
    found = [drawn(built, batch, step) for step in range(300)]
    counts = np.bincount(np.concatenate(found), minlength=4)
    assert counts[0] == 0
    assert counts[1:] == pytest.approx([600] * 3, abs=100)
    again, other = case.build(**NESTED), case.build(seed=1, **NESTED)
    # A resumed run begins at another step, in a method that has drawn nothing yet.
    assert [drawn(again, batch, step) for step in range(20, 40)] == found[20:40]
    assert [drawn(other, batch, step) for step in range(20)] != found[:20]
    # The same rows dealt and cut otherwise.
    places = torch.tensor([4, 1])
    assert drawn(again, replace(batch.select(places), places=places), 7) == [
        found[7][4],
        found[7][1],
    ]
    from_zero = case.build(ladder=[0, 2, 4], **NESTED)
    assert {n for step in range(20) for n in drawn(from_zero, batch, step)} == {0, 1, 2}


def test_gradients_reach_only_the_components_in_use(case: Case) -> None:
    built = trained(case, **NESTED)
    batch = collate(built.examples, np.array([0]), 0)
    seen = set()
    for step in range(12):
        used = drawn(built, batch, step)[0]
        built.model.train()
        built.model.zero_grad()
        built.task_model.row_losses(batch)[0].sum().backward()
        seen.add(used)
        for name, adapter in built.adapters.items():
            count = [0, 1, 2, 4][used]
            assert adapter.lora_A.grad is not None, name
            assert adapter.lora_B.grad is not None, name
            assert not adapter.lora_A.grad[count:].any()
            assert not adapter.lora_B.grad[:, count:].any()
            assert adapter.lora_B.grad[:, :count].any(0).all()
    assert seen == {1, 2, 3}


def test_a_nested_step_computes_the_prefix_of_each_row(case: Case) -> None:
    built = without_dropout(trained(case, **NESTED))
    batch = collate(built.examples, np.arange(6), 0)
    used = drawn(built, batch)
    assert len(set(used)) > 1
    built.model.train()
    with torch.no_grad():
        found = built.task_model.logits(batch)
    for row, count in enumerate(used):
        method = chunkwise(built)
        with method.at_tier(method.config.blocks_of.index(count)):
            alone = built.logits(collate(built.examples, np.array([row]), 0))[0]
        close(found[row, : len(alone)] if alone.ndim > 1 else found[row], alone, 2e-5)


def test_chunks_draw_their_own_tiers(case: Case) -> None:
    built = trained(case, **NESTED, nested_by="chunk")
    batch = collate(built.examples, np.arange(6), 0)
    built.method.before_forward(batch)
    plan = chunkwise(built).sampled
    assert plan is not None
    expected = new_scheduler(built).prompt(batch.input_ids, batch.attention_mask.bool())
    assert torch.equal(plan.weights, expected.plan.weights)
    assert not plan.uniform
    assert not plan.weights.view(*batch.input_ids.shape, -1)[~batch.attention_mask.bool()].any()
    # What training computes is what the model computes afterwards.
    without_dropout(built).model.train()
    with torch.no_grad():
        close(built.task_model.logits(batch), built.logits(batch), 2e-5)


def test_dropout_is_of_the_adapters_input_and_the_mask_acts_after_it(llama: Case) -> None:
    built = trained(llama, lora_dropout=0.4, **NESTED)
    adapter = built.adapters["model.layers.0.mlp.down_proj"].train()
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([[1.0, 1, 0]] * 5 + [[1.0, 0.5, 0.25]] * 5)
    chunkwise(built).current.plan = TierPlan.of(weights)
    torch.manual_seed(3)
    found = adapter(x)
    torch.manual_seed(3)
    hidden = linear(dropout(x, 0.4), adapter.lora_A) * weights[:, [0, 1, 2, 2]].view(2, 5, 4)
    close(found, adapter.base.layer(x) + adapter.scale * linear(hidden, adapter.lora_B))


@pytest.mark.parametrize("by", ["sequence", "chunk"])
def test_nested_training_learns_and_its_ladder_is_the_trained_one(case: Case, by: str) -> None:
    built = case.build(**NESTED, nested_by=by, ladder=[1, 2, 4])
    losses = [
        report.loss
        for report in steps(
            built, case.examples(), spec(max_steps=30, per_device_train_batch_size=12)
        )
    ]
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    before = {name: tensor.clone() for name, tensor in trained_tensors(built.model).items()}
    assert built.method.conclude(built.calibration())
    assert_equal_tensors(before, trained_tensors(built.model))


@pytest.mark.parametrize("by", ["sequence", "chunk"])
def test_a_resumed_nested_run_ends_with_the_same_bytes(
    llama: Case, by: str, tmp_path: Path
) -> None:
    settings, examples = spec(max_steps=6), llama.examples()
    whole = llama.build(**NESTED, nested_by=by, lora_dropout=0.1)
    optimizer = started(whole, settings)
    torch.manual_seed(0)
    for report in train(whole.task_model, whole.method, optimizer, examples, settings):
        if report.step == 3:
            cut = checkpoint.save(
                tmp_path, whole.model, whole.method, optimizer, RunState(step=3), keep=None
            )
    torch.manual_seed(99)
    other, saved = llama.build(**NESTED, nested_by=by, lora_dropout=0.1), checkpoint.read(cut)
    saved.restore_model(other.model, other.method)
    optimizer = build_optimizer(other.method, other.heads, settings)
    other.method.begin(optimizer, 6)
    saved.restore_optimizer(other.model, optimizer)
    saved.restore_random()
    for _ in train(other.task_model, other.method, optimizer, examples, settings, first_step=4):
        pass
    assert_equal_tensors(trained_tensors(other.model), trained_tensors(whole.model))
    assert_equal_tensors(other.method.tensors(), whole.method.tensors())
    for built in (whole, other):
        built.method.conclude(built.calibration())
    assert_equal_tensors(other.method.tensors(), whole.method.tensors())


# -- what is left ----------------------------------------------------------------------------------

SOURCES = {
    "table": {},
    "table, weights": {"difficulty": {"weights": {"novelty": 1.0, "bigram": 2.0, "position": 0.0}}},
    "model": {"difficulty": {"source": "model"}},
    "model, scored": {"difficulty": {"source": "model", "score_prompt": True}},
}


@pytest.mark.parametrize("source", SOURCES)
def test_the_adapter_folder_and_a_checkpoint_hold_the_tables_byte_for_byte(
    case: Case, source: str, tmp_path: Path
) -> None:
    if case.task == "sequence-classification" and source.startswith("model"):
        pytest.skip("classifiers have no such source")
    built = concluded(case, **SOURCES[source])
    labels = LABELS if case.task == "sequence-classification" else None
    facts = AdapterFacts(
        built.method.config.model_dump(mode="json", by_alias=True), case.task, labels, case.source
    )
    save_native(tmp_path / "adapter", built.task_model, built.method, facts)
    assert_equal_tensors(load_file(tmp_path / "adapter" / TABLES_FILE), built.method.tensors())
    loaded = case.build(seed=8, **SOURCES[source])
    load_native(tmp_path / "adapter", loaded.task_model, loaded.method)
    optimizer = started(built, spec())
    folder = checkpoint.save(
        tmp_path, built.model, built.method, optimizer, RunState(step=1), keep=None
    )
    restored = case.build(seed=9, **SOURCES[source])
    checkpoint.read(folder).restore_model(restored.model, restored.method)
    batch = case.batch()
    for other in (loaded, restored):
        assert_equal_tensors(other.method.tensors(), built.method.tensors())
        assert other.method.summary() == built.method.summary()
        assert torch.equal(other.logits(batch), built.logits(batch))


@pytest.mark.parametrize(
    "gone", ["held_out", "table.keys", "table.backoffs", "percentiles.novelty", "thresholds."]
)
def test_tables_of_which_something_is_missing_are_refused(llama: Case, gone: str) -> None:
    tensors = concluded(llama).method.tensors()
    del tensors[gone]
    with pytest.raises(ValueError, match="lack"):
        llama.build().method.load_tensors(tensors)


def test_before_it_is_concluded_it_is_plain_lora(case: Case) -> None:
    built = trained(case)
    plain = Case("vanilla", case.kind, case.folder, {"r": 4}).build()
    load_trained(plain.model, trained_tensors(built.model), "the test")
    assert torch.equal(built.logits(case.batch()), plain.logits(case.batch()))
    assert built.method.tiers.scheduler() is None
    assert built.method.tensors() == {}


# -- runs through the command line -----------------------------------------------------------------

RECIPE = """\
model: {{name_or_path: {model}, task: {task}}}
data: {{name_or_path: {data}}}
method: {method}
train: {{max_steps: {steps}, per_device_train_batch_size: 8, learning_rate: 1e-2, precision: fp32,
  save_steps: 10}}
"""
SHORT = "min_len: 2, max_len: 8, trailing: 2, fade: 2"
CONVERT = (
    "method.ladder=[1,2,4]",
    "method.min_len=2",
    "method.max_len=8",
    "method.trailing=2",
    "method.fade=2",
    "method.kv.policy=full",
)
CONVERTED = {
    "vanilla": "{name: vanilla, r: 4}",
    "l1ra": "{name: l1ra, r: 4, l1_share: 3, rank_update_ratio: 0.05, rank_pattern: {q_proj: 3}}",
    "salor": "{name: salor, r: 4, factors: {density: 0.5}}",
    "salor, base": "{name: salor, r: 4, base: {criterion: magnitude, r_res: 2}}",
    "l1ra, salor": (
        "{name: l1ra, r: 4, with: [{name: salor, base: {criterion: magnitude, r_res: 2}}]}"
    ),
}


def run_of(folder: Path) -> tuple[Any, Any]:
    task_model, method, _ = saved_model(folder, saved_recipe(folder), torch.float32)
    return task_model, method


@pytest.mark.parametrize("name", CONVERTED)
def test_a_converted_run_computes_as_whole_what_its_source_did(
    name: str,
    tiny_llama: Path,
    sums: Path,
    call: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    llama: Case,
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = RECIPE.format(
        model=llama.folder, task="causal-lm", data=sums, method=CONVERTED[name], steps=30
    )
    (tmp_path / "a.yaml").write_text(recipe)
    call("train", "a.yaml")
    call("convert", "runs/a", *CONVERT)
    (before, trained_), (after, method) = (
        run_of(tmp_path / "runs/a"),
        run_of(tmp_path / "runs/a-chunkwise"),
    )
    batch = llama.batch()
    with torch.no_grad():
        expected = before.logits(batch)
        bare = llama.bare()
        bare.model.eval()
        assert (bare.logits(batch) - expected).abs().max() > 1e-3
        if name == "l1ra":
            assert len({adapter.rank for adapter in method.adapters.values()}) > 2, (
                "the test should cover ranks that moved"
            )
        with method.tiers.full_rank():
            close(after.logits(batch), expected, 2e-5)
    for module, adapter in method.adapters.items():
        assert adapter.rank == trained_.adapters[module].rank
        assert adapter.scale == trained_.adapters[module].scale
        a, b = adapter.factors()
        values = torch.linalg.vector_norm(b, dim=0) * torch.linalg.vector_norm(a, dim=1)
        assert (values.diff() <= 1e-6).all(), module
    result = json.loads((tmp_path / "runs/a-chunkwise/result.json").read_text())
    source = json.loads((tmp_path / "runs/a/result.json").read_text())
    assert result["converted_from"] == "runs/a"
    assert result["method"] == "chunkwise"
    assert result["metrics_before"] == pytest.approx(source["metrics"], rel=1e-4)
    assert [tier["rank"] for tier in result["tiers"]] == [1, 2, 4]


def test_a_converted_classifier_keeps_its_head_and_its_products(
    tiny_bert: Path,
    sentiment: Path,
    call: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    method = "{name: l1ra, r: 4, l1_share: 3, rank_update_ratio: 0.05}"
    recipe = RECIPE.format(
        model=tiny_bert, task="sequence-classification", data=sentiment, method=method, steps=30
    )
    (tmp_path / "a.yaml").write_text(recipe)
    call("train", "a.yaml")
    call("convert", "runs/a", *(key for key in CONVERT if "kv" not in key), "--out", "runs/b")
    (before, _), (after, converted) = run_of(tmp_path / "runs/a"), run_of(tmp_path / "runs/b")
    batch = Case("chunkwise", "bert", tiny_bert).batch()
    with torch.no_grad(), converted.tiers.full_rank():
        close(after.logits(batch), before.logits(batch))


def test_a_run_with_the_usual_cache_policy_comes_to_its_end(
    tiny_llama: Path,
    sums: Path,
    call: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Evaluation pads on the right, generation on the left: the cache takes both."""
    monkeypatch.chdir(tmp_path)
    method = f"{{name: chunkwise, r: 4, ladder: [1, 2, 4], {SHORT}}}"
    (tmp_path / "a.yaml").write_text(
        RECIPE.format(model=tiny_llama, task="causal-lm", data=sums, method=method, steps=3)
    )
    call("train", "a.yaml")
    result = json.loads((tmp_path / "runs/a/result.json").read_text())
    assert {tier["kv"] for tier in result["tiers"]} == {"int8"}
    assert result["metrics"]["loss"] == pytest.approx(result["metrics_before"]["loss"], abs=0.1)


def test_a_run_that_is_cut_and_resumed_leaves_the_same_bytes(
    tiny_llama: Path,
    sums: Path,
    call: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    method = f"{{name: chunkwise, r: 4, ladder: [1, 2, 4], training: nested, {SHORT}}}"
    (tmp_path / "a.yaml").write_text(
        RECIPE.format(model=tiny_llama, task="causal-lm", data=sums, method=method, steps=60)
    )
    call("train", "a.yaml", "output_dir=runs/whole")
    process, run = start(tmp_path, "train", "a.yaml", "output_dir=runs/cut"), tmp_path / "runs/cut"
    wait_for(process, "a checkpoint", lambda: len(checkpoints(run)) > 0)
    process.send_signal(signal.SIGINT)
    done = end(process)
    assert done.code == 130, done.err
    assert not (run / "result.json").exists()
    call("train", "a.yaml", "output_dir=runs/cut", "--resume", "auto")
    for file in (WEIGHTS, f"adapter/{TABLES_FILE}"):
        assert (run / file).read_bytes() == (tmp_path / "runs/whole" / file).read_bytes()
    results = [
        json.loads((folder / "result.json").read_text())
        for folder in (run, tmp_path / "runs/whole")
    ]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[0]["tiers"] == results[1]["tiers"]


# -- what may be converted, and what is not lost ---------------------------------------------------


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("method.r=16", "another adapter"),
        ("method.lora_alpha=64", "another adapter"),
        ("method.target_modules=[q_proj]", "another adapter"),
        ("model.name_or_path=elsewhere", "another adapter"),
        ("train.max_steps=5", "another adapter"),
        ("output_dir=elsewhere", "--out"),
    ],
)
def test_a_conversion_changes_nothing_of_the_adapter(
    tiny_llama: Path, sums: Path, tmp_path: Path, override: str, said: str
) -> None:
    run = trained_for_conversion(tmp_path, tiny_llama, sums)
    with pytest.raises(UsageError, match=said):
        run_conversion(run, [override], tmp_path / "new", Progress(Console(stderr=True)))
    assert not (tmp_path / "new").exists()


def test_a_conversion_trains_no_prefixes(tiny_llama: Path, sums: Path, tmp_path: Path) -> None:
    """Its ladder is made by the SVD: without one its prefixes would be any components."""
    run = trained_for_conversion(tmp_path, tiny_llama, sums)
    with pytest.raises(RecipeError, match="posthoc"):
        run_conversion(
            run, ["method.training=nested"], tmp_path / "new", Progress(Console(stderr=True))
        )
    assert not (tmp_path / "new").exists()


def test_a_conversion_refuses_its_target_before_anything_is_loaded(
    tiny_llama: Path, sums: Path, tmp_path: Path
) -> None:
    run = trained_for_conversion(tmp_path, tiny_llama, sums)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine.txt").write_text("mine")
    for target in (run, tmp_path / "new"):
        with pytest.raises(UsageError):
            run_conversion(run, [], target, Progress(Console(stderr=True)), overwrite=True)
    assert (tmp_path / "new" / "mine.txt").read_text() == "mine"
    assert (run / "result.json").is_file()


def trained_for_conversion(folder: Path, model: Path, data: Path) -> Path:
    recipe = folder / "plain.yaml"
    recipe.write_text(
        f"model: {{name_or_path: {model}, task: causal-lm}}\ndata: {{name_or_path:"
        f" {data}}}\nmethod: {{name: vanilla, r: 4}}\ntrain: {{max_steps: 1, precision:"
        f" fp32}}\noutput_dir: {folder / 'plain'}\n"
    )
    run_training(load_recipe(recipe), Progress(Console(stderr=True)))
    return folder / "plain"


def test_steps_that_patience_ended_are_saved_before_the_method_concludes(
    tiny_llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "early.yaml"
    recipe.write_text(
        f"model: {{name_or_path: {tiny_llama}, task: causal-lm}}\ndata: {{name_or_path:"
        f" {sums}}}\nmethod: {{name: chunkwise, r: 4, min_len: 2, fade: 1}}\ntrain: {{max_steps:"
        " 50, learning_rate: 1e-9, eval_steps: 2, early_stopping_patience: 1, precision:"
        f" fp32}}\noutput_dir: {tmp_path / 'early'}\n"
    )

    def fails(*_: object) -> bool:
        raise RunError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(Chunkwise, "conclude", fails)
        with pytest.raises(RunError, match="no memory"):
            run_training(load_recipe(recipe), Progress(Console(stderr=True)))
    assert len(list((tmp_path / "early" / "checkpoints").glob("step-*"))) == 1
    result = run_training(load_recipe(recipe), Progress(Console(stderr=True)), resume="auto")
    assert result["steps"] < 50
    assert result["tiers"]
