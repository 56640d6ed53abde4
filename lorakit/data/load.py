"""Rows: training and validation sets from the hub, a builtin, a folder or a file, all through `datasets`."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict

from lorakit.data.spec import DataSpec
from lorakit.errors import RecipeError, RunError
from lorakit.sources import Source

log = logging.getLogger("lorakit")

LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {"keep_linebreaks": True}),
}
VALIDATION_NAMES = ("validation", "validation_matched", "valid", "dev", "val", "eval")
HELD_OUT = 0.1


@dataclass(frozen=True)
class Rows:
    """The two sets. `lines` tells that rows are lines of running text, which belong together."""

    train: Dataset
    validation: Dataset
    lines: bool = False


def load_rows(source: Source, spec: DataSpec) -> Rows:
    """Read the rows. Raises RecipeError for what the recipe names wrongly, RunError for what goes wrong on the way."""
    datasets.disable_progress_bars()
    if source.kind in ("hub", "hub-cache"):
        rows = _from_splits(_hub(source, spec), spec)
    else:
        path = Path(source.location).expanduser()
        rows = (
            _file(path, spec)
            if path.is_file()
            else _folder(path, spec, with_subset=not (source.stand_in or source.kind == "builtin"))
        )
    for split, data in (("training", rows.train), ("validation", rows.validation)):
        if len(data) == 0:
            raise RecipeError.at("data.name_or_path", f"the {split} set of `{source.requested}` has no rows")
    return rows


def _hub(source: Source, spec: DataSpec) -> DatasetDict:
    try:
        return datasets.load_dataset(source.location, spec.subset, revision=spec.revision)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise RecipeError.at(
            "data.name_or_path", f"the hub has no data set `{source.location}`", "owner/name as on the hub"
        ) from error
    except ValueError as error:
        subsets = _hub_subsets(source.location)
        if spec.subset not in subsets:
            raise _no_subset(spec.subset, subsets) from error
        raise RunError(f"`{source.location}` could not be loaded: {_first_line(error)}") from error
    except (OSError, RuntimeError) as error:
        raise RunError(f"`{source.location}` could not be loaded: {_first_line(error)}", "Is the hub reachable?") from error


def _hub_subsets(name: str) -> list[str]:
    try:
        return list(datasets.get_dataset_config_names(name))
    except (OSError, ValueError, RuntimeError):
        return []


def _no_subset(subset: str | None, there: list[str]) -> RecipeError:
    near = get_close_matches(subset or "", there, 1)
    what = f"there is no subset `{subset}`" if subset else "a subset must be named"
    return RecipeError.at("data.subset", what, f"one of {', '.join(there)}" if there else None, near[0] if near else None)


def _no_split(key: str, split: str, there: list[str]) -> RecipeError:
    near = get_close_matches(split, there, 1)
    return RecipeError.at(key, f"there is no split `{split}`", f"one of {', '.join(there)}", near[0] if near else None)


def _folder(folder: Path, spec: DataSpec, with_subset: bool) -> Rows:
    if with_subset and spec.subset:
        there = sorted(child.name for child in folder.iterdir() if child.is_dir() and _split_files(child))
        if spec.subset not in there:
            raise (
                _no_subset(spec.subset, there)
                if there
                else RecipeError.at(
                    "data.subset", f"`{folder}` has no subfolder `{spec.subset}` with data", "null, to use the folder itself"
                )
            )
        folder = folder / spec.subset
    files = _split_files(folder)
    if spec.train_split not in files:
        inside = sorted(child.name for child in folder.iterdir() if child.is_dir() and _split_files(child))
        if inside:
            raise _no_subset(None, inside)
        if files:
            raise _no_split("data.train_split", spec.train_split, list(files))
        expected = f"{spec.train_split} and validation files ending in {', '.join(LOADERS)}"
        raise RecipeError.at("data.name_or_path", f"the folder `{folder}` has no file {spec.train_split}.*", expected)
    lines = files[spec.train_split].suffix == ".txt"
    rows = _from_splits(DatasetDict({name: _read(file) for name, file in files.items()}), spec)
    return Rows(rows.train, rows.validation, lines)


def _split_files(folder: Path) -> dict[str, Path]:
    """{split: file} of the data files of a folder."""
    return {file.stem: file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix in LOADERS}


def _file(path: Path, spec: DataSpec) -> Rows:
    if path.suffix not in LOADERS:
        raise RecipeError.at("data.name_or_path", f"`{path}` is not a data file", f"a file ending in {', '.join(LOADERS)}")
    if isinstance(spec.validation_split, str):
        raise RecipeError.at(
            "data.validation_split", "a single file has no splits", "the fraction of its rows to hold out, or null"
        )
    train, validation = _hold_out(_read(path), spec)
    return Rows(train, validation, path.suffix == ".txt")


def _from_splits(splits: DatasetDict, spec: DataSpec) -> Rows:
    if spec.train_split not in splits:
        raise _no_split("data.train_split", spec.train_split, list(splits))
    train = splits[spec.train_split]
    if isinstance(spec.validation_split, str):
        if spec.validation_split not in splits:
            raise _no_split("data.validation_split", spec.validation_split, list(splits))
        return Rows(train, splits[spec.validation_split])
    if spec.validation_split is None:
        for name in VALIDATION_NAMES:
            if name in splits and name != spec.train_split:
                return Rows(train, splits[name])
    return Rows(*_hold_out(train, spec))


def _hold_out(data: Dataset, spec: DataSpec) -> tuple[Dataset, Dataset]:
    """The last rows, contiguous, become the validation set: lines of a text stay together."""
    fraction = spec.validation_split if isinstance(spec.validation_split, float) else HELD_OUT
    held = max(1, round(len(data) * fraction))
    if held >= len(data):
        raise RecipeError.at(
            "data.name_or_path", f"{len(data)} rows are too few to hold out {fraction:.0%} for validation", "at least 2 rows"
        )
    log.info("no validation set: the last %d of %d rows are held out", held, len(data))
    cut = len(data) - held
    return data.select(range(cut)), data.select(range(cut, len(data)))


def _read(path: Path) -> Dataset:
    if path.stat().st_size == 0:
        raise RecipeError.at("data.name_or_path", f"the file `{path}` is empty", "at least one row")
    loader, options = LOADERS[path.suffix]
    with _reading(path):
        return datasets.load_dataset(loader, data_files=str(path), split="train", **options)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    level = logging.getLogger("datasets").level
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    try:
        yield
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError, RuntimeError) as error:
        cause = error.__cause__ or error
        place, what = _broken_line(path) or (str(path), _first_line(cause))
        raise RecipeError.at("data.name_or_path", f"{place}: {what}", f"rows as {path.suffix[1:]}") from error
    finally:
        logging.getLogger("datasets").setLevel(level)


def _broken_line(path: Path) -> tuple[str, str] | None:
    """Place and reason of the first line of a JSON-lines file that is not a JSON object."""
    if path.suffix != ".jsonl":
        return None
    with path.open(encoding="utf-8", errors="replace") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                return f"{path}:{number}:{error.colno}", f"not JSON: {error.msg}"
            if not isinstance(row, dict):
                return f"{path}:{number}", "a row must be a JSON object"
    return None


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
