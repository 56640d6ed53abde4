"""Parts that the commands share: arguments, the two consoles, the log."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lorakit.cli import complete, streams
from lorakit.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

RECIPE = typer.Argument(
    ...,
    help="The recipe, a YAML file.",
    show_default=False,
    metavar="RECIPE",
    autocompletion=complete.recipe_files,
)
OVERRIDES = typer.Argument(
    None,
    help="Recipe keys to set, as train.max_steps=100.",
    show_default=False,
    metavar="[KEY=VALUE]...",
)
RUN_AND_OVERRIDES = typer.Argument(
    None,
    help="A run folder or a checkpoint (by default the newest run), then recipe keys to set.",
    show_default=False,
    metavar="[RUN] [KEY=VALUE]...",
    autocompletion=complete.runs,
)
RUN = typer.Argument(
    None,
    help="A run folder or one of its checkpoints; by default the newest run under runs/.",
    show_default=False,
    metavar="[RUN]",
    autocompletion=complete.runs,
)


class _Said:
    """How much this process says: the level of its log."""

    level = logging.INFO


def say_so_much(verbose: bool, quiet: bool) -> None:
    """Set what `consoles` show. Raises UsageError for both at once."""
    if verbose and quiet:
        raise UsageError("--verbose and --quiet are opposites", "Give one of them.")
    _Said.level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO


def consoles() -> tuple[Console, Console]:
    """(stdout for tables, stderr for log and progress); lorakit's log goes to stderr. With --quiet
    the second prints nothing, and of the log there are warnings alone."""
    from lorakit.report.progress import log_to

    # Piped or logged tables should not be wrapped at 80 columns.
    width = None if os.isatty(1) or "COLUMNS" in os.environ else 120
    out, err = console(width=width), console(stderr=True, soft_wrap=True)
    log_to(err, _Said.level)
    if _Said.level > logging.INFO:
        return out, console(stderr=True, quiet=True)
    return out, err


def console(**options: Any) -> Console:
    """Console that prints every text unchanged: names and paths may look like rich's markup
    (`runs/[b]`, `[/b]`) or like the name of an emoji (`:fire:`). All consoles of the commands are
    made here; for colours, pass a `Text`."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False, **options)


def say(text: str, end: str = "\n") -> None:
    """Write a text to stdout unchanged and flush. (typer.echo would write UTF-8 to a console of
    another encoding.)"""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def say_json(value: Any, indent: int | None = None) -> None:
    """Write one JSON object to stdout: in ASCII where the console cannot show more, and with null
    for numbers that JSON lacks."""
    from lorakit.files import finite

    say(json.dumps(finite(value), indent=indent, ensure_ascii=not streams.speaks_unicode()))


def typed(text: str) -> str:
    """A text of the command line as it was typed, in UTF-8, where Python took the locale's word
    that there is only ASCII."""
    if streams.names_files_in_unicode():
        return text
    return os.fsencode(text).decode("utf-8", "replace")


def home(path: Path) -> Path:
    """`path` with `~` replaced by the home folder: a shell does that only at the start of a word,
    not in --out=~/x.

    An option that was not given is None, whatever typer's declarations say, and stays None.
    """
    from lorakit.files import expanded

    return path if path is None else expanded(path)


def given(overrides: list[str] | None) -> list[str]:
    """The overrides as they were typed; a VALUE that is an existing path keeps the form in which
    Python can open it."""
    return [one if os.path.exists(one.partition("=")[2]) else typed(one) for one in overrides or []]


def split_run(arguments: list[str] | None) -> tuple[Path | None, list[str]]:
    """(run folder or None, overrides) of `[RUN] [key=value …]`. Raises UsageError when a further
    argument is not an override.

    A first argument that contains `=` is the run if it exists as a folder, or if the part before
    the `=` can only be a path.
    """
    first, *others = arguments or [""]
    path = Path(os.path.expanduser(first))
    run = (
        path
        if first and ("=" not in first or path.is_dir() or "/" in first.partition("=")[0])
        else None
    )
    overrides = others if run is not None or not first else [first, *others]
    for override in overrides:
        if "=" not in override:
            raise UsageError(
                f"`{override}` is neither the run folder nor key=value",
                "The run folder comes first, then key=value pairs.",
            )
    return run, given(overrides)
