"""Kinds of labels: classes or numbers, as the recipe or the file's cells say."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from lorakit.data.cells import NESTED, NOTHING, Cells, Kind
from lorakit.data.columns import WORDS
from lorakit.data.keys import DataKeys
from lorakit.data.table import Table
from lorakit.errors import RecipeError

KEY = "data.label_column"
PROBLEM = "data.problem_type"
CHOICE = f"{PROBLEM}: single_label_classification or regression"
WHOLE = re.compile(r"[+-]?[0-9]+")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
COMMA = re.compile(r"[+-]?[0-9]+,[0-9]+")
NUMBERS = (Kind.WHOLE, Kind.FRACTION)
SAID = {
    Kind.STRING: "strings",
    Kind.WHOLE: "numbers",
    Kind.FRACTION: "numbers",
    Kind.BOOLEAN: "booleans",
}


def is_regression(
    cells: Cells, data: Table, spec: DataKeys, column: str, class_names: Any
) -> tuple[bool, str | None]:
    """(True if labels are numbers, according to the recipe or the labels themselves; a message
    about that or None). Raises RecipeError where they are ambiguous."""
    refuse_nothing(cells, data, column)
    if spec.problem_type is not None:
        return spec.problem_type == "regression", None
    if class_names is not None:
        return False, None
    counts = np.bincount(cells.kinds, minlength=len(Kind)).tolist()
    kinds = Counter[str]()
    for kind, count in zip(Kind, counts, strict=True):
        if count:
            kinds[SAID.get(kind, "texts")] += count
    if len(kinds) > 1:
        counted = " and ".join(f"{count} {what}" for what, count in sorted(kinds.items()))
        raise RecipeError.at(
            PROBLEM, f"`{column}` (data.label_column) holds {counted}: classes or numbers?", CHOICE
        )
    if cells.has(Kind.BOOLEAN):
        return False, None
    if not all(map(is_number, cells.texts)):
        _refuse_decimal_commas(cells, data, column)
        return False, None
    written = [WHOLE.fullmatch(text) is None for text in cells.texts]  # with a point or an exponent
    real = [has_fraction(text) for text in cells.texts]
    if not any(written):
        return False, None
    if not any(real):
        if cells.has(*NUMBERS):
            as_classes = "whole numbers, though written with a fraction: they are read as classes"
            return False, f"the labels in `{column}` are {as_classes}"
        row = written.index(True)
        what = f"whole numbers written with a fraction ({cells.texts[row]} in {data.place(row)})"
    elif 2 * sum(written) > len(written) and not cells.has(Kind.STRING):
        regression = f"numbers with fractions: regression, unless {PROBLEM} says otherwise"
        return True, f"the labels in `{column}` are {regression}"
    else:
        row = real.index(True)
        said = (
            "strings that are numbers, with"
            if cells.has(Kind.STRING)
            else "mostly whole numbers, and"
        )
        what = f"{said} fractions among them ({cells.texts[row]} in {data.place(row)})"
    raise RecipeError.at(
        PROBLEM, f"`{column}` (data.label_column) holds {what}: classes or numbers?", CHOICE
    )


def _refuse_decimal_commas(cells: Cells, data: Table, column: str) -> None:
    """Raise RecipeError where all labels would be numbers if their commas were points."""
    commas = [COMMA.fullmatch(text.strip()) is not None for text in cells.texts]
    if any(commas) and all(
        comma or is_number(text.strip()) for comma, text in zip(commas, cells.texts, strict=True)
    ):
        row = commas.index(True)
        what = (
            f"`{column}` (data.label_column) holds numbers with a decimal comma ({cells.texts[row]}"
            f" in {data.place(row)})"
        )
        raise RecipeError.at(
            PROBLEM,
            what,
            "a decimal point, if they are numbers; single_label_classification, if they are names",
        )


def is_number(text: str) -> bool:
    """True if a class's name is a number; `nan` and `inf` are texts."""
    return NUMBER.fullmatch(text) is not None


def has_fraction(text: str) -> bool:
    return is_number(text) and not float(text).is_integer()


def each_cell(cells: Cells) -> Iterator[tuple[int, str]]:
    return zip(cells.kinds.tolist(), cells.texts, strict=True)


def refuse_nothing(cells: Cells, data: Table, column: str) -> None:
    for row, (kind, text) in enumerate(each_cell(cells)):
        if (
            kind in (*NOTHING, Kind.EMPTY)
            or (kind == Kind.FRACTION and text == "NaN")
            or not text.strip()
        ):
            what = f"{data.place(row)} has nothing in the column `{column}` (data.label_column)"
            raise RecipeError.at(KEY, what, "a label in every row")
        if kind in NESTED:
            what = (
                f"{data.place(row)} has {WORDS[Kind(kind)]} in the column `{column}`"
                " (data.label_column)"
            )
            raise RecipeError.at(
                KEY, what, "one label in every row: a text, a number, true or false"
            )
