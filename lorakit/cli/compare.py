"""lorakit compare"""

from __future__ import annotations

from pathlib import Path

import typer

from lorakit.cli import common, complete


def compare(
    runs: list[Path] = typer.Argument(
        ...,
        help="Folders of finished runs.",
        show_default=False,
        metavar="RUN RUN...",
        autocompletion=complete.runs,
    ),
    baseline: Path = typer.Option(
        None,
        "--baseline",
        metavar="RUN",
        autocompletion=complete.runs,
        help="Compare with this run; by default the first.",
    ),
    as_json: bool = typer.Option(False, "--json", help="One JSON object instead of tables."),
    plot: Path = typer.Option(
        None,
        "--plot",
        metavar="FILE.png|.html",
        help="Draw quality against adapter size and time, and the losses.",
    ),
) -> None:
    """Show finished runs side by side; those that differ only in the seed as their mean."""
    from lorakit.report import comparison as comparisons
    from lorakit.report import comparison_tables
    from lorakit.runs.compare import compare as compare_runs

    folders, plot = [common.home(run) for run in runs], common.home(plot)
    comparison = compare_runs(folders, common.home(baseline))
    if plot is not None:
        from lorakit.report.comparison_figure import plot_comparison

        plot_comparison(comparison, plot)
    if as_json:
        common.say_json(comparisons.as_json(comparison))
        return
    out, err = common.consoles()
    out.print(comparison_tables.comparison_tables(comparison))
    if plot is not None:
        err.print(f"plot written to {plot}")
