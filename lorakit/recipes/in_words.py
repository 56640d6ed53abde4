"""Values, bounds and spellings in words, for explanations of errors."""

from __future__ import annotations

import json
from difflib import get_close_matches
from typing import Any

# Similarity of two names, from 0 to 1 (difflib's ratio), from which one is suggested for the other:
# within a section, and across sections. At 0.6 `deepspeed` is taken for `seed`.
ALIKE, ALIKE_ELSEWHERE = 0.7, 0.85

_BOUNDS = {
    "minimum": "of at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}

_KINDS = {
    bool: "a boolean",
    str: "a string",
    int: "a whole number",
    float: "a floating-point number",
    list: "a list",
    dict: "a mapping",
}


def bounds(branch: dict[str, Any]) -> str:
    """The bounds of a number, such as " of at least 0 and below 1"."""
    found = [f"{words} {_plain(branch[name])}" for name, words in _BOUNDS.items() if name in branch]
    return " " + " and ".join(found) if found else ""


def _plain(bound: float) -> str:
    return str(int(bound)) if float(bound).is_integer() else str(bound)


def shown(value: Any) -> str:
    """`value`, with its kind where only the kind is wrong: a quoted number, or 8.0 for 8."""
    if value is None:
        return "null"
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"{_KINDS[type(value)]}, {text if len(text) <= 60 else text[:59] + '…'}"


def close(word: str, names: list[str], cutoff: float = ALIKE) -> str | None:
    """The one of `names` that is spelled most like `word`, if it is like it at all."""
    return next(iter(get_close_matches(word.lower(), names, n=1, cutoff=cutoff)), None)
