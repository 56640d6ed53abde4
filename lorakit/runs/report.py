"""The HTML page about a run: reads the files of its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError, UsageError
from lorakit.recipes.recipe import flat
from lorakit.recipes.yaml_data import read_yaml
from lorakit.report.history import (
    RANKS_FILE,
    read_history,
    read_metrics,
    read_object,
    read_result,
    read_warnings,
)
from lorakit.report.output import save_output
from lorakit.report.run_page import RunFiles, page
from lorakit.runs.folder import MANIFEST, RECIPE

PAGE = "report.html"


def report(folder: Path, out: Path | None = None) -> Path:
    """Write the page about the run in `folder`, finished or not, to `out`, by default report.html
    in the folder; returns where it is.

    Raises UsageError for a file of the run that is broken, and if the page can not be written.
    """
    path = out if out is not None else folder / PAGE
    if path.suffix.lower() not in (".html", ".htm"):
        what = f"the page can not be written as `{path.name}`"
        raise UsageError(what, "Give it a name that ends in .html.")
    save_output(path, page(run_files(folder)).encode())
    return path


def run_files(folder: Path) -> RunFiles:
    """The files of a run that the page shows."""
    steps, evaluations = read_metrics(folder)
    recipe, settings = _recipe(folder / RECIPE)
    return RunFiles(
        folder.resolve().name,
        recipe,
        settings,
        read_object(folder / MANIFEST),
        read_result(folder),
        read_history(folder) if (folder / RANKS_FILE).is_file() else [],
        steps,
        evaluations,
        read_warnings(folder),
    )


def _recipe(path: Path) -> tuple[str, dict[str, Any]]:
    """(its text, its values by dotted key); the text alone where it is not a recipe any more."""
    if not path.is_file():
        return "", {}
    try:
        return path.read_text(encoding="utf-8"), flat(read_yaml(path).data)
    except (LorakitError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8", errors="replace"), {}
