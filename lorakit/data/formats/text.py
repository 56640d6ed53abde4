"""Format `text`: running text, every token of which is a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lorakit.data.collect import CHUNK, Collector, Made, Tokens, as_tokens, joined
from lorakit.data.columns import TEXTS, field_texts, first_of, text_columns
from lorakit.data.formats._base import (
    Format,
    Record,
    Split,
    are_there,
    chosen_texts,
    named_texts,
    text_keys,
)
from lorakit.data.keys import ChosenSpec, DataKeys
from lorakit.data.packs import pack
from lorakit.data.table import Table
from lorakit.data.tokenise import Tokeniser
from lorakit.errors import RecipeError

DOCUMENTS = "documents"


class Text(Format):
    """Each row is a document, which begins as the tokenizer begins a text and ends with the
    end-of-sequence token. The rows of a text file are instead one running text, which begins once
    and has no end-of-sequence token.

    Packed, rows are joined and cut into pieces of `max_length`; or, as documents, put together into
    packs without seeing each other; otherwise each row is an example.

    With a stride the pieces are windows that move by that many tokens, and only tokens that the
    previous window did not contain are targets (the sliding window of Transformers' documentation,
    "Perplexity of fixed-length models"). Every token of the stream but its first is a target once,
    with at least max_length - stride tokens before it.
    """

    name = "text"
    task = "causal-lm"
    keys = ("text_columns", "packing", "stride")
    tried = 1
    told_by = ("a text column (data.text_columns)",)
    called_elsewhere = dict.fromkeys(
        ("completion", "raw", "pretrain", "pretraining", "corpus"), "`text` is running text."
    )
    when_cut = "are cut: they lose their end, and nobody learns from them where to stop"

    def detects(self, spec: DataKeys, columns: Sequence[str]) -> bool:
        return bool(spec.text_columns or first_of(columns, TEXTS))

    def is_recorded(self, record: Record, columns: Sequence[str]) -> bool:
        return (
            record.get("format") == self.name
            and bool(record.get("columns"))
            and are_there(record["columns"], columns)
        )

    def chosen(self, spec: DataKeys, columns: Sequence[str], record: Record) -> dict[str, Any]:
        return {"text_columns": chosen_texts(spec, columns, record)}

    def used_columns(self, spec: ChosenSpec, columns: Sequence[str]) -> list[str]:
        found = text_columns(spec, columns)
        if len(found) > 1:
            what = "a pair of columns is for classification"
            raise RecipeError.at("data.text_columns", what, "one column")
        return found

    def naming_keys(self, spec: ChosenSpec, columns: Sequence[str]) -> dict[str, str]:
        return named_texts(spec)

    def wrong_values(self, spec: DataKeys) -> str | None:
        if spec.stride is None:
            return None
        if spec.packing in (False, DOCUMENTS):
            return "stride is for format: text with packing: joined"
        if spec.max_seq_length is not None and spec.stride >= spec.max_seq_length:
            limit = f"max_seq_length {spec.max_seq_length}"
            return f"stride must be less than {limit}, not {spec.stride}"
        return None

    def input_keys(self, data: Table, spec: ChosenSpec) -> list[Any]:
        return text_keys(data, spec)

    def check(self, spec: ChosenSpec, tokenizer: Any, max_length: int) -> None:
        super().check(spec, tokenizer, max_length)
        if spec.stride is not None and spec.stride >= max_length:
            windows = f"windows of {max_length} tokens that move by {spec.stride}"
            what = f"{windows} leave a target without context"
            raise RecipeError.at("data.stride", what, f"less than {max_length}")
        if spec.truncation != "cut" and self.is_joined(spec):
            what = "packed text is cut into pieces and loses nothing: there are no rows too long"
            raise RecipeError.at("data.truncation", what, "cut, or packing: false")

    def read(self, split: Split) -> Made:
        if split.lines and split.spec.packing == DOCUMENTS:
            what = "the lines of a text file are one running text, not documents"
            raise RecipeError.at("data.packing", what, "joined, or a file with a document a row")
        texts = _texts(split.data, split.spec)
        tokeniser = Tokeniser(split.tokenizer)
        rows = Collector(split.spec, split.max_length, split.data)
        if split.spec.packing == DOCUMENTS:
            return self._packed(split, texts, tokeniser, rows)
        if not self.is_joined(split.spec):
            for row, ids in enumerate(_documents(tokeniser, texts, split)):
                rows.add(row, ids, len(ids), targets=np.ones(len(ids), bool))
            tokens = rows.tokens
        else:
            tokens, lengths = _stream(tokeniser, texts, split)
            _add_pieces(rows, joined(tokens), np.cumsum(lengths), split)
        rows.find_special(split.tokenizer, [texts])
        rows.find_unknown(tokeniser, tokens, [texts])
        return rows.made()

    def _packed(
        self, split: Split, texts: Sequence[str], tokeniser: Tokeniser, rows: Collector
    ) -> Made:
        """Documents in packs; long ones in pieces."""
        documents, limit = _documents(tokeniser, texts, split), split.max_length
        pieces = [
            (row, ids[start : start + limit])
            for row, ids in enumerate(documents)
            for start in range(0, max(len(ids), 1), limit)
            # a single token of a cut document has nothing before it to be predicted from
            if start == 0 or len(ids) - start > 1
        ]
        there = [(row, ids) for row, ids in pieces if len(ids) > 1]
        for row, ids in pieces:
            if len(ids) <= 1:
                rows.count("empty", row)
        packs = pack([len(ids) for _, ids in there], limit)
        for number in (number for one in packs for number in one):
            row, ids = there[number]
            rows.add(row, ids, len(ids), targets=np.ones(len(ids), bool))
        rows.find_special(split.tokenizer, [texts])
        rows.find_unknown(tokeniser, documents, [texts])
        examples, counts = rows.made()
        ends = np.cumsum([0, *map(len, packs)]).astype(np.int64)
        return replace(examples, packs=ends), counts

    def is_joined(self, spec: ChosenSpec) -> bool:
        return spec.packing is not False

    def learned_texts(self, data: Table, spec: ChosenSpec, lines: bool) -> list[str]:
        texts = _texts(data, spec)
        return ["".join(texts)] if lines and self.is_joined(spec) else texts

    def empty_row(self) -> tuple[str, str]:
        return "data.text_columns", "text"


def _texts(data: Table, spec: ChosenSpec) -> list[str]:
    (column,) = text_columns(spec, data.column_names)
    return field_texts(data, column, "data.text_columns")


def _documents(tokeniser: Tokeniser, texts: Sequence[str], split: Split) -> list[Tokens]:
    """The tokens of each row as a document of its own."""
    found: list[Tokens] = []
    for start in range(0, len(texts), CHUNK):
        found += map(as_tokens, tokeniser.documents(texts[start : start + CHUNK]))
        split.progress(min(CHUNK, len(texts) - start))
    return found


def _stream(
    tokeniser: Tokeniser, texts: Sequence[str], split: Split
) -> tuple[list[Tokens], list[int]]:
    """(parts that, joined, are the stream of all rows; number of tokens of each row)."""
    if not split.lines:
        tokens = _documents(tokeniser, texts, split)
        return tokens, list(map(len, tokens))
    tokens, lengths = [], []
    for ids, counts in tokeniser.running(texts, split.progress):
        tokens.append(as_tokens(ids))
        lengths += counts
    return tokens, lengths


def _add_pieces(rows: Collector, stream: Tokens, ends: Any, split: Split) -> None:
    """Cut the stream into pieces of `max_length`, or into windows. ends [rows]: where each row ends
    in the stream."""
    overlap = split.max_length - split.stride if split.stride else 0
    starts = range(0, max(len(stream) - overlap, 1), split.max_length - overlap)
    # The row in which each piece begins.
    begins = np.searchsorted(ends, np.asarray(starts), side="right").tolist()
    for number, (start, row) in enumerate(zip(starts, begins, strict=True)):
        piece = stream[start : start + split.max_length]
        if len(piece) > 1:  # the last piece may be a single token, which has nothing before it
            targets = np.arange(len(piece)) >= (overlap if number else 0)
            rows.add(row, piece, len(piece), targets=targets)


FORMAT = Text()
