"""The folder of a run as it begins or goes on: its first files, and nothing from after the
checkpoint that it goes on from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lorakit.files import keep_json_lines, write_json, write_text
from lorakit.recipes.recipe import dump_yaml
from lorakit.runs.extension import keep_finished
from lorakit.runs.folder import (
    ADAPTER,
    BEST,
    CHECKPOINTS,
    MANIFEST,
    METRICS,
    RANKS,
    RECIPE,
    RESULT,
)
from lorakit.runs.record import manifest
from lorakit.runs.session import Session
from lorakit.training import checkpoint
from lorakit.training.checkpoint import RunState, Saved


def open_folder(
    folder: Path,
    session: Session,
    state: RunState,
    saved: Saved | None,
    overwrite: bool,
    extended: bool,
) -> None:
    """Write the files of a run's start; drop lines from after the checkpoint. extended: a finished
    run that was there goes on, and is kept as it is."""
    facts = manifest(session, state, folder / MANIFEST)
    if overwrite and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if extended:
        keep_finished(folder)
    write_json(folder / MANIFEST, facts)
    write_text(folder / RECIPE, dump_yaml(session.recipe))
    # A finished run, which these mark, is continued now.
    (folder / RESULT).unlink(missing_ok=True)
    shutil.rmtree(folder / ADAPTER, ignore_errors=True)
    keep_json_lines(folder / METRICS, lambda line: _is_before(line, state))
    _drop_later_checkpoints(folder / CHECKPOINTS, saved, state)
    if saved is not None and state.best_step is not None:
        _bring_best(saved.folder, folder, state)
    lines = (json.dumps(line) + "\n" for line in state.ranks)
    write_text(folder / RANKS, "".join(lines))


def _drop_later_checkpoints(root: Path, saved: Saved | None, state: RunState) -> None:
    """Remove checkpoints after the resumed one: they will be written anew, and `--resume auto`
    would continue from them."""
    if saved is None:
        shutil.rmtree(root, ignore_errors=True)
    for later in checkpoint.checkpoints(root):
        if int(later.name.removeprefix("step-")) > state.step:
            shutil.rmtree(later)


def _is_before(line: dict[str, Any], state: RunState) -> bool:
    """True if the run's state includes the step or evaluation of a line of metrics.jsonl."""
    evaluation = any(name.startswith("eval_") for name in line)
    if evaluation:
        return int(line["step"]) <= state.evaluated_step
    return 0 < int(line["step"]) <= state.step


def _bring_best(resumed: Path, folder: Path, state: RunState) -> None:
    """Copy the best checkpoint when a run is continued in another folder."""
    name = f"step-{state.best_step:08d}"
    source, target = resumed.parent / BEST / name, folder / CHECKPOINTS / BEST / name
    if source.is_dir() and not target.is_dir():
        shutil.copytree(source, target)
