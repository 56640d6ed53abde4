"""Files of plots, pages and results, written where the user names them."""

from __future__ import annotations

from pathlib import Path

from lorakit.errors import UsageError
from lorakit.files import try_file, write_bytes


def try_output(path: Path, remedy: str | None = None) -> None:
    """Raise UsageError, with the remedy, unless a file can be written to `path`."""
    try:
        try_file(path)
    except OSError as error:
        raise _can_not(path, error, remedy) from error


def save_output(path: Path, content: bytes) -> None:
    """Write a picture or a page, and its folder. Raises UsageError if it can not be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
    except OSError as error:
        raise _can_not(path, error) from error


def _can_not(path: Path, error: OSError, remedy: str | None = None) -> UsageError:
    return UsageError(f"`{path}` can not be written: {error.strerror}", remedy)
