"""Joined examples against the same rows in arrays of their own."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lorakit.data.batches import collate
from lorakit.data.examples import Examples
from lorakit.data.joined import Joined, joined, set_figures


def part(lengths: list[int], first: int, row_ids: list[int], packs: Any = None) -> Examples:
    """Rows of these lengths, whose tokens are numbers from `first` on."""
    total = sum(lengths)
    return Examples(
        tokens=np.arange(first, first + total, dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        row_ids=np.array(row_ids),
        targets=np.arange(first, first + total) % 3 > 0,
        packs=None if packs is None else np.array(packs),
    )


ONE = part([3, 5], 0, [1, 4])
TWO = part([2, 4, 6], 100, [7, 2, 7])
THREE = part([4], 200, [1])
NAMES = ("one", "two", "three")


def whole() -> Examples:
    return Examples(
        tokens=np.concatenate([ONE.tokens, TWO.tokens, THREE.tokens]),
        offsets=np.array([0, 3, 8, 10, 14, 20, 24]),
        row_ids=np.array([1, 4, 11, 6, 11, 12]),
        targets=np.concatenate([p.targets for p in (ONE, TWO, THREE) if p.targets is not None]),
    )


def assert_same(one: Examples, other: Examples) -> None:
    for field in fields(Examples):
        found, expected = getattr(one, field.name), getattr(other, field.name)
        assert (found is None) == (expected is None)
        assert found is None or found.tolist() == expected.tolist(), field.name


@pytest.mark.parametrize("rows", [[0], [5, 0, 3], [2, 2, 1], [], [0, 1, 2, 3, 4, 5]])
def test_rows_are_those_of_one_set_with_all_of_them(rows: list[int]) -> None:
    found, same = Joined((ONE, TWO, THREE), NAMES), whole()
    assert len(found) == len(same)
    assert found.lengths.tolist() == same.lengths.tolist()
    assert found.row_ids.tolist() == same.row_ids.tolist()
    assert found.token_count == same.token_count == 24
    chosen: NDArray[np.int64] = np.array(rows, np.int64)
    assert_same(found.select(chosen), same.select(chosen))
    if rows:
        batch, expected = collate(found, chosen, 0), collate(same, chosen, 0)
        assert batch.row_ids == expected.row_ids
        assert batch.input_ids.tolist() == expected.input_ids.tolist()
        assert batch.labels.tolist() == expected.labels.tolist()


def test_row_ids_are_told_apart_and_in_words() -> None:
    found = Joined((ONE, TWO, THREE), NAMES)
    assert found.where([1]) == "row 1 of one"
    assert found.where(found.row_ids.tolist()) == (
        "rows 1 and 4 of one, rows 2 and 7 of two, row 1 of three"
    )
    assert whole().where([3, 1, 2]) == "rows 1, 2 and 3"


def test_units_are_packs_where_a_set_has_packs_and_rows_where_not() -> None:
    packed = part([2, 4, 6], 100, [7, 2, 7], packs=[0, 2, 3])
    found = Joined((ONE, packed, THREE), NAMES)
    assert found.unit_lengths.tolist() == [3, 5, 6, 6, 4]
    assert found.rows_of(np.array([2, 0, 4])).tolist() == [2, 3, 0, 5]
    assert found.mixture.sizes == (2, 2, 1)
    plain = Joined((ONE, TWO), NAMES[:2])
    assert plain.rows_of(np.array([4, 1])).tolist() == [4, 1]


def test_a_single_set_is_itself_and_a_changed_set_changes_the_digest() -> None:
    assert joined([ONE], ["one"]) is ONE
    assert Joined((ONE, TWO), NAMES[:2]).digest() != Joined((TWO, ONE), NAMES[:2]).digest()
    longer = part([3, 6], 0, [1, 4])
    assert Joined((ONE, TWO), NAMES[:2]).digest() != Joined((longer, TWO), NAMES[:2]).digest()


def test_figures_of_the_sets() -> None:
    one, two = set_figures(Joined((ONE, TWO), NAMES[:2], (3.0, 2.0)))
    assert (one.name, one.rows, one.tokens, one.rows_per_epoch) == ("one", 2, 8, 3)
    assert (two.rows_per_epoch, two.share_of_rows) == (2, 0.4)
    # 3 rows of 4 tokens on average, and 2 of 4
    assert one.share_of_tokens == pytest.approx(12 / 20)
    assert (one.passes_per_epoch, two.passes_per_epoch) == (1.5, pytest.approx(2 / 3))
    assert set_figures(ONE) == []
