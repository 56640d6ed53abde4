"""One self-contained HTML page about a run: curves, ranks, sparsity, tiers, numbers, recipe.

The page loads nothing: style, script and data are in it, and its content security policy forbids
everything else. Each text from a file is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from lorakit.report.charts import Series, chart, embedded
from lorakit.report.grid_table import MEANINGS
from lorakit.report.history import Line, RankRecord, changes
from lorakit.report.layout import layout
from lorakit.report.rank_page import grid_html, sparse_tables
from lorakit.report.ranks import fixed_ranks
from lorakit.report.summary import metric_value, stand_ins
from lorakit.report.tiers import tier_colours, tiers_in_words

HERE = Path(__file__).parent
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{body}
<script>
{script}</script>
</body>
</html>
"""
# Curves of each step in this order, under these titles; other numbers follow if they vary.
STEP_CURVES = {
    "learning_rate": "learning rate",
    "tokens_per_second": "tokens per second",
    "grad_norm": "gradient norm before clipping",
    "density": "density of the factors",
}
NO_CURVES = {"step", "epoch", "loss", "seconds", "tokens"}


@dataclass(frozen=True)
class RunFiles:
    """A run as its files have it; what a run that is not finished lacks is empty or None."""

    name: str
    recipe: str
    settings: Mapping[str, Any] = field(default_factory=dict)  # {dotted key: value} of the recipe
    manifest: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] | None = None
    records: Sequence[RankRecord] = ()
    steps: Sequence[Line] = ()
    evaluations: Sequence[Line] = ()
    warnings: Sequence[str] = ()


def page(run: RunFiles) -> str:
    """The page."""
    sections = [
        _headline(run),
        _warnings(run),
        _curves(run),
        _ranks(run),
        _sparsity(run),
        _tiers(run),
        _numbers(run),
        _folded("Recipe", f"<pre>{html.escape(run.recipe)}</pre>") if run.recipe else "",
        _environment(run),
    ]
    return PAGE.format(
        title=html.escape(run.name),
        style=(HERE / "run_page.css").read_text(encoding="utf-8"),
        script=(HERE / "run_page.js").read_text(encoding="utf-8"),
        body="\n".join(filter(None, sections)),
    )


# -- headline --------------------------------------------------------------------------------------


def _headline(run: RunFiles) -> str:
    result = run.result or {}
    last = run.steps[-1]["step"] if run.steps else 0
    status = (
        f"finished after {result.get('steps', last)} steps"
        if run.result is not None
        else f"not finished: {last} steps so far, interrupted or still going"
    )
    metrics = result.get("metrics") or _last_metrics(run.evaluations)
    when = "" if run.result is not None else " so far"
    cards = {f"{name}{when}": metric_value(value, ".4f") for name, value in metrics.items()}
    for one, values in (result.get("metrics_by_set") or {}).items():
        cards |= {f"{name} of {one}": metric_value(v, ".4f") for name, v in values.items()}
    facts = {
        "task": result.get("task") or run.settings.get("model.task"),
        "model": _used(run, "model"),
        "data": " · ".join(filter(None, [_used(run, "data"), _rows(run)])),
        "method": result.get("method") or run.settings.get("method.name"),
        "seed": run.settings.get("train.seed"),
        "precision": result.get("precision"),
    }
    lines = "".join(f'<p class="stand-in">{html.escape(line)}</p>' for line in stand_ins(result))
    return (
        f'<h1>{html.escape(run.name)}</h1><p><span class="status">{html.escape(status)}</span></p>'
        f"{lines}{_list(cards, 'cards')}{_list(facts, 'facts')}"
    )


def _last_metrics(evaluations: Sequence[Line]) -> dict[str, Any]:
    last = evaluations[-1] if evaluations else {}
    return {name.removeprefix("eval_"): value for name, value in last.items() if name != "step"}


def _used(run: RunFiles, what: str) -> str:
    """The name of the model or of the data, as the recipe has it."""
    name = run.settings.get(f"{what}.name_or_path") or (run.manifest.get(what) or {}).get("used")
    subset = run.settings.get(f"{what}.subset")
    return f"{name or ''}{f' ({subset})' if subset else ''}"


def _rows(run: RunFiles) -> str:
    data = run.manifest.get("data") or {}
    if "train_rows" not in data:
        return ""
    return (
        f"{data['train_rows']:,} training rows, {data.get('validation_rows', 0):,} for validation"
    )


def _list(rows: Mapping[str, Any], kind: str) -> str:
    """A list of names and values; those without a value are left out."""
    found = {name: value for name, value in rows.items() if value not in (None, "", [], {})}
    if not found:
        return ""
    items = (
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd></div>"
        if kind == "cards"
        else f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>"
        for name, value in found.items()
    )
    return f'<dl class="{kind}">{"".join(items)}</dl>'


def _warnings(run: RunFiles) -> str:
    if not run.warnings:
        return ""
    items = "".join(f"<li>{html.escape(text)}</li>" for text in dict.fromkeys(run.warnings))
    return f'<div class="warnings"><strong>Warnings</strong><ul>{items}</ul></div>'


# -- curves ----------------------------------------------------------------------------------------


def _curves(run: RunFiles) -> str:
    """Losses together, then a chart for each other number."""
    steps = [line | _speed(line) for line in run.steps]
    charts = [
        chart(
            "loss",
            [
                _series("training", steps, "loss"),
                _series("validation", run.evaluations, "eval_loss", dots=True),
            ],
        )
    ]
    names = dict.fromkeys(name for line in run.evaluations for name in line)
    charts += [
        chart(
            f"validation {name.removeprefix('eval_')}",
            [_series("validation", run.evaluations, name, dots=True)],
        )
        for name in names
        if name not in ("step", "eval_loss")
    ]
    others = dict.fromkeys([*STEP_CURVES, *(name for line in steps for name in line)])
    for name in others:
        series = _series(name, steps, name)
        if name in NO_CURVES or (name not in STEP_CURVES and len(set(series.values)) < 2):
            continue
        charts.append(chart(STEP_CURVES.get(name, name.replace("_", " ")), [series]))
    found = "".join(charts)
    return f'<h2>Curves</h2><div class="charts">{found}</div>' if found else ""


def _speed(line: Line) -> dict[str, float]:
    seconds, tokens = line.get("seconds"), line.get("tokens")
    return {"tokens_per_second": tokens / seconds} if seconds and tokens else {}


def _series(name: str, lines: Sequence[Line], key: str, dots: bool = False) -> Series:
    found = [
        (line["step"], float(line[key]))
        for line in lines
        if isinstance(line.get(key), int | float) and not isinstance(line[key], bool)
    ]
    return Series(name, [step for step, _ in found], [value for _, value in found], dots)


# -- ranks, sparsity, tiers ------------------------------------------------------------------------


def _ranks(run: RunFiles) -> str:
    """The ranks as a heat map, with a slider over their changes; a line where all are alike."""
    records = run.records
    if not records:
        return ""
    gates = (run.result or {}).get("gates")
    fixed = fixed_ranks(records, gates)
    if fixed is not None and "\n  " not in fixed.plain:  # one rank everywhere
        return f"<h2>Ranks</h2><p>{html.escape(fixed.plain)}</p>"
    grid, last = layout(records[0].ranks), records[-1]
    number = {name: at for at, name in enumerate(records[0].ranks)}
    highest = max(
        (record.sum_of(names) for record in records for names in grid.cells.values()), default=1
    )

    def cell(names: list[str], kind: str = "heat") -> str:
        now = last.sum_of(names)
        modules = " ".join(str(number[name]) for name in names)
        style = f"--share:{now / max(1, highest):.3f}"
        return f'<span class="{kind}" data-modules="{modules}" style="{style}">{now}</span>'

    table = grid_html(grid, cell, edge=lambda names: cell(names, "sum"))
    data = {
        "highest": max(1, highest),
        "ranks": list(records[0].ranks.values()),
        "records": [
            _record(before, after, number) for before, after in pairwise([records[0], *records])
        ],
    }
    end = len(records) - 1
    slider = (
        '<div class="slider" hidden><input type="range" aria-label="change of the ranks" min="0"'
        f' max="{end}" value="{end}"><output></output></div>{embedded(data)}'
    )
    moved = len(records) > 1
    words = "<br>".join(html.escape(f"{word}: {MEANINGS[word]}") for word in ("budget", "pool"))
    return (
        f'<section class="ranks{" moved" if moved else ""}"><h2>Ranks</h2>{slider if moved else ""}'
        f'<div class="wide">{table}</div><p><small>{words}</small></p></section>'
    )


def _record(before: RankRecord, after: RankRecord, number: Mapping[str, int]) -> dict[str, Any]:
    """A change of ranks for the script: {number of a module: its new rank}."""
    changed = {number[name]: after.ranks[name] for name in changes(before, after)}
    return {"step": after.step, "pool": after.pool, "budget": after.budget, "changed": changed}


def _sparsity(run: RunFiles) -> str:
    if not run.records:
        return ""
    parts = sparse_tables(run.records, run.result)
    return "".join(f'<div class="wide">{part}</div>' if part[1] == "t" else part for part in parts)


def _tiers(run: RunFiles) -> str:
    """The tiers of the ladder and how many tokens run at each."""
    tiers = (run.result or {}).get("tiers")
    if not tiers or run.result is None:
        return ""
    rows = []
    for at, (tier, colour) in enumerate(zip(tiers, tier_colours(len(tiers)), strict=True)):
        bar = f'<span class="bar" style="background:{colour};width:{8 * tier["share"]:.2f}rem">'
        cells = [f"<td>{tier['rank']}</td><td>{tier['share']:.1%}</td>"]
        cells += [
            f'<td class="barred">{bar}</span></td><td>{html.escape(str(tier["kv"] or ""))}</td>'
        ]
        rows.append(f'<tr><th scope="row">{at}</th>{"".join(cells)}</tr>')
    heads = "".join(
        f'<th scope="col">{head}</th>' for head in ("tier", "rank", "share", "", "cache")
    )
    return (
        f"<h2>Chunks and tiers</h2><p>{html.escape(tiers_in_words(run.result))}</p>"
        f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}'
        "</tbody></table></div>"
    )


# -- numbers and environment -----------------------------------------------------------------------


def _numbers(run: RunFiles) -> str:
    """Every single number and word of result.json."""
    if run.result is None:
        return ""
    rows = {
        name.replace("_", " "): _plain(value)
        for name, value in run.result.items()
        if isinstance(value, str | int | float) and name not in ("task", "method")
    }
    return f"<h2>Result</h2>{_list(rows, 'facts')}"


def _plain(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def _environment(run: RunFiles) -> str:
    manifest = run.manifest
    if not manifest:
        return ""
    command = manifest.get("command") or []
    resumed = [f"step {at.get('step')} at {at.get('at')}" for at in manifest.get("resumed") or []]
    rows: dict[str, Any] = {
        "started": manifest.get("started"),
        "resumed": ", ".join(resumed),
        "command": " ".join(map(str, command)),
        "working folder": manifest.get("working_folder"),
        **{f"{name}": value for name, value in (manifest.get("machine") or {}).items()},
        **{name: value for name, value in (manifest.get("versions") or {}).items() if value},
    }
    for what in ("model", "data"):
        source = manifest.get(what) or {}
        rows[f"{what} from"] = f"{source.get('kind', '')} {source.get('used', '')}".strip()
        rows[f"{what} revision"] = source.get("commit") or source.get("revision")
        if isinstance(source.get("sha256"), Mapping):
            rows |= {f"sha256 of {name}": digest for name, digest in source["sha256"].items()}
    return _folded("Environment", _list(rows, "facts"))


def _folded(title: str, content: str) -> str:
    """A section that is opened by a click."""
    return f"<details><summary>{title}</summary>{content}</details>"
