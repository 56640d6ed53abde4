"""Findings about examples: each with its count, and the place of the first row."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lorakit.data.findings import (
    double_beginning,
    duplicates,
    end_tokens,
    overlap,
    without_end,
    without_target,
)
from lorakit.data.formats import format_named
from lorakit.data.keys import ChosenSpec
from lorakit.data.lengths import Lengths
from lorakit.data.part import Uncut
from lorakit.data.shown import kept_places, notable_first, spread
from tests.support.previews import nothing_cut, part
from tests.support.tokenizers import BOS, byte_level

TEXT = format_named("text")
SPEC = ChosenSpec(name_or_path="rows.jsonl", format="text", text_columns=["text"], packing=False)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """<unk> 0, <s> 1, </s> 2, and <turn>, a special token that was added."""
    found = byte_level(f"{BOS} $A")
    found.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    return found


def test_two_beginnings_next_to_each_other_in_a_row(tokenizer: Any) -> None:
    rows = part([[1, 40, 1], [1, 1, 40], [40, 1, 1]])
    found = double_beginning(rows, tokenizer)
    assert found is not None
    assert (found.count, found.examples.tolist()) == (2, [1, 2])
    assert found.first == "row 2 (training.jsonl)"
    assert found.text.startswith("2 of 3 training rows (the first is row 2 (training.jsonl)) have")
    assert "`<s>`" in found.text
    # the end of a row and the beginning of the next one
    assert double_beginning(part([[40, 1], [1, 40]]), tokenizer) is None


def test_a_beginning_that_is_the_end_too_may_stand_between_joined_rows(tokenizer: Any) -> None:
    both = byte_level(f"{BOS} $A")
    both.eos_token = BOS
    rows = part([[40, 1, 1, 41]], is_joined=True)
    assert double_beginning(rows, both) is None
    assert double_beginning(rows, tokenizer) is not None


def test_targets_end_in_an_end_token_or_white_space_after_it(tokenizer: Any) -> None:
    (line_break,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    ends = end_tokens(tokenizer, SimpleNamespace(eos_token_id=[2, 99]))
    assert ends == {2, 99, turn}
    last = [[40, 2], [40, turn], [40, turn, line_break], [40, 99], [40, 41], [40, line_break]]
    rows = part([[1, 50, *ids] for ids in last])
    found = without_end(rows, nothing_cut(rows), tokenizer, ends)
    assert found is not None
    assert found.examples.tolist() == [4, 5]


def test_an_end_token_that_is_no_target_is_not_learned(tokenizer: Any) -> None:
    rows = part(
        [[1, 40, 41, 2], [1, 40, 41, 2]], [[False, False, True, True], [False] * 2 + [True, False]]
    )
    found = without_end(rows, nothing_cut(rows), tokenizer, {2})
    assert found is not None
    assert found.examples.tolist() == [1]


def test_rows_that_are_cut_are_not_said_to_lack_an_end(tokenizer: Any) -> None:
    rows, before = part([[1, 40, 41], [1, 40, 41]]), part([[1, 40, 41, 2]])
    found = without_end(rows, Uncut(before.examples, {0: 0}), tokenizer, {2})
    assert found is not None
    assert found.examples.tolist() == [1]


def test_a_first_token_is_no_target(tokenizer: Any) -> None:
    rows = part([[1, 40], [1, 40]], [[True, False], [False, True]])
    found = without_target(rows)
    assert found is not None
    assert found.examples.tolist() == [0]


def test_duplicates_are_the_same_tokens_and_targets() -> None:
    rows = part(
        [[5, 6, 2], [5, 7, 2], [5, 6, 2], [5, 6, 2], [5, 7, 2]],
        [[False, True, True]] * 4 + [[False, False, True]],
    )
    found = duplicates(rows, TEXT, SPEC)
    assert found is not None
    assert found.examples.tolist() == [2, 3]
    assert found.first == "row 3 (training.jsonl)"
    assert "like row 1 (training.jsonl)" in found.text


def test_duplicates_of_joined_rows_are_those_of_their_texts() -> None:
    texts = ["a b", "", "c", "", "c"]
    rows = part([[5, 6, 2]] * 5, texts=texts, is_joined=True)
    found = duplicates(rows, TEXT, SPEC)
    assert found is not None
    assert (found.count, found.first, len(found.examples)) == (1, "row 5 (training.jsonl)", 0)


def test_validation_rows_with_the_input_of_a_training_row() -> None:
    train = part([[5, 6], [7, 8]], texts=["a b", "c d"])
    held = part([[9, 9], [7, 8], [9, 8]], texts=["e", "c d", "a b"], name="validation")
    found = overlap(train, held, TEXT, SPEC)
    assert found is not None
    assert (found.split, found.examples.tolist()) == ("validation", [1, 2])
    assert "row 2 (validation.jsonl), like row 2 (training.jsonl)" in found.text
    assert overlap(train, part([[9, 9]], texts=["e"]), TEXT, SPEC) is None


# -- which rows and tokens are shown ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "whole", "marks"),
    [
        ("abc", "abcde", "11100"),
        ("[abc]", "[abcde]", "1111001"),
        ("cde", "abcde", "00111"),
        ("[ab|x]", "[abcd|xyz]", "1110011001"),
        ("abc", "abc", "111"),
        ("aab", "aaaab", "11001"),
    ],
)
def test_the_tokens_that_a_cut_leaves_are_found(kept: str, whole: str, marks: str) -> None:
    found = kept_places([*map(ord, kept)], [*map(ord, whole)])
    assert found == [mark == "1" for mark in marks]


def test_tokens_that_are_no_part_of_the_row_are_not_found() -> None:
    assert kept_places([1, 9, 3], [1, 2, 3, 4]) is None


def test_rows_are_spread_and_notable_ones_come_along() -> None:
    items = [(row, row) for row in range(100)]
    assert [row for row, _ in spread(items, 5)] == [0, 25, 50, 74, 99]
    assert spread(items, 1) == [(0, 0)]
    assert spread(items, 0) == []
    assert spread(items[:3], 5) == items[:3]
    chosen = notable_first(items, {7, 8, 9}, 10)
    assert len(chosen) == 10
    assert chosen == sorted(chosen)
    assert {(7, 7), (8, 8), (9, 9)} < set(chosen)
    assert len(notable_first(items, set(range(50)), 10)) == 10
    assert len(notable_first(items, set(range(90)), 98)) == 98


# -- lengths ---------------------------------------------------------------------------------------


def test_quantiles_are_lengths_that_occur() -> None:
    lengths = Lengths(np.arange(1, 101))
    assert (lengths.quantile(0.5), lengths.quantile(0.95), lengths.longest) == (50, 95, 100)
    assert Lengths(np.array([4])).quantile(0.95) == 4


@pytest.mark.parametrize("values", [[1], [256] * 9, range(1, 101), [*range(90, 130), 90_000]])
@pytest.mark.parametrize("most", [1, 12, 40])
def test_every_row_is_in_one_bin(values: list[int], most: int) -> None:
    bins = Lengths(np.array(values)).bins(most)
    assert len(bins) <= most + 1
    assert sum(bin.rows for bin in bins) == len(values)
    assert [sum(bin.holds(value) for bin in bins) for value in values] == [1] * len(values)


def test_a_few_long_rows_do_not_squeeze_the_others_into_one_bin() -> None:
    bins = Lengths(np.array([*range(90, 130), 90_000])).bins(12)
    assert bins[-1].last is None
    assert bins[-1].rows == 1
    assert sum(bin.rows > 0 for bin in bins) > 2
