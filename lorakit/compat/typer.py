"""typer: the errors of a command line."""

from __future__ import annotations

from typing import Any

from lorakit.compat.lookup import attribute, part


def command_line_error() -> Any:
    """The base class of typer's errors about a command line; it has a method `show`.

    It is found as the base of an error that typer exports, since some versions use the installed
    click and others their own.
    """
    base = part("typer.BadParameter").__base__
    attribute(base, "show", "typer")
    return base
