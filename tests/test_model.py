"""Logits where targets stand, whatever the architecture does to them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from lorakit.data.examples import IGNORED, Batch, Examples, collate
from lorakit.model import TaskModel


def _batch() -> Batch:
    examples = Examples(
        tokens=np.arange(5, 30, dtype=np.int32),
        offsets=np.array([0, 12, 19, 25]),
        row_ids=np.arange(3),
        first_target=np.array([4, 6, 0]),
    )
    return collate(examples, np.arange(3), pad_id=0)


def _check(model: torch.nn.Module, folder: Path, bare: bool) -> None:
    task_model = TaskModel(model.eval(), AutoTokenizer.from_pretrained(folder), "causal-lm", [])
    batch = _batch()
    assert task_model.bare_head is bare
    losses, _ = task_model.row_losses(batch)
    logits = task_model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.log_softmax(-1)
    for row in range(3):
        places = [t for t in range(1, batch.labels.shape[1]) if batch.labels[row, t] != IGNORED]
        expected = -sum(logits[row, t - 1, batch.labels[row, t]] for t in places)
        torch.testing.assert_close(losses[row], expected, rtol=1e-4, atol=1e-4)
    assert batch.targets == (12 - 4) + 1 + 5


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_row_losses_equal_those_of_all_logits(name: str, request: pytest.FixtureRequest) -> None:
    from transformers import AutoModelForCausalLM

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
