"""The HTML page of a run: its picture, and the numbers of the picture as tables."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lorakit.report.grid_table import meanings
from lorakit.report.history import RankRecord
from lorakit.report.layout import Grid, layout
from lorakit.report.rank_figure import subtitle
from lorakit.report.sparsity import EFFECTIVE_RANKS, Sparsity, base_line, sparsity

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; color: #222; background: #fff;
        margin: 2rem auto; max-width: 72rem }}
img {{ max-width: 100%; height: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .2rem .6rem; text-align: right }}
thead th {{ border-bottom: 1px solid #999 }}
tfoot td, tfoot th {{ border-top: 1px solid #999; font-weight: 600 }}
.up {{ color: #2c7a2c }} .down {{ color: #b53333 }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{caption}</p>
<p><small>{meanings}</small></p>
<p><img src="data:image/png;base64,{image}" alt="{alt}"></p>
{tables}
</body>
</html>
"""
ALT = "Ranks by layer and kind of module, and their course over the steps"


def page(
    records: Sequence[RankRecord],
    image: bytes,
    title: str,
    result: Mapping[str, Any] | None,
) -> str:
    """The page with a PNG of the run."""
    grid = layout(records[-1].ranks)
    tables = [grid_html(grid, _ranks(records)), *sparse_tables(records, result)]
    words = meanings("budget", "cost", "pool").plain.splitlines()
    return PAGE.format(
        title=html.escape(title),
        caption=html.escape(subtitle(records, grid, result)),
        meanings="<br>".join(map(html.escape, words)),
        image=base64.b64encode(image).decode(),
        alt=ALT,
        tables="\n".join(tables),
    )


def sparse_tables(
    records: Sequence[RankRecord],
    result: Mapping[str, Any] | None,
) -> list[str]:
    """Headings and tables of sparse factors, and a line on a pruned base; none for other runs."""
    sparse = sparsity(records, result)
    parts = []
    if sparse is not None:
        parts += [f"<h2>{html.escape(sparse.what)}</h2>", grid_html(sparse.grid, _nonzeros(sparse))]
        means = grid_html(sparse.grid, lambda names: f"{sparse.effective_rank(names):.2f}", "mean")
        parts += [f"<h2>{EFFECTIVE_RANKS}</h2>", means]
    if result is not None and result.get("base_density"):
        grid = layout(records[-1].ranks)
        parts.append(f"<p>{html.escape(base_line(result['base_density'], grid))}</p>")
    return parts


# -- tables: a cell is a function that gives the HTML for its modules ------------------------------


def _ranks(records: Sequence[RankRecord]) -> Callable[[list[str]], str]:
    """The rank, and how it moved."""
    first, last = records[0], records[-1]

    def cell(modules: list[str]) -> str:
        now = last.sum_of(modules)
        delta = now - first.sum_of(modules)
        move = f' <span class="{"up" if delta > 0 else "down"}">{delta:+d}</span>'
        return f"{now}{move if delta else ''}"

    return cell


def _nonzeros(sparse: Sparsity) -> Callable[[list[str]], str]:
    """The non-zeros, and their share."""

    def cell(modules: list[str]) -> str:
        share = sparse.share(modules)
        percent = "" if share is None else f" <small>{100 * share:.3g}&nbsp;%</small>"
        return f"{sparse.count(modules):,}{percent}"

    return cell


def grid_html(
    grid: Grid,
    cell: Callable[[list[str]], str],
    overall: str = "total",
    edge: Callable[[list[str]], str] | None = None,
) -> str:
    """Layers down, kinds across, and `overall`, the name of the last row and column, whose cells
    are made by `edge` if that is given."""
    at_edge = edge or cell

    def row(label: str, cells: list[list[str]], last: bool = False) -> str:
        *inner, end = cells
        made = [(at_edge if last else cell)(names) if names else "" for names in inner]
        filled = "".join(f"<td>{content}</td>" for content in [*made, at_edge(end)])
        return f'<tr><th scope="row">{html.escape(label)}</th>{filled}</tr>'

    def head(kind: str) -> str:
        full, short = html.escape(kind), html.escape(grid.heads[kind]).replace(".", ".<wbr>")
        return f'<th scope="col" title="{full}">{short}</th>'

    def of_layer(layer: str) -> list[list[str]]:
        each = (grid.cells.get((layer, kind), []) for kind in grid.kinds)
        return [*each, grid.of_layer(layer)]

    heads = "".join(map(head, grid.kinds))
    everything = [name for names in grid.cells.values() for name in names]
    last = row(overall, [*map(grid.of_kind, grid.kinds), everything], last=True)
    lines = [
        "<table>",
        f'<thead><tr><th scope="col">layer</th>{heads}<th scope="col">{overall}</th></tr></thead>',
        "<tbody>",
        *(row(layer, of_layer(layer)) for layer in grid.layers),
        "</tbody>",
        f"<tfoot>{last}</tfoot>",
        "</table>",
    ]
    return "\n".join(lines)
