"""The ranks of a run as one JSON object, for `inspect-ranks --json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.report.history import RankRecord, changes
from lorakit.report.layout import layout

# Keys of result.json about the entries of the factors and of the base.
ENTRY_KEYS = (
    "density",
    "nonzeros",
    "effective_ranks",
    "base_density",
    "tiers",
    "mean_rank",
    "mean_chunk_length",
)


def as_json(
    records: Sequence[RankRecord],
    result: Mapping[str, Any] | None = None,
    run: Path | None = None,
    densities: Mapping[int, float] | None = None,
) -> dict[str, Any]:
    """The object. result: result.json, None while the run is still going, for which `densities`
    {step: density} has the density so far."""
    first, last = records[0], records[-1]
    grid = layout(last.ranks)

    def start_and_now(modules: list[str]) -> dict[str, int]:
        return {"start": first.sum_of(modules), "now": last.sum_of(modules)}

    return {
        "run": None if run is None else str(run),
        "method": (result or {}).get("method"),
        "step": last.step,
        "total": last.total,
        "cost": last.cost,
        "pool": last.pool,
        "budget": last.budget,
        "ranks": last.ranks,
        "initial_ranks": first.ranks,
        "moved": changes(first, last),
        "by_kind": {kind: start_and_now(grid.of_kind(kind)) for kind in grid.kinds},
        "by_layer": {layer: start_and_now(grid.of_layer(layer)) for layer in grid.layers},
        "history": _history(records),
        **_entries(result, densities),
    }


def _history(records: Sequence[RankRecord]) -> list[dict[str, Any]]:
    return [
        {
            "step": record.step,
            "total": record.total,
            "cost": record.cost,
            "pool": record.pool,
            "budget": record.budget,
            "changed": {} if before is None else changes(before, record),
        }
        for before, record in zip([None, *records], records, strict=False)
    ]


def _entries(
    result: Mapping[str, Any] | None,
    densities: Mapping[int, float] | None,
) -> dict[str, Any]:
    """Facts of result.json about entries, or the density so far."""
    if result is not None:
        return {key: result[key] for key in ENTRY_KEYS if key in result}
    if densities:
        step, density = list(densities.items())[-1]
        return {"density": {"total": density, "step": step}}
    return {}
