"""Tiny real models and data, made on the spot: no network, no files from elsewhere."""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Before anything imports huggingface_hub: tests never ask the hub, they test what happens without
# it.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lorakit.cli import main
from tests.support.kernels import why_not
from tests.support.tiny import (
    BAD,
    FILLER,
    GOOD,
    VOCABULARY,
    tokenizer,
    write_jsonl,
)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # tiny models only wait for a second one; as in the processes, for the same sums
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _compiled_here(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compiled blocks are those of this run: another version's, from a cache that all processes
    share, ended a test with an abort."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("inductor"))


LOG = logging.getLogger("lorakit")
LOG_AT_FIRST = LOG.handlers[:], LOG.level, LOG.propagate


@pytest.fixture(autouse=True)
def _log_as_at_first() -> None:
    """Commands that run in this process send lorakit's log to their console; each test finds it as
    it was at first, whatever ran before, fixtures of the whole file among them."""
    LOG.handlers[:], LOG.propagate = LOG_AT_FIRST[0], LOG_AT_FIRST[2]
    LOG.setLevel(LOG_AT_FIRST[1])


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`main` in this process; returns stdout of a command that succeeds."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["lorakit", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capfd.readouterr()
        assert not exit_.value.code, captured.err
        return captured.out

    return run


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random 2-layer BERT (hidden 32, feed-forward 48)."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    return _save(
        BertForSequenceClassification(config).bert,
        tokenizer(pair=True),
        tmp_path_factory.mktemp("bert"),
    )


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random 2-layer Llama with grouped queries (hidden 32, 4 heads, 2 key-value
    heads); no pad token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=VOCABULARY["[EOS]"],
    )
    return _save(LlamaForCausalLM(config), tokenizer(pair=False), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random 2-layer GPT-2, whose layers are Conv1D."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(VOCABULARY),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        bos_token_id=None,
        eos_token_id=VOCABULARY["[EOS]"],
    )
    return _save(GPT2LMHeadModel(config), tokenizer(pair=False), tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def sentiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl (96 rows) and validation.jsonl (24): sentence, label. Learnable:
    good words against bad."""
    folder = tmp_path_factory.mktemp("sentiment")
    rng = random.Random(0)
    for split, count in (("train", 96), ("validation", 24)):
        rows = []
        for i in range(count):
            words = [rng.choice((BAD, GOOD)[i % 2]) for _ in range(rng.randint(1, 4))]
            filler = [rng.choice(FILLER) for _ in range(rng.randint(0, 12))]
            rows.append({"sentence": " ".join([*words, *filler]), "label": i % 2})
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


@pytest.fixture(scope="session")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl (64 rows) and validation.jsonl (16): question, answer."""
    folder = tmp_path_factory.mktemp("sums")
    rng = random.Random(1)
    for split, count in (("train", 64), ("validation", 16)):
        rows = []
        for _ in range(count):
            a, b = rng.randint(0, 4), rng.randint(0, 5)
            filler = " ".join(rng.choice(FILLER) for _ in range(rng.randint(0, 6)))
            rows.append(
                {
                    "question": f"how many hens are there {filler} {a} and {b} ?",
                    "answer": f"there are {a + b} hens .",
                }
            )
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


def _save(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error within an optimisation is a reason to do without, as for users, where CI is
    strict."""
    monkeypatch.delenv("LORAKIT_STRICT", raising=False)


@pytest.fixture(params=["native", "torch"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Tests run on the kernels in C, where they can be compiled, and on torch's operations."""
    if request.param == "torch":
        monkeypatch.setenv("LORAKIT_KERNELS", "torch")
    elif reason := why_not("activations"):
        pytest.skip(reason)
    return str(request.param)
