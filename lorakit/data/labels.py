"""Labels: the classes or numbers that a classifier is trained to give, counted from the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from datasets import ClassLabel, Dataset

from lorakit.data.columns import first_of, listed, no_column
from lorakit.data.spec import DataSpec
from lorakit.errors import RecipeError

Task = Literal["sequence-classification", "causal-lm"]
LABELS = ("label", "labels")


@dataclass(frozen=True)
class Labels:
    """The label space of a classification task. `names` in the order of the class ids; [] for regression."""

    names: list[str] = field(default_factory=list)
    regression: bool = False

    @property
    def count(self) -> int:
        return 1 if self.regression else len(self.names)


def label_column(spec: DataSpec, columns: Sequence[str]) -> str:
    if spec.label_column is not None:
        if spec.label_column not in columns:
            raise no_column("data.label_column", spec.label_column, columns)
        return spec.label_column
    found = first_of(columns, LABELS)
    if found is None:
        raise RecipeError.at("data.label_column", f"no label column among {listed(columns)}", "its name")
    return found


def count_labels(train: Dataset, spec: DataSpec) -> Labels:
    """The label space, counted from all the training rows."""
    column = label_column(spec, train.column_names)
    values = train[column][:]
    _refuse_missing(values, column)
    fractions = any(isinstance(value, float) and not float(value).is_integer() for value in values)
    if spec.problem_type == "regression" or (spec.problem_type is None and fractions):
        if not all(isinstance(value, int | float) for value in values):
            raise RecipeError.at("data.label_column", f"regression needs numbers in `{column}`")
        return Labels(regression=True)
    feature = train.features[column]
    if isinstance(feature, ClassLabel):
        if min(values) < 0:
            raise RecipeError.at("data.train_split", f"`{column}` has the label {min(values)}: these rows are not labelled")
        return Labels(list(feature.names))
    names = sorted({_label_name(value) for value in values}, key=_numbers_first)
    if len(names) < 2:
        raise RecipeError.at(
            "data.label_column", f"all rows of `{column}` have the label {names[0]}", "at least two different labels"
        )
    return Labels(names)


def label_ids(data: Dataset, labels: Labels, spec: DataSpec, split: str) -> Any:
    """The labels of a split as class ids [rows] int64, or as values [rows] float32 for regression."""
    column = label_column(spec, data.column_names)
    values = data[column][:]
    _refuse_missing(values, column)
    if labels.regression:
        return np.asarray(values, np.float32)
    if isinstance(data.features[column], ClassLabel):
        values = [data.features[column].names[value] if value >= 0 else value for value in values]
    ids = {name: i for i, name in enumerate(labels.names)}
    known = [ids.get(_label_name(value), -1) for value in values]
    if -1 in known:
        row = known.index(-1)
        what = f"the {split} label {_label_name(values[row])!r} (row {row}, column `{column}`) is not in the training data"
        raise RecipeError.at("data.name_or_path", what, f"one of {', '.join(labels.names)}")
    return np.asarray(known, np.int64)


def _label_name(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _numbers_first(name: str) -> tuple[int, float, str]:
    try:
        return 0, float(name), name
    except ValueError:
        return 1, 0.0, name


def _refuse_missing(values: Sequence[Any], column: str) -> None:
    for row, value in enumerate(values):
        if value is None or value != value:
            raise RecipeError.at("data.label_column", f"row {row} has nothing in the column `{column}`", "a label in every row")
