"""Preview of a recipe's data: real rows as the model reads them, before any training. Loads
tokenizer and configuration, and no weights."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from lorakit.data.findings import SetParts, about_set, all_findings, between
from lorakit.data.joined import set_figures
from lorakit.data.lengths import Lengths, in_all
from lorakit.data.load import Loaded
from lorakit.data.part import Part, Uncut, cut_examples, lengths_before, part_of, truncation, uncut
from lorakit.data.preview import Finding, Preview, ShownRow
from lorakit.data.reading import Reader
from lorakit.data.shown import Item, items_of, items_of_row, notable_first, shown_rows, spread
from lorakit.data.table import Table
from lorakit.errors import UsageError
from lorakit.recipes.recipe import Recipe, locating
from lorakit.report.progress import Progress
from lorakit.runs.session import Inputs, find_sources, inputs_of, read_rows
from lorakit.runs.sets import DataSet, about, data_sets

log = logging.getLogger("lorakit")

SPLITS = {"train": "training", "validation": "validation"}
PART_ROWS = 10_000  # most rows of a split that is too large for memory
PAGE_ROWS, PAGE_TOKENS = 200, 200_000  # most of a page, so that a browser opens it at once


@dataclass(frozen=True)
class _Read:
    """A data set's rows, its parts, each with its rows before any cut, and the split to show."""

    one: DataSet
    rows: Loaded
    parts: dict[str, tuple[Part, Uncut]]
    split: str
    findings: list[Finding]

    @property
    def shown(self) -> Part:
        return self.parts[self.split][0]

    @property
    def whole(self) -> Uncut:
        return self.parts[self.split][1]

    def show(self, inputs: Inputs, items: list[Item]) -> list[ShownRow]:
        given = (self.whole, self.findings, inputs.tokenizer, inputs.labels)
        found = shown_rows(self.shown, items, *given)
        if self.one.number is None:
            return found
        name = self.one.name
        return [replace(row, place=f"{name}: {row.place}", data_set=name) for row in found]


def preview(
    recipe: Recipe,
    progress: Progress,
    rows: int = 5,
    row: int | None = None,
    split: str = "train",
    page: bool = False,
) -> Preview:
    """Rows of a split, token by token, with lengths and warnings. They are the examples that
    training gets.

    rows: how many of each data set, at equal distances; row: only this one, by its number in the
    source, from 1, of each data set that has it;
    split: train or validation; page: also choose rows for a page. Warnings that training would log
    are logged. Raises UsageError for a split or a row that does not exist, and whatever a run
    raises before it loads the model.
    """
    if split not in SPLITS:
        raise UsageError(f"there is no split `{split}`", f"It is {' or '.join(SPLITS)}.")
    with locating(recipe), _hearing() as heard:
        source, data_sources = find_sources(recipe)
        loaded = _looked_at(data_sets(recipe), read_rows(recipe, data_sources, progress), row)
        inputs = inputs_of(recipe, source, data_sources, loaded, progress)
        sets = _read_sets(recipe, loaded, inputs, SPLITS[split], progress)
        here = [one for one in sets if SPLITS[split] in one.parts]
        items = [items_of(one.shown) for one in here]
        if row is not None:
            chosen = wanted = _items_of_number(here, sets, row, max(1, rows))
        else:
            chosen = [spread(one, rows) for one in items]
            wanted = [_for_page(*one, len(here)) for one in zip(here, items, strict=True)]
        shown, page_rows = (
            [found for one, some in zip(here, of, strict=True) for found in one.show(inputs, some)]
            for of in (chosen, wanted if page else [[] for _ in here])
        )
    parts = [one.shown for one in here]
    targets = [part.targets.sum() for part in parts if part.targets is not None]
    lengths = [lengths_before(one.shown, one.whole) for one in here]
    return Preview(
        recipe=recipe.path,
        model=source.used,
        data=" + ".join(of.used for of in data_sources),
        stand_in=any(of.stand_in for of in data_sources),
        split=SPLITS[split],
        max_length=inputs.max_length,
        available=sum(len(part.data) for part in parts),
        examples=sum(len(part.examples) for part in parts),
        is_joined=all(part.is_joined for part in parts),
        tokens=sum(len(part.examples.tokens) for part in parts),
        targets=int(sum(targets)) if targets else None,
        lengths=Lengths(np.concatenate(lengths)),
        truncation=in_all([truncation(one.shown, one.whole) for one in here]),
        rows=tuple(shown),
        page_rows=tuple(page_rows),
        heard=tuple(heard),
        findings=tuple(_findings(sets)),
        sets=tuple(set_figures(inputs.train)),
    )


def _read_sets(
    recipe: Recipe,
    loaded: Sequence[Loaded],
    inputs: Inputs,
    split: str,
    progress: Progress,
) -> list[_Read]:
    """Every data set, with its rows before any cut."""
    found = []
    for one, rows, read in zip(data_sets(recipe), loaded, inputs.sets, strict=True):
        joined = rows.format.is_joined(rows.spec)
        with about(one), progress.stage("measuring the rows that are cut") as advance:
            given = (inputs.labels, rows.spec, inputs.tokenizer, inputs.max_length)
            reader = Reader(*given, advance, inputs.config)
            tables = [("training", reader.training_rows(rows), read.train)]
            if read.validation is not None:
                tables.append(("validation", reader.validation_rows(rows), read.validation))
            parts = {}
            for name, data, examples in tables:
                part = part_of(name, data, examples, joined, rows.lines)
                parts[name] = part, uncut(part, reader)
        how = (rows.format, rows.spec, inputs.tokenizer, inputs.config)
        findings = all_findings(list(parts.values()), *how)
        found.append(_Read(one, rows, parts, split, findings))
    return found


def _looked_at(sets: Sequence[DataSet], loaded: Sequence[Loaded], row: int | None) -> list[Loaded]:
    """The rows to look at of each set: of a split that is too large for memory a part."""
    found = []
    for one, rows in zip(sets, loaded, strict=True):
        with about(one):
            train, validation = (_part_of(name, getattr(rows, name), row) for name in SPLITS)
            found.append(replace(rows, train=train, validation=validation))
    return found


def _part_of(split: str, data: Table, row: int | None) -> Table:
    """The rows of a split to look at: all, or of one that is too large for memory about BLOCK_BYTES
    from its first row on, or from the row with the number `row`."""
    if not data.is_spilled:
        return data
    start = 0
    if row is not None and row in data.row_numbers:
        start = int(np.flatnonzero(data.row_numbers == row)[0])
    _, block = next(data.select(range(start, len(data))).blocks(PART_ROWS))
    if len(block) < len(data):
        message = (
            "the split is too large for memory: %d of %d %s rows are looked at, from row %d on"
        )
        log.warning(message, len(block), len(data), SPLITS[split], int(block.row_numbers[0]))
    return block


def _findings(sets: Sequence[_Read]) -> list[Finding]:
    """The findings of all data sets, and of each two of them."""
    if len(sets) == 1:
        return sets[0].findings
    found = [about_set(read.one.name, finding) for read in sets for finding in read.findings]
    parts = [
        SetParts(
            read.one.name,
            read.parts["training"][0],
            read.parts["validation"][0] if "validation" in read.parts else None,
            read.rows.format,
            read.rows.spec,
        )
        for read in sets
    ]
    return found + [finding for pair in combinations(parts, 2) for finding in between(*pair)]


def _items_of_number(
    here: Sequence[_Read], sets: Sequence[_Read], number: int, most: int
) -> list[list[Item]]:
    """Everything to show of the row with this number in the source of each data set."""
    found = []
    for read in here:
        rows = np.flatnonzero(read.shown.data.row_numbers == number)
        found.append(items_of_row(read.shown, int(rows[0]))[:most] if len(rows) else [])
    if any(found):
        return found
    numbers = np.concatenate([read.shown.data.row_numbers for read in here])
    what = f"row {number} is none of the {len(numbers):,} {here[0].split} rows"
    remedy = f"Their numbers are from {numbers.min()} to {numbers.max()}."
    for option, other in SPLITS.items():
        parts = [read.parts[other][0] for read in sets if other in read.parts]
        if other != here[0].split and any(number in part.data.row_numbers for part in parts):
            remedy += f" `--split {option}` has a row {number}."
    raise UsageError(what, remedy)


def _for_page(read: _Read, items: list[Item], sets: int) -> list[Item]:
    """The rows of a page that shows so many data sets: about half of them are cut, or have a
    warning, if there are so many."""
    part = read.shown
    notable = set(cut_examples(part, read.whole))
    for finding in read.findings:
        if finding.split == part.name:
            notable.update(finding.examples.tolist())
    longest = max(1, int(lengths_before(part, read.whole).mean()))
    most = min(PAGE_ROWS, PAGE_TOKENS // longest) // sets
    return notable_first(items, notable, max(1, most))


@contextlib.contextmanager
def _hearing() -> Iterator[list[str]]:
    """Context that collects the warnings that are logged within it, each once."""
    heard: dict[str, None] = {}

    class Hearing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.setdefault(record.getMessage())

    handler, found = Hearing(logging.WARNING), list[str]()
    log.addHandler(handler)
    try:
        yield found
        found += heard
    finally:
        log.removeHandler(handler)
