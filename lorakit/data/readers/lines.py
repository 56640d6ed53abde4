"""Lines of a data file: UTF-8, with or without a byte order mark, plain or compressed (gz, bz2,
xz)."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from lorakit.data.table import KEY
from lorakit.errors import RecipeError

OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# Byte order marks of unsupported encodings; UTF-32's begins with UTF-16's.
MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its line break) for the file, split at line feeds only."""
    with OPENERS.get(path.suffix.lower(), _plain)(path) as stream:
        for number, line in enumerate(stream, 1):
            if number == 1:
                for mark, encoding in MARKS.items():
                    if line.startswith(mark):
                        raise _not_utf8(path, number, f"it is {encoding}", encoding)
                line = line.removeprefix(b"\xef\xbb\xbf")
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(
                    path, number, f"the byte 0x{line[error.start]:02x} at byte {error.start + 1}"
                ) from error


def _plain(path: Path) -> IO[bytes]:
    return path.open("rb")


def _not_utf8(path: Path, line: int, why: str, encoding: str = "ENCODING") -> RecipeError:
    remedy = f"UTF-8; `iconv -f {encoding} -t UTF-8` converts a file"
    return RecipeError.at(KEY, f"{path}:{line}: not UTF-8: {why}", remedy)
