"""Fast passes of whole models against the same models as transformers has them, without packing and
without joint layers."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    BertConfig,
    DebertaConfig,
    DebertaV2Config,
    DistilBertConfig,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LongformerConfig,
    MistralConfig,
    ModernBertConfig,
    MPNetConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    RobertaConfig,
)

from lorakit.adapters.inject import inject, match_targets, merge_all
from lorakit.adapters.layer import Adapter
from lorakit.cpu import block_parts, decoder_block, encoder_block
from lorakit.cpu.blocks import checkpoint_blocks
from lorakit.cpu.optimisations import fits_kernels, packable_blocks
from lorakit.cpu.speed_up import speed_up
from lorakit.data.batches import Batch, collate
from lorakit.kernels import attention
from lorakit.kernels.attention import use_attention
from lorakit.kernels.fast_modules import use_fast_elementwise
from lorakit.methods import build_method, config_classes, method_names
from lorakit.models.fetching import auto_class
from lorakit.models.heads import train_heads
from lorakit.models.task_model import TaskModel
from lorakit.models.tasks import task_named
from tests.support.batches import WINDOW, WORDS, batch_of
from tests.support.contract import COMBINED, TASKS, Built, Case, spec, steps, without_dropout
from tests.support.kernels import why_not

BASE = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = BASE | {"num_key_value_heads": 1, "head_dim": 16}
GPT2 = {
    "vocab_size": WORDS,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 96,
    "pad_token_id": 0,
}
DISTIL = {
    "vocab_size": WORDS,
    "dim": 32,
    "hidden_dim": 48,
    "n_layers": 2,
    "n_heads": 2,
    "max_position_embeddings": 96,
}
OPT = BASE | {"ffn_dim": 48, "word_embed_proj_dim": 32}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# transformers 5.0 lets ModernBERT use no other attention than its own.
MODERN_PACKS = Version(transformers.__version__) >= Version("5.1")
MODERN = {
    "cls_token_id": 1,
    "sep_token_id": 2,
    "local_attention": 2 * WINDOW,
    "global_attn_every_n_layers": 2,
}
CAUSAL: tuple[str, ...] = ("causal-lm", "sequence-classification")
CLASSES: tuple[str, ...] = ("sequence-classification",)
LLAMA_GROUPS = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]
BERT_GROUPS = [("query", "key", "value")]


@dataclass(frozen=True)
class Architecture:
    """A tiny random model: its configuration, what it can be trained for, whether its rows can be
    packed, the layers of a block that read the same input, and the attention of transformers that
    is right for it where the default may not be."""

    config: type[Any]
    settings: dict[str, Any]
    tasks: tuple[str, ...] = CAUSAL
    packs: bool = True
    groups: list[tuple[str, ...]] = field(default_factory=list)
    attention: str | None = None


ARCHITECTURES = {
    "gpt2": Architecture(GPT2Config, GPT2),
    "gpt2, heads of 8": Architecture(GPT2Config, GPT2 | {"n_head": 4}),
    "llama": Architecture(LlamaConfig, GROUPED, groups=LLAMA_GROUPS),
    "llama, heads of 8": Architecture(
        LlamaConfig, GROUPED | {"head_dim": 8, "num_attention_heads": 4}, groups=LLAMA_GROUPS
    ),
    "mistral": Architecture(
        MistralConfig, GROUPED | {"sliding_window": WINDOW}, groups=LLAMA_GROUPS
    ),
    "qwen2": Architecture(Qwen2Config, GROUPED, groups=LLAMA_GROUPS),
    "qwen3": Architecture(Qwen3Config, GROUPED, groups=LLAMA_GROUPS),
    "qwen3-moe": Architecture(Qwen3MoeConfig, GROUPED | EXPERTS, groups=LLAMA_GROUPS[:1]),
    "gemma": Architecture(GemmaConfig, GROUPED, groups=LLAMA_GROUPS),
    "gemma2": Architecture(
        Gemma2Config,
        GROUPED | {"sliding_window": WINDOW},
        packs=False,
        groups=LLAMA_GROUPS,
        attention="eager",
    ),
    "gemma3": Architecture(
        Gemma3TextConfig, GROUPED | {"sliding_window": WINDOW}, groups=LLAMA_GROUPS
    ),
    "phi3": Architecture(Phi3Config, GROUPED),
    "gpt-neox": Architecture(GPTNeoXConfig, BASE),
    "opt": Architecture(OPTConfig, OPT, groups=[("k_proj", "v_proj", "q_proj")]),
    "bert": Architecture(BertConfig, BASE, CLASSES, groups=BERT_GROUPS),
    "bert, heads of 8": Architecture(
        BertConfig, BASE | {"num_attention_heads": 4}, CLASSES, groups=BERT_GROUPS
    ),
    "roberta": Architecture(
        RobertaConfig, BASE | {"pad_token_id": 1, "bos_token_id": 0}, CLASSES, groups=BERT_GROUPS
    ),
    "albert": Architecture(
        AlbertConfig, BASE | {"embedding_size": 16}, CLASSES, groups=BERT_GROUPS
    ),
    "distilbert": Architecture(
        DistilBertConfig, DISTIL, CLASSES, groups=[("q_lin", "k_lin", "v_lin")]
    ),
    "mpnet": Architecture(MPNetConfig, BASE, CLASSES, packs=False, groups=[("q", "k", "v")]),
    "modernbert": Architecture(ModernBertConfig, BASE | MODERN, CLASSES, packs=MODERN_PACKS),
    "deberta": Architecture(
        DebertaConfig,
        BASE
        | {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "max_relative_positions": 16,
        },
        CLASSES,
        packs=False,
    ),
    "deberta-v2": Architecture(
        DebertaV2Config,
        BASE | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        CLASSES,
        packs=False,
        groups=[("query_proj", "key_proj", "value_proj"), ("pos_key_proj", "pos_query_proj")],
    ),
    "longformer": Architecture(
        LongformerConfig, BASE | {"attention_window": 8}, CLASSES, packs=False
    ),
}
BOTH = [(name, task) for name, architecture in ARCHITECTURES.items() for task in architecture.tasks]


@dataclass
class Tried:
    """A model with adapters, and what was said when it was made fast; nothing for one that was
    not."""

    task_model: TaskModel
    adapters: dict[str, Adapter]
    notes: list[str]

    def losses(self, batch: Batch) -> Tensor:
        return self.task_model.row_losses(batch)[0]

    def gradients(self, losses: Tensor) -> dict[str, Tensor]:
        """Of all that is trained, by name."""
        trained = {
            name: p for name, p in self.task_model.model.named_parameters() if p.requires_grad
        }
        found = torch.autograd.grad(
            losses.sum(), list(trained.values()), allow_unused=True, retain_graph=True
        )
        return {
            name: grad
            for name, grad in zip(trained, found, strict=True)
            if grad is not None and grad.numel()
        }


def build(
    name: str,
    task: str,
    fast: bool,
    dropout: bool = False,
    method: dict[str, Any] | None = None,
    **settings: Any,
) -> Tried:
    """fast: with all that is ours, as a run makes it; else as transformers makes it. The same
    weights for both."""
    architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
    attention_name = None if fast else architecture.attention
    config = architecture.config(**(architecture.settings | settings))
    model: Any = auto_class(task).from_config(config, attn_implementation=attention_name)
    if fast:
        use_attention(model)
        use_fast_elementwise(model)
    task_model = TaskModel(model, None, task_named(task), task_named(task).head_names(model))
    config = config_classes()["vanilla"].model_validate({"r": 4} | (method or {}))
    made = build_method(config, 0)
    inject(model, made, match_targets(model, config, task_model.heads))
    train_heads(task_model)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for adapter in made.adapters.values():
            for factor in (adapter.lora_A, adapter.lora_B):
                factor.normal_(std=0.2, generator=rng)
    model.train()
    for module in [] if dropout else model.modules():
        for setting in [
            key
            for key, value in vars(module).items()
            if "dropout" in key and isinstance(value, float)
        ]:
            setattr(module, setting, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return Tried(task_model, made.adapters, speed_up(task_model, made.adapters) if fast else [])


def pad_of(tried: Tried) -> int:
    return int(tried.task_model.model.config.pad_token_id or 0)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], allowed: float = 1e-4) -> None:
    """Each within `allowed`, as a share of its norm; what is nearly zero, of the norm of all."""
    assert ours.keys() == theirs.keys()
    assert ours
    floor = 1e-3 * max(float(x.norm()) for x in theirs.values()) or 1.0
    for name, right in theirs.items():
        error = float((ours[name] - right).norm()) / max(float(right.norm()), floor)
        assert error <= allowed, (name, error)


def compare(fast: Tried, slow: Tried, batch: Batch, allowed: float = 1e-4) -> None:
    ours, theirs = fast.losses(batch), slow.losses(batch)
    assert_same({"losses": ours.detach()}, {"losses": theirs.detach()}, allowed)
    assert_same(fast.gradients(ours), slow.gradients(theirs), allowed)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of rows that attended packed, one for each layer that was run so."""
    seen: list[int] = []
    real, of_block = attention.packed_attention, block_parts.attend

    def watched(query: Tensor, key: Tensor, value: Tensor, packing: Any, *more: Any) -> Tensor:
        seen.append(packing.rows)
        return real(query, key, value, packing, *more)

    def watched_in_block(form: Any, *heads: Tensor) -> Any:
        seen.append(form.packing.rows)
        return of_block(form, *heads)

    monkeypatch.setattr(attention, "packed_attention", watched)
    for block in (encoder_block, decoder_block):
        monkeypatch.setattr(block, "attend", watched_in_block)
    return seen


@pytest.fixture
def expecting_errors(request: pytest.FixtureRequest) -> None:
    """For models that change in place what a layer gave, which one of joined layers does not
    allow."""
    if request.node.callspec.params["name"] == "longformer":
        request.getfixturevalue("lenient")


RAGGED = (9, 1, 17, 5, 1, WINDOW)


@pytest.mark.parametrize(("name", "task"), BOTH)
@pytest.mark.usefixtures("expecting_errors")
def test_losses_and_gradients_are_those_of_the_plain_model(
    name: str, task: str, packed: list[int]
) -> None:
    """Rows of many lengths, some of one token, some without a target; a batch of one row, and one
    of rows of one token."""
    fast, slow = (build(name, task, fast) for fast in (True, False))
    packed.clear()  # what was tried
    assert fast.task_model.packs == ARCHITECTURES[name].packs, fast.notes
    assert len(fast.notes) == (not fast.task_model.packs)
    for lengths in (RAGGED, (7,), (2, 1, 1)):
        compare(fast, slow, batch_of(lengths, task, len(lengths), pad_of(slow), first_target=2))
        assert set(packed) == ({len(lengths)} if fast.task_model.packs else set())
        packed.clear()


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.usefixtures("expecting_errors")
def test_without_gradients_the_losses_are_the_same(name: str) -> None:
    task = ARCHITECTURES[name].tasks[0]
    fast, slow = (build(name, task, fast) for fast in (True, False))
    batch = batch_of(RAGGED, task, 3, pad_of(slow))
    for tried in (fast, slow):
        tried.task_model.model.eval()
    with torch.no_grad():
        expected = slow.losses(batch)
        assert_same({"losses": fast.losses(batch)}, {"losses": expected})
        for adapter in fast.adapters.values():
            adapter.freeze()
        assert_same({"losses": fast.losses(batch)}, {"losses": expected})


@pytest.mark.parametrize(
    "name", [name for name, architecture in ARCHITECTURES.items() if architecture.groups]
)
def test_layers_that_read_the_same_input_are_found(name: str) -> None:
    fast = build(name, ARCHITECTURES[name].tasks[-1], True)
    groups: dict[int, list[str]] = {}
    for module, adapter in fast.adapters.items():
        if adapter.shared is not None:
            assert [own for own in adapter.shared.layers if own is adapter] == [adapter]
            groups.setdefault(id(adapter.shared), []).append(module)
    blocks = 1 if name == "albert" else 2
    found = [[module.rpartition(".")[2] for module in modules] for modules in groups.values()]
    assert sorted(map(sorted, found)) == sorted(
        sorted(group) for group in ARCHITECTURES[name].groups for _ in range(blocks)
    )
    for modules in groups.values():
        assert len({module.rpartition(".")[0] for module in modules}) == 1, (
            "layers of different blocks"
        )


def test_layers_left_out_dropped_out_or_without_rank() -> None:
    some = build(
        "llama", "causal-lm", True, method={"target_modules": ["q_proj", "v_proj", "up_proj"]}
    )
    joined = {
        name.rpartition(".")[2]
        for name, adapter in some.adapters.items()
        if adapter.shared is not None
    }
    assert joined == {"q_proj", "v_proj"}
    settings: dict[str, Any] = {"rank_pattern": {"k_proj": 0, "gate_proj": 0, "up_proj": 0}}
    fast, slow = (build("llama", "causal-lm", fast, method=settings) for fast in (True, False))
    compare(fast, slow, batch_of(RAGGED, "causal-lm"))
    dropped = build("llama", "causal-lm", True, dropout=True, method={"lora_dropout": 0.1})
    assert all(adapter.shared is None for adapter in dropped.adapters.values())
    assert dropped.task_model.packs


# -- rows know nothing of each other ---------------------------------------------------------------

ISOLATED: list[tuple[str, str]] = [
    ("gpt2", "causal-lm"),
    ("llama", "causal-lm"),
    ("llama, heads of 8", "causal-lm"),
    ("bert", "sequence-classification"),
    ("bert, heads of 8", "sequence-classification"),
    ("gemma2", "causal-lm"),
]


@pytest.mark.parametrize(("name", "task"), ISOLATED)
def test_a_row_is_the_same_in_any_company(name: str, task: str) -> None:
    """Its loss and the gradients of its loss, alone and among others; the gradient of a batch is
    the sum of those of its rows."""
    tried, lengths = build(name, task, True), (9, 2, 17, 5, 12, 11)
    batch = batch_of(lengths, task)
    losses = tried.losses(batch)
    total: dict[str, Tensor] = {}
    for row, length in enumerate(lengths):
        # anew for each row, since some blocks can be gone through once only
        own = tried.gradients(tried.losses(batch)[row])
        only = slice(row, row + 1), *[slice(length)]
        labels = batch.labels[only] if task == "causal-lm" else batch.labels[row : row + 1]
        alone = Batch(
            batch.input_ids[only],
            batch.attention_mask[only],
            batch.lengths[row : row + 1],
            labels,
            [row],
        )
        loss = tried.losses(alone)
        assert_same({"loss": loss.detach()}, {"loss": losses[row : row + 1].detach()})
        # Sums in another order: where gradients nearly cancel, by up to 2e-4 (attention's, on
        # processors with short vectors).
        assert_same(own, tried.gradients(loss), allowed=1e-3)
        total = {module: grad + total.get(module, 0) for module, grad in own.items()}
    assert_same(tried.gradients(losses), total, allowed=1e-3)


@pytest.mark.parametrize(("name", "task"), ISOLATED)
def test_other_words_in_one_row_change_nothing_for_the_others(name: str, task: str) -> None:
    """Not a bit of their losses, nor of the gradients of these."""
    tried, batch, changed = build(name, task, True), batch_of((9, 17, 17, 1, 12), task), 2
    found = []
    for shift in (0, 11):
        batch.input_ids[changed] = (batch.input_ids[changed] - 3 + shift) % (WORDS - 3) + 3
        losses = tried.losses(batch)
        others = torch.cat([losses[:changed], losses[changed + 1 :]])
        found.append((others.detach(), losses[changed].detach(), tried.gradients(others)))
    (others, own, gradients), (others_after, own_after, gradients_after) = found
    assert torch.equal(others, others_after)
    assert own != own_after
    assert all(torch.equal(gradients[module], gradients_after[module]) for module in gradients)


@pytest.mark.parametrize(("name", "task"), ISOLATED)
def test_a_loss_has_no_gradient_at_the_words_of_other_rows(name: str, task: str) -> None:
    tried, lengths = build(name, task, True), (9, 1, 17, 12)
    words: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        words.append(output.detach().requires_grad_())
        return words[-1]

    tried.task_model.model.get_input_embeddings().register_forward_hook(keep)
    for row, length in enumerate(lengths):
        # anew for each row, since some blocks can be gone through once only
        losses = tried.losses(batch_of(lengths, task))
        words_of_batch = words[-1]  # what came before it was to find out about the head
        if losses[row].item() == 0:  # one token and no target
            continue
        (grad,) = torch.autograd.grad(losses[row], words_of_batch)
        places = grad.abs().sum(-1) > 0
        allowed = torch.zeros_like(places)
        allowed[row, :length] = True
        assert places[row, : max(1, length - 1)].all()
        assert not (places & ~allowed).any()


@pytest.mark.parametrize("bad", [0, 2])
@pytest.mark.parametrize(("name", "task"), ISOLATED)
def test_a_row_that_is_not_finite_leaves_the_others_as_they_are(
    name: str, task: str, bad: int
) -> None:
    """So that an error can name the row."""
    tried, batch = build(name, task, True), batch_of((9, 17, 4, 12), task)
    expected = tried.losses(batch).detach()

    def spoil(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.index_fill(0, torch.tensor(bad), float("nan"))

    tried.task_model.model.get_input_embeddings().register_forward_hook(spoil)
    losses = tried.losses(batch)
    others = [row for row in range(4) if row != bad]
    assert losses[bad].isnan()
    torch.testing.assert_close(losses[others], expected[others])


# -- where it must not be done ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mistral", "gemma3", "modernbert"])
def test_rows_longer_than_a_window_are_not_packed(name: str, packed: list[int]) -> None:
    task, packs = ARCHITECTURES[name].tasks[0], ARCHITECTURES[name].packs
    fast, slow = (build(name, task, fast) for fast in (True, False))
    assert fast.task_model.longest_packed == (WINDOW if packs else 0)
    for longest in (WINDOW, WINDOW + 1, 3 * WINDOW):
        packed.clear()
        compare(fast, slow, batch_of((5, longest, 1), task))
        assert bool(packed) == (packs and longest <= WINDOW)


def test_a_window_smaller_than_what_is_tried_is_found_by_trying() -> None:
    fast, slow = (build("mistral", "causal-lm", fast, sliding_window=4) for fast in (True, False))
    assert not fast.task_model.packs
    assert "hidden states would differ" in fast.notes[0]
    compare(fast, slow, batch_of(RAGGED, "causal-lm"))


def test_a_model_with_another_attention_is_left_alone_and_says_so() -> None:
    fast = build("gemma2", "causal-lm", True)
    assert fast.notes == [
        "rows are padded instead of packed, which is slower: the model's attention is `eager`"
    ]
    assert fast.task_model.longest_packed == 0


@pytest.mark.skipif(
    MODERN_PACKS, reason="this version of transformers lets ModernBERT use lorakit's attention"
)
def test_a_model_that_takes_no_other_attention_keeps_its_own_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fast = build("modernbert", "sequence-classification", True)
    assert fast.notes == [
        "rows are padded instead of packed, which is slower: the model's attention is `sdpa`"
    ]
    assert not caplog.records


def test_a_soft_cap_on_attention_scores_is_applied(caplog: pytest.LogCaptureFixture) -> None:
    """Some versions of transformers attend by SDPA, which leaves it out."""
    batch, losses = batch_of(RAGGED, "causal-lm"), {}
    for cap in (0.01, 50.0):
        fast, slow = (
            build("gemma2", "causal-lm", fast, attn_logit_softcapping=cap) for fast in (True, False)
        )
        losses[cap] = fast.losses(batch).detach()
        assert_same({"losses": losses[cap]}, {"losses": slow.losses(batch).detach()})
    assert not torch.allclose(losses[0.01], losses[50.0], rtol=1e-3)
    theirs = auto_class("causal-lm").from_config(
        Gemma2Config(**(GROUPED | {"sliding_window": WINDOW}))
    )
    said = [
        record.message
        for record in caplog.records
        if "puts a soft cap on its attention scores" in record.message
    ]
    assert bool(said) == (theirs.config._attn_implementation == "sdpa")


@pytest.mark.usefixtures("lenient")
def test_blocks_that_look_at_their_mask_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, packed: list[int]
) -> None:
    """And no hook stays behind."""
    tried = build("llama", "causal-lm", False)
    use_attention(tried.task_model.model)
    block = tried.task_model.model.model.layers[1]
    real = block.forward

    def looks(hidden_states: Tensor, attention_mask: Any = None, **more: Any) -> Any:
        assert attention_mask is None or attention_mask.ndim == 4
        return real(hidden_states, attention_mask=attention_mask, **more)

    monkeypatch.setattr(block, "forward", looks)
    (note,) = speed_up(tried.task_model, tried.adapters)
    assert "do not take packed rows (AttributeError" in note
    assert not tried.task_model.packs
    packed.clear()
    compare(tried, build("llama", "causal-lm", False), batch_of(RAGGED, "causal-lm"))
    assert not packed


@pytest.mark.parametrize("seed", range(4))
def test_blocks_that_are_left_out_at_random_while_training(seed: int) -> None:
    """Layer drop (Fan et al., arXiv 1909.11556), as OPT has it: the first block may be left out, or
    the last."""
    fast = build("opt", "causal-lm", True, layerdrop=0.5, num_hidden_layers=3)
    slow = build("opt", "causal-lm", False, layerdrop=0.5, num_hidden_layers=3)
    batch = batch_of(RAGGED, "causal-lm")
    found = []
    for tried in (fast, slow):
        torch.manual_seed(seed)
        found.append(tried.losses(batch).detach())
    assert_same({"losses": found[0]}, {"losses": found[1]})


def test_rows_that_go_through_a_cache_stay_padded(packed: list[int]) -> None:
    """Without gradients alone: what a method's cache keeps decides what comes out."""
    tried = build("llama", "causal-lm", True)
    batch = batch_of(RAGGED, "causal-lm")
    expected = tried.losses(batch).detach()
    tried.task_model.new_cache = DynamicCache
    packed.clear()
    with torch.no_grad():
        assert tried.task_model.longest_packed == 0
        assert_same({"losses": tried.losses(batch)}, {"losses": expected})
    assert tried.task_model.longest_packed == math.inf
    assert not packed
    tried.losses(batch)
    assert packed


# -- what else has to stay as it was ---------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_trying_changes_neither_the_mode_nor_chance_nor_the_factors(training: bool) -> None:
    tried = build("llama", "causal-lm", False, dropout=True)
    use_attention(tried.task_model.model)
    tried.task_model.model.train(training)
    before = {name: p.detach().clone() for name, p in tried.task_model.model.named_parameters()}
    state = torch.get_rng_state()
    assert speed_up(tried.task_model, tried.adapters) == []
    assert torch.equal(torch.get_rng_state(), state)
    assert tried.task_model.model.training == training
    for name, parameter in tried.task_model.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_adapters_outside_of_the_body_are_left_alone() -> None:
    """Of the head, which a pass through the body does not reach."""
    method = {"target_modules": ["lm_head"]}
    fast, slow = (
        build("llama", "causal-lm", fast, method=method, tie_word_embeddings=False)
        for fast in (True, False)
    )
    compare(fast, slow, batch_of(RAGGED, "causal-lm"))


def test_a_model_without_adapters_is_packed_too() -> None:
    tried = build("llama", "causal-lm", False)
    merge_all(tried.task_model.model, tried.adapters)
    use_attention(tried.task_model.model)
    assert speed_up(tried.task_model, {}) == []
    assert tried.task_model.packs


@pytest.mark.parametrize(
    ("name", "task"), [("llama", "causal-lm"), ("bert", "sequence-classification")]
)
def test_a_merged_model_can_be_saved_and_loaded(name: str, task: str, tmp_path: Path) -> None:
    """Though its weights are views of larger ones."""
    tried, batch = build(name, task, True), batch_of(RAGGED, task)
    tried.task_model.model.eval()
    with torch.no_grad():
        expected = tried.losses(batch)
        merge_all(tried.task_model.model, tried.adapters)
        tried.task_model.model.save_pretrained(tmp_path)
        loaded = auto_class(task).from_pretrained(tmp_path)
        found = Tried(TaskModel(loaded, None, task_named(task), []), {}, []).losses(batch)
    assert_same({"losses": found}, {"losses": expected})


@pytest.mark.parametrize(
    ("name", "task"),
    [("gpt2", "causal-lm"), ("llama", "causal-lm"), ("bert", "sequence-classification")],
)
def test_bfloat16_is_packed_and_no_further_from_float32_than_padded_rows_are(
    name: str, task: str
) -> None:
    fast, slow, exact = (build(name, task, False) for _ in range(3))
    for tried in (fast, slow, exact):
        use_attention(tried.task_model.model)
        for parameter in tried.task_model.model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16().to(
                    torch.float32 if tried is exact else torch.bfloat16
                )
        for adapter in tried.adapters.values():
            adapter.lora_B.data *= 0.2
    assert speed_up(fast.task_model, fast.adapters) == []
    batch = batch_of(RAGGED, task)
    losses, gradients = [], []
    for tried in (fast, slow, exact):
        losses.append(tried.losses(batch))
        gradients.append(
            torch.cat([grad.flatten() for grad in tried.gradients(losses[-1]).values()])
        )
    for values in (losses, gradients):
        packed, padded = (
            float((x - values[2]).detach().norm() / values[2].detach().norm()) for x in values[:2]
        )
        assert 0 < packed <= 1.5 * padded + 1e-3


@pytest.mark.parametrize(
    ("name", "task"), [("gpt2", "causal-lm"), ("bert", "sequence-classification")]
)
def test_with_dropout_the_mean_loss_is_that_of_the_plain_model(name: str, task: str) -> None:
    settings = {"attn_pdrop": 0.3} if name == "gpt2" else {"attention_probs_dropout_prob": 0.3}
    batch, draws = batch_of((9, 1, 17, 5), task), []
    for fast in (True, False):
        tried = build(name, task, fast, dropout=True, **settings)
        torch.manual_seed(0)
        with torch.no_grad():
            draws.append(torch.stack([tried.losses(batch) for _ in range(60)]))
        torch.manual_seed(5)
        first = tried.gradients(tried.losses(batch))
        torch.manual_seed(5)
        assert all(
            torch.equal(first[name], grad)
            for name, grad in tried.gradients(tried.losses(batch)).items()
        )
    noise = (sum(x.var(0) for x in draws) / 60) ** 0.5
    assert bool(((draws[0].mean(0) - draws[1].mean(0)).abs() <= 5 * noise + 1e-5).all())


# -- every method ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("name", [*method_names(), *COMBINED])
def test_every_method_trains_as_without(
    name: str, kind: str, request: pytest.FixtureRequest
) -> None:
    """Losses step by step, while ranks, masks and tiers move."""
    method, settings = COMBINED.get(name, (name, {}))
    case = Case(method, kind, request.getfixturevalue(f"tiny_{kind}"), settings)
    losses = []
    for fast in (True, False):
        built = without_dropout(case.build(**case.moving(4)))
        assert not fast or speed_up(built.task_model, built.adapters) == []
        losses.append(
            torch.tensor([report.loss for report in steps(built, built.examples, spec())])
        )
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("name", [*method_names(), "nested"])
def test_blocks_that_are_computed_again_train_as_those_that_are_kept(
    name: str, kind: str, request: pytest.FixtureRequest
) -> None:
    """With the dropout of the model, and with tiers that are drawn for each row."""
    method, settings = ("chunkwise", {"training": "nested"}) if name == "nested" else (name, {})
    case = Case(method, kind, request.getfixturevalue(f"tiny_{kind}"), settings)
    losses, kept = [], []
    for again in (True, False):
        built = case.build(**case.moving(4))
        speed_up(built.task_model, built.adapters)
        if again:
            tiers = built.method.tiers
            checkpoint_blocks(built.task_model, tiers.recompute_context if tiers else nullcontext)
        losses.append(
            torch.tensor([report.loss for report in steps(built, built.examples, spec())])
        )
        kept.append(sum(x.numel() for x in kept_by(built)))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    assert kept[0] < kept[1]


def kept_by(built: Built) -> list[Tensor]:
    """What autograd keeps for the backward pass of a batch."""
    found: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        found.append(x)
        return x

    built.model.train()
    batch = collate(built.examples, np.arange(4), 0)
    built.method.before_forward(batch)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        built.task_model.row_losses(batch)
    return found


@pytest.mark.parametrize(
    ("name", "settings", "fits"),
    [
        ("llama", {"head_dim": 32, "intermediate_size": 64}, True),
        ("llama", {"head_dim": 32, "intermediate_size": 72}, False),
        ("llama", {"head_dim": 8, "intermediate_size": 64}, False),  # one key of 8
        ("bert", {"intermediate_size": 64}, True),
        ("gpt2", {}, True),
    ],
)
def test_blocks_whose_products_are_all_in_c(
    name: str, settings: dict[str, Any], fits: bool
) -> None:
    blocks = block_list(
        build(name, "sequence-classification", fast=False, **settings).task_model.model
    )
    assert [fits_kernels(block) for block in blocks] == [fits] * len(blocks)


@pytest.mark.parametrize(
    ("name", "layer", "fits"), [("gpt2", "c_attn", False), ("bert", "query", True)]
)
def test_a_layer_that_is_not_adapted_goes_by_tiles_if_it_is_plain(
    name: str, layer: str, fits: bool
) -> None:
    wide = {"intermediate_size": 64} if name == "bert" else {}
    tried = build(
        name, "sequence-classification", fast=False, method={"target_modules": [layer]}, **wide
    )
    assert [fits_kernels(block) for block in block_list(tried.task_model.model)] == [fits] * 2


def block_list(model: Any) -> list[Any]:
    use_attention(model)
    return list(packable_blocks(model))


@pytest.mark.skipif(bool(why_not("lora_linear")), reason=why_not("lora_linear"))
@pytest.mark.parametrize(("width", "compiles"), [(64, False), (72, True)])
def test_token_counts_are_rounded_up_only_where_products_are_compiled_for_them(
    width: int, compiles: bool
) -> None:
    config = BertConfig(**(BASE | {"intermediate_size": width}))
    model: Any = auto_class("sequence-classification").from_config(config).requires_grad_(False)
    use_attention(model)
    task_model = TaskModel(model, None, task_named("sequence-classification"), [])
    assert task_model.compiles
    assert speed_up(task_model, {}) == []
    assert task_model.compiles == compiles
    packing = task_model.packing(batch_of([60, 9], "sequence-classification"))
    assert packing is not None
    assert packing.tokens == (72 if compiles else 70)
