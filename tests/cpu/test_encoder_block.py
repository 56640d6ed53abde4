"""BERT's blocks as one operation; what they have in common with others is in test_whole_block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    BertConfig,
    CamembertConfig,
    DebertaConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    ErnieConfig,
    MPNetConfig,
    RobertaConfig,
    RobertaPreLayerNormConfig,
    XLMRobertaConfig,
)

from lorakit.models.task_model import TaskModel
from tests.support.blocks import (
    BERT,
    BERT_SIZES,
    DTYPE,
    RAGGED,
    Case,
    Tiny,
    assert_as_near,
    assert_by_modules,
    bert_config,
    close,
    compare_with_float64,
    errors,
    exact_twin,
    is_factor,
    plain_name,
    tiny_of,
    watch,
)


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return watch(monkeypatch, BERT)


# -- against float64 -------------------------------------------------------------------------------

WIDE_HEADS: dict[str, Any] = BERT_SIZES | {
    "hidden_size": 128,
    "intermediate_size": 160,
    "initializer_range": 0.1,
}
NO_ATTENTION = dict.fromkeys(("query", "key", "value"), 0)
# The first pattern that fits a layer decides.
RANKS = {
    "key": 0,
    "attention.output.dense": 1,
    "intermediate.dense": 40,
    "output.dense": 33,
    "value": 17,
}
CASES = {
    "bert": Case(bert_config()),
    "roberta": Case(RobertaConfig(**BERT_SIZES)),
    "gelu by tanh": Case(bert_config(hidden_act="gelu_new")),
    "silu": Case(bert_config(hidden_act="silu")),
    "heads of 64": Case(BertConfig(**WIDE_HEADS)),
    "three heads": Case(bert_config(hidden_size=96, num_attention_heads=3)),
    "ranks": Case(bert_config(), {"rank_pattern": RANKS}),
    "none for the attention": Case(
        bert_config(), {"rank_pattern": NO_ATTENTION | {"attention.output.dense": 0}}
    ),
    "none at all": Case(bert_config(), {"rank_pattern": {".*": 0}}),
    "gates": Case(
        bert_config(), {"method": "l1ra", "rank_pattern": {"value": 0, "intermediate.dense": 7}}
    ),
    "residual": Case(
        bert_config(), {"residual": True, "rank_pattern": {"query": 0, "intermediate.dense": 0}}
    ),
    "gates and residual": Case(RobertaConfig(**BERT_SIZES), {"method": "l1ra", "residual": True}),
    "electra": Case(ElectraConfig(**BERT_SIZES, embedding_size=64)),
}


@pytest.mark.parametrize("lengths", [RAGGED, (31,), (1,) * 20], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_results_are_as_near_to_float64_as_those_of_the_modules(
    name: str, lengths: tuple[int, ...], whole: list[int]
) -> None:
    case = CASES[name]
    compare_with_float64(tiny_of(BERT, case.config, **case.settings), lengths, whole)


@pytest.mark.parametrize("method", ["vanilla", "l1ra"])
def test_losses_and_gradients_of_heads_are_too(method: str, whole: list[int]) -> None:
    tiny = tiny_of(BERT, method=method)
    twin = exact_twin(tiny)
    trained = {name for name, p in tiny.model.named_parameters() if p.requires_grad}
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(plain_name(name) in trained)
    padded = Tiny(TaskModel(twin, None, tiny.task_model.task, []), tiny.method)
    exact = {plain_name(name): value.double() for name, value in padded.gradients().items()}
    assert any(not is_factor(name) for name in trained)
    whole.clear()
    ours = {name: value.double() for name, value in tiny.gradients().items()}
    assert len(whole) == 2
    with tiny.by_modules():
        theirs = {name: value.double() for name, value in tiny.gradients().items()}
    assert_as_near(ours, theirs, exact)


# -- dropout ---------------------------------------------------------------------------------------

HIDDEN, WEIGHTS = "hidden_dropout_prob", "attention_probs_dropout_prob"


@pytest.mark.parametrize(
    "dropouts", [{HIDDEN: 0.2}, {WEIGHTS: 0.2}, {HIDDEN: 0.1, WEIGHTS: 0.3}], ids=str
)
def test_masks_are_those_of_the_modules(dropouts: dict[str, float], whole: list[int]) -> None:
    """In all blocks: so the seeds are drawn in the same order. What follows the last draw is the
    same too."""
    tiny = tiny_of(BERT, bert_config(**dropouts))
    whole.clear()
    ours, after = tiny.gradients(), torch.get_rng_state()
    assert len(whole) == 2
    with tiny.by_modules():
        theirs = tiny.gradients()
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(ours["losses"], theirs["losses"])
    close(ours, theirs)
    assert max(errors(tiny.gradients(dropout_seed=1), ours).values()) > 0.3


def test_dropouts_are_those_of_the_moment(whole: list[int]) -> None:
    tiny = tiny_of(BERT, bert_config(hidden_dropout_prob=0.2))
    before = tiny.gradients()
    for block in tiny.blocks:
        block.output.dropout.p = 0.4
        block.attention.output.dropout.eval()
    assert_by_modules(tiny, whole, 2)
    assert max(errors(tiny.gradients(), before).values()) > 0.1


# -- passes that can not be one operation ----------------------------------------------------------


@pytest.mark.parametrize(
    "part", ["output.LayerNorm", "attention.output.LayerNorm", "attention.output.dropout"]
)
def test_parts_that_are_watched_go_through_the_modules(part: str, whole: list[int]) -> None:
    tiny = tiny_of(BERT)
    handle = tiny.blocks[0].get_submodule(part).register_forward_hook(lambda *arguments: None)
    assert_by_modules(tiny, whole, 1)
    handle.remove()
    assert_by_modules(tiny, whole, 2)


@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_norms_that_are_trained_get_their_gradients(parameter: str, whole: list[int]) -> None:
    tiny = tiny_of(BERT)
    norm = getattr(tiny.blocks[1].output.LayerNorm, parameter).requires_grad_()
    assert_by_modules(tiny, whole, 1)
    (grad,) = torch.autograd.grad(tiny.losses(RAGGED).sum(), norm)
    assert grad.any()


def test_encoded_states_go_through_the_modules(whole: list[int]) -> None:
    """Which do nothing with them in an encoder."""
    tiny = tiny_of(BERT)
    tiny.model.eval()
    expected = tiny.losses(RAGGED)
    states = torch.zeros(len(RAGGED), 3, 64, dtype=DTYPE)

    def add(
        module: nn.Module, arguments: tuple[Any, ...], settings: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        return (*arguments[:2], states, *arguments[3:]), settings

    handle = tiny.blocks[0].register_forward_pre_hook(add, with_kwargs=True)
    whole.clear()
    assert torch.equal(tiny.losses(RAGGED), expected)
    assert len(whole) == 1
    handle.remove()


# -- models that are not taken ---------------------------------------------------------------------

FLAT: dict[str, Any] = {
    "vocab_size": 48,
    "dim": 64,
    "hidden_dim": 96,
    "n_layers": 2,
    "n_heads": 2,
    "max_position_embeddings": 320,
}
NO_DROPOUT: dict[str, Any] = {
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "seq_classif_dropout": 0.0,
    "classifier_dropout": 0.0,
}
RELATIVE: dict[str, Any] = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
    "max_relative_positions": 16,
}
REFUSED = {
    "relu": bert_config(hidden_act="relu"),
    "a decoder": bert_config(is_decoder=True, use_cache=False),
    "cross-attention": bert_config(is_decoder=True, add_cross_attention=True, use_cache=False),
    "feed-forward by chunks": bert_config(chunk_size_feed_forward=1),
    "heads of 8": bert_config(num_attention_heads=8),
    "odd widths": bert_config(intermediate_size=72),
    "norms at first": RobertaPreLayerNormConfig(**BERT_SIZES),
    "albert": AlbertConfig(**BERT_SIZES, embedding_size=32, classifier_dropout_prob=0.0),
    "deberta": DebertaConfig(**BERT_SIZES, **RELATIVE, pooler_dropout=0.0),
    "deberta-v2": DebertaV2Config(**BERT_SIZES, **RELATIVE, pooler_dropout=0.0),
    "distilbert": DistilBertConfig(**FLAT, **NO_DROPOUT, initializer_range=0.16, pad_token_id=0),
    "mpnet": MPNetConfig(**BERT_SIZES),
}
TAKEN = {
    "camembert": CamembertConfig(**BERT_SIZES),
    "electra": ElectraConfig(**BERT_SIZES, embedding_size=32),
    "ernie": ErnieConfig(**BERT_SIZES),
    "roberta": RobertaConfig(**BERT_SIZES),
    "xlm-roberta": XLMRobertaConfig(**BERT_SIZES),
}


@pytest.mark.parametrize("name", [*REFUSED, *TAKEN])
def test_models_train_as_they_do_with_padded_rows(name: str, whole: list[int]) -> None:
    """Each layer by itself, where rows are padded."""
    tiny, padded = (tiny_of(BERT, (REFUSED | TAKEN)[name]) for _ in range(2))
    padded.task_model.packs = False
    whole.clear()
    ours, theirs = (losses_around_a_step(each) for each in (tiny, padded))
    assert len(whole) == (4 if name in TAKEN else 0)
    assert any(tiny.is_whole) == (name in TAKEN)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=0.03, atol=0.05)
    assert not torch.allclose(theirs[0], theirs[1], rtol=0.1, atol=0.1)


def losses_around_a_step(tiny: Tiny) -> list[Tensor]:
    """Of plain gradient descent: Adam's first step would magnify roundings."""
    losses = tiny.losses(RAGGED)
    losses.mean().backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in tiny.model.parameters():
            if parameter.grad is not None:
                parameter -= 0.3 * parameter.grad
    return [losses.detach(), tiny.losses(RAGGED).detach()]


def test_the_last_block_of_one_and_of_many(whole: list[int]) -> None:
    for layers in (1, 4):
        tiny = tiny_of(BERT, bert_config(num_hidden_layers=layers))
        assert_by_modules(tiny, whole, layers)
