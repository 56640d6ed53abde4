"""The HTML page of a preview: rows token by token, lengths, warnings. It is one file, loads
nothing, and shows everything also where scripts do not run."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterator
from itertools import groupby

from lorakit.data.preview import Preview, Role, ShownRow, Token
from lorakit.report.length_figure import length_figure
from lorakit.report.preview import facts, row_counts
from lorakit.report.visible import BLANK, NOTHING, visible

STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --faint: #6a6a6a; --line: #c8c8c8;
  --soft: #f3f3f3; --context: #e9ecef; --context2: #dde2e6; --target: #bfe8c5; --target2: #a5dcae;
  --cut: #f8cdcd; --cut2: #f2b8b8; --bar: #3a70d0; --beyond: #c03030; --warn: #8a5a00 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e4e4; --paper: #16181b; --faint: #a0a0a0;
  --line: #44484d; --soft: #202327; --context: #2c3136; --context2: #363c42; --target: #1d4a28;
  --target2: #255b32; --cut: #5a2528; --cut2: #6b2d31; --bar: #6f9cf0; --beyond: #ef7070;
  --warn: #e0b050 } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  margin: 2rem auto; max-width: 72rem; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
h3 { font-size: 1rem; margin: 0 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem }
dt { color: var(--faint) } dd { margin: 0; overflow-wrap: anywhere }
svg { max-width: 100%; height: auto }
svg text { fill: var(--ink); font: 11px system-ui, sans-serif }
.bar { fill: var(--bar) } .beyond { fill: var(--beyond) } .axis { stroke: var(--line) }
.limit { stroke: var(--beyond); stroke-dasharray: 4 3 } .mark { stroke: var(--faint) }
.warnings li { color: var(--warn); overflow-wrap: anywhere }
nav { display: flex; flex-wrap: wrap; gap: .6rem; align-items: center; position: sticky; top: 0;
  background: var(--paper); padding: .5rem 0; border-bottom: 1px solid var(--line) }
button, select { font: inherit; padding: .2rem .7rem }
article { margin: 1rem 0; padding: .8rem 1rem; background: var(--soft); border-radius: .4rem }
article p { margin: .1rem 0 .6rem; color: var(--faint) } article p b { color: var(--ink) }
article em { color: var(--warn); font-style: normal }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.75 ui-monospace, monospace }
.tokens i, .legend i { font-style: normal; border-radius: .2em; padding: .1em 0 }
.context i { background: var(--context) } .context i:nth-child(even) { background: var(--context2) }
.target i { background: var(--target) } .target i:nth-child(even) { background: var(--target2) }
.cut i { background: var(--cut); text-decoration: line-through }
.cut i:nth-child(even) { background: var(--cut2) }
i.special { outline: 1px solid currentColor; outline-offset: -1px; font-weight: 700 }
.legend span { margin-right: 1rem } [hidden] { display: none }
"""

# Rows are shown one at a time, among those that the filter leaves.
SCRIPT = """
"use strict";
const rows = [...document.querySelectorAll("article")];
const filter = document.getElementById("filter"), place = document.getElementById("place");
let left = rows, at = 0;
function show() {
  at = Math.max(0, Math.min(at, left.length - 1));
  rows.forEach(row => { row.hidden = row !== left[at]; });
  place.textContent = left.length ? `${at + 1} of ${left.length}` : "no such row";
}
function choose() {
  const kind = filter.value;
  left = rows.filter(row => kind === "all" || row.dataset[kind] === "1");
  at = 0;
  show();
}
function move(by) { at += by; show(); }
filter.addEventListener("change", choose);
document.getElementById("before").addEventListener("click", () => move(-1));
document.getElementById("after").addEventListener("click", () => move(1));
document.addEventListener("keydown", event => {
  if (event.target === filter) return;
  if (event.key === "ArrowLeft") move(-1);
  if (event.key === "ArrowRight") move(1);
});
document.querySelector("nav").hidden = false;
choose();
"""

# No address may be opened, and no script runs but the one above, whatever rows hold.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<dl>
{facts}
</dl>
{warnings}
<h2>Lengths in tokens</h2>
{figure}
<h2>Rows as the model reads them</h2>
<p class="legend">{legend}</p>
<nav hidden>
<button id="before" title="arrow left">previous</button>
<button id="after" title="arrow right">next</button>
<select id="filter" aria-label="rows to show">
<option value="all">all {count} rows</option>
<option value="cut">cut or left out ({cut})</option>
<option value="warned">with warnings ({warned})</option>
</select>
<span id="place"></span>
</nav>
{rows}
<script>{script}</script>
</body>
</html>
"""


def page(found: Preview) -> str:
    """The page of a preview, with its `page_rows`."""
    rows = found.page_rows
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    roles = [("context", "context"), ("target", "target"), ("cut", "cut away")]
    if found.targets is None:
        roles.remove(("target", "target"))
    legend = [f'<span class="{role}"><i>{name}</i></span>' for role, name in roles]
    legend.append('<span class="context"><i class="special">special token</i></span>')
    return PAGE.format(
        policy=html.escape(POLICY.format(digest=digest)),
        title=html.escape(f"{found.recipe or 'recipe'}: {found.split} rows"),
        style=STYLE,
        facts="\n".join(
            f"<dt>{name}</dt><dd>{html.escape(what)}</dd>" for name, what in facts(found)
        ),
        warnings=_warnings(found),
        figure=length_figure(found.lengths, found.max_length),
        legend="".join(legend),
        count=len(rows),
        cut=sum(map(_loses, rows)),
        warned=sum(bool(row.warnings) for row in rows),
        rows="\n".join(map(_article, rows)),
        script=SCRIPT,
    )


def _warnings(found: Preview) -> str:
    texts = [*found.heard, *(finding.text for finding in found.findings)]
    if not texts:
        return ""
    items = "\n".join(f"<li>{html.escape(text)}</li>" for text in texts)
    return f'<h2>Warnings</h2>\n<ul class="warnings">\n{items}\n</ul>'


def _loses(row: ShownRow) -> bool:
    return row.is_left_out or row.count("cut") > 0


def _article(row: ShownRow) -> str:
    data = f'data-cut="{int(_loses(row))}" data-warned="{int(bool(row.warnings))}"'
    about = [html.escape(row_counts(row))]
    if row.label is not None:
        about.append(f"label <b>{html.escape(row.label)}</b>")
    about += [f"<em>{html.escape(mark)}</em>" for mark in row.marks]
    lines = [
        f"<article {data}>",
        f"<h3>{html.escape(row.place)}</h3>",
        f"<p>{' · '.join(about)}</p>",
        f'<div class="tokens">{"".join(_runs(row))}</div>',
        "</article>",
    ]
    return "\n".join(lines)


def _runs(row: ShownRow) -> Iterator[str]:
    for role, run in groupby(row.tokens, lambda token: token.role):
        yield f'<span class="{role}">{"".join(_token(token, role) for token in run)}</span>'


def _token(token: Token, role: Role) -> str:
    kind = ' class="special"' if token.special else ""
    name = "special token, " if token.special else ""
    about = html.escape(f"{token.text!r}, id {token.id}, {name}{role}")
    shown = html.escape(visible(token.text) or NOTHING).replace(BLANK, f"<wbr>{BLANK}")
    return f'<i{kind} title="{about}">{shown}</i>'
