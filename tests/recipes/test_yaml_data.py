"""YAML: scalars follow version 1.2, places are exact, and what is written is read back
unchanged."""

from __future__ import annotations

from typing import Any

import pytest

from lorakit.errors import RecipeError
from lorakit.recipes.yaml_data import dump, parse_yaml

SCALARS = [
    ("1e-3", 1e-3),
    ("2e-5", 2e-5),
    ("1E5", 1e5),
    (".5", 0.5),
    ("1.", 1.0),
    ("-1.5e+3", -1500.0),
    ("+.5", 0.5),
    (".inf", float("inf")),
    ("-.INF", float("-inf")),
    ("0", 0),
    ("-7", -7),
    ("+7", 7),
    ("007", 7),
    ("0x1F", 31),
    ("0o17", 15),
    ("true", True),
    ("false", False),
    ("True", True),
    ("null", None),
    ("~", None),
    ("", None),
    ("no", "no"),
    ("on", "on"),
    ("yes", "yes"),
    ("off", "off"),
    ("y", "y"),
    ("1_000", "1_000"),
    ("1:30", "1:30"),
    ("2024-01-01", "2024-01-01"),
    ("e5", "e5"),
    (".", "."),
    ("1e", "1e"),
    ("'1e-3'", "1e-3"),
    ('"8"', "8"),
    ("'null'", "null"),
    ("!!str 8", "8"),
    ("!!float 8", 8.0),
    ("inf", "inf"),
    ("nan", "nan"),
    ("=", "="),
    ("<<", "<<"),
]
ODD_STRINGS = [
    "8\n",
    " a",
    "a: b",
    "# a",
    "\t",
    "é\u2028",
    "[a",
    "1e-3 x",
    "-",
    "*a",
    "!x",
    "a\nb\n",
]


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    written = parse_yaml(f"a: {text}\n", "x")
    assert written.problems == []
    assert written.data["a"] == value
    assert type(written.data["a"]) is type(value)


def test_not_a_number_is_a_number() -> None:
    value = parse_yaml("a: .NaN", "x").data["a"]
    assert isinstance(value, float)
    assert value != value


@pytest.mark.parametrize("value", [*(value for _, value in SCALARS), *ODD_STRINGS])
def test_dump_is_read_back_unchanged(value: Any) -> None:
    data = {"a": value, "b": [value], "c": {"d": {}, "e": []}, str(value): 1}
    written = parse_yaml(dump(data), "x")
    assert written.problems == []
    assert written.data == data
    assert type(written.data["a"]) is type(value)


def test_places() -> None:
    written = parse_yaml("a:\n  b: [x, {c: 1}]\n  d: &d {e: 1}\nf: *d\n", "dir/x.yaml")
    assert written.places == {
        "": "dir/x.yaml",
        "a": "dir/x.yaml:1:1",
        "a.b": "dir/x.yaml:2:3",
        "a.b.0": "dir/x.yaml:2:7",
        "a.b.1": "dir/x.yaml:2:10",
        "a.b.1.c": "dir/x.yaml:2:11",
        "a.d": "dir/x.yaml:3:3",
        "a.d.e": "dir/x.yaml:3:10",
        "f": "dir/x.yaml:4:1",
        "f.e": "dir/x.yaml:3:10",
    }


def billion_laughs() -> str:
    rows = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    rows += [
        f"{new}: &{new} [{', '.join(['*' + old] * 10)}]"
        for old, new in zip("abcde", "bcdef", strict=True)
    ]
    return "\n".join(rows)


@pytest.mark.parametrize(
    ("text", "words"), [("[" * 3000, "nested too deeply"), (billion_laughs(), "aliases expand")]
)
def test_texts_that_would_take_all_memory(text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse_yaml(text, "x")
