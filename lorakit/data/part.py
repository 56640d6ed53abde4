"""Part: a split beside its examples, and the rows that max_seq_length cuts, before the cut."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lorakit.data.examples import Examples
from lorakit.data.lengths import Truncation
from lorakit.data.reading import Reader
from lorakit.data.table import Table


@dataclass(frozen=True)
class Part:
    """A split as it is trained or evaluated on. rows [examples]: the row of `data`, from 0, that an
    example is made of, or in which it begins where rows are joined; lines: rows are lines of one
    running text."""

    name: str
    data: Table
    examples: Examples
    rows: NDArray[np.int64]
    is_joined: bool
    lines: bool

    @cached_property
    def targets(self) -> NDArray[np.bool_] | None:
        """Marks [tokens] of the tokens to predict: a row's first token is none."""
        return effective_targets(self.examples)

    @cached_property
    def example_of(self) -> dict[int, int]:
        """{row of `data`: its example}, where rows stay apart."""
        return {} if self.is_joined else {row: i for i, row in enumerate(self.rows.tolist())}

    def place(self, example: int) -> str:
        return self.data.place(int(self.rows[example]))


def part_of(name: str, data: Table, examples: Examples, is_joined: bool, lines: bool) -> Part:
    """The part with examples of a Reader, whose `row_ids` are row numbers of the source."""
    numbers = data.row_numbers
    order = np.argsort(numbers, kind="stable")
    rows = order[np.searchsorted(numbers, examples.row_ids, sorter=order)]
    return Part(name, data, examples, rows, is_joined, lines)


@dataclass(frozen=True)
class Uncut:
    """The rows that are cut or left out, without any cut. number_of: {row of the data: its number
    in `examples`}; a row without a token has none."""

    examples: Examples
    number_of: dict[int, int]

    @cached_property
    def targets(self) -> NDArray[np.bool_] | None:
        return effective_targets(self.examples)


def uncut(part: Part, reader: Reader) -> Uncut:
    """The rows of a part that are cut to the reader's `max_length`, or left out. They are tokenised
    once more, without a limit."""
    if part.is_joined:
        nothing = part.examples.select(np.arange(0))
        return Uncut(nothing, {})
    full = part.rows[part.examples.lengths >= reader.max_length]
    left_out = np.setdiff1d(np.arange(len(part.data)), part.rows)
    rows = np.union1d(full, left_out)
    examples = (
        reader.uncut(part.name, part.data.select(rows))
        if len(rows)
        else part.examples.select(np.arange(0))
    )
    found = rows[examples.row_ids].tolist()
    return Uncut(examples, {row: number for number, row in enumerate(found)})


def lengths_before(part: Part, whole: Uncut) -> NDArray[np.int64]:
    """Tokens of each example before any cut, then those of the rows that are left out."""
    lengths = part.examples.lengths.copy()
    left_out = []
    for row, number in whole.number_of.items():
        example = part.example_of.get(row)
        if example is None:
            left_out.append(int(whole.examples.lengths[number]))
        else:
            lengths[example] = whole.examples.lengths[number]
    return np.concatenate([lengths, np.asarray(left_out, np.int64)])


def cut_examples(part: Part, whole: Uncut) -> list[int]:
    """The examples that are cut."""
    pairs = ((part.example_of.get(row), number) for row, number in whole.number_of.items())
    return [
        example
        for example, number in pairs
        if example is not None and whole.examples.lengths[number] > part.examples.lengths[example]
    ]


def truncation(part: Part, whole: Uncut) -> Truncation:
    """Loss of a part to the cut."""
    marks, before = part.targets, whole.targets
    tokens = targets = 0
    for row, number in whole.number_of.items():
        example = part.example_of.get(row)
        tokens += int(whole.examples.lengths[number])
        targets += _marked(whole.examples, before, number)
        if example is not None:
            tokens -= int(part.examples.lengths[example])
            targets -= _marked(part.examples, marks, example)
    left_out = 0 if part.is_joined else len(part.data) - len(part.examples)
    return Truncation(len(cut_examples(part, whole)), left_out, tokens, targets)


def effective_targets(examples: Examples) -> NDArray[np.bool_] | None:
    """The targets without each row's first token, which has nothing before it."""
    if examples.targets is None:
        return None
    marks = examples.targets.copy()
    marks[examples.offsets[:-1][examples.lengths > 0]] = False
    return marks


def _marked(examples: Examples, marks: NDArray[np.bool_] | None, row: int) -> int:
    """Number of marks in a row."""
    if marks is None:
        return 0
    return int(marks[examples.offsets[row] : examples.offsets[row + 1]].sum())
