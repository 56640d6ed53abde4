"""typer: the errors of a command line."""

from __future__ import annotations

from typing import Any

from lorakit.compat.lookup import attribute, part


def command_line_error() -> Any:
    """The base of all that typer raises about a command line; it has a method `show`.

    Found as the base of an error that typer exports, since its click is the installed one in some
    versions and its own in others.
    """
    base = part("typer.BadParameter").__base__
    attribute(base, "show", "typer")
    return base
