"""Visible: text in which white space and control characters can be seen."""

from __future__ import annotations

BLANK, LINE_BREAK, TAB = "·", "⏎", "→"
NOTHING = "∅"  # for a token without a text of its own


def visible(text: str) -> str:
    """The text with signs in place of white space, a real line break after the sign of one, and
    escapes (\\x1b) in place of all other characters that do not print: a terminal would obey
    them."""
    return "".join(map(_sign, text))


def _sign(letter: str) -> str:
    if letter == " ":
        return BLANK
    if letter == "\n":
        return LINE_BREAK + "\n"
    if letter == "\t":
        return TAB
    if letter.isprintable():
        return letter
    return letter.encode("unicode_escape", "surrogatepass").decode("ascii")
