"""Texts of single tokens, such that those of a row make up its text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorakit import compat

UNFINISHED = "�"  # decoders write it for a part of a letter
LETTER = 4  # most bytes of a letter in UTF-8, each of which may be a token


def token_texts(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[list[str]]:
    """The text of each token of each row: what it adds to the text of the token before it.

    The tokens of a letter's bytes have the text "", except the last, which has the letter. Every
    pair of neighbours is decoded once.
    """
    pairs: dict[tuple[int, ...], str] = {(): ""}
    for row in rows:
        for before, token in zip([None, *row], row, strict=False):
            pairs.setdefault((token,), "")
            if before is not None:
                pairs.setdefault((before, token), "")
    _decode(tokenizer, pairs, list(pairs))
    return [_of_row(tokenizer, row, pairs) for row in rows]


def _decode(
    tokenizer: Any, known: dict[tuple[int, ...], str], wanted: Sequence[tuple[int, ...]]
) -> None:
    keys = [key for key in wanted if key]
    known.update(zip(keys, compat.decode(tokenizer, keys), strict=True))


def _of_row(tokenizer: Any, row: Sequence[int], known: dict[tuple[int, ...], str]) -> list[str]:
    texts: list[str] = []
    start = 0  # where the letter began that is not finished
    for place in range(len(row)):
        before = tuple(row[max(0, start - 1) : start])
        key = (*before, *row[start : place + 1])
        if key not in known:
            _decode(tokenizer, known, [key])
        text = _added(known[before], known[key])
        is_part = text.endswith(UNFINISHED) and place + 1 - start < LETTER and place + 1 < len(row)
        if is_part and _completes(tokenizer, row, start, known):
            texts.append("")
            continue
        texts.append(text)
        start = place + 1
    return texts


def _completes(
    tokenizer: Any, row: Sequence[int], start: int, known: dict[tuple[int, ...], str]
) -> bool:
    """True if some of the next tokens finish the letter that begins at `start`."""
    before = tuple(row[max(0, start - 1) : start])
    keys = [(*before, *row[start:end]) for end in range(start + 2, start + LETTER + 1)]
    _decode(tokenizer, known, [key for key in keys if key not in known])
    return any(UNFINISHED not in _added(known[before], known[key]) for key in keys)


def _added(before: str, both: str) -> str:
    """The rest of `both` after `before`. Decoders may write the end of the first token otherwise if
    another follows (a blank comes or goes)."""
    if both.startswith(before):
        return both[len(before) :]
    shared = 0
    while shared < min(len(before), len(both)) and before[shared] == both[shared]:
        shared += 1
    return both[shared:]
