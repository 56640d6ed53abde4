"""The preview of a recipe's data as one JSON object, for `preview --json`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from lorakit.data.lengths import Lengths
from lorakit.data.preview import Finding, Preview, ShownRow

BINS = 40


def as_json(found: Preview) -> dict[str, Any]:
    """The object. Warnings that the log has too come first, as sentences alone."""
    heard = [{"mark": None, "split": None, "text": text} for text in found.heard]
    return {
        "recipe": found.recipe,
        "model": found.model,
        "data": {"name": found.data, "stand_in": found.stand_in},
        "split": found.split,
        "available_rows": found.available,
        "examples": found.examples,
        "joined": found.is_joined,
        "tokens": found.tokens,
        "targets": found.targets,
        "target_share": found.target_share,
        "max_seq_length": found.max_length,
        "lengths": _lengths(found.lengths),
        "truncation": asdict(found.truncation),
        **({"sets": [asdict(one) for one in found.sets]} if found.sets else {}),
        "rows": [_row(row) for row in found.rows],
        "warnings": [*heard, *map(_finding, found.findings)],
    }


def _lengths(lengths: Lengths) -> dict[str, Any]:
    bins = [{"first": bin.first, "last": bin.last, "rows": bin.rows} for bin in lengths.bins(BINS)]
    return {
        "p50": lengths.quantile(0.5),
        "p95": lengths.quantile(0.95),
        "longest": lengths.longest,
        "histogram": bins,
    }


def _row(row: ShownRow) -> dict[str, Any]:
    return {
        **({} if row.data_set is None else {"data_set": row.data_set}),
        "row": row.number,
        "place": row.place,
        "label": row.label,
        "marks": list(row.marks),
        "tokens": [asdict(token) for token in row.tokens],
    }


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "mark": finding.mark,
        "split": finding.split,
        "text": finding.text,
        "count": finding.count,
        "first": finding.first,
    }
