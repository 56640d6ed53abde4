"""Texts with tokens marked by spans of characters, for texts that are written as a whole, such as a
chat template's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Span = tuple[int, int]
"""First character, and the one after the last."""


@dataclass(frozen=True)
class Spanned:
    """A text with its tokens in some spans marked [tokens]. exact: False if a token crosses the
    beginning of a span, so that the text up to there has other tokens when it stands alone."""

    ids: list[int]
    marks: NDArray[np.bool_]
    exact: bool


def spanned(tokenizer: Any, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[Spanned]:
    """Token ids of whole texts as they stand, with nothing put around them, and marks for the
    tokens of some spans of characters, which are in order and do not overlap.

    A token that is partly inside a span is marked.
    """
    if not tokenizer.is_fast:
        return [_by_prefixes(tokenizer, *row) for row in zip(texts, spans, strict=True)]
    options = {
        "add_special_tokens": False,
        "return_attention_mask": False,
        "return_token_type_ids": False,
        "return_offsets_mapping": True,
    }
    encoded = tokenizer(list(texts), verbose=False, **options)
    rows = zip(encoded["input_ids"], encoded["offset_mapping"], spans, strict=True)
    return [_by_offsets(*row) for row in rows]


def _by_offsets(
    ids: list[int], offsets: Sequence[tuple[int, int]], inside: Sequence[Span]
) -> Spanned:
    begins, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
    # The offsets of some tokenizers leave blanks out, which belong to the next token.
    behind = np.concatenate([[0], np.maximum.accumulate(ends)])[: len(ends)]
    begins = np.minimum(begins, behind)
    marks, exact = np.zeros(len(ids), bool), True
    for start, end in inside:
        here = (ends > start) & (begins < end)
        exact &= not (here & (begins < start)).any()
        marks |= here
    return Spanned(ids, marks, bool(exact))


def _by_prefixes(tokenizer: Any, text: str, inside: Sequence[Span]) -> Spanned:
    """For a tokenizer in Python, which does not say where its tokens stand: the tokens of the text
    up to each border are counted."""

    def tokens(part: str) -> list[int]:
        found: list[int] = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    ids = tokens(text)
    marks, exact = np.zeros(len(ids), bool), True
    for start, end in inside:
        before, within = tokens(text[:start]), tokens(text[:end])
        exact &= ids[: len(before)] == before and ids[: len(within)] == within
        marks[len(before) : len(within)] = True
    return Spanned(ids, marks, exact)
