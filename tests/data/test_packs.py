"""`packing: documents`: documents share the places of a batch, and never see each other."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lorakit
from lorakit.data.choice import choose
from lorakit.data.examples import Examples
from lorakit.data.load import Rows
from lorakit.data.packs import pack
from lorakit.data.reading import Reader
from lorakit.data.spec import DataSpec
from lorakit.data.table import Table
from lorakit.errors import RecipeError
from lorakit.training.loop import step_order
from lorakit.training.spec import TrainSpec
from tests.support.tiny import write_jsonl
from tests.support.tokenizers import byte_level


def build(texts: list[str], length: int, lines: bool = False, **keys: Any) -> Examples:
    spec = DataSpec.model_validate({"name_or_path": "./data", "cache": False, **keys})
    data = Table.from_list([{"text": text} for text in texts])
    chosen = choose(spec, "causal-lm", data.column_names)
    reader = Reader(None, chosen, byte_level(), length, lambda done, rows: None)
    return reader.train(Rows(data, data, lines))


def packs_of(lengths: list[int], limit: int) -> list[list[int]]:
    rows, ends = pack(np.array(lengths, np.int64), limit)
    return [rows[start:end].tolist() for start, end in pairwise(ends)]


def test_packs_by_hand() -> None:
    # The longest first, each where it leaves the least room.
    assert packs_of([5, 3, 8, 2, 7], 10) == [[2, 3], [4, 1], [0]]
    assert packs_of([], 10) == []
    assert packs_of([10, 10], 10) == [[0], [1]]


def test_packs_hold_every_row_once_and_are_nearly_full() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(2, 100) for _ in range(3000)]
    packs = packs_of(lengths, 100)
    assert sorted(row for one in packs for row in one) == list(range(3000))
    assert all(sum(lengths[row] for row in one) <= 100 for one in packs)
    assert len(packs) <= 1.02 * -(-sum(lengths) // 100)


def test_no_token_is_lost_and_rows_stay_apart() -> None:
    tokenizer, length = byte_level(), 24
    texts = ["a fine film", "a fine warm film and a dull slow one, " * 4, "x", "1 + 1 = 2"]
    found = build(texts, length, packing="documents")
    assert found.packs is not None
    assert found.unit_lengths.max() <= length
    assert found.unit_lengths.sum() == len(found.tokens)
    for number, text in enumerate(texts, 1):
        whole = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        parts = [
            found.tokens[found.offsets[row] : found.offsets[row + 1]].tolist()
            for row in np.flatnonzero(found.row_ids == number)
        ]
        # The last token of a long document may be alone in its piece, and then is no target.
        assert sum(map(len, parts)) in (len(whole), len(whole) - 1)
    alone = build(texts, 1000, packing=False)
    first = alone.tokens[: alone.offsets[1]].tolist()
    assert any(
        found.tokens[found.offsets[row] : found.offsets[row + 1]].tolist() == first
        for row in range(len(found))
    )


def test_a_batch_counts_packs() -> None:
    found = build(["a fine film"] * 40, 64, packing="documents")
    assert found.packs is not None
    packs = len(found.packs) - 1
    assert packs < len(found)
    spec = TrainSpec.model_validate({"per_device_train_batch_size": 2})
    order = step_order(found.unit_lengths, spec)
    seen = [row for step in range(1, packs // 2 + 1) for row in found.rows_of(order.of_step(step))]
    assert len(set(seen)) == len(seen)
    assert len(seen) >= len(found) - int(np.diff(found.packs).max())


@pytest.mark.parametrize(
    ("keys", "lines", "why"),
    [
        ({}, True, "one running text, not documents"),
        ({"truncation": "drop"}, False, "loses nothing"),
    ],
)
def test_what_has_no_documents(keys: dict[str, Any], lines: bool, why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        build(["a", "b"], 64, lines, packing="documents", **keys)


def test_strides_are_for_joined_text() -> None:
    with pytest.raises(ValueError, match="packing: joined"):
        build(["a"], 64, packing="documents", stride=4)


def test_a_run_of_packs_learns_the_same_however_it_is_cut(tiny_llama: Path, tmp_path: Path) -> None:
    texts = [{"text": "good film " * (1 + i % 5)} for i in range(60)]
    write_jsonl(tmp_path / "train.jsonl", texts)  # type: ignore[arg-type]
    write_jsonl(tmp_path / "validation.jsonl", texts[:6])  # type: ignore[arg-type]
    recipe = {
        "model": {"name_or_path": str(tiny_llama), "task": "causal-lm"},
        "data": {"name_or_path": str(tmp_path), "packing": "documents", "max_seq_length": 32},
        "method": {"name": "vanilla", "r": 2},
        "train": {"num_train_epochs": 2, "per_device_train_batch_size": 2, "precision": "fp32"},
    }
    one, other = (
        lorakit.train(
            recipe, f"output_dir={tmp_path / name}", f"train.max_tokens_per_micro_batch={n}"
        )
        for name, n in (("a", "null"), ("b", 32))
    )
    assert one.metrics["loss"] == pytest.approx(other.metrics["loss"], rel=1e-4)
    packs = one.result["tokens"] / 2 / 32
    assert packs / 2 <= one.result["steps"] / 2 <= packs
