"""Find a run folder, and read the history of its ranks (`ranks.jsonl`) and of its density
(`metrics.jsonl`)."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import UsageError

RUNS = Path("runs")
RANKS_FILE = "ranks.jsonl"
METRICS_FILE = "metrics.jsonl"
STATE_FILE = "state.json"  # of a checkpoint
RUN_MARKS = (RANKS_FILE, "recipe.yaml")
# The form of a line in each file, for error messages.
RANKS_FORM = '{"step": 0, "ranks": {"MODULE": 8, …}, "cost": 8, "pool": 0, "budget": 8}'
METRICS_FORM = '{"step": 1, "loss": 0.7, "density": 1.0, …}'


@dataclass(frozen=True)
class RankRecord:
    """One line of ranks.jsonl: the ranks from `step` on. cost + pool = budget."""

    step: int
    ranks: dict[str, int]
    cost: int
    pool: int
    budget: int

    @property
    def total(self) -> int:
        return sum(self.ranks.values())

    def sum_of(self, modules: Iterable[str]) -> int:
        """The ranks of some modules, together."""
        return sum(self.ranks[name] for name in modules)


def changes(before: RankRecord, after: RankRecord) -> dict[str, int]:
    """{module: by how much its rank moved}, only modules that did, in the model's order."""
    return {
        name: rank - before.ranks[name]
        for name, rank in after.ranks.items()
        if rank != before.ranks[name]
    }


# -- finding a run ---------------------------------------------------------------------------------


def is_run(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in RUN_MARKS)


def run_of(folder: Path) -> Path:
    """The run that `folder` is a checkpoint of, as RUN/checkpoints/step-00000100 or its best one in
    RUN/checkpoints/best; any other folder itself."""
    if not re.fullmatch(r"step-\d{8,}", folder.name or folder.resolve().name):
        return folder
    for place in (folder, folder.resolve()):  # of `.` or a link, the path shows nothing
        above = place.parent.parent if place.parent.name == "best" else place.parent
        if above.name == "checkpoints" and is_run(above.parent):
            return above.parent
    return folder


def existing_runs(root: Path = RUNS) -> list[Path]:
    """Every run folder under `root`, at any depth, sorted by name. A run's own subfolders are not
    searched."""
    found = []
    for folder, subfolders, files in os.walk(root):
        if any(mark in files for mark in RUN_MARKS):
            found.append(Path(folder))
            subfolders.clear()
    return sorted(found)


def newest_run(root: Path = RUNS) -> Path:
    """The run under `root` that was written to last. Raises UsageError if there is none."""

    def last_written(run: Path) -> float:
        return max((run / mark).stat().st_mtime for mark in RUN_MARKS if (run / mark).is_file())

    runs = existing_runs(root)
    if not runs:
        raise UsageError(
            f"there is no run under `{root}/`",
            "Start one with `lorakit train RECIPE`, or name a run folder on the command line.",
        )
    return max(runs, key=last_written)


def run_folder(name: Path | None = None, root: Path = RUNS, or_checkpoint: bool = False) -> Path:
    """The run folder `name`, or the newest one under `root` for None; or_checkpoint: one of a run's
    checkpoints is as good.

    Raises UsageError, with the nearest run, if `name` is not a run folder.
    """
    if name is None:
        return newest_run(root)
    if name.is_dir() and is_run(name):
        return name
    if name.is_dir() and (run := run_of(name)) != name:
        if or_checkpoint:
            return name
        raise UsageError(f"`{name}` is a checkpoint, not a run", f"Name the run, `{run}`.")
    if name.is_dir():
        what = f"`{name}` is not a run folder: it holds neither {' nor '.join(RUN_MARKS)}"
        inside = existing_runs(name)
    else:
        what = f"`{name}` is {'a file, not a run folder' if name.exists() else 'not there'}"
        inside = []
    nearest = inside[0] if inside else _nearest(name, existing_runs(root))
    remedy = (
        f"did you mean `{nearest}`?"
        if nearest
        else "Name the output_dir of a run; `lorakit train RECIPE` makes one."
    )
    raise UsageError(what, remedy)


def _nearest(name: Path, runs: list[Path]) -> Path | None:
    """The run whose path, or whose last part, is spelled most like `name`."""

    def likeness(run: Path) -> float:
        pairs = ((str(name), str(run)), (name.name, run.name))
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    best = max(runs, key=likeness, default=None)
    return best if best is not None and likeness(best) >= 0.6 else None


# -- reading its records ---------------------------------------------------------------------------


def read_history(run: Path) -> list[RankRecord]:
    """The rank records of a run, or those up to a checkpoint, oldest first; at least one.

    Raises UsageError for a folder that is not a run, and for a file that is missing, empty or
    broken (with the line).
    """
    if run_of(run) != run:
        return _records_of_checkpoint(run / STATE_FILE)
    path = run / RANKS_FILE
    if not path.is_file():
        run_folder(run)
        raise UsageError(
            f"`{run}` has no {RANKS_FILE}",
            "The run has not reached its first step; see its log for the reason.",
        )
    records: list[RankRecord] = []
    for number, line in _json_lines(path, RANKS_FORM):
        try:
            record = _record(line)
        except ValueError as error:
            raise _broken(path, number, str(error), RANKS_FORM) from error
        if records and record.ranks.keys() != records[0].ranks.keys():
            raise _broken(path, number, "it lists other modules than the first line", RANKS_FORM)
        # A resumed run goes on from a checkpoint: its records replace those after the checkpoint.
        while records and records[-1].step >= record.step:
            records.pop()
        records.append(record)
    if not records:
        raise UsageError(
            f"{path} holds no record",
            "The run has not reached its first step; try again once it has.",
        )
    return records


def progress_of(folder: Path) -> str:
    """`: step 100 of 400` for a checkpoint, nothing for a run."""
    if run_of(folder) == folder:
        return ""
    state = read_object(folder / STATE_FILE).get("run", {})
    return f": step {state.get('step')} of {state.get('total_steps')}"


def _records_of_checkpoint(path: Path) -> list[RankRecord]:
    """The rank records in the state of a checkpoint, which holds those up to its step."""
    try:
        return [_record(line) for line in read_object(path)["run"]["ranks"]]
    except (KeyError, TypeError, ValueError) as error:
        remedy = "Name another checkpoint, or the run."
        raise UsageError(f"{path}: not the state of a checkpoint: {error}", remedy) from error


def read_densities(run: Path) -> dict[int, float]:
    """{step: the density of the factors after it}, in order, of a run, or up to a checkpoint; empty
    for a run that does not make its factors sparse.

    Raises UsageError for a metrics.jsonl that is broken (with the line).
    """
    densities: dict[int, float] = {}
    for number, line in _metric_lines(run):
        if "density" not in line:
            continue
        step, density = line["step"], line["density"]
        if (
            isinstance(density, bool)
            or not isinstance(density, int | float)
            or not 0 <= density <= 1
        ):
            what = f"`density` is not a number from 0 to 1: {density!r}"
            raise _broken(run / METRICS_FILE, number, what, METRICS_FORM)
        # As in read_history: a resumed run replaces the lines after its checkpoint.
        while densities and (last := next(reversed(densities))) >= step:
            del densities[last]
        densities[step] = float(density)
    return densities


Line = dict[str, Any]


def read_metrics(run: Path) -> tuple[list[Line], list[Line]]:
    """The lines of metrics.jsonl, in order: of optimizer steps, and of evaluations, whose names
    begin with `eval_`. Both are empty for a run without the file.

    Raises UsageError for a metrics.jsonl that is broken (with the line).
    """
    steps: list[Line] = []
    evaluations: list[Line] = []
    for _, line in _metric_lines(run):
        kind = evaluations if any(name.startswith("eval_") for name in line) else steps
        while kind and kind[-1]["step"] >= line["step"]:
            kind.pop()
        kind.append(line)
    return steps, evaluations


def _metric_lines(run: Path) -> Iterator[tuple[int, Line]]:
    """(line number, line) of metrics.jsonl, if there is one."""
    path = run_of(run) / METRICS_FILE
    until = math.inf if path.parent == run else int(run.resolve().name.removeprefix("step-"))
    for number, line in _json_lines(path, METRICS_FORM) if path.is_file() else ():
        if not isinstance(line, dict) or not _is_count(line.get("step")):
            raise _broken(path, number, "not an object with a `step`", METRICS_FORM)
        if line["step"] <= until:
            yield number, line


def read_warnings(run: Path) -> list[str]:
    """The messages of warnings.jsonl, in order; none for a run without the file."""
    path, form = run / "warnings.jsonl", '{"at": "…", "message": "…"}'
    found = []
    for number, line in _json_lines(path, form) if path.is_file() else ():
        if not isinstance(line, dict) or not isinstance(line.get("message"), str):
            raise _broken(path, number, "not an object with a `message`", form)
        found.append(line["message"])
    return found


def read_result(run: Path) -> dict[str, Any] | None:
    """The run's result.json, or None while it is not finished."""
    path = run / "result.json"
    return read_object(path) if path.is_file() else None


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} if there is no file. Raises UsageError for a broken one."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path}: not an object, but {json.dumps(value)[:40]}")
    return value


def _json_lines(path: Path, form: str) -> Iterator[tuple[int, Any]]:
    """(line number, JSON value) of a file with a value a line; form: of a line, for messages."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"{path} can not be read: {error.strerror}") from error
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                # No newline behind it: a run that is still going, or that was killed, was writing
                # this line.
                return
            raise _broken(
                path,
                number,
                f"not JSON ({error.msg}, column {error.colno})",
                form,
            ) from error
        yield number, value


def _broken(path: Path, number: int, what: str, form: str) -> UsageError:
    return UsageError(f"{path}:{number}: {what}", f"expected: one object a line, {form}")


def _record(line: Any) -> RankRecord:
    """A record from the JSON value of one line. Raises ValueError that says which key is wrong."""
    if not isinstance(line, dict):
        raise ValueError("not an object")
    ranks = line.get("ranks")
    if not isinstance(ranks, dict) or not ranks:
        raise ValueError("`ranks` is not an object {module: rank}")
    for name, rank in ranks.items():
        if not _is_count(rank):
            raise ValueError(f"the rank of `{name}` is not a number of components: {rank!r}")
    for key in ("step", "cost", "pool", "budget"):
        if not _is_count(line.get(key)):
            raise ValueError(f"`{key}` is not a whole number, 0 or more: {line.get(key)!r}")
    return RankRecord(line["step"], ranks, line["cost"], line["pool"], line["budget"])


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
