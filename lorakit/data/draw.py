"""Drawing of rows: those held out for validation, and those used where a recipe limits their
number.

A file may be sorted, so neither end represents the whole. Rows are drawn with a fixed seed of their
own: runs with different train.seed share one validation set. Classes keep their proportions. Lines
of running text belong together: they are cut, not drawn.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from lorakit.data.formats import format_of
from lorakit.data.keys import ChosenSpec
from lorakit.data.label_kinds import is_number
from lorakit.data.table import Table
from lorakit.errors import RecipeError

log = logging.getLogger("lorakit")

SEED = 20_260
HELD_OUT = 0.1


def hold_out(data: Table, spec: ChosenSpec, lines: bool) -> tuple[Table, Table]:
    """(training, validation) rows, both in the order of the file. Rows with the same text or prompt
    are in the same set.

    Raises RecipeError for too few rows.
    """
    fraction = spec.validation_split if isinstance(spec.validation_split, float) else HELD_OUT
    count = max(1, round(len(data) * fraction))
    if count >= len(data):
        what = f"{len(data)} rows are too few to hold out {100 * fraction:g}% for validation"
        raise RecipeError.at("data.name_or_path", what, "at least 2 rows; a smaller part of them")
    if lines:
        cut = len(data) - count
        log.info("no validation set: the last %d of %d lines are held out", count, len(data))
        return data.select(range(cut)), data.select(range(cut, len(data)))
    form = format_of(spec)
    strata = form.strata(data, spec)
    if strata is not None and len(set(strata)) == len(strata):
        what = (
            f"each of the {len(strata)} rows has a label of its own: none can be held out for"
            " validation and be learned too"
        )
        expected = "a label that several rows have, or a file of validation rows"
        if not all(is_number(text.strip()) for text in strata):
            raise RecipeError.at("data.label_column", what, expected)
        raise RecipeError.at(
            "data.problem_type",
            what,
            f"data.problem_type: regression, if they are numbers; else {expected}",
        )
    keys = _input_keys(data, spec)
    held = draw(len(data), count, strata, keys, leave_one=True)
    # Keeping rows with equal inputs together may rule out a draw by classes; together comes first.
    if held is None and strata is not None:
        held, strata = draw(len(data), count, None, keys, leave_one=True), None
    if held is None:
        strata = form.strata(data, spec)
        alike = np.bincount(keys)
        shared = int(alike[alike > 1].sum())
        message = (
            "%d of %d rows share their input with others: they are held out one by one, and inputs"
            " are in both sets"
        )
        log.warning(message, shared, len(data))
        held = draw(len(data), count, strata, leave_one=True)
        assert held is not None
    how = "" if strata is None else ", by classes"
    log.info("no validation set: %d of %d rows are held out (drawn%s)", len(held), len(data), how)
    return data.select(np.setdiff1d(np.arange(len(data)), held)), data.select(held)


def limited(data: Table, limit: int | None, spec: ChosenSpec, lines: bool) -> Table:
    """`limit` rows of the data in their order, drawn as for a validation set; the first ones for
    running text; all rows for None."""
    if limit is None or limit >= len(data):
        return data
    if lines:
        return data.select(range(limit))
    drawn = draw(len(data), limit, format_of(spec).strata(data, spec))
    assert drawn is not None
    return data.select(drawn)


def draw(
    rows: int,
    count: int,
    strata: Sequence[Hashable] | None = None,
    keys: NDArray[np.int64] | None = None,
    leave_one: bool = False,
) -> NDArray[np.int64] | None:
    """`count` randomly drawn row numbers in rising order, the same every time.

    strata [rows]: each stratum gets its share of the count, to the nearest row, and at least one
    row if the count is large enough. keys [rows], from 0: rows with the same key are drawn together
    or not at all; the count may then be missed by a few rows, and None means that no choice of keys
    comes within half of it. leave_one: never draw all rows of a stratum.
    """
    order = np.random.default_rng(SEED).permutation(rows)
    group = np.arange(rows) if keys is None else keys
    sizes = np.bincount(group, minlength=rows)
    stratum = np.zeros(rows, np.int64) if strata is None else _numbers(strata)
    strata_sizes = np.bincount(stratum)
    quota = _shares(strata_sizes, count, strata_sizes - leave_one)
    taken = np.zeros(rows, bool)  # by key
    seen = np.zeros(rows, bool)
    for row in order:
        number = group[row]
        if not seen[number]:
            seen[number] = True
            if sizes[number] <= quota[stratum[row]]:
                taken[number] = True
                quota[stratum[row]] -= sizes[number]
    chosen = np.flatnonzero(taken[group])
    if keys is None:
        return chosen
    return chosen if count / 2 <= len(chosen) < rows else None


def _shares(sizes: NDArray[np.int64], count: int, most: NDArray[np.int64]) -> NDArray[np.int64]:
    """`count` divided in proportion to the sizes, by largest remainder; then those without any get
    one, taken from the largest shares. No share exceeds `most`, and together they are `count`
    unless that limit forbids it."""
    exact = sizes * (count / sizes.sum())
    shares: NDArray[np.int64] = np.floor(exact).astype(np.int64)
    order = np.argsort(shares - exact, kind="stable")
    shares[order[: count - shares.sum()]] += 1
    np.minimum(shares, most, out=shares)
    while shares.sum() < min(count, most.sum()):
        shares[int((most - shares).argmax())] += 1
    for number in np.flatnonzero((shares == 0) & (most > 0)):
        richest = int(shares.argmax())
        if shares[richest] <= 1:
            break
        shares[richest] -= 1
        shares[number] = 1
    return shares


def _numbers(values: Sequence[Hashable]) -> NDArray[np.int64]:
    """Numbers from 0 for the values, equal for equal values, in the order of first occurrence."""
    found: dict[Hashable, int] = {}
    return np.fromiter(
        (found.setdefault(value, len(found)) for value in values), np.int64, len(values)
    )


def _input_keys(data: Table, spec: ChosenSpec) -> NDArray[np.int64]:
    """Numbers from 0 for the rows' inputs (`Format.input_keys`), equal for equal ones. Inputs are
    hashed (128 bits), since all of them together may be larger than memory."""
    form, hashes = format_of(spec), bytearray()
    for _, block in data.blocks():
        for key in form.input_keys(block, spec):
            text = json.dumps(key, ensure_ascii=False)
            hashes += hashlib.blake2b(text.encode(), digest_size=16).digest()
    _, numbers = np.unique(np.frombuffer(hashes, "V16"), return_inverse=True)
    return numbers.astype(np.int64)
