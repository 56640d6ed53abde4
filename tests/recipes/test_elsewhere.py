"""Whole configurations of other tools: each of their keys is answered by the one that lorakit has
for it, or by what to do instead.

Each file of `elsewhere/` is such a configuration. Its comments say what the key of the line should
be answered with: a dotted key of lorakit's, or `none`; a key without a comment is called the same
here, or belongs to the one above it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lorakit.errors import Problem, RecipeError
from lorakit.recipes.recipe import load_recipe

CONFIGS = sorted((Path(__file__).parent / "elsewhere").glob("*.y*ml"))
LINE = re.compile(r"( *)(?:- )*(\w+):.*?  # ([\w.]+)$")


def answers(path: Path) -> dict[int, Problem]:
    """{number of a line: the problem that is reported there}."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    found: dict[int, Problem] = {}
    for problem in caught.value.problems:
        place = re.search(r":(\d+):\d+$", str(problem.where))
        if place and problem.what.startswith("unknown key"):
            assert int(place[1]) not in found
            found[int(place[1])] = problem
    return found


def test_there_are_twelve_and_one_of_each_tool_at_least() -> None:
    assert len(CONFIGS) == 12
    tools = {path.stem.split("_")[0] for path in CONFIGS}
    assert tools >= {"axolotl", "llama", "trl", "mlx", "torchtune", "litgpt", "unsloth", "peft"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_key_of_another_tool_is_answered(path: Path) -> None:
    found, wrong = answers(path), []
    text = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(text, 1):
        match = LINE.match(line)
        problem = found.pop(number, None)
        if match is None:
            assert problem is None, f"{line}: {problem}"
            continue
        key, expected = match[2], match[3]
        same = not match[1] and problem is not None and problem.nearest == f"{expected}.{key}"
        if problem is None:
            wrong.append(f"{key}: no answer, not {expected}")
        elif expected == "none":
            if problem.nearest or "no counterpart: " not in str(problem.hint):
                wrong.append(f"{key}: {problem.nearest}, {problem.hint}, not none")
        elif problem.nearest not in (expected, expected.rpartition(".")[2]) and not same:
            wrong.append(f"{key}: {problem.nearest}, {problem.hint}, not {expected}")
    assert wrong == []
    assert found == {}
