"""Format `text`: running text, every token of which is a target."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from lorakit.data.collect import Collector, Made, Tokens, as_tokens, joined
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
from lorakit.data.store import let_go
from lorakit.data.table import BLOCK_ROWS, Table
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
        rows, tokeniser = split.collector(), Tokeniser(split.tokenizer)
        if split.spec.packing == DOCUMENTS:
            return self._packed(split, tokeniser, rows)
        if self.is_joined(split.spec):
            running = split.lines
            parts = _running(tokeniser, split, rows) if running else _joined(tokeniser, split, rows)
            _add_pieces(rows, parts, split)
            return rows.made()
        for start, texts, documents in _documents(tokeniser, split):
            for row, ids in enumerate(documents, start):
                rows.add(row, ids, len(ids), targets=np.ones(len(ids), bool))
            rows.end_block(tokeniser, [texts], start)
        return rows.made()

    def _packed(self, split: Split, tokeniser: Tokeniser, rows: Collector) -> Made:
        """Documents in packs; long ones in pieces."""
        limit, pieces = split.max_length, split.store.growing("pieces", np.int32)
        numbers, lengths = array("q"), array("q")  # of each piece: its row, and its tokens
        for start, texts, documents in _documents(tokeniser, split):
            found = []
            for row, ids in enumerate(documents, start):
                for begin in range(0, max(len(ids), 1), limit):
                    piece = ids[begin : begin + limit]
                    if len(piece) > 1 and len(ids) - begin > 1:
                        found.append(piece)
                        numbers.append(row)
                    # a single token of a cut document has nothing before it to be predicted from
                    elif begin == 0 or len(ids) - begin > 1:
                        rows.count("empty", row)
            lengths.extend(map(len, found))
            pieces.append(joined(found))
            rows.find_special(split.tokenizer, [texts], first=start)
            rows.find_unknown(tokeniser, documents, [texts])
        tokens, counts = pieces.done(), np.array(lengths, np.int64)
        ends = np.cumsum(counts)
        order, packs = pack(counts, limit)
        for place, number in enumerate(order.tolist(), 1):
            ids = tokens[ends[number] - counts[number] : ends[number]]
            rows.add(numbers[number], ids, len(ids), targets=np.ones(len(ids), bool))
            if place % BLOCK_ROWS == 0:
                rows.flush()
                let_go(tokens)
        return rows.made(packs=packs)

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


def _documents(tokeniser: Tokeniser, split: Split) -> Iterator[tuple[int, list[str], list[Tokens]]]:
    """(first row, texts, tokens of each row as a document of its own), block by block."""
    for start, block in split.data.blocks():
        texts = _texts(block, split.spec)
        yield start, texts, list(map(as_tokens, tokeniser.documents(texts)))
        split.progress(len(block))


Part = tuple[Tokens, list[int]]
"""A part of the stream of all rows, and how many of its tokens begin in each of the part's rows."""


def _joined(tokeniser: Tokeniser, split: Split, rows: Collector) -> Iterator[Part]:
    for start, texts, documents in _documents(tokeniser, split):
        rows.find_special(split.tokenizer, [texts], first=start)
        rows.find_unknown(tokeniser, documents, [texts])
        yield joined(documents), list(map(len, documents))


def _running(tokeniser: Tokeniser, split: Split, rows: Collector) -> Iterator[Part]:
    def lines() -> Iterator[str]:
        for start, block in split.data.blocks():
            texts = _texts(block, split.spec)
            rows.find_special(split.tokenizer, [texts], first=start)
            rows.find_unknown(tokeniser, [], [texts])
            yield from texts

    for ids, counts in tokeniser.running(lines(), split.progress):
        tokens = as_tokens(ids)
        rows.find_unknown(tokeniser, [tokens], [])
        yield tokens, counts


def _add_pieces(rows: Collector, parts: Iterable[Part], split: Split) -> None:
    """Cut the stream into pieces of `max_length`, or into windows."""
    length, total, row = split.max_length, 0, 0
    overlap = length - split.stride if split.stride else 0
    step = length - overlap
    # The stream from the next piece on: its first token's place, its tokens, the ends of its rows.
    place, stream, ends = 0, np.empty(0, np.int32), np.empty(0, np.int64)

    def cut(count: int) -> None:
        nonlocal place, stream, ends, row
        starts = place + step * np.arange(count)
        # The row in which each piece begins.
        begins = (row + np.searchsorted(ends, starts, side="right")).tolist()
        for number, begin in enumerate(begins):
            piece = stream[number * step : number * step + length]
            if len(piece) > 1:  # the last piece may be a single token, which has nothing before it
                targets = np.arange(len(piece)) >= (overlap if place or number else 0)
                rows.add(begin, piece, len(piece), targets=targets)
        rows.flush()
        place, stream = place + count * step, stream[count * step :]
        done = int(np.searchsorted(ends, place, side="right"))
        row, ends = row + done, ends[done:]

    for tokens, counts in parts:
        stream = np.concatenate([stream, tokens])
        ends = np.concatenate([ends, total + np.cumsum(counts, dtype=np.int64)])
        total += len(tokens)
        if len(stream) >= length:
            cut((len(stream) - length) // step + 1)
    cut(len(range(place, max(total - overlap, 1), step)))


FORMAT = Text()
