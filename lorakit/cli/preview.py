"""lorakit preview"""

from __future__ import annotations

from pathlib import Path

import typer

from lorakit.cli import common, complete

SPLIT = complete.one_of("train", "--split", "train", "validation", help="Of this set.")


def preview(
    recipe: Path = common.RECIPE,
    overrides: list[str] = common.OVERRIDES,
    rows: int = typer.Option(5, "--rows", min=0, metavar="N", help="Show so many rows."),
    row: int = typer.Option(
        None, "--row", min=1, metavar="K", help="Show the row with this number, counted from 1."
    ),
    split: str = SPLIT,
    full: bool = typer.Option(False, "--full", help="Every token, also of long rows."),
    html: Path = typer.Option(
        None, "--html", metavar="FILE", help="Write a page too, with up to 200 rows."
    ),
    as_json: bool = typer.Option(False, "--json", help="One JSON object instead of tables."),
) -> None:
    """Show rows as the model reads them, token by token, with their targets, lengths and
    warnings."""
    from lorakit.recipes.recipe import load_recipe
    from lorakit.report.output import save_output, try_output

    loaded, html = load_recipe(common.home(recipe), common.given(overrides)), common.home(html)
    if html is not None:
        try_output(html)
    from lorakit.report.preview import preview_tables, preview_warnings
    from lorakit.report.preview_json import as_json as to_json
    from lorakit.report.preview_page import page
    from lorakit.report.progress import Progress
    from lorakit.runs.preview import preview as previewed

    out, err = common.consoles()
    found = previewed(loaded, Progress(err), rows, row, split, page=html is not None)
    if html is not None:
        save_output(html, page(found).encode())
    if as_json:
        common.say_json(to_json(found))
    else:
        out.print(preview_tables(found, full))
        for line in preview_warnings(found):
            out.print(line, soft_wrap=True)
    if html is not None:
        err.print(f"page written to {html}")
