"""Parts that the commands share: arguments, the two consoles, the log."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import typer

from lorakit import THREADS_AS_TOLD
from lorakit.cli import _streams
from lorakit.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

RECIPE = typer.Argument(..., help="The recipe, a YAML file.", show_default=False, metavar="RECIPE")
OVERRIDES = typer.Argument(None, help="Recipe keys to set, as train.max_steps=100.", show_default=False, metavar="[KEY=VALUE]...")
RUN_AND_OVERRIDES = typer.Argument(
    None,
    help="A run folder (by default the newest under runs/), then recipe keys to set.",
    show_default=False,
    metavar="[RUN] [KEY=VALUE]...",
)
RUN = typer.Argument(None, help="A run folder; by default the newest under runs/.", show_default=False, metavar="[RUN]")


# How long to look at what else runs, and from which share of a core on it counts: the clock of /proc/stat ticks every 10 ms.
LOOK_SECONDS, IDLE_SHARE = 0.15, 0.3
HELD: list[IO[str]] = []  # files that are locked


def wait_by_spinning() -> None:
    """For commands that write token by token: threads spin for a moment before they sleep, since a step by torch's operations is
    hundreds of short parallel regions. Measured on two cores, SmolLM2-135M without kernels in C: 30 ms a token against 65.
    Before anything imports torch."""
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def spin_if_idle() -> None:
    """For commands that train: threads spin before they sleep if nothing else runs on this machine now, and no other lorakit
    spins already.

    Measured on two cores, MiniLM: 6 700 tokens a second with 100 000 turns of spinning, 5 000 without; beside one busy process
    800 against 4 400. Before anything imports torch.
    """
    from lorakit.files import cache_root

    if THREADS_AS_TOLD or not Path("/proc/stat").exists() or not _first_to_spin(cache_root() / "spins.lock"):
        return
    before, started = _busy_elsewhere(), time.perf_counter()
    time.sleep(LOOK_SECONDS)
    share = (_busy_elsewhere() - before) / (time.perf_counter() - started)
    if share < IDLE_SHARE:
        os.environ["GOMP_SPINCOUNT"] = "100000"


def _first_to_spin(lock: Path) -> bool:
    """True if no other process that lives has asked for this before: two that start at once both see an idle machine."""
    import fcntl

    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = lock.open("w")
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    HELD.append(held)  # until this process ends
    return True


def _busy_elsewhere() -> float:
    """Seconds of processor time that other processes than this one have had since the system started."""
    user, nice, system, _, _, irq, soft_irq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    own = os.times()
    return (user + nice + system + irq + soft_irq + steal) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def consoles() -> tuple[Console, Console]:
    """(stdout for tables, stderr for log and progress); lorakit's log goes to the second."""
    from lorakit.report.progress import log_to

    # Tables that are piped or logged should not fold at 80 columns.
    width = None if os.isatty(1) or "COLUMNS" in os.environ else 120
    out, err = console(width=width), console(stderr=True, soft_wrap=True)
    log_to(err)
    return out, err


def console(**options: Any) -> Console:
    """A console that shows every text as it is: names and paths may look like rich's markup (`runs/[b]`, `[/b]`) or like the
    name of an emoji (`:fire:`). All consoles of the commands are made here; whoever wants colours passes a `Text`."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False, **options)


def say(text: str, end: str = "\n") -> None:
    """Write to stdout as it is, at once. (typer.echo would write UTF-8 to a console of another encoding.)"""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def say_json(value: Any, indent: int | None = None) -> None:
    """Write one JSON object to stdout, in ASCII where the console has no more, with null for what JSON has no number for."""
    from lorakit.files import finite

    say(json.dumps(finite(value), indent=indent, ensure_ascii=not _streams.speaks_unicode()))


def typed(text: str) -> str:
    """A text of the command line as it was typed, in UTF-8, where Python took the locale's word that there is only ASCII."""
    if _streams.names_files_in_unicode():
        return text
    return os.fsencode(text).decode("utf-8", "replace")


def home(path: Path) -> Path:
    """`path` with `~` replaced by the home folder: a shell does that only at the start of a word, not in --out=~/x.

    What was not given is None, whatever typer's declarations say, and stays so.
    """
    return path if path is None else path.expanduser()


def given(overrides: list[str] | None) -> list[str]:
    """The overrides as they were typed; a VALUE that is a path which is there stays as Python can open it."""
    return [one if os.path.exists(one.partition("=")[2]) else typed(one) for one in overrides or []]


def split_run(arguments: list[str] | None) -> tuple[Path | None, list[str]]:
    """(run folder or None, overrides) of `[RUN] [key=value …]`. Raises UsageError when two are not overrides.

    A first argument with `=` in it is the run if it is there, or if what is before the `=` can only be a path.
    """
    first, *others = arguments or [""]
    path = Path(first).expanduser()
    run = path if first and ("=" not in first or path.is_dir() or "/" in first.partition("=")[0]) else None
    overrides = others if run is not None or not first else [first, *others]
    for override in overrides:
        if "=" not in override:
            raise UsageError(
                f"`{override}` is neither the run folder nor key=value", "The run folder comes first, then key=value pairs."
            )
    return run, given(overrides)
