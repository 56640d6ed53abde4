"""The page about a run: its structure, what it escapes, and how it works in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import UsageError
from lorakit.report.charts import Series, chart, embedded, number
from lorakit.runs.report import report
from tests.support.records import MODELS, moving, write_run

EVIL = "</script><script>alert(1)</script><b title='\"&"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run whose ranks moved, with a text in every place that would end an element."""
    folder = write_run(tmp_path / "a <b> run", moving(MODELS["bert"]))
    (folder / "recipe.yaml").write_text(f"method: {{name: l1ra}}\nmodel: {json.dumps(EVIL)}\n")
    steps = [
        {"step": s, "loss": 1 / s, "learning_rate": 1e-3 / s, "tokens": 90, "seconds": 0.5}
        | {"density": 1 - s / 100, "constant": 3}
        for s in range(1, 51)
    ]
    evaluations = [{"step": s, "eval_accuracy": s / 50, "eval_loss": 1 / s} for s in (25, 50)]
    write_lines(folder / "metrics.jsonl", [*steps, *evaluations])
    write_lines(folder / "warnings.jsonl", [{"at": "", "message": EVIL}] * 2)
    tiers = [{"rank": r, "share": 0.5, "kv": "int8"} for r in (4, 8)]
    result = {
        "method": "l1ra",
        "task": EVIL,
        "metrics": {"accuracy": 1.0, EVIL: 0.5},
        "steps": 50,
        "tiers": tiers,
        "mean_rank": 6.0,
        "mean_chunk_length": 9.5,
        "data": {"name": EVIL, "stand_in": "builtin/x"},
    }
    (folder / "result.json").write_text(json.dumps(result))
    manifest = {"versions": {"torch": EVIL}, "machine": {EVIL: EVIL}, "command": ["lorakit", EVIL]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


VOID = {"meta", "link", "input", "br", "img", "wbr"}


class Page(HTMLParser):
    """The elements of a page: all are closed, and what each holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.scripts if self.open[-1:] == ["script"] else self.texts).append(data)

    def of(self, tag: str, kind: str | None = None) -> list[dict[str, str | None]]:
        """The attributes of elements, of one class if `kind` is given."""
        return [
            found
            for name, found in self.found
            if name == tag and (kind is None or kind in (found.get("class") or "").split())
        ]


def test_the_page_has_all_parts_and_loads_nothing(run: Path) -> None:
    text = report(run).read_text(encoding="utf-8")
    page = Page(text)
    shown = "".join(page.texts)
    titles = ("Curves", "Ranks", "Chunks and tiers", "Result", "Recipe", "Environment", "Warnings")
    assert [title for title in titles if title not in shown] == []
    assert "finished after 50 steps" in shown
    assert "STAND-IN DATA: builtin/x" in shown
    assert "mean rank 6.00 over held-out tokens, chunks of 9.5 tokens" in shown
    curves = re.findall(r"<figcaption>([^<]*)", text)
    assert curves == [
        "loss",
        "validation accuracy",
        "learning rate",
        "tokens per second",
        "density of the factors",
    ]
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert "default-src 'none'" in text
    assert [link.get("href") for link in page.of("link")] == ["data:,"]
    assert not [found for _, found in page.found if found.get("src")]


def test_every_text_of_a_file_is_escaped(run: Path) -> None:
    text = report(run).read_text(encoding="utf-8")
    page = Page(text)
    assert text.count("<script") == len(page.scripts)
    assert not page.of("b")
    assert "alert(1)" not in "".join(page.scripts)
    shown = "".join(page.texts)
    assert shown.count(EVIL) >= 6
    assert "a <b> run" in shown
    # one warning that came twice is listed once
    assert "".join(page.texts).count("Warnings") == 1
    assert json.loads(embedded({"name": EVIL})[len('<script type="application/json">') : -9]) == {
        "name": EVIL
    }


def test_the_heat_map_has_a_cell_for_each_module_and_a_change_for_each_record(run: Path) -> None:
    page = Page(report(run).read_text(encoding="utf-8"))
    records = moving(MODELS["bert"])
    assert len(page.of("span", "heat")) == len(MODELS["bert"])
    (slider,) = [found for found in page.of("input") if found.get("type") == "range"]
    assert slider["max"] == slider["value"] == str(len(records) - 1)
    (data,) = [json.loads(s) for s in page.scripts if s.startswith('{"highest"')]
    ranks = data["ranks"]
    for record, change in zip(records[1:], data["records"][1:], strict=True):
        for module, rank in change["changed"].items():
            ranks[int(module)] = rank
        assert ranks == list(record.ranks.values())
        assert change["step"] == record.step


def test_an_interrupted_run_has_a_page_too(run: Path) -> None:
    (run / "result.json").unlink()
    text = report(run).read_text(encoding="utf-8")
    assert "not finished: 50 steps so far" in text
    assert "accuracy so far" in text
    for name in ("metrics.jsonl", "ranks.jsonl", "manifest.json", "warnings.jsonl"):
        (run / name).unlink()
    assert "not finished: 0 steps" in report(run).read_text(encoding="utf-8")


def test_broken_files_and_other_suffixes_are_errors_and_nothing_is_written(run: Path) -> None:
    with pytest.raises(UsageError, match=r"ends in \.html"):
        report(run, run / "page.pdf")
    (run / "metrics.jsonl").write_text("{]\n{}\n")
    with pytest.raises(UsageError, match=r"metrics\.jsonl:1: not JSON"):
        report(run)
    (run / "metrics.jsonl").write_text("")
    (run / "manifest.json").write_text("3")
    with pytest.raises(UsageError, match=r"manifest\.json: not an object"):
        report(run)
    assert not (run / "report.html").exists()


def test_ranks_that_are_all_alike_are_a_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", moving(MODELS["gpt2"], updates=0))
    text = report(folder).read_text(encoding="utf-8")
    assert "rank 8 each" in text
    assert 'class="heat"' not in text


def test_charts_keep_finite_points_and_their_ends() -> None:
    assert chart("x", [Series("a", [], [])]) == ""
    assert chart("x", [Series("a", [1], [float("nan")])]) == ""
    one = chart("x", [Series("a", [3], [0.5])])
    assert "<circle" in one
    steps = list(range(1, 5001))
    data = json.loads(
        re.findall(r"json\">(.*)</script>", chart("x", [Series("a", steps, steps)]))[0]
    )
    kept = data["series"][0]["steps"]
    assert len(kept) <= 800
    assert kept[-1] == 5000
    assert [number(value) for value in (0, 0.5, 1234, 12345, 2.5e6, 2.5e-4)] == [
        *("0", "0.5", "1234", "12.35k" if f"{12.345:.4g}" == "12.35" else "12.34k"),
        *("2.5M", "2.5e-4"),
    ]


def test_the_command_writes_into_the_run_or_where_it_is_told(
    run: Path, call: Callable[..., str], tmp_path: Path
) -> None:
    assert call("report", run) == f"{run / 'report.html'}\n"
    assert call("report", run, "--out", tmp_path / "new/page.html") == f"{tmp_path}/new/page.html\n"


# -- in a browser ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium: $CHROME_PATH, one on the path, or playwright's own."""
    package = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = os.environ.get("CHROME_PATH") or next(filter(None, map(shutil.which, BROWSERS)), None)
    with package.sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except package.Error as error:
            pytest.skip(f"no browser: {str(error).splitlines()[0]}")
        yield chromium
        chromium.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_works_in_a_browser(browser: Any, run: Path, scheme: str) -> None:
    tab = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    file = report(run)
    tab.goto(file.as_uri())

    # the curve's value under the pointer, and by the keys
    curve = tab.locator(".chart svg[role=img]").nth(2)
    assert not tab.locator(".chart .tip").nth(2).is_visible()
    curve.hover(position={"x": 200, "y": 60})
    assert re.fullmatch(r"step \d+: [\d.e-]+", tab.locator(".chart .tip").nth(2).inner_text())
    curve.focus()
    curve.press("Home")
    assert tab.locator(".chart .tip").nth(2).inner_text() == "step 1: 0.001"

    # the slider changes numbers and colours
    records = moving(MODELS["bert"])
    cells, slider = tab.locator(".heat"), tab.locator(".slider input")

    def state() -> list[str]:
        texts: list[str] = cells.all_inner_texts()
        return [text.split()[0] for text in texts]

    def colour() -> str:
        return str(cells.first.evaluate("element => getComputedStyle(element).backgroundColor"))

    assert state() == [str(rank) for rank in records[-1].ranks.values()]
    after = colour()
    slider.fill("0")
    assert state() == [str(rank) for rank in records[0].ranks.values()]
    assert colour() != after
    assert f"ranks {records[0].total}" in tab.locator(".slider output").inner_text()

    # a phone scrolls the tables, never the page
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    dark = tab.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    assert said == []
    assert [url for url in asked if not url.startswith("file:")] == []
