"""Preview of a recipe's data: real rows as the model reads them, before any training. Loads
tokenizer and configuration, and no weights."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from lorakit.data.findings import all_findings
from lorakit.data.lengths import Lengths
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
from lorakit.sources.resolve import Source

log = logging.getLogger("lorakit")

SPLITS = {"train": "training", "validation": "validation"}
PART_ROWS = 10_000  # most rows of a split that is too large for memory
PAGE_ROWS, PAGE_TOKENS = 200, 200_000  # most of a page, so that a browser opens it at once


@dataclass(frozen=True)
class _Read:
    """A recipe's rows and examples, the part to show, and its rows before any cut."""

    rows: Loaded
    inputs: Inputs
    parts: dict[str, tuple[Part, Uncut]]
    shown: Part
    whole: Uncut
    findings: list[Finding]

    def show(self, items: list[Item]) -> tuple[ShownRow, ...]:
        tokenizer, labels = self.inputs.tokenizer, self.inputs.labels
        found = shown_rows(self.shown, items, self.whole, self.findings, tokenizer, labels)
        return tuple(found)


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

    rows: how many, at equal distances; row: only this one, by its number in the source, from 1;
    split: train or validation; page: also choose rows for a page. Warnings that training would log
    are logged. Raises UsageError for a split or a row that does not exist, and whatever a run
    raises before it loads the model.
    """
    if split not in SPLITS:
        raise UsageError(f"there is no split `{split}`", f"It is {' or '.join(SPLITS)}.")
    with locating(recipe), _hearing() as heard:
        source, data_source = find_sources(recipe)
        read = _read(recipe, source, data_source, SPLITS[split], row, progress)
        if row is not None:
            chosen = wanted = _items_of_number(read, row)[: max(1, rows)]
        else:
            items = items_of(read.shown)
            chosen, wanted = spread(items, rows), _for_page(read, items) if page else []
        shown = read.show(chosen)
        page_rows = read.show(wanted) if page else ()
    part, examples = read.shown, read.shown.examples
    return Preview(
        recipe=recipe.path,
        model=source.used,
        data=data_source.used,
        stand_in=data_source.stand_in,
        split=part.name,
        max_length=read.inputs.max_length,
        available=len(part.data),
        examples=len(examples),
        is_joined=part.is_joined,
        tokens=len(examples.tokens),
        targets=None if part.targets is None else int(part.targets.sum()),
        lengths=Lengths(lengths_before(part, read.whole)),
        truncation=truncation(part, read.whole),
        rows=shown,
        page_rows=page_rows,
        heard=tuple(heard),
        findings=tuple(read.findings),
    )


def _read(
    recipe: Recipe,
    source: Source,
    data_source: Source,
    split: str,
    row: int | None,
    progress: Progress,
) -> _Read:
    rows = read_rows(recipe, data_source, progress)
    train = _part_of("train", rows.train, row)
    rows = replace(rows, train=train, validation=_part_of("validation", rows.validation, row))
    inputs = inputs_of(recipe, source, rows, progress)
    joined = rows.format.is_joined(rows.spec)
    with progress.stage("measuring the rows that are cut") as advance:
        given = (inputs.labels, rows.spec, inputs.tokenizer, inputs.max_length)
        reader = Reader(*given, advance, inputs.config)
        tables = {
            "training": (reader.training_rows(rows), inputs.train),
            "validation": (reader.validation_rows(rows), inputs.validation),
        }
        found = {}
        for name, (data, examples) in tables.items():
            part = part_of(name, data, examples, joined, rows.lines)
            found[name] = part, uncut(part, reader)
    how = (rows.format, rows.spec, inputs.tokenizer, inputs.config)
    findings = all_findings(list(found.values()), *how)
    return _Read(rows, inputs, found, *found[split], findings)


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


def _items_of_number(read: _Read, number: int) -> list[Item]:
    """Everything to show of the row with this number in its source."""
    found = np.flatnonzero(read.shown.data.row_numbers == number)
    if len(found):
        return items_of_row(read.shown, int(found[0]))
    name, numbers = read.shown.name, read.shown.data.row_numbers
    what = f"row {number} is none of the {len(numbers):,} {name} rows"
    remedy = f"Their numbers are from {numbers.min()} to {numbers.max()}."
    for option, other in SPLITS.items():
        if other != name and number in read.parts[other][0].data.row_numbers:
            remedy += f" `--split {option}` has a row {number}."
    raise UsageError(what, remedy)


def _for_page(read: _Read, items: list[Item]) -> list[Item]:
    """The rows of a page: about half of them are cut, or have a warning, if there are so many."""
    part = read.shown
    notable = set(cut_examples(part, read.whole))
    for finding in read.findings:
        if finding.split == part.name:
            notable.update(finding.examples.tolist())
    longest = max(1, int(lengths_before(part, read.whole).mean()))
    return notable_first(items, notable, max(1, min(PAGE_ROWS, PAGE_TOKENS // longest)))


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
