"""Data sets that the package `datasets` reads: those of the hub, and those that it saved."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path

import datasets
from datasets import ClassLabel, Dataset, DatasetDict

from lorakit import compat
from lorakit.data.keys import DataKeys
from lorakit.data.streaming import Streaming, columns_of
from lorakit.data.table import KEY, Table
from lorakit.errors import RecipeError, RunError, first_line
from lorakit.sources.resolve import Source


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Context: datasets without its progress bars; the setting is restored afterwards."""
    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if bars:
            datasets.enable_progress_bars()


def split_reader(name: str, data: Dataset, streaming: Streaming) -> Callable[[], Table]:
    """Function that reads a split of a `datasets` data set, with its types and class names."""

    def read() -> Table:
        spill = streaming.of_dataset(data, name)
        arrow = data.with_format("arrow")[:] if spill is None else columns_of(data, spill)
        names = {
            column: feature.names
            for column, feature in data.features.items()
            if isinstance(feature, ClassLabel)
        }
        as_json = [
            column for column, feature in data.features.items() if type(feature).__name__ == "Json"
        ]
        return Table.from_arrow(arrow, name, names, as_json)

    return read


def from_hub(source: Source, spec: DataKeys) -> DatasetDict:
    """The splits of a data set on the hub, or in its cache. Raises RecipeError for a name, subset
    or revision that is not there, RunError where loading fails otherwise."""
    try:
        # A hub that is known to be unreachable would cost its time-outs again.
        with compat.hub_only_from_cache(source.kind == "hub-cache"):
            return datasets.load_dataset(source.location, spec.subset, revision=spec.revision)
    except datasets.exceptions.DatasetNotFoundError as error:
        # Also raised for a gated data set and for a missing revision: the error's own words say
        # which.
        key = "data.revision" if "evision" in first_line(error) else "data.name_or_path"
        raise RecipeError.at(key, first_line(error), "as on the hub") from error
    except ValueError as error:
        subsets = _subsets(source.location)
        if subsets and spec.subset not in subsets and (spec.subset is not None or len(subsets) > 1):
            raise no_subset(spec.subset, subsets) from error
        raise RunError(f"`{source.location}` could not be loaded: {first_line(error)}") from error
    # datasets, its file readers and two HTTP clients each have errors of their own
    except Exception as error:
        raise RunError(
            f"`{source.location}` could not be loaded: {first_line(error)}",
            "Is the hub reachable?",
        ) from error


def _subsets(name: str) -> list[str]:
    with contextlib.suppress(Exception):  # only asked in order to explain another error
        return list(datasets.get_dataset_config_names(name))
    return []


def no_subset(subset: str | None, there: list[str]) -> RecipeError:
    """The error for a subset that is not among those which are there; None: none was named."""
    near = get_close_matches(subset or "", there, 1)
    what = f"there is no subset `{subset}`" if subset else "a subset must be named"
    return RecipeError.at(
        "data.subset",
        what,
        f"data.subset: one of {', '.join(there)}" if there else None,
        near[0] if near else None,
    )


def saved_by_datasets(folder: Path) -> Dataset | DatasetDict | None:
    """Data set that the `save_to_disk` of `datasets` wrote into the folder; None if there is none.
    Raises RecipeError for one that cannot be read."""
    if not (folder / "dataset_dict.json").is_file() and not (folder / "state.json").is_file():
        return None
    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # datasets, Arrow and the disk each have errors of their own
        raise RecipeError.at(
            KEY, f"`{folder}`, saved by `datasets`, can not be read: {first_line(error)}"
        ) from error
