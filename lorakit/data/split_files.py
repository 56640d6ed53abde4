"""Split files: assigns the data files of a folder to splits, and reads all shards of one."""

from __future__ import annotations

import re
from pathlib import Path

from lorakit.data.readers import data_stem, data_suffix, read_file
from lorakit.data.stored import stays
from lorakit.data.streaming import Streaming
from lorakit.data.table import KEY, Table
from lorakit.errors import RecipeError

VALIDATION_NAMES = (
    "validation",
    "validation_matched",
    "valid",
    "dev",
    "dev_matched",
    "val",
    "eval",
)
SPLIT_NAMES = ("train", "test", *VALIDATION_NAMES)
# A shard of a split: train-00000-of-00003 (the hub's naming), train-0, train_1.
SHARD = re.compile(r"(?P<split>.+?)[-_.](?P<number>\d+)(-of-(?P<count>\d+))?")


def split_files(folder: Path) -> dict[str, list[Path]]:
    """{split: its files} of a folder. Files are in the folder itself, in a subfolder `data`, or in
    a subfolder with the split's name."""
    found = _files_in(folder)
    if not found and (folder / "data").is_dir():
        found = _files_in(folder / "data")
    if not found:
        for child in sorted(folder.iterdir()):
            if child.is_dir() and child.name.lower() in SPLIT_NAMES:
                parts = [
                    file for file in sorted(child.iterdir()) if file.is_file() and data_suffix(file)
                ]
                if parts:
                    found[child.name] = parts
    return found


def _files_in(folder: Path) -> dict[str, list[Path]]:
    """{split: its files} of the data files of a folder; the shards of a split go together."""
    found: dict[str, list[Path]] = {}
    shards: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if file.is_file() and data_suffix(file):
            stem = data_stem(file)
            found.setdefault(stem, []).append(file)
            if part := SHARD.fullmatch(stem):
                shards.setdefault(part["split"], []).append(file)
    for split, files in shards.items():
        if split not in found:
            found[split] = sorted(files, key=_shard_number)
    return found


def _shard_number(file: Path) -> int:
    part = SHARD.fullmatch(data_stem(file))
    assert part is not None
    return int(part["number"])


def read_all(files: list[Path], streaming: Streaming) -> Table:
    """The rows of a split. Raises RecipeError if its files are not shards, or some shards are
    missing."""
    parts = [SHARD.fullmatch(data_stem(file)) for file in files]
    folder = files[0].parent
    # a folder named train may hold any files of that split
    of_split = folder.name.lower() in SPLIT_NAMES
    if len({data_suffix(file) for file in files}) > 1 or (
        len(files) > 1 and None in parts and not of_split
    ):
        what = f"{' and '.join(file.name for file in files)} are both in `{folder}`"
        raise RecipeError.at(KEY, what, "one file a split, or the shards of one")
    there = {int(part["number"]) for part in parts if part is not None}
    for count in {int(part["count"]) for part in parts if part is not None and part["count"]}:
        first = 1 if 0 not in there and count in there else 0  # the hub counts shards from 0
        missing = sorted(set(range(first, first + count)) - there)
        if missing:
            shown = ", ".join(map(str, missing[:5])) + (" …" if len(missing) > 5 else "")
            raise RecipeError.at(
                KEY,
                f"of the {count} shards as `{files[0]}` these are missing: {shown}",
                "all of them",
            )
    try:
        spill = streaming.of_files(files)
        keep = stays if spill is None else spill.keep
        return Table.joined([read_file(file, spill) for file in files], keep)
    except ValueError as error:
        raise RecipeError.at(
            KEY,
            f"the files of `{files[0].parent}` do not fit together: {error}",
            "the same columns in all",
        ) from error
