"""The start of a run: the folder that it may write to, and the checkpoint that it continues
from."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from lorakit.errors import UsageError
from lorakit.files import try_folder
from lorakit.recipes.recipe import Recipe, flat, load_recipe, resolved
from lorakit.runs.folder import CHECKPOINTS, FREE_KEYS, LENGTH_KEYS, MANIFEST, RECIPE, RESULT
from lorakit.training import checkpoint
from lorakit.training.checkpoint import Saved

log = logging.getLogger("lorakit")


def starting_point(
    folder: Path,
    recipe: Recipe,
    resume: str | None,
    overwrite: bool,
) -> Saved | None:
    """The checkpoint to start from, or None.

    Raises UsageError when the folder must not be written to, and when the recipe is not that of the
    checkpoint.
    """
    if resume and overwrite:
        what = "--resume goes on with a run and --overwrite starts it anew"
        raise UsageError(what, "Give one of them.")
    remedies = "--resume auto goes on with it, --overwrite replaces it"
    others = "output_dir=… names another folder."
    check_folder(folder, bool(resume or overwrite), f"{remedies}, {others}")
    if not resume:
        return None
    found = checkpoint.find(folder / CHECKPOINTS, os.path.expanduser(resume))
    if resume == "auto" and (folder / RESULT).is_file():
        before = load_recipe(folder / RECIPE)
        _refuse_changes(flat(resolved(before)), recipe, folder)
        if _length(before) == _length(recipe):
            return None
        if found is None:
            what = f"the run `{folder}` has no checkpoint to go on from"
            remedy = f"A new run can start at its adapter: method.init_from={folder} output_dir=…"
            raise UsageError(what, remedy)
    if found is None:
        log.info("nothing to resume in %s: starting from the first step", folder)
        return None
    saved = checkpoint.read(found)
    _refuse_changes(saved.run.fingerprint["recipe"], recipe, found)
    return saved


def check_folder(folder: Path, may_hold_a_run: bool, remedy: str) -> None:
    """Raise UsageError when the folder must not, or cannot, be written to.

    remedy: the advice for a folder that holds a run, when it may not.
    """
    another = "Name a folder that does not exist yet."
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UsageError(f"output_dir `{folder}` is, or holds, the working folder", another)
    nearest = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    if nearest.exists() and not nearest.is_dir():
        file = " is a file" if nearest == folder else f": `{nearest}` is a file"
        raise UsageError(f"output_dir `{folder}`{file}", another)
    there = folder.is_dir() and any(folder.iterdir())
    # Both files are required, since an unrelated folder may hold a recipe.yaml.
    if there and not all((folder / mark).is_file() for mark in (RECIPE, MANIFEST)):
        what = f"output_dir `{folder}` holds files that are not a run"
        raise UsageError(what, "Name another folder; nothing in this one was touched.")
    if there and not may_hold_a_run:
        raise UsageError(f"output_dir `{folder}` already holds a run", remedy)
    try:
        try_folder(folder)
    except OSError as error:
        what = f"output_dir `{folder}` can not be written: {error.strerror}"
        if error.filename and Path(error.filename) != folder:
            what += f" (`{error.filename}`)"
        remedy = "Name a folder that can be made and written to; nothing was loaded yet."
        raise UsageError(what, remedy) from error


def _length(recipe: Recipe) -> tuple[int | None, float | None]:
    """The keys that the number of steps is counted from: (max_steps, num_train_epochs)."""
    steps = recipe.train.max_steps
    return steps, recipe.train.num_train_epochs if steps is None else None


def _refuse_changes(before: dict[str, Any], recipe: Recipe, where: Path) -> None:
    """Raise UsageError naming the keys that differ from the run to be resumed, and that neither
    have no effect nor extend it."""
    # Flat already, but for lists in checkpoints of earlier versions.
    before, now = flat(before), flat(resolved(recipe))
    lines = []
    for key in sorted((before.keys() | now.keys()) - FREE_KEYS - LENGTH_KEYS):
        # A run of an earlier version did what the default of a key that it lacks does now.
        if before.get(key, _default(recipe, key)) != now.get(key):
            lines.append(f"\n  {key}: {before.get(key)} → {now.get(key)}")
    if lines:
        what = f"the recipe is not the one of {where}:{''.join(lines)}"
        raise UsageError(what, "Resume with the old values, or start anew.")


def _default(recipe: Recipe, key: str) -> Any:
    """The default of a dotted key in the form of a saved recipe; None where it has none."""
    section, _, name = key.partition(".")
    field = getattr(type(getattr(recipe, section, None)), "model_fields", {}).get(name)
    return None if field is None else field.get_default(call_default_factory=True)


def refuse_other_inputs(saved: Saved, fingerprint: dict[str, Any]) -> None:
    """Raise UsageError when data, base model or precision are not those of the checkpoint."""
    for what, now in fingerprint.items():
        if what != "recipe" and saved.run.fingerprint.get(what) != now:
            before = f"the {what} is not what {saved.folder} was trained with"
            raise UsageError(before, "Restore it, or start anew with --overwrite.")
