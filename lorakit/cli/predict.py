"""lorakit predict"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lorakit.cli import common, complete
from lorakit.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

SHOWN = 20  # rows of the table
ARGUMENTS = typer.Argument(
    None,
    help=(
        "A run folder or a checkpoint (by default the newest run), then a file of rows or - for"
        " lines of standard input, then recipe keys to set."
    ),
    show_default=False,
    metavar="[RUN] [ROWS] [KEY=VALUE]...",
    autocompletion=complete.runs,
)
TEXT = typer.Option(
    [],
    "--text",
    help="A text instead of ROWS; may be given again. Of a run on pairs, each two are a row.",
    show_default=False,
)
TOP = typer.Option(None, "--top", min=1, help="So many classes of each row instead of all.")
OUT = typer.Option(
    None, "--out", metavar="FILE.jsonl|.csv", help="Write all predictions to this file."
)
AS_JSON = typer.Option(False, "--json", help="One JSON object instead of a table.")


def predict(
    arguments: list[str] = ARGUMENTS,
    text: list[str] = TEXT,
    top: int = TOP,
    out: Path = OUT,
    as_json: bool = AS_JSON,
) -> None:
    """Predict classes with their probabilities, or values, for rows of a file or for texts."""
    from lorakit.report.history import run_folder
    from lorakit.report.progress import Progress
    from lorakit.runs.predict import predict as predict_rows

    run, file, overrides = _split(arguments)
    if (file is None) == (not text):
        what = "there is nothing to predict" if file is None else "ROWS and --text are two sources"
        raise UsageError(what, "Name a file of rows, - for standard input, or give --text.")
    rows: Path | list[str] = [common.typed(one) for one in text]
    if file is not None:
        rows = _lines() if str(file) == "-" else file
    console, err = common.consoles()
    folder = run_folder(run, or_checkpoint=True)
    found = predict_rows(folder, rows, Progress(err), overrides, top, common.home(out))
    if as_json:
        common.say_json(found)
        return
    if out is not None:
        err.print(f"{found['rows']:,} predictions written to {found['out']}")
        return
    console.print(_table(found["predictions"][:SHOWN]))
    if found["rows"] > SHOWN:
        err.print(f"and {found['rows'] - SHOWN:,} more: --out FILE.jsonl or --json has all of them")


def _split(arguments: list[str] | None) -> tuple[Path | None, Path | None, list[str]]:
    """(run or None, rows or None, overrides). One path alone is the run if it is a folder."""
    places: list[Path] = []
    overrides: list[str] = []
    for one in arguments or []:
        path = common.home(Path(one))
        if "=" in one and not path.exists():
            overrides.append(one)
        else:
            places.append(path)
    if len(places) > 2:
        what = f"`{places[2]}` is neither the run, nor the rows, nor key=value"
        raise UsageError(what, "The run comes first, then the rows.")
    if len(places) == 1:
        places = [places[0]] if places[0].is_dir() else [None, places[0]]  # type: ignore[list-item]
    run, rows = [*places, None, None][:2]
    return run, rows, common.given(overrides)


def _lines() -> list[str]:
    """The lines of standard input; the two texts of a pair stand on two lines."""
    return sys.stdin.read().splitlines()


def _table(predictions: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    if "value" in predictions[0]:
        table = Table("row", "value")
        for one in predictions:
            table.add_row(str(one["row"]), f"{one['value']:.4f}")
        return table
    table = Table("row", "label", "probability", "others")
    for one in predictions:
        shares = [f"{name} {share:.4f}" for name, share in one["probabilities"].items()]
        table.add_row(
            str(one["row"]), one["label"], f"{one['probability']:.4f}", " · ".join(shares[1:])
        )
    return table
