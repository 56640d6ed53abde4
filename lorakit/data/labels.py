"""Labels: the classes or numbers that a classifier is trained to predict, counted from the rows.

A class is named by the text of its cells. The kind of the labels (classes or numbers) follows from
the file where that is clear; where it is not, the recipe has to say it.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.data.cells import Cells, Kind
from lorakit.data.columns import first_of, listed, no_column
from lorakit.data.keys import DataKeys
from lorakit.data.label_kinds import (
    COMMA,
    KEY,
    NUMBERS,
    PROBLEM,
    WHOLE,
    each_cell,
    has_fraction,
    is_number,
    is_regression,
    refuse_nothing,
)
from lorakit.data.table import Table
from lorakit.errors import RecipeError

log = logging.getLogger("lorakit")

LABELS = ("label", "labels")
LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Labels:
    """The label space of a classification task. `names` are in the order of the class ids; [] for
    regression."""

    names: list[str] = field(default_factory=list)
    regression: bool = False

    @property
    def count(self) -> int:
        return 1 if self.regression else len(self.names)


# The tasks of GLUE (Wang et al., arXiv 1804.07461) with classes numbered as in nyu-mll/glue on the
# hub; STS-B's labels are numbers.
GLUE = {
    "cola": Labels(["unacceptable", "acceptable"]),
    "sst2": Labels(["negative", "positive"]),
    "mrpc": Labels(["not_equivalent", "equivalent"]),
    "qqp": Labels(["not_duplicate", "duplicate"]),
    "stsb": Labels(regression=True),
    "mnli": Labels(["entailment", "neutral", "contradiction"]),
    "qnli": Labels(["entailment", "not_entailment"]),
    "rte": Labels(["entailment", "not_entailment"]),
    "wnli": Labels(["not_entailment", "entailment"]),
}


def glue_task(spec: DataKeys) -> str | None:
    """The GLUE task that the data's subset, folder or file is named after: `stsb` for STS-B, `mnli`
    for mnli_matched."""
    path = Path(spec.name_or_path)
    names = (
        [spec.subset]
        if spec.subset is not None
        else [path.name, path.name.partition(".")[0], path.parent.name]
    )
    for name in names:
        plain = (
            re.sub(r"[-_ ]", "", name.lower()).removesuffix("mismatched").removesuffix("matched")
        )
        if plain in GLUE:
            return plain
    return None


def label_column(spec: DataKeys, columns: Sequence[str]) -> str:
    """The column of the labels. Raises RecipeError if it does not exist."""
    if spec.label_column is not None:
        if spec.label_column not in columns:
            raise no_column(KEY, spec.label_column, columns)
        return spec.label_column
    found = first_of(columns, LABELS)
    if found is None:
        raise RecipeError.at(
            KEY, f"no label column among {listed(columns)}", "its name as data.label_column"
        )
    return found


def count_labels(train: Table, spec: DataKeys) -> Labels:
    """The label space, counted from all the training rows; independent of their order."""
    column = label_column(spec, train.column_names)
    cells = train.cells(column)
    class_names = train.class_names(column)
    known = _glue_labels(spec)
    if known is not None and class_names is None and _fits(cells, known):
        _glue_ids(cells, known, train, column, "training")
        what = "numbers" if known.regression else f"the classes {listed_classes(known.names)}"
        log.info("the labels in `%s` are %s, as GLUE's %s has them", column, what, glue_task(spec))
        return known
    regression, said = is_regression(cells, train, spec, column, class_names)
    if said is not None:
        log.info(said)
    if regression:
        _numbers(cells, train, column)
        return Labels(regression=True)
    if class_names is not None:
        _class_texts(cells, class_names, train, column, "training")
        return Labels(list(class_names))
    found = set(_texts(cells, train, column))
    names = sorted(found, key=_order(found))
    if len(names) < 2:
        what = f"all rows of `{column}` have the label {shown_class(names[0])}"
        raise RecipeError.at(
            KEY, what, "at least two different labels, or another column as data.label_column"
        )
    return Labels(names)


def check_labels(data: Table, spec: DataKeys) -> None:
    """Raise RecipeError where labels are missing, are not labels, or are of an ambiguous kind."""
    column = label_column(spec, data.column_names)
    cells, class_names, known = data.cells(column), data.class_names(column), _glue_labels(spec)
    if known is None or class_names is not None or not _fits(cells, known):
        is_regression(cells, data, spec, column, class_names)


def label_ids(data: Table, labels: Labels, spec: DataKeys, split: str) -> Any:
    """The labels of a split as class ids [rows] int64, or as values [rows] float32 for
    regression."""
    column = label_column(spec, data.column_names)
    cells = data.cells(column)
    if labels.regression:
        return _numbers(cells, data, column)
    class_names = data.class_names(column)
    if class_names is not None:
        texts = _class_texts(cells, class_names, data, column, split)
    else:
        texts = _texts(cells, data, column)
        known = _glue_labels(spec)
        if known is not None and set(known.names) == set(labels.names):
            numbers = _glue_ids(cells, known, data, column, split)
            if numbers is not None:
                return np.array([labels.names.index(name) for name in known.names], np.int64)[
                    numbers
                ]
    ids = {name: i for i, name in enumerate(labels.names)}
    found = [ids.get(text, -1) for text in texts]
    if -1 in found:
        row = found.index(-1)
        what = (
            f"the {split} label {texts[row]!r} of {data.place(row)}, column `{column}`, is not in"
            " the training data"
        )
        raise RecipeError.at(
            "data.name_or_path",
            what,
            f"one of {listed_classes(labels.names)}, or another data.label_column",
        )
    return np.asarray(found, np.int64)


def class_strata(data: Table, spec: DataKeys) -> list[str] | None:
    """Strata for drawing rows: the text of each row's label; None for regression. Raises
    RecipeError if the label column does not exist."""
    column = label_column(spec, data.column_names)
    cells = data.cells(column)
    if spec.problem_type == "regression" or (
        glue_task(spec) == "stsb" and spec.problem_type is None
    ):
        return None
    numbers = all(map(is_number, cells.texts)) and any(map(has_fraction, cells.texts))
    return None if spec.problem_type is None and numbers else cells.texts


def warn_of_missing(
    labels: Labels | None, training: NDArray[Any] | None, validation: NDArray[Any] | None
) -> None:
    """Log a line about classes that have rows in only one of the two sets, or in none."""
    if labels is None or labels.regression or training is None or validation is None:
        return
    for split, ids in (("training", training), ("validation", validation)):
        counts = np.bincount(ids, minlength=labels.count)
        absent = [name for name, count in zip(labels.names, counts, strict=True) if count == 0]
        if absent:
            why = (
                "it can not be learned"
                if split == "training"
                else "the metrics say nothing about it"
            )
            log.warning("no %s row has the label %s: %s", split, listed_classes(absent), why)


def warn_of_alike(labels: Labels | None) -> None:
    """Log a line about classes whose names differ only in surrounding blanks, in case or in Unicode
    form."""
    alike: dict[str, list[str]] = {}
    for name in labels.names if labels is not None else ():
        alike.setdefault(unicodedata.normalize("NFC", name.strip()).casefold(), []).append(name)
    several = [" and ".join(map(repr, names)) for names in alike.values() if len(names) > 1]
    if several:
        log.warning("labels that look the same are classes of their own: %s", "; ".join(several))


def shown_class(name: str) -> str:
    """The name of a class for a table or a line: in Python's quotes if it has line breaks, or
    blanks around it."""
    return name if name.isprintable() and name == name.strip() else repr(name)


def listed_classes(names: Iterable[str]) -> str:
    return listed(map(shown_class, names))


def _glue_labels(spec: DataKeys) -> Labels | None:
    """The labels of the GLUE task that the data is named after, unless the recipe says that its
    labels are of another kind."""
    known = GLUE.get(glue_task(spec) or "")
    if (
        known is not None
        and spec.problem_type is not None
        and known.regression != (spec.problem_type == "regression")
    ):
        return None
    return known


def _fits(cells: Cells, known: Labels) -> bool:
    if known.regression:
        return all(
            kind in (*NUMBERS, Kind.CELL, Kind.STRING) and is_number(text)
            for kind, text in each_cell(cells)
        )
    return set(cells.texts) <= {"-1", *map(str, range(known.count))} or set(cells.texts) <= set(
        known.names
    )


def _glue_ids(
    cells: Cells, known: Labels, data: Table, column: str, split: str
) -> NDArray[np.int64] | None:
    """Labels that are the numbers of GLUE's classes [rows], or None where they are not. -1 means no
    label."""
    if known.regression or not set(cells.texts) <= {"-1", *map(str, range(known.count))}:
        return None
    numbers = np.array([int(text) for text in cells.texts], np.int64)
    _refuse_unlabelled(numbers, data, column, split)
    return numbers


def _numbers(cells: Cells, data: Table, column: str) -> NDArray[np.float32]:
    """The labels as numbers [rows]. Raises RecipeError for one that is not a number."""
    refuse_nothing(cells, data, column)
    for row, (kind, text) in enumerate(each_cell(cells)):
        if kind == Kind.BOOLEAN or not is_number(text.strip()) or abs(float(text)) > LARGEST:
            what = (
                f"regression needs numbers in `{column}` (data.label_column); {data.place(row)} has"
                f" {text!r}"
            )
            if COMMA.fullmatch(text.strip()):
                what += ", with a decimal comma"
            raise RecipeError.at(
                KEY, what, f"a number in every row, or {PROBLEM}: single_label_classification"
            )
    return np.array([float(text) for text in cells.texts], np.float32)


def _texts(cells: Cells, data: Table, column: str) -> list[str]:
    """The class name of each row: its text in the file; for whole numbers, their digits."""
    refuse_nothing(cells, data, column)
    return [
        str(int(Decimal(text))) if kind == Kind.FRACTION and float(text).is_integer() else text
        for kind, text in each_cell(cells)
    ]


def _class_texts(
    cells: Cells, names: Sequence[str], data: Table, column: str, split: str
) -> list[str]:
    refuse_nothing(cells, data, column)
    numbers = np.array([int(text) for text in cells.texts], np.int64)
    _refuse_unlabelled(numbers, data, column, split)
    return [names[number] for number in numbers]


def _refuse_unlabelled(numbers: NDArray[np.int64], data: Table, column: str, split: str) -> None:
    if numbers.min() < 0:
        place = data.place(int(numbers.argmin()))
        what = (
            f"`{column}` has the label {numbers.min()} in {place}: these {split} rows are not"
            " labelled"
        )
        key = "data.train_split" if split == "training" else "data.validation_split"
        raise RecipeError.at(key, what, f"{key}: a split with labels; or another data.label_column")


def _order(names: set[str]) -> Any:
    """Sort key of classes: numbers by value, other texts by their characters. `nan` and `inf` are
    texts."""
    if all(map(is_number, names)):
        return lambda name: (int(name) if WHOLE.fullmatch(name) else float(name), name)
    return lambda name: name
