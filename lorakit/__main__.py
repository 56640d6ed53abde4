"""`lorakit`, and `python -m lorakit`: what is imported here is little, so that Ctrl-C is heeded
from the very start."""

from __future__ import annotations

import sys

from lorakit.training.interrupt import EXIT_CODE, Stopped, Stops


def main() -> None:
    """The command line."""
    with Stops() as stops:
        try:
            from lorakit.cli import main as command_line

            command_line(stops)
        except Stopped as stopped:
            # While the command line itself was imported.
            sys.stderr.write(f"{stopped}\n")
            sys.exit(EXIT_CODE)


if __name__ == "__main__":
    main()
