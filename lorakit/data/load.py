"""Rows: training and validation sets from the hub, a builtin, a folder or a file, all through `datasets`."""

from __future__ import annotations

import contextlib
import csv
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict

from lorakit import compat
from lorakit.data.spec import DataSpec
from lorakit.errors import RecipeError, RunError
from lorakit.sources import Source

log = logging.getLogger("lorakit")

LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    # `NA` and `null` are texts like others; tab-separated files, GLUE's among them, do not quote.
    ".csv": ("csv", {"keep_default_na": False, "na_values": [""]}),
    ".tsv": ("csv", {"sep": "\t", "quoting": csv.QUOTE_NONE, "keep_default_na": False, "na_values": [""]}),
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


def load_rows(source: Source, spec: DataSpec, only_validation: bool = False) -> Rows:
    """Read the rows. Raises RecipeError for what the recipe names wrongly, RunError for what goes wrong on the way.

    With `only_validation` nothing is trained: a single file is the validation set as a whole, a training split need
    not be there, and `train` is the validation set too.
    """
    datasets.disable_progress_bars()
    if source.kind in ("hub", "hub-cache"):
        rows = _from_splits(_hub(source, spec), spec)
    else:
        path = Path(source.location).expanduser()
        rows = _file(path, spec, only_validation) if path.is_file() else _folder(path, spec, source, only_validation)
    for split, data in (("training", rows.train), ("validation", rows.validation)):
        if len(data) == 0:
            raise RecipeError.at("data.name_or_path", f"the {split} set of `{source.requested}` has no rows")
    return rows


def first_rows(data: Dataset, limit: int | None) -> Dataset:
    """The first `limit` rows; all of them for None."""
    return data.select(range(min(limit, len(data)))) if limit else data


def _hub(source: Source, spec: DataSpec) -> DatasetDict:
    try:
        # A hub that is known to be away would cost its time-outs again.
        with compat.hub_only_from_cache(source.kind == "hub-cache"):
            return datasets.load_dataset(source.location, spec.subset, revision=spec.revision)
    except datasets.exceptions.DatasetNotFoundError as error:
        # Also for a gated data set and for a revision that is not there: its own words tell which.
        key = "data.revision" if "evision" in _first_line(error) else "data.name_or_path"
        raise RecipeError.at(key, _first_line(error), "as on the hub") from error
    except ValueError as error:
        subsets = _hub_subsets(source.location)
        if subsets and spec.subset not in subsets and (spec.subset is not None or len(subsets) > 1):
            raise _no_subset(spec.subset, subsets) from error
        raise RunError(f"`{source.location}` could not be loaded: {_first_line(error)}") from error
    except Exception as error:  # datasets, its file readers and two HTTP clients, each with errors of its own
        raise RunError(f"`{source.location}` could not be loaded: {_first_line(error)}", "Is the hub reachable?") from error


def _hub_subsets(name: str) -> list[str]:
    with contextlib.suppress(Exception):  # only asked in order to explain another error
        return list(datasets.get_dataset_config_names(name))
    return []


def _no_subset(subset: str | None, there: list[str]) -> RecipeError:
    near = get_close_matches(subset or "", there, 1)
    what = f"there is no subset `{subset}`" if subset else "a subset must be named"
    return RecipeError.at("data.subset", what, f"one of {', '.join(there)}" if there else None, near[0] if near else None)


def _no_split(key: str, split: str, there: list[str]) -> RecipeError:
    near = get_close_matches(split, there, 1)
    return RecipeError.at(key, f"there is no split `{split}`", f"one of {', '.join(there)}", near[0] if near else None)


def _folder(folder: Path, spec: DataSpec, source: Source, only_validation: bool) -> Rows:
    named = folder / spec.subset if spec.subset else folder
    if source.kind != "builtin" and spec.subset and not (source.stand_in and not named.is_dir()):
        there = sorted(child.name for child in folder.iterdir() if child.is_dir() and _split_files(child))
        if spec.subset not in there:
            if there:
                raise _no_subset(spec.subset, there)
            what = f"`{folder}` has no subfolder `{spec.subset}` with data"
            raise RecipeError.at("data.subset", what, "null, to use the folder itself")
        folder = named
    files = _split_files(folder)
    wanted = [spec.train_split]
    if isinstance(spec.validation_split, str):
        wanted.append(spec.validation_split)
        if files and spec.validation_split not in files:
            raise _no_split("data.validation_split", spec.validation_split, list(files))
    elif spec.validation_split is None:
        wanted += [name for name in VALIDATION_NAMES if name in files][:1]
    if only_validation and spec.train_split not in files and len(wanted) > 1:
        wanted[0] = wanted[1]
    if wanted[0] not in files:
        inside = sorted(child.name for child in folder.iterdir() if child.is_dir() and _split_files(child))
        if inside:
            raise _no_subset(None, inside)
        if files:
            raise _no_split("data.train_split", spec.train_split, list(files))
        expected = f"{spec.train_split} and validation files ending in {', '.join(LOADERS)}"
        raise RecipeError.at("data.name_or_path", f"the folder `{folder}` has no file {spec.train_split}.*", expected)
    # Only what is used: a folder may well hold notes, or a test set without labels.
    splits = DatasetDict({name: _read(_only(files[name])) for name in wanted if name in files})
    if only_validation and len(wanted) > 1 and wanted[1] in splits:
        return Rows(splits[wanted[1]], splits[wanted[1]], files[wanted[1]][0].suffix == ".txt")
    rows = _from_splits(splits, spec)
    return Rows(rows.train, rows.validation, files[wanted[0]][0].suffix == ".txt")


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """{split: its files} of the data files of a folder."""
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in LOADERS:
            found.setdefault(file.stem, []).append(file)
    return found


def _only(files: list[Path]) -> Path:
    if len(files) > 1:
        what = f"{' and '.join(file.name for file in files)} are both in `{files[0].parent}`"
        raise RecipeError.at("data.name_or_path", what, "one file a split")
    return files[0]


def _file(path: Path, spec: DataSpec, only_validation: bool) -> Rows:
    if path.suffix not in LOADERS:
        raise RecipeError.at("data.name_or_path", f"`{path}` is not a data file", f"a file ending in {', '.join(LOADERS)}")
    if isinstance(spec.validation_split, str):
        raise RecipeError.at(
            "data.validation_split", "a single file has no splits", "the fraction of its rows to hold out, or null"
        )
    data = _read(path)
    if only_validation and spec.validation_split is None:
        return Rows(data, data, path.suffix == ".txt")
    train, validation = _hold_out(data, spec)
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
