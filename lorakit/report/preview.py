"""Preview of a recipe's data on a terminal: facts, a histogram of lengths, rows token by token,
warnings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich import box
from rich.cells import cell_len, get_character_cell_size
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lorakit.data.joined import SetFigures
from lorakit.data.lengths import Lengths
from lorakit.data.preview import Preview, Role, ShownRow, Token
from lorakit.report.grid_table import MUTED, SHARE_COLOURS
from lorakit.report.visible import BLANK, LINE_BREAK, TAB, visible

BINS, BAR_WIDTH = 14, 40
HEAD, TAIL, NEAR = (
    60,
    40,
    12,
)  # tokens of a long row that are shown: at its ends, and at each change
FEWEST_LEFT_OUT = 20  # fewer tokens than this are not left out
STYLES: dict[Role, str] = {"context": "", "target": SHARE_COLOURS[2], "cut": SHARE_COLOURS[4]}
# As `git diff --word-diff` marks what is added and removed: readable without colours.
BRACKETS: dict[Role, tuple[str, str]] = {
    "context": ("", ""),
    "target": ("{+", "+}"),
    "cut": ("[-", "-]"),
}
SPECIAL = ("⟨", "⟩")
SIGNS = (BLANK, LINE_BREAK, TAB)


def preview_tables(found: Preview, full: bool = False) -> RenderableType:
    """The preview for a terminal, without its warnings. full: every token of long rows."""
    parts: list[RenderableType] = [_facts(found), Text(), _histogram(found)]
    if found.rows:
        parts += [Text(), _legend(found)]
    for row in found.rows:
        parts += [Text(), _heading(row), Padding(_Folded(row_text(row, full)), (0, 0, 0, 2))]
    return Group(*parts)


def preview_warnings(found: Preview) -> list[Text]:
    """The warnings that were not logged, a line each."""
    return [
        Text("warning: ", style="bold yellow").append(finding.text, style="not bold default")
        for finding in found.findings
    ]


def facts(found: Preview) -> list[tuple[str, str]]:
    """[(name, figures)] of the split, for terminals and pages."""
    lengths, taken = found.lengths, found.truncation
    what = "pieces of joined rows" if found.is_joined else "rows"
    count = f"{found.examples:,} {found.split} {what}"
    if found.is_joined:
        count += f", from {found.available:,} rows"
    elif taken.left_out_rows:
        count += f"; {taken.left_out_rows:,} more are left out"
    figures = f"p50 {lengths.quantile(0.5):,}, p95 {lengths.quantile(0.95):,}, longest"
    rows = [
        ("data", found.data + (" (a stand-in)" if found.stand_in else "")),
        ("model", found.model),
        ("rows", count),
        *((one.name, _of_set(one)) for one in found.sets),
        ("tokens", f"{found.tokens:,}"),
        ("lengths", f"{figures} {lengths.longest:,}; max_seq_length {found.max_length:,}"),
    ]
    if found.targets is not None:
        share = found.target_share or 0.0
        rows.append(("targets", f"{found.targets:,} ({share:.1%} of the tokens)"))
    if not found.is_joined:
        rows.append(("cut away", _taken(found)))
    return rows


def _of_set(one: SetFigures) -> str:
    return (
        f"{one.rows:,} training rows, {one.tokens:,} tokens; {one.share_of_rows:.1%} of the rows of"
        f" an epoch, {one.share_of_tokens:.1%} of its tokens, {one.passes_per_epoch:.3g} passes"
    )


def row_counts(row: ShownRow) -> str:
    """Numbers of the row's tokens by role, in words."""
    target, cut = row.count("target"), row.count("cut")
    text = _number(len(row.tokens) - cut, "token")
    text += ", " + _number(target, "target") if target else ""
    return text + (f", {cut:,} cut away" if cut else "")


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("s" if count != 1 else "")


def row_text(row: ShownRow, full: bool = False) -> Text:
    """The tokens of a row, coloured by their role and in brackets that say the same."""
    text = Text()
    for is_shown, part in groupby(
        zip(row.tokens, shown_marks(row.tokens, full), strict=True), _last
    ):
        tokens = [token for token, _ in part]
        if not is_shown:
            text.append(f" … {len(tokens):,} tokens left out … ", MUTED)
            continue
        for role, run in groupby(tokens, lambda token: token.role):
            _append_run(text, role, list(run))
    if not row.tokens:
        text.append("no tokens", MUTED)
    return text


def shown_marks(tokens: Sequence[Token], full: bool) -> list[bool]:
    """Marks of the tokens that are shown: all, or those at both ends of a long row and around each
    change of role."""
    count = len(tokens)
    if full:
        return [True] * count
    marks = [i < HEAD or i >= count - TAIL for i in range(count)]
    for place in range(1, count):
        if tokens[place].role != tokens[place - 1].role:
            for near in range(max(0, place - NEAR), min(count, place + NEAR)):
                marks[near] = True
    start = 0
    for is_shown, run in groupby(list(marks)):
        length = len(list(run))
        if not is_shown and length < FEWEST_LEFT_OUT:
            marks[start : start + length] = [True] * length
        start += length
    return marks


class _Folded:
    """A text whose lines end behind a sign of white space, if there is one in the line."""

    def __init__(self, text: Text) -> None:
        self.text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        ends, behind_sign, width = [], 0, 0
        for place, letter in enumerate(self.text.plain):
            size = get_character_cell_size(letter)
            if letter != "\n" and width + size > options.max_width:
                ends.append(behind_sign or place)
                width = cell_len(self.text.plain[ends[-1] : place])
                behind_sign = 0
            width = 0 if letter == "\n" else width + size
            behind_sign = 0 if letter == "\n" else place + 1 if letter in SIGNS else behind_sign
        for part in self.text.divide(ends):
            part.end = "" if part.plain.endswith("\n") else "\n"
            yield part


def _last(pair: tuple[Token, bool]) -> bool:
    return pair[1]


def _append_run(text: Text, role: Role, tokens: Sequence[Token]) -> None:
    style, (before, after) = STYLES[role], BRACKETS[role]
    text.append(before, f"bold {style}")
    for token in tokens:
        if token.special:
            text.append(visible(token.text).join(SPECIAL), f"{style} reverse")
            continue
        for is_space, letters in groupby(visible(token.text), lambda sign: sign in SIGNS):
            text.append("".join(letters), f"{style} dim" if is_space else style)
    text.append(after, f"bold {style}")


def _heading(row: ShownRow) -> Text:
    text = Text(row.place, "bold")
    text.append(f"  {row_counts(row)}", "not bold")
    if row.label is not None:
        text.append("  label ", f"not bold {MUTED}").append(row.label, "bold")
    for mark in row.marks:
        text.append(f"  {mark}", f"not bold {SHARE_COLOURS[3]}")
    return text


def _legend(found: Preview) -> Text:
    text = Text("context", STYLES["context"])
    roles: list[tuple[Role, str]] = [("cut", "cut away")]
    if found.targets is not None:
        roles.insert(0, ("target", "target"))
    for role, name in roles:
        text.append("  ").append(name.join(BRACKETS[role]), STYLES[role])
    text.append("  ").append("special token".join(SPECIAL), "reverse")
    return text.append(f"  {BLANK} blank  {LINE_BREAK} line break", "dim")


def _taken(found: Preview) -> str:
    taken = found.truncation
    if not taken.cut_rows and not taken.left_out_rows:
        return "nothing"
    share = taken.tokens / max(1, int(found.lengths.values.sum()))
    text = f"{taken.tokens:,} tokens ({share:.1%})"
    if found.targets is not None:
        text += f", {taken.targets:,} of them targets"
    return text + f"; rows: {taken.cut_rows:,} cut, {taken.left_out_rows:,} left out"


def _facts(found: Preview) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style=MUTED, no_wrap=True)
    table.add_column(overflow="fold")
    for name, figures in facts(found):
        table.add_row(name, Text(figures))
    return table


def _histogram(found: Preview) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("pieces" if found.is_joined else "rows", justify="right", no_wrap=True)
    table.add_column("", width=BAR_WIDTH, no_wrap=True)
    table.add_column("", style=MUTED, no_wrap=True)
    bins = found.lengths.bins(BINS)
    most = max(bin.rows for bin in bins)
    for bin in bins:
        bar = "━" * round(BAR_WIDTH * bin.rows / most)
        beyond = bin.first > found.max_length
        style = STYLES["cut"] if beyond else SHARE_COLOURS[1]
        marks = [
            name for name, length in marked(found.lengths, found.max_length) if bin.holds(length)
        ]
        table.add_row(
            bin.name,
            f"{bin.rows:,}",
            Text(bar or ("╴" if bin.rows else ""), style),
            ", ".join(marks),
        )
    return table


def marked(lengths: Lengths, max_length: int) -> Iterator[tuple[str, int]]:
    """(name, length) of the lengths that a histogram marks."""
    yield "p50", lengths.quantile(0.5)
    yield "p95", lengths.quantile(0.95)
    yield "longest", lengths.longest
    if max_length <= lengths.longest:
        yield "max_seq_length", max_length
