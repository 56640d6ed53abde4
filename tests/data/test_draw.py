"""Held-out and limited rows: the same every time, by classes, in order, and no input on both
sides."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from lorakit.data.choice import choose
from lorakit.data.draw import draw, hold_out, limited
from lorakit.data.keys import ChosenSpec
from lorakit.data.spec import DataSpec
from lorakit.data.table import Table
from lorakit.errors import RecipeError

CLASSES, LM = "sequence-classification", "causal-lm"


def spec(**keys: Any) -> DataSpec:
    return DataSpec.model_validate({"name_or_path": "./data", **keys})


def chosen(data: Table, task: str, **keys: Any) -> ChosenSpec:
    return choose(spec(**keys), task, data.column_names)


def parted(data: Table, task: str, lines: bool, **keys: Any) -> tuple[Table, Table]:
    """(training, validation) rows."""
    return hold_out(data, chosen(data, task, **keys), lines)


def sorted_by_label(rows: int = 100, classes: int = 2) -> Table:
    return Table.from_list(
        [{"text": f"film {i}", "label": i * classes // rows} for i in range(rows)]
    )


def labels(data: Table) -> Counter[str]:
    return Counter(data.cells("label").texts)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, "lorakit"):
        yield caplog


@pytest.mark.parametrize(("fraction", "held"), [(None, 10), (0.2, 20), (0.5, 50)])
def test_a_file_sorted_by_label_gives_every_class_its_share(
    fraction: float | None, held: int
) -> None:
    data = sorted_by_label()
    train, validation = parted(data, CLASSES, False, validation_split=fraction)
    assert labels(validation) == {"0": held // 2, "1": held // 2}
    for part in (train, validation):
        assert (np.diff(part.row_numbers) > 0).all()
    assert sorted([*train.row_numbers, *validation.row_numbers]) == list(range(1, 101))
    again = parted(data, CLASSES, False, validation_split=fraction)[1]
    assert again.row_numbers.tolist() == validation.row_numbers.tolist()


def test_rows_that_are_held_out_are_not_from_one_end() -> None:
    rows = Table.from_list([{"prompt": f"p{i}", "completion": "x"} for i in range(100)])
    numbers = parted(rows, LM, False)[1].row_numbers
    assert len(numbers) == 10
    assert numbers.min() < 50 < numbers.max()


def test_lines_of_a_text_stay_together(said: pytest.LogCaptureFixture) -> None:
    rows = Table.from_list([{"text": f"line {i}"} for i in range(30)])
    train, validation = parted(rows, LM, True)
    assert validation.row_numbers.tolist() == [28, 29, 30]
    assert limited(train, 4, chosen(train, LM), True).row_numbers.tolist() == [1, 2, 3, 4]
    assert "the last 3 of 30 lines" in said.text


@pytest.mark.parametrize("task", [CLASSES, LM])
def test_rows_of_one_input_are_on_one_side(task: Any) -> None:
    rows = [
        {"text": f"film {i % 40}", "label": i % 2, "prompt": f"p{i % 40}", "completion": f"c{i}"}
        for i in range(120)
    ]
    data = Table.from_list(rows)
    form = {} if task == CLASSES else {"format": "prompt-completion"}
    train, validation = parted(data, task, False, **form)
    column = "text" if task == CLASSES else "prompt"
    assert not set(train.cells(column).texts) & set(validation.cells(column).texts)
    assert 6 <= len(validation) <= 18


def test_where_all_inputs_are_the_same_rows_are_drawn_and_that_is_said(
    said: pytest.LogCaptureFixture,
) -> None:
    data = Table.from_list([{"prompt": "go: ", "completion": f"c{i}"} for i in range(20)])
    assert len(parted(data, LM, False)[1]) == 2
    assert "20 of 20 rows share their input with others" in said.text


def test_inputs_apart_come_before_shares_of_classes() -> None:
    rows = [{"text": f"film {i // 2}", "label": i % 4 // 2} for i in range(20)]
    train, validation = parted(Table.from_list(rows), CLASSES, False)
    assert len(validation) == 2
    assert not set(train.cells("text").texts) & set(validation.cells("text").texts)


@pytest.mark.parametrize("rows", range(3, 21))
def test_few_rows_can_be_held_out(rows: int) -> None:
    train, validation = parted(sorted_by_label(rows), CLASSES, False)
    assert len(train) + len(validation) == rows
    assert len(validation) == max(1, round(rows / 10))


def test_too_few_rows_are_told() -> None:
    with pytest.raises(RecipeError, match="1 rows are too few"):
        parted(sorted_by_label(1), CLASSES, False)
    with pytest.raises(RecipeError, match="each of the 2 rows has a label of its own"):
        parted(sorted_by_label(2), CLASSES, False)
    two = Table.from_list([{"prompt": f"p{i}", "completion": "x"} for i in range(2)])
    assert [len(part) for part in parted(two, LM, False)] == [1, 1]


def test_a_class_of_one_row_stays_in_training() -> None:
    rows = [{"text": f"film {i}", "label": "many" if i else "one"} for i in range(10)]
    for fraction in (0.1, 0.5, 0.9):
        train, _ = parted(Table.from_list(rows), CLASSES, False, validation_split=fraction)
        assert labels(train)["one"] == 1


def test_a_limit_is_exact_and_keeps_the_shares_of_classes() -> None:
    data = sorted_by_label(90, 3)
    for limit in (3, 10, 45, 90):
        found = limited(data, limit, chosen(data, CLASSES), False)
        assert len(found) == limit
        assert max(labels(found).values()) - min(labels(found).values()) <= 1
        assert (np.diff(found.row_numbers) > 0).all()
    assert limited(data, None, chosen(data, CLASSES), False) is data
    assert len(limited(data, 1000, chosen(data, CLASSES), False)) == 90


def test_shares_are_those_of_the_classes_to_a_row() -> None:
    strata = ["a"] * 70 + ["b"] * 25 + ["c"] * 5
    found = draw(100, 20, strata)
    assert found is not None
    assert Counter(strata[row] for row in found) == {"a": 14, "b": 5, "c": 1}
    few = draw(100, 3, strata)
    assert few is not None
    assert Counter(strata[row] for row in few) == {"a": 1, "b": 1, "c": 1}


def test_numbers_as_labels_are_drawn_without_classes() -> None:
    data = Table.from_list([{"text": f"film {i}", "label": i / 7} for i in range(50)])
    assert len(parted(data, CLASSES, False)[1]) == 5
