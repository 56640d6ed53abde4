"""Commands that make a run: training, and conversion of a finished run."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakit.compat import untested
from lorakit.errors import UsageError
from lorakit.files import read_json
from lorakit.recipes.recipe import Recipe
from lorakit.report.history import run_of
from lorakit.report.progress import Progress
from lorakit.report.trackers import Trackers
from lorakit.runs.convert import converted
from lorakit.runs.folder import RESULT
from lorakit.runs.init_from import given_adapter, start_from
from lorakit.runs.moment import chosen
from lorakit.runs.session import assemble
from lorakit.runs.start import check_folder, starting_point
from lorakit.runs.training_run import TrainingRun
from lorakit.runs.watching import Warnings, check_trackers, start_trackers, warnings_kept
from lorakit.training.distributed import World, joined
from lorakit.training.interrupt import StopRequest, before_it_begins

log = logging.getLogger("lorakit")


def run_training(
    recipe: Recipe,
    progress: Progress,
    resume: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train as the recipe says; returns the content of result.json.

    Raises RecipeError and UsageError before anything is written, RunError when the run fails,
    Interrupted when a signal stopped it and a checkpoint was saved.
    """
    check_trackers(recipe)
    with warnings_kept() as warnings, joined(recipe.distributed.timeout_seconds) as world:
        return _trained(recipe, progress, warnings, resume, overwrite, world)


def _trained(
    recipe: Recipe,
    progress: Progress,
    warnings: Warnings,
    resume: str | None,
    overwrite: bool,
    world: World,
) -> dict[str, Any]:
    """`run_training` with its warnings collected, as one of the processes of `world`."""
    started = time.perf_counter()
    for warning in untested():
        log.warning("%s", warning)
    folder = Path(recipe.output_dir)
    resume = resume or recipe.train.resume_from_checkpoint
    # The first one tries whether the folder can be written to.
    with world.one_after_the_first():
        saved = starting_point(folder, recipe, resume, overwrite)
    if saved is None and resume == "auto" and (folder / RESULT).is_file():
        log.info("the run %s is finished: a larger train.max_steps=… extends it", folder)
        before: dict[str, Any] = read_json(folder / RESULT)
        return before
    # A resumed run has it in its checkpoint.
    given = given_adapter(recipe) if saved is None else None
    with before_it_begins():
        session = assemble(recipe, progress, world)
        if given is not None:
            start_from(session, given)
    run = TrainingRun(session, folder, progress, started, world)
    run.trackers = Trackers(recipe.train.report_to if world.is_first else ())
    with StopRequest() as run.stop, run.trackers:
        run.start(saved, overwrite)
        if world.is_first:
            warnings.keep_in(folder)
        start_trackers(run.trackers, folder, recipe, run.state.step)
        # Python's garbage collector would scan all imported and loaded objects again and again: 5 %
        # of a step of a small model.
        gc.freeze()
        try:
            run.train()
        finally:
            gc.unfreeze()
        result = run.finish()
        run.trackers.finish(result)
        return result


def run_conversion(
    run: Path,
    overrides: Sequence[str],
    out: Path,
    progress: Progress,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Convert the adapters of a run, or of a checkpoint, into chunkwise ones, in a new run folder,
    without training.

    Returns the content of result.json, which also has the metrics from before the conversion.
    Raises UsageError and RecipeError before anything is written.
    """
    started = time.perf_counter()
    run = chosen(run)
    if out.resolve() == run_of(run).resolve():
        raise UsageError(f"`{out}` is the run that is converted", "Name another folder with --out.")
    check_folder(out, overwrite, "--overwrite replaces it, --out names another folder.")
    with before_it_begins():
        session = converted(run, overrides, out, progress)
    conversion = TrainingRun(session, out, progress, started)
    with StopRequest() as conversion.stop:
        conversion.start(None, overwrite)
        found = conversion.evaluate(save=False)
        conversion.state.last_metrics, conversion.state.last_by_set = found.metrics, found.by_set
        return conversion.finish({"converted_from": str(run)})
