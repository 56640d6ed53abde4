"""Labels: classes by the text of the file, in one order whatever the hash seed; numbers where they
are surely numbers."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lorakit.data.cells import Kind
from lorakit.data.labels import (
    GLUE,
    Labels,
    count_labels,
    glue_task,
    label_ids,
    listed_classes,
    warn_of_alike,
    warn_of_missing,
)
from lorakit.data.spec import DataSpec
from lorakit.data.table import Builder, Table
from lorakit.errors import RecipeError


def spec(**keys: Any) -> DataSpec:
    return DataSpec.model_validate({"name_or_path": "./data", **keys})


def json_column(*values: Any) -> Table:
    return Table.from_list([{"text": "x", "label": value} for value in values])


def csv_column(*cells: str) -> Table:
    builder = Builder()
    for cell in cells:
        builder.add_cells(["text", "label"], ["x", cell])
    return builder.table("x.csv")


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, "lorakit"):
        yield caplog


@pytest.mark.parametrize(
    ("table", "names"),
    [
        (json_column("2021-03-02", "2021-03-01"), ["2021-03-01", "2021-03-02"]),
        (json_column(10, 9, 10), ["9", "10"]),
        (json_column("10", "9"), ["9", "10"]),
        (json_column(False, True), ["false", "true"]),
        (json_column("nan", "inf", "a"), ["a", "inf", "nan"]),
        (json_column("nan", "2", "10"), ["10", "2", "nan"]),
        (json_column("b", "B", "ä"), ["B", "b", "ä"]),
        (csv_column("007", "7"), ["007", "7"]),
        (csv_column("true", "False"), ["False", "true"]),
        (csv_column("+1", "-1"), ["-1", "+1"]),
    ],
)
def test_classes_are_named_by_the_text_of_the_file(table: Table, names: list[str]) -> None:
    labels = count_labels(table, spec())
    assert labels == Labels(names)
    ids = label_ids(table, labels, spec(), "training")
    assert [names[i] for i in ids] == table.cells("label").texts


def test_whole_numbers_with_a_fraction_are_the_classes_of_their_digits(
    said: pytest.LogCaptureFixture,
) -> None:
    table = json_column(1.0, 0.0, 2)
    assert count_labels(table, spec()) == Labels(["0", "1", "2"])
    assert "are read as classes" in said.text


@pytest.mark.parametrize(
    "table",
    [json_column(0.0, 2.6, 5.0), json_column(0.5, 5, 1.5), csv_column("0.000", "2.50", "5.000")],
)
def test_numbers_with_fractions_are_numbers_and_that_is_said(
    table: Table, said: pytest.LogCaptureFixture
) -> None:
    labels = count_labels(table, spec())
    assert labels.regression
    assert "regression" in said.text
    expected = [float(text) for text in table.cells("label").texts]
    assert label_ids(table, labels, spec(), "training").tolist() == pytest.approx(expected)


UNCLEAR = {
    "strings with fractions": (json_column("0.0", "2.6", "5.0"), "strings that are numbers"),
    "one fraction among classes": (json_column(0, 1, 1.5, 0, 1), r"1.5 in row 3"),
    "one in a CSV file": (csv_column("0", "1", "1.5", "0"), "mostly whole numbers"),
    "scores that are all whole": (
        csv_column("5.000", "2.000"),
        "whole numbers written with a fraction",
    ),
    "strings and numbers": (json_column("a", 1, 2), "2 numbers and 1 strings"),
    "booleans and numbers": (json_column(True, 1, 0), "1 booleans and 2 numbers"),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_labels_that_do_not_tell_are_asked_about(case: str) -> None:
    table, words = UNCLEAR[case]
    with pytest.raises(RecipeError, match=words) as caught:
        count_labels(table, spec())
    assert caught.value.problems[0].key == "data.problem_type"
    assert "data.label_column" in str(caught.value)
    assert "expected: data.problem_type: single_label_classification or regression" in str(
        caught.value
    )
    assert not count_labels(table, spec(problem_type="single_label_classification")).regression
    if "and" not in case:
        assert count_labels(table, spec(problem_type="regression")).regression


NO_LABELS = {
    "null": json_column("a", None, "b"),
    "missing": Table.from_list([{"label": "a"}, {"text": "x"}]),
    "blank": json_column("a", " "),
    "empty cell": csv_column("a", ""),
    "a list": json_column("a", ["b"]),
    "a mapping": json_column("a", {"b": 1}),
    "not a number": json_column(1.5, float("nan")),
}


@pytest.mark.parametrize("case", NO_LABELS)
@pytest.mark.parametrize("problem", [None, "regression", "single_label_classification"])
def test_a_row_without_a_label_is_named(case: str, problem: str | None) -> None:
    if case == "not a number":
        NO_LABELS[case] = Table.from_arrow(pa.table({"label": [1.5, float("nan")]}))
    with pytest.raises(
        RecipeError, match=r"row 2 .*data\.label_column|`label` \(data\.label_column\).*row "
    ) as caught:
        count_labels(NO_LABELS[case], spec(problem_type=problem))
    assert caught.value.problems[0].key == "data.label_column"


@pytest.mark.parametrize("text", ["three", "1,5", "1_000", "0x10", "nan", "inf", "1e99"])
def test_regression_takes_numbers_alone(text: str) -> None:
    with pytest.raises(RecipeError, match="regression needs numbers"):
        count_labels(csv_column("1.5", text), spec(problem_type="regression"))


def test_the_order_of_classes_does_not_depend_on_the_hash_seed() -> None:
    code = (
        "from lorakit.data.labels import *; from lorakit.data.table import Table; from"
        " lorakit.data.spec import DataSpec;rows = [{'label': name} for name in ('nan', 'inf',"
        " 'infinity', '-inf', 'b', 'a', '1', '1.0', '1e0',"
        " '01')];print(count_labels(Table.from_list(rows), DataSpec.model_validate({'name_or_path':"
        " './x'})).names)"
    )
    found = set()
    for seed in range(3):
        env = os.environ | {"PYTHONHASHSEED": str(seed)}
        found.add(
            subprocess.run(
                [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
            ).stdout
        )
    assert len(found) == 1
    assert "'nan'" in found.pop()


# -- GLUE ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "task"),
    [
        ({"subset": "mnli"}, "mnli"),
        ({"subset": "mnli_matched"}, "mnli"),
        ({"name_or_path": "glue/MNLI"}, "mnli"),
        ({"name_or_path": "./glue/STS-B"}, "stsb"),
        ({"name_or_path": "./glue/STS-B/train.tsv"}, "stsb"),
        ({"name_or_path": "./sst2.csv"}, "sst2"),
        ({"name_or_path": "./reviews"}, None),
        ({"name_or_path": "./mnli", "subset": "reviews"}, None),
    ],
)
def test_a_task_of_glue_is_told_by_its_name(keys: dict[str, Any], task: str | None) -> None:
    assert glue_task(spec(**keys)) == task


@pytest.mark.parametrize(
    "values", [(2, 0, 1), ("2", "0", "1"), ("contradiction", "entailment", "neutral")]
)
def test_local_copies_of_mnli_keep_its_names_and_numbers(values: tuple[Any, ...]) -> None:
    table = json_column(*values)
    labels = count_labels(table, spec(subset="mnli"))
    assert labels == GLUE["mnli"] == Labels(["entailment", "neutral", "contradiction"])
    assert label_ids(table, labels, spec(subset="mnli"), "training").tolist() == [2, 0, 1]
    with pytest.raises(RecipeError, match="not labelled"):
        label_ids(json_column(-1, 0), labels, spec(subset="mnli"), "validation")


@pytest.mark.parametrize(
    "table", [csv_column("5.000", "2.000"), json_column(5, 0), json_column("2.5", "3.0")]
)
def test_local_copies_of_stsb_have_numbers(table: Table) -> None:
    assert count_labels(table, spec(name_or_path="./glue/STS-B")).regression
    assert not count_labels(
        table, spec(name_or_path="./STS-B", problem_type="single_label_classification")
    ).regression


def test_other_labels_under_a_name_of_glue_are_what_they_are() -> None:
    assert count_labels(json_column("yes", "no"), spec(subset="cola")) == Labels(["no", "yes"])
    assert count_labels(json_column(0, 1, 2), spec(subset="cola")) == Labels(["0", "1", "2"])


def test_a_class_that_one_side_lacks_is_said(said: pytest.LogCaptureFixture) -> None:
    warn_of_missing(Labels(["a", "b"]), np.array([0, 1]), np.array([0, 0]))
    assert said.messages == ["no validation row has the label b: the metrics say nothing about it"]
    said.clear()
    warn_of_missing(Labels(["a", "b"]), np.array([0, 1]), np.array([1, 0]))
    warn_of_missing(Labels(regression=True), np.array([0.5]), np.array([0.5]))
    assert said.messages == []


def test_kinds_say_what_the_file_says() -> None:
    assert csv_column("1").cells("label").kinds.tolist() == [Kind.CELL]
    assert json_column("1", 1, 1.5, True).cells("label").kinds.tolist() == [
        Kind.STRING,
        Kind.WHOLE,
        Kind.FRACTION,
        Kind.BOOLEAN,
    ]


def test_classes_that_look_the_same_are_named_in_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    names = count_labels(
        json_column("pos", "neg", "pos ", "Yes", "yes", "YES", "\u00e9", "e\u0301"), spec()
    )
    with caplog.at_level(logging.WARNING, "lorakit"):
        warn_of_alike(names)
    (record,) = caplog.records
    message = record.getMessage()
    assert (
        message == "labels that look the same are classes of their own: 'YES' and 'Yes' and 'yes';"
        " 'e\u0301' and '\u00e9'; 'pos' and 'pos '"
    )
    caplog.clear()
    for labels in (Labels(["neg", "pos"]), Labels(["1", "10"]), Labels(regression=True), None):
        warn_of_alike(labels)
    assert not caplog.records


def test_classes_are_shown_as_they_are_unless_a_line_can_not_show_them() -> None:
    assert listed_classes(["pos", "\u00e9t\u00e9", "[b]", "a b"]) == "pos, \u00e9t\u00e9, [b], a b"
    assert (
        listed_classes(["a\nb", "pos ", "\x1b[31m", "a\tb"])
        == r"'a\nb', 'pos ', '\x1b[31m', 'a\tb'"
    )
    rows = json_column("a\nb", "c")
    with pytest.raises(RecipeError, match=r"one of 'a\\nb', c, or"):
        label_ids(json_column("d"), count_labels(rows, spec()), spec(), "validation")
