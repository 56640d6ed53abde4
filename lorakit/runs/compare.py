"""Comparison of finished runs: reads their folders."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError, UsageError
from lorakit.methods import config_classes
from lorakit.recipes.recipe import flat
from lorakit.recipes.yaml_data import read_yaml
from lorakit.report.comparison import Comparison, FinishedRun, compared
from lorakit.report.history import read_metrics, read_object
from lorakit.runs.folder import FREE_KEYS, MANIFEST, RECIPE, RESULT


def compare(folders: Sequence[Path], baseline: Path | None = None) -> Comparison:
    """The runs in `folders`, side by side; `baseline`, one of them, is what others are compared
    with, by default the first.

    Raises UsageError, once for all folders, where one holds no finished run.
    """
    by_place = {folder.resolve(): folder for folder in folders}
    if baseline is not None and baseline.resolve() not in by_place:
        by_place = {baseline.resolve(): baseline} | by_place
    chosen = list(by_place.values())
    _refuse_others(chosen)
    if len(chosen) < 2:
        raise UsageError(
            f"`{chosen[0]}` alone is nothing to compare", "Name two or more run folders."
        )
    names = short_names(chosen)
    runs = [_read(folder, name) for folder, name in zip(chosen, names, strict=True)]
    first = list(by_place).index(baseline.resolve()) if baseline is not None else 0
    return compared(runs, runs[first], _defaults())


def _refuse_others(folders: Sequence[Path]) -> None:
    """Raise UsageError that names every folder without a finished run."""
    wrong = [f for f in folders if not ((f / RESULT).is_file() and (f / RECIPE).is_file())]
    if not wrong:
        return
    listed = ", ".join(f"`{folder}`" for folder in wrong[:5])
    more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    unfinished = [folder for folder in wrong if (folder / RECIPE).is_file()]
    remedy = (
        f"`{unfinished[0]}` has not finished: go on with `lorakit train RECIPE --resume auto`,"
        " or leave it out."
        if unfinished
        else "Name folders that `lorakit train` wrote, and leave out others."
    )
    verb = "is no finished run" if len(wrong) == 1 else "are no finished runs"
    raise UsageError(f"{listed}{more} {verb}", remedy)


def short_names(folders: Sequence[Path]) -> list[str]:
    """The paths without the folder that all of them are in."""
    if len(folders) < 2:
        return [folder.name for folder in folders]
    parents = os.path.commonpath([folder.resolve().parent for folder in folders])
    return [os.path.relpath(folder.resolve(), parents) for folder in folders]


def _read(folder: Path, name: str) -> FinishedRun:
    try:
        recipe = flat(read_yaml(folder / RECIPE).data)
    except LorakitError as error:
        raise UsageError(f"the recipe of `{folder}` can not be read: {error}") from error
    manifest, result = read_object(folder / MANIFEST), read_object(folder / RESULT)
    data, machine = manifest.get("data", {}), manifest.get("machine", {})
    model = manifest.get("model", {})
    parts = [machine.get(key) for key in ("processor", "cores", "threads", "gpus", "kernels")]
    steps, evaluations = read_metrics(folder)
    return FinishedRun(
        name,
        result,
        {key: value for key, value in recipe.items() if key not in FREE_KEYS},
        base=str(model.get("sha256") or model.get("commit")),
        data=str(data.get("train_sha256")),
        validation=str(data.get("validation_sha256")),
        machine=str(parts),
        steps=steps,
        evaluations=evaluations,
    )


def _defaults() -> Mapping[str, Mapping[str, Any]]:
    """{method: {dotted key: default}}."""
    return {
        name: flat({"method": config.model_validate({}).model_dump(mode="json", by_alias=True)})
        for name, config in config_classes().items()
    }
