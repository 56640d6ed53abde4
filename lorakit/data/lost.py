"""Detection of characters that a tokenizer loses, by tokenising and decoding a text and parts of
it.

T5's tokenizer turns a line break into a blank, BERT's turns capitals into small letters: the model
is then not trained on the text itself.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lorakit import compat

LOOKED_AT = 50_000  # characters of the text that are examined
# maximum number of characters that are tried, those with most occurrences missing first: Chinese
# has thousands
SUSPECTS = 100
TRIED = 8  # occurrences of a character that are tried
# maximum context on either side, up to white space, with which a character is tried
BESIDE = 32
SHOWN = 5
TWO_BLANKS = "  "
NAMES = {
    "\n": "line breaks",
    "\r": "carriage returns",
    "\t": "tabs",
    TWO_BLANKS: "blanks in a row",
    " ": "blanks",
}
CAPITALS = "capital letters"
BEFORE = re.compile(rf"\S{{0,{BESIDE}}}\Z")
BEFORE_SPACE = re.compile(rf"\S{{0,{BESIDE}}}\s{{0,{BESIDE}}}\Z")
AFTER = re.compile(rf"\S{{0,{BESIDE}}}")


def lost_characters(tokenizer: Any, texts: Iterable[str]) -> list[str]:
    """Characters of the texts that never survive tokenising and decoding: their names, or else the
    characters in Python's notation, in the order in which they first occur in the texts.

    Characters that are rarer in the decoded texts are tried in their context. White space is tried
    after the word or the line break before it, and not at the beginning of a text, where many
    tokenizers drop a blank. A part that contains the unknown token proves nothing.
    """
    seen = list(_beginning(texts))
    decoded, _ = _there_and_back(tokenizer, seen)
    before, after = _counts(seen), _counts(list(decoded.values()))
    missing = before - after
    suspects = {sign for sign, _ in missing.most_common(SUSPECTS)}
    tried = _parts(seen, [sign for sign in before if sign in suspects])
    back, known = _there_and_back(
        tokenizer, list(dict.fromkeys(part for parts in tried.values() for part in parts))
    )
    lost = [
        sign
        for sign, parts in tried.items()
        if _is_lost(sign, [part for part in parts if part in known], back)
    ]
    return list(
        dict.fromkeys(
            CAPITALS if _is_small_now(sign, lost) else NAMES.get(sign, repr(sign)) for sign in lost
        )
    )


def listed_lost(names: Sequence[str]) -> str:
    """The names for a sentence, only the first few of many."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _beginning(texts: Iterable[str]) -> Iterator[str]:
    letters, seen = 0, set()
    for text in texts:
        if letters >= LOOKED_AT:
            return
        if text in seen:
            continue
        seen.add(text)
        yield text[: LOOKED_AT - letters]
        letters += len(text)


def _there_and_back(tokenizer: Any, texts: Sequence[str]) -> tuple[dict[str, str], set[str]]:
    """({text: the text decoded from its tokens}, the texts without the unknown token). The texts
    differ from each other."""
    if not texts:
        return {}, set()
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    decoded = dict(zip(texts, compat.decode(tokenizer, ids), strict=True))
    return decoded, {
        text for text, row in zip(texts, ids, strict=True) if tokenizer.unk_token_id not in row
    }


def _counts(texts: Sequence[str]) -> Counter[str]:
    """Number of occurrences in the texts of each character, in the order of first occurrence, and
    of two blanks in a row."""
    counts = Counter(sign for text in texts for sign in text)
    counts[TWO_BLANKS] = sum(text.count(TWO_BLANKS) for text in texts)
    return counts


def _parts(texts: Sequence[str], signs: Sequence[str]) -> dict[str, list[str]]:
    """{sign: parts of the texts around its first occurrences}, for signs in their order."""
    found: dict[str, list[str]] = {sign: [] for sign in signs}
    left = set(signs)
    for text in texts:
        for place, sign in enumerate(text):
            for one in (sign, TWO_BLANKS) if text.startswith(TWO_BLANKS, place) else (sign,):
                if one in left and (part := _part(text, place, one)):
                    found[one].append(part)
                    if len(found[one]) == TRIED:
                        left.remove(one)
    return found


def _part(text: str, place: int, sign: str) -> str:
    """`sign`, which is at `place`, with its context; "" for white space with only blanks before
    it."""
    end = place + len(sign)
    pattern = BEFORE_SPACE if sign.isspace() else BEFORE
    before = pattern.search(text[max(0, place - 2 * BESIDE) : place])
    after = AFTER.match(text, end)
    assert before is not None
    assert after is not None
    if sign.isspace() and not before[0].strip(" \t"):
        return ""
    return before[0] + sign + after[0]


def _is_lost(sign: str, parts: Sequence[str], decoded: dict[str, str]) -> bool:
    return bool(parts) and all(decoded[part].count(sign) < part.count(sign) for part in parts)


def _is_small_now(sign: str, lost: Sequence[str]) -> bool:
    return sign.isupper() and sign.lower() not in lost
