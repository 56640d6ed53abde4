"""Records that a run folder keeps: the fingerprint, manifest.json and result.json."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lorakit.data.joined import set_figures
from lorakit.files import read_json
from lorakit.recipes.recipe import flat, resolved
from lorakit.runs.environment import peak_memory_mb, versions
from lorakit.runs.factors import factor_facts
from lorakit.runs.machine import machine
from lorakit.runs.memory import MB, base_bytes
from lorakit.runs.session import Session
from lorakit.runs.sets import source_facts
from lorakit.training.checkpoint import RunState
from lorakit.training.metrics import Evaluation
from lorakit.training.spec import GROUPED
from lorakit.training.trained import trainable


def fingerprint(session: Session) -> dict[str, Any]:
    """Everything that must be the same for a resumed run to end with the same bytes."""
    source = session.facts.source
    return {
        "recipe": flat(resolved(session.recipe)),
        **_digests(session),
        # Hashes of a folder's files, or the hub's commit.
        "base model": {"sha256": source.hashes(), "commit": source.revision},
        "precision": str(session.dtype),
    }


def _digests(session: Session) -> dict[str, Any]:
    """Hashes of the examples; of a mix, first those of each set, so that an error names it."""
    found: dict[str, Any] = {}
    if session.recipe.data.mix is not None:
        for one in session.sets:
            found[f"training data of {one.name}"] = one.train.digest()
            if one.validation is not None:
                found[f"validation data of {one.name}"] = one.validation.digest()
    whole = {"training data": session.train, "validation data": session.validation}
    return found | {name: examples.digest() for name, examples in whole.items()}


def _data_manifest(session: Session, hashes: Mapping[str, Any]) -> dict[str, Any]:
    """Where the rows came from, and what they are; of a mix, `sets` says it of each set."""
    rows = {
        "train_rows": len(session.train),
        "validation_rows": len(session.validation),
        "train_sha256": hashes["training data"],
        "validation_sha256": hashes["validation data"],
    }
    if session.recipe.data.mix is None:
        (only,) = session.sets
        return asdict(only.source) | {"shape": only.shape} | rows
    sets = [
        {"name": one.name, **asdict(one.source), "shape": one.shape}
        | {
            "train_rows": len(one.train),
            "validation_rows": 0 if one.validation is None else len(one.validation),
            "train_sha256": hashes[f"training data of {one.name}"],
            "validation_sha256": hashes.get(f"validation data of {one.name}"),
        }
        for one in session.sets
    ]
    return (
        {"used": " + ".join(one.name for one in session.sets), "kind": "mix"}
        | rows
        | {"sets": sets}
    )


def data_facts(session: Session) -> dict[str, Any]:
    """{"name", "stand_in"} of the data; of a mix, "sets" has those of each, with its figures."""
    sources = [one.source for one in session.sets]
    found = source_facts(session.recipe, sources)
    for facts, figures in zip(found.get("sets", []), set_figures(session.train), strict=False):
        facts |= asdict(figures)
    return found


def manifest(session: Session, state: RunState, before: Path) -> dict[str, Any]:
    """Content of manifest.json; for a resumed run, the manifest in `before` with a line about the
    resumption."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    if state.step and before.is_file():
        kept: dict[str, Any] = read_json(before)
        resumed = [*kept.get("resumed", []), {"at": started, "step": state.step}]
        return kept | {"resumed": resumed} | _extensions(state)
    return {
        "started": started,
        "command": sys.argv,
        "working_folder": str(Path.cwd()),
        "versions": versions(),
        "machine": machine(),
        "model": asdict(session.facts.source) | state.fingerprint["base model"],
        "data": _data_manifest(session, state.fingerprint),
        "init_from": session.started_from,
        "labels": session.facts.labels.names if session.facts.labels else None,
    }


def result(
    session: Session,
    state: RunState,
    found: Evaluation,
    adapter: Path,
) -> dict[str, Any]:
    """Content of result.json; found: the metrics of the adapter; adapter: the folder that it was
    saved in."""
    recipe, facts = session.recipe, session.facts
    ranks = session.method.rank_state().ranks
    trained = trainable(session.task_model.model).values()
    precision, in_bits = str(session.dtype).removeprefix("torch."), recipe.model.quantization
    return {
        "method": "+".join([recipe.method.name, *(part.name for part in recipe.method.with_)]),
        "task": recipe.model.task,
        "metrics": found.metrics,
        **({"metrics_by_set": found.by_set} if found.by_set else {}),
        "train_seconds": round(state.seconds, 3),
        "wall_seconds": round(state.wall_seconds, 3),
        "tokens": state.tokens,
        "tokens_per_second": round(state.tokens / state.seconds, 1) if state.seconds else 0.0,
        "peak_memory_mb": peak_memory_mb(),
        "base_memory_mb": round(base_bytes(session) / MB, 1),
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
        "quantization": None if in_bits is None else in_bits.model_dump(mode="json"),
        "model": {"name": facts.source.requested, "stand_in": facts.source.stand_in},
        "data": data_facts(session),
        **_extensions(state),
        **factor_facts(session.method.adapters),
        **session.method.summary(),
    }


def _extensions(state: RunState) -> dict[str, Any]:
    """{extended: its extensions}, of a run that was extended."""
    return {"extended": state.extended} if state.extended else {}
