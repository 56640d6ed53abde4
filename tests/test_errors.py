"""Errors about a recipe name the key that is meant, also where the recipe leaves it out."""

from __future__ import annotations

import pytest

from lorakit.errors import Problem, RecipeError

PLACES = {"": "a.yaml", "data": "a.yaml:4:1", "data.name_or_path": "a.yaml:5:3"}


@pytest.mark.parametrize(
    ("key", "what", "expected", "named"),
    [
        ("data.problem_type", "classes or numbers?", "regression", False),
        ("data.problem_type", "classes or numbers?", "data.problem_type: regression", True),
        ("data.problem_type", "`problem_type` has no effect", None, True),
        ("data.max_seq_length", "within max_seq_length 8", "more tokens", True),
        ("data.prompt", "the prompt of row 2 is empty", "at least a word", False),
        ("data.prompt", "the `prompt` of row 2 is empty", "at least a word", True),
        ("data.format", "a format: what", None, True),
        ("data.format", "reformat: what", None, False),
    ],
)
def test_a_key_that_the_recipe_leaves_out_is_named_once(
    key: str, what: str, expected: str | None, named: bool
) -> None:
    (problem,) = RecipeError.at(key, what, expected).located(PLACES).problems
    assert problem.where == "a.yaml:4:1"
    assert problem.names_its_key is named
    line = f"\n  the key is {key}, which is not in the recipe"
    assert str(problem).endswith(line) is not named
    # At its own place the key need not be named.
    (there,) = RecipeError.at(key, what, expected).located(PLACES | {key: "a.yaml:6:3"}).problems
    assert str(there) == f"a.yaml:6:3: {what}" + (f"\n  expected: {expected}" if expected else "")


def test_a_place_that_is_known_stays_and_the_whole_file_has_no_key() -> None:
    error = RecipeError([Problem("no UTF-8", where="b.yaml"), Problem("nothing is there")])
    assert str(error.located(PLACES)) == "b.yaml: no UTF-8\na.yaml: nothing is there"
