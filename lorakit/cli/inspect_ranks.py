"""lorakit inspect-ranks"""

from __future__ import annotations

from pathlib import Path

import typer

from lorakit.cli import common


def inspect_ranks(
    run: Path = common.RUN,
    history: bool = typer.Option(False, "--history", help="Every change of ranks, a row each."),
    full: bool = typer.Option(
        False, "--full", help="The whole table, also where no rank ever moved."
    ),
    as_json: bool = typer.Option(False, "--json", help="One JSON object instead of tables."),
    plot: Path = typer.Option(
        None,
        "--plot",
        metavar="FILE.png|.html",
        help="Draw a heat map, and ranks and density over time.",
    ),
) -> None:
    """Show where the ranks went: layers down, module kinds across."""
    from lorakit.report import grid_table, rank_json, ranks, sparsity
    from lorakit.report import history as records_of

    folder, plot = records_of.run_folder(common.home(run), or_checkpoint=True), common.home(plot)
    records = records_of.read_history(folder)
    result = records_of.read_result(folder)
    # A finished run's density is in its result; the plot needs its history.
    densities = records_of.read_densities(folder) if result is None or plot is not None else {}
    if plot is not None:
        from lorakit.report.plots import plot_ranks

        plot_ranks(records, plot, folder.name, result, densities)
    if as_json:
        common.say_json(rank_json.as_json(records, result, folder, densities))
        return
    out, err = common.consoles()
    err.print(f"run {folder}{records_of.progress_of(folder)}")
    if history:
        out.print(ranks.history_table(records), grid_table.meanings("budget", "pool"), sep="\n")
    else:
        out.print(sparsity.run_tables(records, result, densities, full))
    if plot is not None:
        err.print(f"plot written to {plot}")
