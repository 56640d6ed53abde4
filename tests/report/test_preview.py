"""The preview of rows on a terminal, as a page and as JSON."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from lorakit.data.lengths import Lengths
from lorakit.data.preview import Preview
from lorakit.errors import UsageError
from lorakit.report.output import save_output, try_output
from lorakit.report.preview import STYLES, preview_tables, preview_warnings, row_text
from lorakit.report.preview_json import as_json
from lorakit.report.preview_page import page
from lorakit.report.visible import visible
from tests.support.previews import preview_of, row, token

COLOURS = (STYLES["target"], STYLES["cut"])
EVIL = '<script>alert("x")</script>'
CUT = row(
    6,
    token("<s>", special=True),
    token("2 +"),
    token(" 3 ="),
    token(" 5", "target"),
    token("\n", "target"),
    token("more", "cut"),
)
WARNED = row(9, token(EVIL), token("&amp;", "target"), warnings=("duplicate",), label="<b>")
PLAIN = row(12, token("a"), token("b", "target", number=4711))


def printed(found: Preview, width: int = 100, full: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, markup=False, emoji=False, highlight=False)
    console.print(preview_tables(found, full))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# -- terminal --------------------------------------------------------------------------------------


def test_roles_can_be_read_without_colours() -> None:
    assert row_text(CUT).plain == "⟨<s>⟩2·+·3·={+·5⏎\n+}[-more-]"
    text = printed(preview_of(CUT))
    assert "context  {+target+}  [-cut away-]  ⟨special token⟩  · blank  ⏎ line break" in text
    assert "row 6 (rows.jsonl:6)  5 tokens, 2 targets, 1 cut away  cut" in text
    assert "\x1b" not in text


def test_roles_have_colours_on_a_terminal() -> None:
    styles = {str(span.style) for span in row_text(CUT).spans}
    assert {style.split()[0] for style in styles if style.startswith("#")} >= set(COLOURS)
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=80)
    console.print(preview_tables(preview_of(CUT)))
    assert "\x1b[" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_legend_of_a_classifier_has_no_targets() -> None:
    text = printed(preview_of(WARNED, targets=None))
    assert "{+target+}" not in text
    assert "of the tokens" not in text
    assert "label <b>  duplicate" in text


def test_facts_and_histogram() -> None:
    lengths = Lengths(np.array([3, 5, 8, 12]))
    text = printed(preview_of(CUT, lengths=lengths, is_joined=False))
    assert "lengths   p50 5, p95 12, longest 12; max_seq_length 8" in text
    assert "targets   4 (40.0% of the tokens)" in text
    assert "cut away  4 tokens (14.3%), 2 of them targets; rows: 1 cut, 0 left out" in text
    assert re.search(r"^ *8 +1 +━+ +max_seq_length *$", text, re.M)
    assert re.search(r"^ *12 +1 +━+ +p95, longest *$", text, re.M)


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert visible("a\x1b[31m\t\u202eb\r\u00a0") == "a\\x1b[31m→\\u202eb\\r\\xa0"
    assert visible("Ünïcode 今日 🎬") == "Ünïcode·今日·🎬"
    assert "\x1b" not in printed(preview_of(row(1, token("\x1b[2J"))))


def test_long_rows_show_their_ends_and_changes() -> None:
    tokens = [token(f" {i}", "target" if 400 <= i < 500 else "context") for i in range(900)]
    text, full = row_text(row(1, *tokens)).plain, row_text(row(1, *tokens), full=True).plain
    assert re.findall(r"… (\d+) tokens left out …", text) == ["328", "76", "348"]
    for shown in ("·0·", "·59", "·399{+·400", "·499+}·500", "·899"):
        assert shown in text
    assert "left out" not in full
    assert all(f"·{i}" in full for i in range(900))


def test_few_tokens_are_not_left_out() -> None:
    tokens = [token(f" {i}") for i in range(110)]
    assert "left out" not in row_text(row(1, *tokens)).plain


def test_lines_end_between_words_and_fit() -> None:
    words = row(1, *(token(f" word{i}") for i in range(40)), token(" " + "x" * 90))
    lines = printed(preview_of(words), width=60).split("row 1 (rows.jsonl:1)")[1].splitlines()[1:]
    assert all(len(line) <= 60 for line in lines)
    assert "".join(line.strip() for line in lines) == row_text(words).plain
    assert all(re.search(r"·$|x+$", line.rstrip()) for line in lines)


def test_warnings_that_were_logged_are_not_repeated() -> None:
    lines = [line.plain for line in preview_warnings(preview_of(CUT))]
    assert lines == ["warning: 1 of 2 rows <b>twice</b>"]


def test_a_row_without_tokens_says_so() -> None:
    assert row_text(row(3, is_left_out=True)).plain == "no tokens"


# -- JSON ------------------------------------------------------------------------------------------


def test_json_has_rows_lengths_and_all_warnings() -> None:
    found = json.loads(json.dumps(as_json(preview_of(CUT, WARNED))))
    assert found["rows"][0]["tokens"][3] == {
        "id": 7,
        "text": " 5",
        "role": "target",
        "special": False,
    }
    assert [one["marks"] for one in found["rows"]] == [["cut"], ["duplicate"]]
    assert found["rows"][1]["label"] == "<b>"
    assert found["lengths"]["longest"] == 12
    assert sum(part["rows"] for part in found["lengths"]["histogram"]) == 4
    assert found["truncation"] == {"cut_rows": 1, "left_out_rows": 0, "tokens": 4, "targets": 2}
    logged, other = found["warnings"]
    assert logged["text"] == "2 of 4 rows <i>are cut</i>"
    assert (other["mark"], other["count"], other["first"]) == ("duplicate", 1, "row 2")


# -- page ------------------------------------------------------------------------------------------


class Read(HTMLParser):
    """Elements of a page: {tag: their attributes}, texts of scripts and of tokens. Fails where tags
    do not match."""

    VOID = ("meta", "rect", "line")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: dict[str, list[dict[str, str | None]]] = {}
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.setdefault(tag, []).append(dict(attrs))
        if tag not in ("meta", "wbr"):
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.setdefault(tag, []).append(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]][-1] += data


def test_the_page_is_one_file_that_loads_nothing() -> None:
    read = Read(page(preview_of(CUT, WARNED, PLAIN)))
    addresses = {"src", "href", "xlink:href", "action", "data", "poster", "srcset", "style"}
    for tag, all_attributes in read.found.items():
        assert tag not in ("link", "img", "iframe", "object", "base", "form")
        for attributes in all_attributes:
            assert not addresses & attributes.keys()
            assert not [name for name in attributes if name.startswith("on")]
    assert len(read.found["script"]) == 1
    (style,) = read.texts["style"]
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style


def test_no_script_may_run_but_the_pages_own() -> None:
    read = Read(page(preview_of(CUT)))
    (script,) = read.texts["script"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = read.found["meta"][1]
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert f"script-src 'sha256-{digest}'" in str(policy["content"])
    assert "default-src 'none'" in str(policy["content"])


def test_whatever_rows_hold_is_text() -> None:
    found = preview_of(WARNED, recipe=EVIL, data=EVIL, model=EVIL, heard=(EVIL,))
    text = page(replace(found, page_rows=(replace(WARNED, place=EVIL),)))
    read = Read(text)
    assert EVIL not in text
    assert len(read.found["script"]) == 1
    assert read.texts["i"][-2:] == [EVIL, "&amp;"]
    assert read.texts["h3"] == [EVIL]
    assert read.found["i"][-2]["title"] == f"{EVIL!r}, id 7, context"
    assert EVIL in read.texts["li"]
    assert "b" in read.found
    assert "<b>" in read.texts["b"]


def test_the_page_has_a_token_an_element_with_id_text_and_role() -> None:
    read = Read(page(preview_of(CUT, WARNED, PLAIN)))
    titles = [one["title"] for one in read.found["i"] if "title" in one]
    assert titles[:2] == ["'<s>', id 7, special token, context", "'2 +', id 7, context"]
    assert titles[4:6] == ["'\\n', id 7, target", "'more', id 7, cut"]
    assert titles[-1] == "'b', id 4711, target"
    rows = read.found["article"]
    assert [(one["data-cut"], one["data-warned"]) for one in rows] == [
        ("1", "0"),
        ("0", "1"),
        ("0", "0"),
    ]
    assert read.texts["option"] == ["all 3 rows", "cut or left out (1)", "with warnings (1)"]
    assert {"filter", "place", "before", "after"} <= {
        str(one.get("id")) for tags in read.found.values() for one in tags
    }


def test_the_page_shows_all_rows_where_scripts_do_not_run() -> None:
    read = Read(page(preview_of(CUT, WARNED)))
    assert all("hidden" not in one for one in read.found["article"])
    assert "hidden" in read.found["nav"][0]


def test_the_histogram_of_the_page_counts_every_row_once() -> None:
    read = Read(page(preview_of(CUT)))
    titles = [text for text in read.texts["title"] if "tokens:" in text]
    assert sum(int(text.split(": ")[1].split()[0]) for text in titles) == 4
    kinds = [one["class"] for one in read.found["rect"]]
    assert kinds.count("beyond") == 4  # bars of 9, 10, 11 and 12 tokens; the limit is 8
    assert any("max_seq_length 8" in text for text in read.texts["text"])


def test_a_page_that_can_not_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file/page.html"):
        with pytest.raises(UsageError, match="can not be written"):
            try_output(path)
        with pytest.raises(UsageError, match="can not be written"):
            save_output(path, page(preview_of(CUT)).encode())
    save_output(tmp_path / "new/page.html", page(preview_of(CUT)).encode())
    assert (tmp_path / "new/page.html").read_text(encoding="utf-8") == page(preview_of(CUT))
    assert sorted(child.name for child in tmp_path.iterdir()) == ["file", "new"]
