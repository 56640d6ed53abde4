"""Readers: a data file becomes a table whose cells are the file's own texts.

The readers of the `datasets` library guess types (a string that looks like a date becomes one, 007
becomes 7) and cache files by their modification time. These readers guess nothing and cache
nothing.
"""

from __future__ import annotations

import gc
import gzip
import lzma
import zlib
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from lorakit.data.readers import separated
from lorakit.data.readers.json_rows import read_json, read_json_lines
from lorakit.data.readers.lines import OPENERS, lines_of
from lorakit.data.readers.parquet import read_parquet
from lorakit.data.readers.separated import read_csv, read_tsv
from lorakit.data.spill import Spill
from lorakit.data.table import BLOCK_ROWS, KEY, Builder, Table
from lorakit.errors import RecipeError, RunError

# First bytes of compressed files; zip and zstd are not read.
PACKED = {
    b"\x1f\x8b": ".gz",
    b"BZh": ".bz2",
    b"\xfd7zXZ\x00": ".xz",
    b"PK\x03\x04": ".zip",
    b"\x28\xb5\x2f\xfd": ".zst",
}
PARQUET = b"PAR1\x15"  # a text may begin with PAR1
# at byte 4 of a bzip2 file that is not empty; a text may begin with BZh
BZIP2_BLOCK = b"1AY&SY"


def data_suffix(path: Path) -> str | None:
    """The suffix that determines how a file is read, in lower case and without a compression
    suffix; None for other files."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] in OPENERS
    suffix = suffixes[-2] if packed and len(suffixes) > 1 else suffixes[-1] if suffixes else ""
    if suffix not in READERS or (packed and suffix == ".parquet"):
        return None
    return suffix


def data_stem(path: Path) -> str:
    """The name of a data file without the suffixes that `data_suffix` reads."""
    name = path.stem if path.suffix.lower() in OPENERS else path.name
    return Path(name).stem


def read_file(path: Path, spill: Spill | None = None) -> Table:
    """The rows of a data file. spill: the file that they go to, for those that are too large for
    memory.

    Raises RecipeError, with the line, for wrong content; RunError for a file that cannot be read at
    all.
    """
    suffix = data_suffix(path)
    if suffix is None:
        raise RecipeError.at(
            KEY,
            f"`{path}` is not a data file",
            f"a file ending in {', '.join(READERS)}, or that and .gz, .bz2, .xz",
        )
    try:
        if path.stat().st_size == 0:
            raise RecipeError.at(KEY, f"the file `{path}` is empty", "at least one row")
        _check_packing(path)
        # The objects of JSON rows trigger Python's garbage collector, which would scan all imported
        # objects each time: a third of the time.
        gc.freeze()
        try:
            return READERS[suffix](path, spill)
        finally:
            gc.unfreeze()
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        what = f"`{path}` is not a whole compressed file: {error}"
        raise RecipeError.at(
            KEY, what, "all of the file, as it was compressed: fetch or copy it again"
        ) from error
    except OSError as error:
        if path.suffix.lower() == ".bz2":  # bz2 raises the same errors as the disk
            raise RecipeError.at(
                KEY, f"`{path}` can not be read as {path.suffix[1:]}: {error}"
            ) from error
        raise RunError(f"`{path}` can not be read: {error.strerror or error}") from error


def first_line_is_data(path: Path) -> bool:
    """True if the first line of a CSV or TSV file looks like a row instead of column names."""
    suffix = data_suffix(path)
    return suffix in (".csv", ".tsv") and separated.first_line_is_data(path, suffix == ".tsv")


def _check_packing(path: Path) -> None:
    """Raise RecipeError for a compressed or Parquet file whose name says otherwise."""
    with path.open("rb") as stream:
        start = stream.read(4 + len(BZIP2_BLOCK))
    if start.startswith(PARQUET) and data_suffix(path) != ".parquet":
        what = f"`{path}` is a Parquet file, though its name does not say so"
        raise RecipeError.at(KEY, what, "the same file with a name that ends in .parquet")
    packed = next((suffix for mark, suffix in PACKED.items() if start.startswith(mark)), None)
    last = path.suffix.lower()
    if last in OPENERS:
        if packed is None:
            what = f"`{path}` is not compressed, though its name ends in {path.suffix}"
            raise RecipeError.at(KEY, what, f"the same file named {path.stem}")
        if packed != last:
            what = f"`{path}` is compressed as {packed[1:]}, though its name ends in {path.suffix}"
            raise RecipeError.at(KEY, what, _named(path.with_suffix(""), packed))
    elif packed is not None and (packed != ".bz2" or start.endswith(BZIP2_BLOCK)):
        raise RecipeError.at(KEY, f"`{path}` is compressed ({packed[1:]})", _named(path, packed))


def _named(path: Path, packed: str) -> str:
    if packed in OPENERS and data_suffix(path) != ".parquet":
        return f"the same file named {path.name}{packed}"
    return "the file that is inside"


def read_text(path: Path, spill: Spill | None = None) -> Table:
    """Lines with their line breaks, in the column `text`."""
    builder, lines, count = Builder(spill), lines_of(path), 0
    while part := [line for _, line in islice(lines, BLOCK_ROWS)]:
        builder.add_texts("text", part)
        count += len(part)
    return builder.table(str(path), range(1, count + 1))


READERS: dict[str, Callable[[Path, Spill | None], Table]] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".txt": read_text,
}
