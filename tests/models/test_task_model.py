"""Logits where targets stand, whatever the architecture does to them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lorakit.adapters.inject import block_linears, inject
from lorakit.data.batches import IGNORED, Batch, collate
from lorakit.data.examples import Examples
from lorakit.methods import config_classes, method_class
from lorakit.models.task_model import TaskModel
from lorakit.models.tasks import task_named
from lorakit.training.loop import build_optimizer, train
from lorakit.training.spec import TrainSpec


def _examples(first_target: list[int]) -> Examples:
    tokens, offsets = np.arange(5, 30, dtype=np.int32), np.array([0, 12, 19, 25])
    places = np.concatenate([np.arange(12), np.arange(7), np.arange(6)])
    targets = places >= np.repeat(first_target, np.diff(offsets))
    return Examples(tokens, offsets, row_ids=np.arange(3), targets=targets)


def _batch() -> Batch:
    return collate(_examples([4, 6, 0]), np.arange(3), pad_id=0)


def _check(model: torch.nn.Module, folder: Path, bare: bool) -> None:
    task_model = TaskModel(
        model.eval(), AutoTokenizer.from_pretrained(folder), task_named("causal-lm"), []
    )
    batch = _batch()
    assert task_model.bare_head is bare
    losses, _ = task_model.row_losses(batch)
    logits = task_model.model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask
    ).logits.log_softmax(-1)
    for row in range(3):
        places = [t for t in range(1, batch.labels.shape[1]) if batch.labels[row, t] != IGNORED]
        expected = -sum(logits[row, t - 1, batch.labels[row, t]] for t in places)
        torch.testing.assert_close(losses[row], expected, rtol=1e-4, atol=1e-4)
    assert batch.targets == (12 - 4) + 1 + 5


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_row_losses_equal_those_of_all_logits(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    _check(AutoModelForCausalLM.from_pretrained(folder), folder, bare=True)


def test_an_architecture_that_caps_its_logits_keeps_its_own_head(tiny_llama: Path) -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=0.5,
        pad_token_id=0,
    )
    _check(Gemma2ForCausalLM(config), tiny_llama, bare=False)


def test_a_causal_model_whose_every_rank_is_0_still_trains_nothing(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    task_model = TaskModel(
        model, AutoTokenizer.from_pretrained(tiny_llama), task_named("causal-lm"), []
    )
    method = method_class("vanilla")(config_classes()["vanilla"]())
    inject(model, method, dict.fromkeys(block_linears(model), 0))
    examples = _examples([0, 0, 0])
    spec = TrainSpec(max_steps=2)
    losses = [
        report.loss
        for report in train(task_model, method, build_optimizer(method, [], spec), examples, spec)
    ]
    assert losses[0] == pytest.approx(losses[1])


def test_a_model_that_looks_at_a_layers_weight_can_be_adapted() -> None:
    """T5 asks its feed-forward layer for its type."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=60,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config).eval()
    ids = torch.arange(3, 10)[None]
    before = model(input_ids=ids, decoder_input_ids=ids).logits
    method = method_class("vanilla")(config_classes()["vanilla"](r=4))
    inject(model, method, dict.fromkeys(block_linears(model), 4))
    torch.testing.assert_close(model(input_ids=ids, decoder_input_ids=ids).logits, before)
