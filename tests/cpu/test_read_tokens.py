"""Tokens whose last hidden states are read: the last block computes no others, and nothing that is
read changes by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.cpu import encoder_block
from lorakit.cpu.optimisations import FirstTokens
from lorakit.cpu.probe import Probe
from lorakit.kernels.optimisation import attempt
from lorakit.models.task_model import TaskModel
from tests.support.batches import batch_of
from tests.support.blocks import BERT, LLAMA, RAGGED, Make, Tiny, close, tiny_of


def reading_all(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    real = TaskModel.packing
    with monkeypatch.context() as patch:
        patch.setattr(TaskModel, "packing", lambda self, batch, read=None: real(self, batch))
        reads_first, tiny.task_model.reads_first = tiny.task_model.reads_first, False
        found = tiny.gradients()
        tiny.task_model.reads_first = reads_first
    return found


@pytest.mark.parametrize("method", ["vanilla", "l1ra"])
@pytest.mark.parametrize("make", [LLAMA, BERT], ids=["llama", "bert"])
def test_losses_and_gradients_are_those_of_all_tokens(
    make: Make, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = tiny_of(make, method=method)
    tiny.task_model.reads_first = make is BERT
    read = tiny.task_model.packing(batch_of(RAGGED, make.task), torch.ones(len(RAGGED), 1) > 0)
    assert read is not None
    assert read.read is not None
    assert len(read.read) == len(RAGGED)
    close(tiny.gradients(), reading_all(tiny, monkeypatch))


def test_a_batch_without_targets_reads_all() -> None:
    tiny = tiny_of(LLAMA)
    packing = tiny.task_model.packing(batch_of((3, 2), LLAMA.task), torch.zeros(2, 2) > 0)
    assert packing is not None
    assert packing.read is None
    assert not tiny.losses((1, 1)).any()


def test_the_last_block_computes_the_first_token_of_each_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny = tiny_of(BERT)
    tiny.task_model.reads_first = True
    rows: list[int] = []
    real = encoder_block.add_layer_norm_in_c

    def watched(x: Tensor, *arguments: Any) -> Any:
        rows.append(len(x))
        return real(x, *arguments)

    monkeypatch.setattr(encoder_block, "add_layer_norm_in_c", watched)
    tiny.losses(RAGGED)
    assert rows == [sum(RAGGED) + 1] * 2 + [len(RAGGED)] * 2


class Mean(nn.Module):
    """A pooler that reads every token."""

    def __init__(self, pooler: nn.Module) -> None:
        super().__init__()
        self.pooler = pooler

    def forward(self, hidden: Tensor) -> Tensor:
        pooled: Tensor = self.pooler(hidden.mean(1, keepdim=True))
        return pooled


@pytest.mark.parametrize("reads_all", [False, True])
def test_a_head_that_reads_other_tokens_is_found_out(reads_all: bool) -> None:
    tiny = tiny_of(BERT)
    if reads_all:
        tiny.model.bert.pooler = Mean(tiny.model.bert.pooler)
    tiny.model.eval()
    reason = attempt(FirstTokens(Probe(tiny.task_model, tiny.adapters), tiny.blocks[-1]))
    assert tiny.task_model.reads_first != reads_all
    assert (reason is not None) == reads_all
