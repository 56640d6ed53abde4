"""Texts of single tokens: together they are the text of the row."""

from __future__ import annotations

import pytest

from lorakit import compat
from lorakit.data.token_texts import token_texts
from tests.support.tokenizers import EXACT, LINES, MAKES


@pytest.mark.parametrize("make", MAKES)
def test_the_texts_of_a_rows_tokens_are_the_text_of_the_row(make: str) -> None:
    tokenizer = MAKES[make]()
    rows = [tokenizer(line)["input_ids"] for line in LINES]
    texts = token_texts(tokenizer, rows)
    assert [len(row) for row in texts] == [len(row) for row in rows]
    if make in EXACT:
        assert ["".join(row) for row in texts] == compat.decode(tokenizer, rows)


@pytest.mark.parametrize("make", ["byte-level", "llama"])
def test_the_bytes_of_a_letter_have_no_text_but_the_last(make: str) -> None:
    tokenizer = MAKES[make]()
    (ids,) = tokenizer(["a🦆b"], add_special_tokens=False)["input_ids"]
    (texts,) = token_texts(tokenizer, [ids])
    assert [text for text in texts if text.strip()] == ["a", "🦆", "b"]
    assert texts.count("") >= 2


def test_a_letter_that_never_ends_is_shown_as_such() -> None:
    tokenizer = MAKES["byte-level"]()
    (ids,) = tokenizer(["🦆"], add_special_tokens=False)["input_ids"]
    (texts,) = token_texts(tokenizer, [[*ids[:2], *tokenizer("x")["input_ids"]]])
    assert "�" in texts[0] + texts[1]
    assert texts[2] == "x"


def test_no_rows_and_empty_rows() -> None:
    tokenizer = MAKES["word level"]()
    assert token_texts(tokenizer, []) == []
    assert token_texts(tokenizer, [[]]) == [[]]
