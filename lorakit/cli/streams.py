"""The process's own stdout and stderr, set up so that no console and no reader makes a command fail
after it has done its work."""

from __future__ import annotations

import codecs
import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from typing_extensions import Buffer

# Non-ASCII characters of tables and messages, and their replacements on a console that cannot show
# them; in tables one character replaces one.
PLAIN = {
    **dict.fromkeys("━─═╴", "-"),
    **dict.fromkeys("│▏┃", "|"),
    **dict.fromkeys("█■", "#"),
    "·": "-",
    "×": "x",
    "…": "~",
    "→": ">",
    "–": "-",
    "—": "-",
    "⏎": "/",
    "⟨": "<",
    "⟩": ">",
    "␣": "_",
    "•": "*",
    "\u00a0": " ",
    "\u2011": "-",
    **dict.fromkeys("“”„", '"'),
    **dict.fromkeys("‘’", "'"),
    **dict.fromkeys("╭╮╰╯┌┐└┘├┤┬┴┼", "+"),
    "≤": "<",
    "≥": ">",
    "√": "v",
}
HANDLER = "lorakit.plain"


def prepare() -> None:
    """Give this process a stdout and a stderr to which writing never fails.

    A character that the encoding lacks is replaced by a similar ASCII one, or by its escape
    (\\u4f60). A reader that goes away (`| head -1`) is no error: further output is dropped, and the
    command completes. A stream that was closed before the start becomes the null device. Streams
    that someone else replaced (pytest) are left alone.
    """
    codecs.register_error(HANDLER, _replaced)
    for name in ("stdout", "stderr"):
        stream: TextIO | None = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # until the process ends
        elif stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, _patient(stream))


def speaks_unicode() -> bool:
    """True if stdout can carry every character."""
    return codecs.lookup(sys.stdout.encoding or "ascii").name.startswith("utf")


def names_files_in_unicode() -> bool:
    """True if every file name can be spelled."""
    return sys.getfilesystemencoding().startswith("utf")


def _patient(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    stream.flush()
    buffer = io.BufferedWriter(_Patient(stream.fileno(), "w", closefd=False))
    at_once = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
    return io.TextIOWrapper(buffer, stream.encoding, HANDLER, None, **at_once)


class _Patient(io.FileIO):
    """File whose reader may go away."""

    def write(self, content: Buffer) -> int:
        try:
            return super().write(content)
        except BrokenPipeError:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self.fileno())
            os.close(nothing)
            return memoryview(content).nbytes


def _replaced(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    wrong = error.object[error.start : error.end]
    return "".join(PLAIN.get(letter) or _numbered(letter) for letter in wrong), error.end


def _numbered(letter: str) -> str:
    return letter.encode("ascii", "backslashreplace").decode()
