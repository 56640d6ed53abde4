"""README.md and the pages under docs/: what they link to is there, and their recipes are valid."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import lorakit
from lorakit.cli import app
from lorakit.recipes.recipe import load_recipe

ROOT = Path(lorakit.__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
# A page may show a section alone; the rest of the recipe is this.
REST = {
    "model": {"name_or_path": "./model", "task": "causal-lm"},
    "data": {"name_or_path": "./data"},
    "method": {"name": "vanilla"},
}


def name(value: Any) -> str:
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else ""


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_found_from_the_first() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(PAGES) > 5
    assert [page for page in PAGES[1:] if f"(docs/{page.name})" not in text] == []


def recipes() -> Iterator[Any]:
    for page in PAGES:
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            yield pytest.param(block, id=f"{page.stem}: {block.splitlines()[0]}")


@pytest.mark.parametrize("shown", recipes())
def test_a_recipe_that_is_shown_is_valid(shown: str, tmp_path: Path) -> None:
    missing = {key: REST[key] for key in REST.keys() - yaml.safe_load(shown).keys()}
    (tmp_path / "shown.yaml").write_text(f"{shown}\n{yaml.safe_dump(missing) if missing else ''}")
    load_recipe(tmp_path / "shown.yaml")


def test_commands_that_are_named_are_there() -> None:
    there, seen = {command.name for command in app.registered_commands}, set[str]()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        code = re.findall(r"```\n(.*?)```|`([^`\n]+)`", text, re.DOTALL)
        lines = [line for found in code for part in found for line in part.splitlines()]
        named = {
            found[1]
            for line in lines
            if (found := re.match(r"(?:\$ )?lorakit ([a-z][\w-]*)", line))
        }
        assert named <= there, page
        seen |= named
    assert len(seen) > 10
