"""Records that a run folder keeps: the fingerprint, manifest.json and result.json."""

from __future__ import annotations

import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lorakit.files import read_json
from lorakit.recipes.recipe import flat, resolved
from lorakit.runs.environment import peak_memory_mb, versions
from lorakit.runs.factors import factor_facts
from lorakit.runs.machine import machine
from lorakit.runs.session import Session
from lorakit.training.checkpoint import RunState
from lorakit.training.spec import GROUPED
from lorakit.training.trained import trainable


def fingerprint(session: Session) -> dict[str, Any]:
    """Everything that must be the same for a resumed run to end with the same bytes."""
    source = session.facts.source
    return {
        "recipe": flat(resolved(session.recipe)),
        "training data": session.train.digest(),
        "validation data": session.validation.digest(),
        # Hashes of a folder's files, or the hub's commit.
        "base model": {"sha256": source.hashes(), "commit": source.revision},
        "precision": str(session.dtype),
    }


def manifest(session: Session, state: RunState, before: Path) -> dict[str, Any]:
    """Content of manifest.json; for a resumed run, the manifest in `before` with a line about the
    resumption."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    if state.step and before.is_file():
        kept: dict[str, Any] = read_json(before)
        resumed = [*kept.get("resumed", []), {"at": started, "step": state.step}]
        return kept | {"resumed": resumed} | _extensions(state)
    data = {
        "shape": session.shape,
        "train_rows": len(session.train),
        "validation_rows": len(session.validation),
        "train_sha256": state.fingerprint["training data"],
        "validation_sha256": state.fingerprint["validation data"],
    }
    return {
        "started": started,
        "command": sys.argv,
        "working_folder": str(Path.cwd()),
        "versions": versions(),
        "machine": machine(),
        "model": asdict(session.facts.source) | state.fingerprint["base model"],
        "data": asdict(session.data_source) | data,
        "init_from": session.started_from,
        "labels": session.facts.labels.names if session.facts.labels else None,
    }


def result(
    session: Session,
    state: RunState,
    metrics: dict[str, float],
    adapter: Path,
) -> dict[str, Any]:
    """Content of result.json; adapter: the folder that the adapter was saved in."""
    recipe, facts, data = session.recipe, session.facts, session.data_source
    ranks = session.method.rank_state().ranks
    trained = trainable(session.task_model.model).values()
    precision = str(session.dtype).removeprefix("torch.")
    return {
        "method": "+".join([recipe.method.name, *(part.name for part in recipe.method.with_)]),
        "task": recipe.model.task,
        "metrics": metrics,
        "train_seconds": round(state.seconds, 3),
        "wall_seconds": round(state.wall_seconds, 3),
        "tokens": state.tokens,
        "tokens_per_second": round(state.tokens / state.seconds, 1) if state.seconds else 0.0,
        "peak_memory_mb": peak_memory_mb(),
        "trainable_parameters": sum(p.numel() for p in trained),
        "adapter_bytes": sum(file.stat().st_size for file in adapter.glob("*.safetensors")),
        "rank_total": sum(ranks.values()),
        "ranks": ranks,
        "steps": state.step,
        "best_step": state.best_step,
        "seed": recipe.train.seed,
        "train_sampling_strategy": recipe.train.sampling,
        "group_by_length": recipe.train.sampling == GROUPED,
        "precision": precision.replace("float32", "fp32").replace("bfloat16", "bf16"),
        "model": {"name": facts.source.requested, "stand_in": facts.source.stand_in},
        "data": {"name": data.requested, "stand_in": data.stand_in},
        **_extensions(state),
        **factor_facts(session.method.adapters),
        **session.method.summary(),
    }


def _extensions(state: RunState) -> dict[str, Any]:
    """{extended: its extensions}, of a run that was extended."""
    return {"extended": state.extended} if state.extended else {}
