"""What a tokenizer loses of a text, found by tokenising and decoding parts of the text itself.

T5's tokenizer makes a blank of a line break, BERT's small letters of capitals: what is trained on is then not the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from lorakit import compat

LOOKED_AT = 50_000  # characters of the text that are looked at
TRIED = 8  # places of a character that are tried
BESIDE = 32  # characters at most, on either side and up to white space, that a character is tried with
SHOWN = 5
NAMES = {"\n": "line breaks", "\r": "carriage returns", "\t": "tabs", "  ": "blanks in a row", " ": "blanks"}
CAPITALS = "capital letters"


def lost_characters(tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """What the texts have and what is decoded of their tokens never has: names of characters, and characters as Python writes
    them, those that come first in the texts first.

    Characters are tried where they stand, with what is beside them. A part that has the unknown token does not tell.
    """
    tried: dict[str, list[str]] = {}
    seen = list(_beginning(texts))
    for sign in [*dict.fromkeys(sign for text in seen for sign in text), "  "]:
        pattern = re.compile(rf"\S{{0,{BESIDE}}}{re.escape(sign)}\S{{0,{BESIDE}}}")
        tried[sign] = list(islice((found[0] for text in seen for found in pattern.finditer(text)), TRIED))
    parts = list(dict.fromkeys(part for parts in tried.values() for part in parts))
    if not parts:
        return []
    ids = tokenizer(parts, add_special_tokens=False, verbose=False)["input_ids"]
    decoded = dict(zip(parts, compat.decode(tokenizer, ids), strict=True))
    known = {part for part, row in zip(parts, ids, strict=True) if tokenizer.unk_token_id not in row}
    lost = [sign for sign, parts in tried.items() if _is_lost(sign, [part for part in parts if part in known], decoded)]
    return list(dict.fromkeys(CAPITALS if _is_small_now(sign, lost) else NAMES.get(sign, repr(sign)) for sign in lost))


def listed_lost(names: Sequence[str]) -> str:
    """The names in a sentence, the first few of many."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _beginning(texts: Sequence[str]) -> Iterator[str]:
    letters = 0
    for text in texts:
        if letters >= LOOKED_AT:
            return
        yield text[: LOOKED_AT - letters]
        letters += len(text)


def _is_lost(sign: str, parts: Sequence[str], decoded: dict[str, str]) -> bool:
    return bool(parts) and all(decoded[part].count(sign) < part.count(sign) for part in parts)


def _is_small_now(sign: str, lost: Sequence[str]) -> bool:
    return sign.isupper() and sign.lower() not in lost
