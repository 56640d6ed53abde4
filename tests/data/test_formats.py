"""Formats: found by their files; targets may be anywhere in a row."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorakit.data import formats
from lorakit.data.batches import IGNORED, collate
from lorakit.data.choice import choose
from lorakit.data.collect import Collector
from lorakit.data.examples import Examples
from lorakit.data.formats import format_of
from lorakit.data.keys import ChosenSpec, DataKeys
from lorakit.data.load import Rows
from lorakit.data.reading import Reader
from lorakit.data.spec import DataSpec
from lorakit.data.table import Table
from lorakit.errors import RecipeError
from lorakit.models.task_model import TaskModel
from lorakit.models.tasks import task_named
from tests.support.tiny import VOCABULARY

# A format as somebody would add it: texts that take turns, of which every second one is learned.
TURNS = """
import numpy as np
from lorakit.data.cells import loads
from lorakit.data.collect import Collector
from lorakit.data.formats import Format
from lorakit.data.tokenise import Tokeniser


class Turns(Format):
    name = "turns"
    task = "causal-lm"
    told_by = ("a column of turns",)
    when_cut = "are cut"

    def detects(self, spec, columns):
        return "turns" in columns

    def chosen(self, spec, columns, record):
        return {}

    def used_columns(self, spec, columns):
        return ["turns"]

    def learned_texts(self, data, spec, lines):
        return [" ".join(loads(text)) for text in data.cells("turns").texts]

    def read(self, split):
        rows = Collector(split.spec, split.max_length, split.data)
        tokeniser = Tokeniser(split.tokenizer)
        for row, text in enumerate(split.data.cells("turns").texts):
            parts = tokeniser.prompts(loads(text))
            learned = np.repeat(np.arange(len(parts)) % 2 == 1, list(map(len, parts)))
            ids = [token for part in parts for token in part]
            rows.add(row, ids, len(ids), targets=learned)
        return rows.made()


FORMAT = Turns()
"""
ROW = {"turns": ["how many eggs ?", "3 eggs .", "and hens ?", "there are 9"]}


@pytest.fixture
def turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A file more in the folder of formats."""
    (tmp_path / "turns.py").write_text(TURNS, encoding="utf-8")
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path)])
    formats.formats.cache_clear()
    formats.formats_of_keys.cache_clear()
    yield
    monkeypatch.undo()
    formats.formats.cache_clear()
    formats.formats_of_keys.cache_clear()


def plain(**keys: Any) -> DataKeys:
    return DataKeys.model_validate({"name_or_path": "./data", **keys})


def read(rows: list[dict[str, Any]], model: Path, length: int = 64, **keys: Any) -> Examples:
    data = Table.from_list(rows)
    spec = choose(plain(cache=False, **keys), "causal-lm", data.column_names)
    reader = Reader(None, spec, AutoTokenizer.from_pretrained(model), length, lambda *_: None)
    return reader.train(Rows(data, data))


def test_a_format_is_one_file(turns: None, tiny_llama: Path) -> None:
    chosen = choose(plain(), "causal-lm", ["turns", "text"])
    assert chosen.format == format_of(chosen).name == "turns"
    found = read([ROW], tiny_llama)
    learned = [VOCABULARY[word] for word in ["3", "eggs", ".", "there", "are", "9"]]
    labels = collate(found, np.arange(1), 0).labels[0]
    assert labels[labels != IGNORED].tolist() == learned
    with pytest.raises(RecipeError, match="`prompt` has no effect: rows are read as turns"):
        choose(plain(format="turns", prompt="{text}"), "causal-lm", ["turns", "text"])
    with pytest.raises(RecipeError, match="do not tell how to read a row") as caught:
        choose(plain(), "causal-lm", ["x"])
    assert "a column of turns" in str(caught.value)


def test_the_loss_is_over_targets_in_the_middle_of_rows(turns: None, tiny_llama: Path) -> None:
    rows = [ROW, {"turns": ["how many ?", "2", "and eggs are there ?", "4"]}]
    found = read(rows, tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    batch = collate(found, np.arange(2), 0)
    assert batch.targets == 6 + 2
    losses, _ = TaskModel(model, tokenizer, task_named("causal-lm"), []).row_losses(batch)
    for row, (start, end) in enumerate(pairwise(found.offsets)):
        ids = torch.from_numpy(found.tokens[start:end].astype(np.int64))
        assert found.targets is not None
        places = np.flatnonzero(found.targets[start:end])
        assert (np.diff(places) > 1).any(), "with something between that is no target"
        scores = model(ids[None]).logits[0].log_softmax(-1)
        expected = -sum(scores[place - 1, ids[place]] for place in places.tolist())
        torch.testing.assert_close(losses[row], expected, rtol=1e-4, atol=1e-4)


def test_a_row_whose_targets_are_cut_away_is_left_out(turns: None, tiny_llama: Path) -> None:
    long = {"turns": ["how many eggs are there in the boxes ?", "9"]}
    found = read([long, ROW], tiny_llama, length=6)
    assert found.row_ids.tolist() == [2]
    assert found.targets is not None
    assert found.targets.tolist() == [False] * 4 + [True] * 2


def test_the_mark_of_a_first_token_alone_makes_no_target() -> None:
    data = Table.from_list([{"text": "x"}] * 3)
    rows = Collector(plain(), 8, data)
    marks = np.array([True, False, False])
    assert not rows.add(0, [5, 6, 7], 3, targets=marks)
    assert not rows.add(1, [5], 1, targets=marks[:1])
    assert rows.add(2, [5, 6, 7], 3, targets=marks[::-1])
    examples, counts = rows.made()
    assert counts == {"empty": 2, "empty_row": 0}
    assert examples.targets is not None
    assert examples.targets.tolist() == [False, False, True]


def test_marks_are_part_of_what_training_sees_and_take_a_byte_a_token() -> None:
    tokens, offsets, marks = (
        np.arange(5, 9, dtype=np.int32),
        np.array([0, 2, 4]),
        np.array([0, 1, 1, 1], bool),
    )
    one = Examples(tokens, offsets, np.arange(2), targets=marks)
    other = Examples(tokens, offsets, np.arange(2), targets=~marks)
    assert one.digest() != other.digest()
    assert one.targets is not None
    assert one.targets.nbytes == len(tokens)
    swapped = one.select(np.array([1, 0]))
    assert (swapped.tokens.tolist(), swapped.row_ids.tolist()) == ([7, 8, 5, 6], [1, 0])
    assert swapped.targets is not None
    assert swapped.targets.tolist() == [True, True, False, True]
    assert one.select(np.array([], np.int64)).offsets.tolist() == [0]


def test_a_recipe_offers_the_formats_that_there_are() -> None:
    schema = DataSpec.model_json_schema()["properties"]
    names = ["alpaca", "chat", "classification", "prompt-completion", "sharegpt", "text"]
    assert schema["format"]["anyOf"][0]["enum"] == names
    targets = ["assistant", "last_assistant", "all", "completion"]
    assert schema["loss_on"]["anyOf"][0]["enum"] == targets
    assert issubclass(ChosenSpec, DataKeys)
    for form in formats.formats():
        assert set(form.keys) <= set(DataKeys.model_fields)
        assert form in task_named(form.task).formats
