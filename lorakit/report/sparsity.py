"""Tables of the sparsity of the factors and of the base: non-zeros and effective ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorakit.report.grid_table import MUTED, ROOMY_COLUMNS, colouring, grid_table, meanings
from lorakit.report.history import RankRecord
from lorakit.report.layout import Grid, layout
from lorakit.report.ranks import fixed_ranks, rank_table
from lorakit.report.tiers import tier_table

# Factors of this density or more are dense: a zero among many entries says nothing.
DENSE = 0.9995
EFFECTIVE_RANKS = "effective rank of each product B A"
# Cells with a count and a share need more room than a rank: with more columns than this there is
# one blank between them.
ROOMY_SHARES = 3


@dataclass(frozen=True)
class Sparsity:
    """Sparsity of the factors by module, as result.json has it.

    sizes: entries of each module, zeros included, where that is known; at the initial ranks where
    `of_initial`. effective_ranks: of the products B A.
    """

    grid: Grid
    nonzeros: Mapping[str, int]
    sizes: Mapping[str, float]
    of_initial: bool
    density: float
    effective_ranks: Mapping[str, float]

    def count(self, modules: Iterable[str]) -> int:
        return sum(self.nonzeros[name] for name in modules)

    def share(self, modules: Sequence[str]) -> float | None:
        """The share of non-zeros in the entries of `modules`; None if there are none, or it is not
        known how many."""
        if len(modules) == len(self.nonzeros):
            return self.density
        entries = sum(self.sizes.get(name, float("nan")) for name in modules)
        return self.count(modules) / entries if entries > 0 else None

    @property
    def what(self) -> str:
        """The non-zeros in words."""
        return (
            "non-zeros of the factors, and their share of the"
            f" {'initial ' if self.of_initial else ''}entries"
        )

    def effective_rank(self, modules: Sequence[str]) -> float:
        """The mean over `modules`."""
        return sum(self.effective_ranks[name] for name in modules) / len(modules)


def sparsity(records: Sequence[RankRecord], result: Mapping[str, Any] | None) -> Sparsity | None:
    """None for factors that are dense, and for a result that does not say."""
    if (
        result is None
        or not {"density", "nonzeros", "effective_ranks"} <= result.keys()
        or result["density"]["total"] >= DENSE
    ):
        return None
    if not any(
        result["effective_ranks"].values(),
    ):  # B is still zero: nothing was trained, and nothing pruned
        return None
    nonzeros, shares = result["nonzeros"], result["density"]["modules"]
    grid = layout(nonzeros)
    first, last = records[0].ranks, records[-1].ranks
    # Where components were pruned, the method counts the rest as a share of the initial entries.
    of_initial = first != last and all(
        abs(shares.get(name, 0.0) * first[name] - last[name]) < 0.01 for name in first
    )
    sizes = {name: count / shares[name] for name, count in nonzeros.items() if shares.get(name)}
    for kind in grid.kinds:
        names = grid.of_kind(kind)
        # A module without a component had one size with the others of its kind.
        ones = [sizes[name] / first[name] for name in names if name in sizes] if of_initial else []
        for name in names:
            if name not in sizes and (ones or not of_initial):
                sizes[name] = first[name] * ones[0] if ones else 0.0
    return Sparsity(
        grid,
        nonzeros,
        sizes,
        of_initial,
        result["density"]["total"],
        result["effective_ranks"],
    )


# -- tables ----------------------------------------------------------------------------------------


def run_tables(
    records: Sequence[RankRecord],
    result: Mapping[str, Any] | None = None,
    densities: Mapping[int, float] | None = None,
    full: bool = False,
) -> Group:
    """All tables of a run: its ranks; for sparse factors, their non-zeros and effective ranks;
    tiers; a line on a pruned base.

    Ranks of which none moved are a few lines in place of a table, unless `full`. `result` is
    result.json; None while the run is still going, for which `densities` has the density so far.
    """
    found = sparsity(records, result)
    gates = (result or {}).get("gates")
    fixed = None if full else fixed_ranks(records, gates)
    parts: list[RenderableType] = [fixed] if fixed is not None else [rank_table(records, gates)]
    if fixed is None:
        parts += [meanings("budget", "pool", *(["gate"] if gates else []))]
    if found is not None:
        means = ", means over the parts of a layer" if found.grid.summed else ""
        parts += [Text(f"\n{found.what}"), nonzero_table(found)]
        parts += [Text(f"\n{EFFECTIVE_RANKS}{means}"), effective_rank_table(found)]
    if result is not None and (tiers := tier_table(result)) is not None:
        parts += [Text(), tiers]
    lines = []
    if result is None and densities:
        step, density = list(densities.items())[-1]
        lines.append(f"density of the factors so far: {density:.3g}, after step {step}")
    if result is not None and result.get("base_density"):
        lines.append(base_line(result["base_density"], layout(records[-1].ranks)))
    return Group(*parts, *(Text(f"\n{line}") for line in lines))


def nonzero_table(found: Sparsity) -> Table:
    """The non-zeros of the factors of each module, with their share; the share alone where that
    leaves no room for both."""
    grid = found.grid
    narrow = len(grid.kinds) > ROOMY_COLUMNS
    shares = [found.share(names) for names in grid.cells.values()]
    colour = colouring(round(share, 2) for share in shares if share is not None)

    def cells(groups: Sequence[list[str]], edge: bool) -> list[Text]:
        counts = [short(found.count(names)) for names in groups]
        width = max(map(len, counts))
        column = []
        for at, (names, count) in enumerate(zip(groups, counts, strict=True)):
            share, whole = found.share(names), edge or at == len(groups) - 1
            style = "bold" if whole else colour(round(share or 0.0, 2)) or MUTED
            shown = f"{percent(share):>3}"
            if not narrow or edge:
                column.append(
                    Text.assemble(
                        (f"{count:>{width}}", "bold" if whole else ""),
                        " ",
                        (shown, style),
                    )
                )
            else:
                column.append(Text(f"{shown}\n{count}" if whole else shown, style))
        return column

    return grid_table(grid, cells, roomy=ROOMY_SHARES)


def effective_rank_table(found: Sparsity) -> Table:
    """The effective rank of each product."""
    grid = found.grid
    colour = colouring(round(found.effective_rank(names), 1) for names in grid.cells.values())

    def cells(groups: Sequence[list[str]], edge: bool) -> list[Text]:
        values = [round(found.effective_rank(names), 1) for names in groups]
        width = max(len(f"{value:.1f}") for value in values)
        styles = ["bold" if edge else colour(value) for value in values[:-1]] + ["bold"]
        return [
            Text(f"{value:>{width}.1f}", style) for value, style in zip(values, styles, strict=True)
        ]

    return grid_table(grid, cells, overall="mean")


def base_line(density: Mapping[str, Any], grid: Grid) -> str:
    """The density of a pruned base: in all, and of the modules with the least and the most of
    it."""
    modules, places = density["modules"], grid.places()
    lowest, highest = min(modules, key=modules.__getitem__), max(modules, key=modules.__getitem__)
    total, low, high = (
        f"{value:.3g}" for value in (density["total"], modules[lowest], modules[highest])
    )
    if low == high:
        return f"base density {total} in each of {len(modules)} pruned modules"
    return f"base density {total}, from {low} ({places[lowest]}) to {high} ({places[highest]})"


def percent(share: float | None) -> str:
    """A share in three characters at most; "all" only if there is no zero, "" for no share."""
    if share is None:
        return ""
    if share >= 0.999999:
        return "all"
    return "<1%" if 0 < share < 0.01 else f"{min(round(100 * share), 99)}%"


def short(count: float) -> str:
    """A count in four characters at most: 999, 1.2k, 663k, 12M."""
    for unit in ("", "k", "M", "G"):
        if count < 999.5:
            return f"{count:.1f}{unit}" if unit and count < 9.95 else f"{count:.0f}{unit}"
        count /= 1000
    return f"{count:.0f}T"
