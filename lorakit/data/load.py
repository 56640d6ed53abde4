"""Rows: training and validation sets from the hub, a builtin, a folder or a file.

Files are read by lorakit's own readers, which guess nothing; the hub's data sets come through
`datasets`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path

from datasets import Dataset

from lorakit.data.choice import check_columns, choose, warn_of_unused
from lorakit.data.draw import hold_out
from lorakit.data.formats import Format, Record, format_of
from lorakit.data.keys import ChosenSpec, DataKeys
from lorakit.data.of_datasets import (
    from_hub,
    no_subset,
    saved_by_datasets,
    split_reader,
    without_bars,
)
from lorakit.data.readers import READERS, data_suffix, first_line_is_data, read_file
from lorakit.data.split_files import VALIDATION_NAMES, read_all, split_files
from lorakit.data.streaming import Advance, Streaming
from lorakit.data.table import KEY, Table
from lorakit.errors import RecipeError
from lorakit.files import expanded
from lorakit.sources.resolve import Source

log = logging.getLogger("lorakit")

# Keys that may be wrong when a column does not exist.
OF_COLUMNS = (
    "data.format",
    "data.text_columns",
    "data.label_column",
    "data.prompt",
    "data.completion",
    "data.references",
    "data.column_map",
)
Splits = Mapping[str, Callable[[], Table]]


@dataclass(frozen=True)
class Rows:
    """The training and validation sets. `lines`: rows are lines of running text, which belong
    together. Validation has no rows where none are to be held out (validation_split: 0)."""

    train: Table
    validation: Table
    lines: bool = False


@dataclass(frozen=True)
class Loaded(Rows):
    """The training and validation sets, and the data section with the columns that both are read
    from."""

    spec: ChosenSpec = field(kw_only=True)

    @property
    def format(self) -> Format:
        return format_of(self.spec)


def load_rows(
    source: Source,
    spec: DataKeys,
    task: str,
    only_validation: bool = False,
    record: Record | None = None,
    inherited: Collection[str] = (),
    progress: Advance = lambda done, total: None,
) -> Loaded:
    """Read the rows. Raises RecipeError for wrong names in the recipe, RunError for failures of
    loading.

    With `only_validation` nothing is trained, and `train` is the validation set too: the split that
    the recipe or a usual name gives, or else all rows of the training split or of a single file. No
    rows are held out unless `spec` says which part.

    record: a finished run's record of its columns, which are used where `spec` names none;
    inherited: keys of `spec` that hold for several sets, and for this one if its format has them;
    progress: of reading, in megabytes, for a large split.
    """
    try:
        with without_bars():
            streaming = Streaming(spec, progress)
            return _load_rows(source, spec, task, only_validation, record, inherited, streaming)
    except RecipeError as error:
        file = (
            _without_names(source)
            if any(problem.key in OF_COLUMNS for problem in error.problems)
            else None
        )
        if file is None:
            raise
        raise _asking_for_names(error, file) from error


def _without_names(source: Source) -> Path | None:
    """The first CSV or TSV file of the data whose first line looks like a row instead of column
    names."""
    if source.kind in ("hub", "hub-cache"):
        return None
    path = expanded(source.location)
    files = (
        [path]
        if path.is_file()
        else [file for parts in split_files(path).values() for file in parts]
    )
    return next(filter(first_line_is_data, files), None)


def _asking_for_names(error: RecipeError, file: Path) -> RecipeError:
    hint = (
        f"is the first line of `{file}` the columns' names? It looks like data: the names go on a"
        " line before it"
    )
    return RecipeError(
        [replace(p, hint=hint) if p.key in OF_COLUMNS else p for p in error.problems]
    )


def _load_rows(
    source: Source,
    spec: DataKeys,
    task: str,
    only_validation: bool,
    record: Record | None,
    inherited: Collection[str],
    streaming: Streaming,
) -> Loaded:
    _check_source(source, spec)
    if source.kind in ("hub", "hub-cache"):
        found = from_hub(source, spec)
        splits: Splits = {
            name: split_reader(f"{source.location}, {name}", split, streaming)
            for name, split in found.items()
        }
        found = _from_splits(splits, spec, only_validation)
    else:
        path = expanded(source.location)
        if path.is_dir():
            found = _folder(path, spec, source, only_validation, streaming)
        else:
            alone = read_file(path, streaming.of_files([path]))
            found = _alone(alone, spec, data_suffix(path) == ".txt", only_validation)
    for split, data in (("training", found.train), ("validation", found.validation)):
        if data is not None and len(data) == 0:
            raise RecipeError.at(KEY, f"the {split} set of `{source.requested}` has no rows")
    chosen = choose(spec, task, found.train.column_names, record, inherited)
    form = format_of(chosen)
    form.say_choice(chosen, found.train.column_names)
    if found.validation is not None:
        train, validation = found.train, found.validation
        check_columns(train, validation, chosen)
    else:
        if not only_validation:
            # Wrong labels would make a draw by classes fail with another error.
            form.check_labels(found.train, chosen)
        if chosen.validation_split == 0:
            train, validation = found.train, found.train.select(range(0))
        else:
            train, validation = hold_out(found.train, chosen, found.lines)
    warn_of_unused(train, validation, chosen)
    return Loaded(train, validation, found.lines, spec=chosen)


@dataclass(frozen=True)
class _Found:
    """The rows of the sets as they are read. validation: None where some training rows are to be
    held out."""

    train: Table
    validation: Table | None
    lines: bool


def _check_source(source: Source, spec: DataKeys) -> None:
    """Raise RecipeError for keys that only apply to the hub where the data is not from there; a
    stand-in accepts the keys of the source that it replaces."""
    if source.stand_in or source.kind in ("hub", "hub-cache"):
        return
    if spec.revision is not None:
        raise RecipeError.at(
            "data.revision",
            f"`{source.requested}` is not from the hub: it has no revisions",
            "null",
        )
    if spec.subset is not None and (
        source.kind == "builtin" or expanded(source.location).is_file()
    ):
        what = "a single file" if source.kind == "local" else f"`{source.requested}`"
        raise RecipeError.at("data.subset", f"{what} has no subsets", "null")


def _no_split(key: str, split: str, there: list[str]) -> RecipeError:
    near = get_close_matches(split, there, 1) or [name for name in there if split in name.lower()]
    return RecipeError.at(
        key,
        f"there is no split `{split}` ({key})",
        f"{key}: one of {', '.join(there)}",
        near[0] if near else None,
    )


def _folder(
    folder: Path, spec: DataKeys, source: Source, only_validation: bool, streaming: Streaming
) -> _Found:
    if spec.subset and source.kind != "builtin":
        named = folder / spec.subset
        if named.is_dir() or not source.stand_in:
            there = sorted(
                child.name for child in folder.iterdir() if child.is_dir() and _has_data(child)
            )
            if spec.subset not in there:
                if there:
                    raise no_subset(spec.subset, there)
                what = f"`{folder}` has no subfolder `{spec.subset}` with data"
                raise RecipeError.at("data.subset", what, "subset: null, to use the folder itself")
            folder = named
    saved = saved_by_datasets(folder)
    if isinstance(saved, Dataset):
        return _alone(split_reader(str(folder), saved, streaming)(), spec, False, only_validation)
    if saved is not None:
        return _from_splits(
            {name: split_reader(f"{folder}/{name}", saved[name], streaming) for name in saved},
            spec,
            only_validation,
        )
    files = split_files(folder)
    if not files:
        inside = sorted(
            child.name for child in folder.iterdir() if child.is_dir() and _has_data(child)
        )
        if inside:
            raise no_subset(None, inside)
        expected = (
            f"train and validation files ending in {', '.join(READERS)}, in it or in its folder"
            " data"
        )
        raise RecipeError.at(KEY, f"the folder `{folder}` has no file train.*", expected)
    # Only splits that are used are read: a folder may hold notes, or a test set without labels.
    splits = {name: lambda parts=parts: read_all(parts, streaming) for name, parts in files.items()}
    lines = {name: data_suffix(parts[0]) == ".txt" for name, parts in files.items()}
    return _from_splits(splits, spec, only_validation, lines)


def _has_data(folder: Path) -> bool:
    return (
        bool(split_files(folder))
        or (folder / "dataset_dict.json").is_file()
        or (folder / "state.json").is_file()
    )


def _alone(data: Table, spec: DataKeys, lines: bool, only_validation: bool) -> _Found:
    """The rows of a file without splits."""
    if isinstance(spec.validation_split, str):
        raise RecipeError.at(
            "data.validation_split",
            "a single file has no splits",
            "the fraction of its rows to hold out, or null",
        )
    if spec.train_split != DataKeys.model_fields["train_split"].default:
        raise RecipeError.at("data.train_split", "a single file has no splits", "no such key")
    return _Found(data, data if only_validation and spec.validation_split is None else None, lines)


def _from_splits(
    splits: Splits, spec: DataKeys, only_validation: bool, lines: Mapping[str, bool] | None = None
) -> _Found:
    """The sets that the recipe names, or those with the usual names. lines: {split: True if its
    rows are lines of text}."""
    train = _named(spec.train_split, splits)
    if isinstance(spec.validation_split, str):
        validation = _named(spec.validation_split, splits)
        if validation is None:
            raise _no_split("data.validation_split", spec.validation_split, list(splits))
    else:
        usual = (
            [_named(name, splits) for name in VALIDATION_NAMES]
            if spec.validation_split is None
            else []
        )
        validation = next((name for name in usual if name is not None and name != train), None)
    if only_validation and validation is None and train is None and spec.validation_split is None:
        what = f"no split has a usual name ({', '.join((*VALIDATION_NAMES, spec.train_split))})"
        raise RecipeError.at(
            "data.validation_split", what, f"data.validation_split: one of {', '.join(splits)}"
        )
    if train is None and not (only_validation and validation is not None):
        raise _no_split("data.train_split", spec.train_split, list(splits))
    first = validation if only_validation and validation is not None else train
    assert first is not None
    data = splits[first]()
    of_lines = bool(lines and lines[first])
    if only_validation and (validation is not None or spec.validation_split is None):
        return _Found(data, data, of_lines)
    if validation is None:
        return _Found(data, None, of_lines)
    if validation == train:
        log.warning(
            "the validation split is the training split, `%s`: its metrics are those of what was"
            " learned",
            train,
        )
        return _Found(data, data, of_lines)
    return _Found(data, splits[validation](), of_lines)


def _named(name: str, splits: Splits) -> str | None:
    """The split of this name, or else the one that differs only in case."""
    if name in splits:
        return name
    alike = [split for split in splits if split.lower() == name.lower()]
    return alike[0] if len(alike) == 1 else None
