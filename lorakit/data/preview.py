"""Preview: a split as the model reads it, token by token, with what is notable of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lorakit.data.joined import SetFigures
from lorakit.data.lengths import Lengths, Truncation

Role = Literal["context", "target", "cut"]


@dataclass(frozen=True)
class Token:
    """A token of a row. text: its part of the decoded row, "" where a letter ends in a later token;
    for a special token its name; role: target (to be predicted), context (only read) or cut (never
    read)."""

    id: int
    text: str
    role: Role
    special: bool


@dataclass(frozen=True)
class ShownRow:
    """A row, or a piece of joined rows. number: of the row in its source, from 1; place: the same
    in words; label: of a classifier's row; warnings: the marks of the findings about it; data_set:
    its name, of several."""

    number: int
    place: str
    tokens: tuple[Token, ...]
    label: str | None
    warnings: tuple[str, ...]
    is_left_out: bool
    data_set: str | None = None

    def count(self, role: Role) -> int:
        """Number of its tokens of this role."""
        return sum(token.role == role for token in self.tokens)

    @property
    def marks(self) -> tuple[str, ...]:
        """Short names of everything notable of it."""
        cut = "left out" if self.is_left_out else "cut" if self.count("cut") else None
        return (cut, *self.warnings) if cut else self.warnings


@dataclass(frozen=True)
class Finding:
    """A warning about rows. mark: a short name, for the rows themselves; count: number of rows;
    first: place of the first of them; examples: their numbers among a split's examples, from 0, as
    far as rows are examples."""

    mark: str
    split: str
    text: str
    count: int
    first: str
    examples: NDArray[np.int64] = field(compare=False, repr=False)


@dataclass(frozen=True)
class Preview:
    """A split as the model reads it.

    recipe: its file; model and data: where they come from; stand_in: True if the data is another's;
    available: number of rows of the split; tokens, targets: of its examples, targets None for
    classifiers; lengths: before any cut; rows: those to show; page_rows: those for a page; heard:
    warnings that were logged; findings: all others; sets: the training rows of each data set, of
    several.
    """

    recipe: str
    model: str
    data: str
    stand_in: bool
    split: str
    max_length: int
    available: int
    examples: int
    is_joined: bool
    tokens: int
    targets: int | None
    lengths: Lengths
    truncation: Truncation
    rows: tuple[ShownRow, ...]
    page_rows: tuple[ShownRow, ...]
    heard: tuple[str, ...]
    findings: tuple[Finding, ...]
    sets: tuple[SetFigures, ...] = ()

    @property
    def target_share(self) -> float | None:
        """Share of the examples' tokens that are targets."""
        return None if self.targets is None else self.targets / max(1, self.tokens)
