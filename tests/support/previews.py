"""Previews made by hand, and parts of splits made of rows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lorakit.data.examples import Examples
from lorakit.data.lengths import Lengths, Truncation
from lorakit.data.part import Part, Uncut
from lorakit.data.preview import Finding, Preview, Role, ShownRow, Token
from lorakit.data.table import Table

NO_ROWS = np.empty(0, np.int64)


def token(text: str, role: Role = "context", special: bool = False, number: int = 7) -> Token:
    return Token(number, text, role, special)


def row(number: int, *tokens: Token, **more: Any) -> ShownRow:
    about = {"label": None, "warnings": (), "is_left_out": False} | more
    return ShownRow(number, f"row {number} (rows.jsonl:{number})", tokens, **about)


def preview_of(*rows: ShownRow, **more: Any) -> Preview:
    """A preview of training rows, cut at 8 tokens."""
    finding = Finding(
        "duplicate", "training", "1 of 2 rows <b>twice</b>", 1, "row 2", np.array([1], np.int64)
    )
    found = Preview(
        recipe="mine.yaml",
        model="a-model",
        data="rows.jsonl",
        stand_in=False,
        split="training",
        max_length=8,
        available=len(rows),
        examples=len(rows),
        is_joined=False,
        tokens=10,
        targets=4,
        lengths=Lengths(np.array([3, 5, 8, 12])),
        truncation=Truncation(1, 0, 4, 2),
        rows=rows,
        page_rows=rows,
        heard=("2 of 4 rows <i>are cut</i>",),
        findings=(finding,),
    )
    return replace(found, **more)


def part(
    rows: Sequence[Sequence[int]],
    targets: Sequence[Sequence[bool]] | None = None,
    texts: Sequence[str] | None = None,
    name: str = "training",
    is_joined: bool = False,
) -> Part:
    """A part of these rows of tokens; every token is a target unless `targets` says otherwise."""
    marks = targets or [[True] * len(ids) for ids in rows]
    examples = Examples(
        tokens=np.concatenate([np.asarray(ids, np.int32) for ids in rows]),
        offsets=np.cumsum([0, *map(len, rows)]),
        row_ids=np.arange(1, len(rows) + 1),
        targets=np.concatenate([np.asarray(part, bool) for part in marks]),
    )
    data = Table.from_list([{"text": text} for text in texts or map(str, rows)], f"{name}.jsonl")
    return Part(name, data, examples, np.arange(len(rows)), is_joined, False)


def nothing_cut(whole: Part) -> Uncut:
    return Uncut(whole.examples.select(NO_ROWS), {})
