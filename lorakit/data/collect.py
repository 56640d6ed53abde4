"""Collector: gathers the tokenised rows of a split, and the counts for warnings about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.data.examples import Examples
from lorakit.data.keys import DataKeys
from lorakit.data.store import Growing, Memory, Store
from lorakit.data.table import Table
from lorakit.data.tokenise import Tokeniser, special_texts
from lorakit.errors import RecipeError

Tokens = NDArray[np.int32]
Marks = NDArray[np.bool_]
Counts = dict[str, int]
"""{property: number of the split's rows that have it}, and as `…_row` the first of them."""
Made = tuple[Examples, Counts]


@dataclass
class Collector:
    """Collects the rows of a split, each cut to `max_length` tokens, or left out. Rows are pending
    until `flush` or `end_block` puts them into the store."""

    spec: DataKeys
    max_length: int
    data: Table
    store: Store = field(default_factory=Memory)
    counts: Counts = field(default_factory=dict)
    pending: list[Tokens] = field(default_factory=list)
    """The tokens of each pending row."""

    def __post_init__(self) -> None:
        self._kept: list[int] = []
        self._types: list[Tokens] = []
        self._targets: list[Marks] = []
        self._arrays: dict[str, Growing] = {}
        self._lengths: list[NDArray[np.int64]] = []
        self._unknown = self._all = 0

    def add(
        self,
        row: int,
        ids: Sequence[int] | Tokens,
        length: int,
        types: Sequence[int] | None = None,
        targets: Marks | None = None,
    ) -> bool:
        """Add a row, whole or already cut; returns True if it is taken.

        length: its tokens before any cut. targets: marks of the tokens to predict. A row needs a
        target that is not cut off and is not its first token, which has nothing before it.

        Raises RecipeError for a row that is too long, if the recipe says so.
        """
        is_long = length > self.max_length
        if is_long and self.spec.truncation == "error":
            where = f"{self.data.place(row)} has {length} tokens"
            what = f"{where}, and max_seq_length is {self.max_length}"
            expected = "more tokens, shorter rows, or truncation: cut or drop"
            raise RecipeError.at("data.truncation", what, expected)
        if is_long and self.spec.truncation == "drop":
            self.count("long", row)
            return False
        cut = slice(self.max_length)
        if not (len(ids[cut]) if targets is None else targets[cut][1:].any()):
            self.count("no_target" if is_long else "empty", row)
            return False
        if is_long:
            self.count("long", row)
        self.pending.append(as_tokens(ids[cut]))
        self._kept.append(row)
        if types is not None:
            self._types.append(as_tokens(types[cut]))
        if targets is not None:
            self._targets.append(targets[cut])
        return True

    def count(self, what: str, row: int) -> None:
        """Count one more row with the property `what`."""
        self.counts[what] = self.counts.get(what, 0) + 1
        self.counts.setdefault(f"{what}_row", row)

    def end_block(
        self,
        tokeniser: Tokeniser,
        columns: Sequence[Sequence[str]],
        first: int,
        template: str = "",
    ) -> None:
        """Look through the texts and tokens of a block, and put its rows into the store. columns:
        its texts; first: its first row."""
        self.find_special(tokeniser.tokenizer, columns, template, first)
        self.find_unknown(tokeniser, self.pending, columns)
        self.flush()

    def find_special(
        self,
        tokenizer: Any,
        columns: Sequence[Sequence[str]],
        template: str = "",
        first: int = 0,
    ) -> None:
        """Count rows, from row `first` on, with text that the tokenizer reads as a special token,
        except for special tokens that the template itself contains."""
        pattern = special_texts(tokenizer)
        if pattern is None:
            return
        written = "".join(part for part, *_ in Formatter().parse(template))
        expected = len(pattern.findall(written))
        for row, texts in enumerate(zip(*columns, strict=True), first):
            if sum(len(pattern.findall(text)) for text in texts) > expected:
                self.count("special", row)

    def find_unknown(
        self, tokeniser: Tokeniser, tokens: Sequence[Tokens], columns: Sequence[Sequence[str]]
    ) -> None:
        """Count all tokens, and the unknown tokens that are not spelled out in the text."""
        if tokeniser.unknown is None:
            return
        token, name = tokeniser.unknown
        self._unknown += sum(int((ids == token).sum()) for ids in tokens)
        self._unknown -= sum(text.count(name) for texts in columns for text in texts)
        self._all += sum(map(len, tokens))

    def flush(self) -> None:
        """Put the pending rows into the store."""
        if not self.pending:
            return
        self._lengths.append(np.array(list(map(len, self.pending)), np.int64))
        self._grow("tokens", np.int32, joined(self.pending))
        self._grow("row_ids", np.int64, np.array(self._kept, np.int64))
        if self._types:
            self._grow("token_types", np.int32, joined(self._types))
        if self._targets:
            self._grow("targets", np.bool_, np.concatenate(self._targets))
        for rows in (self.pending, self._kept, self._types, self._targets):
            rows.clear()

    def _grow(self, name: str, dtype: Any, values: NDArray[Any]) -> None:
        if name not in self._arrays:
            self._arrays[name] = self.store.growing(name, dtype)
        self._arrays[name].append(values)

    def made(self, labels: NDArray[Any] | None = None, packs: NDArray[Any] | None = None) -> Made:
        """The examples, and the counts. labels: of all rows, of which those of the rows that were
        taken are used."""
        self.flush()
        for name in ("tokens", "row_ids", *([] if labels is not None else ["targets"])):
            dtype = {"tokens": np.int32, "row_ids": np.int64, "targets": np.bool_}[name]
            self._grow(name, dtype, np.empty(0, dtype))
        found: dict[str, Any] = {name: array.done() for name, array in self._arrays.items()}
        ends = np.cumsum(np.concatenate([[0], *self._lengths]), dtype=np.int64)
        found["offsets"] = self._whole("offsets", ends)
        if labels is not None:
            found["labels"] = self._whole("labels", labels[found["row_ids"]])
        if packs is not None:
            found["packs"] = self._whole("packs", packs)
        if self._unknown > 0:
            self.counts |= {"unknown": self._unknown, "tokens": self._all}
        return Examples(**found), self.counts

    def _whole(self, name: str, values: NDArray[Any]) -> NDArray[Any]:
        array = self.store.growing(name, values.dtype)
        array.append(values)
        return array.done()


def warnings_of(
    counts: Counts, split: str, data: Table, max_length: int, when_cut: str
) -> Iterator[str]:
    """Warnings for the user about the rows of a split. when_cut: the treatment of rows that are too
    long."""
    rows = len(data)
    all_rows = f"of {rows} {split} rows"

    def first(what: str) -> str:
        return f"the first is {data.place(counts[f'{what}_row'])}"

    if many := counts.get("no_target"):
        where = f"{many} {all_rows} have no target within {max_length} tokens"
        yield f"{where} ({first('no_target')}) and are left out"
    if many := counts.get("empty"):
        yield (
            f"{many} {all_rows} ({first('empty')}) are empty: they have no token to learn and are"
            " left out"
        )
    if many := counts.get("textless"):
        where = f"{many} {all_rows} ({first('textless')})"
        yield f"{where} have an empty text: nothing tells their class"
    if many := counts.get("unprompted"):
        yield (
            f"{many} {all_rows} ({first('unprompted')}) have an empty prompt, and the tokenizer"
            " puts no token at the beginning: the completion's first token has nothing before it"
            " to be predicted from and is no target"
        )
    if many := counts.get("long"):
        where = f"{many} {all_rows} have more than {max_length} tokens ({first('long')})"
        yield f"{where} and {when_cut}"
    if many := counts.get("inexact"):
        yield (
            f"in {many} {all_rows} ({first('inexact')}) the tokenizer can not write prompt and "
            "completion next to each other as they are: what stands between them is lost, or a "
            "blank is added"
        )
    if many := counts.get("crossed"):
        yield (
            f"in {many} {all_rows} ({first('crossed')}) a token crosses the border between prompt"
            " and answer: a prompt alone ends in other tokens than those that are trained on"
        )
    if many := counts.get("open"):
        yield (
            f"in {many} {all_rows} ({first('open')}) the template's marks leave the token that ends"
            " a turn out: nobody learns from them where to stop"
        )
    if many := counts.get("unknown"):
        yield (
            f"{many} of {counts['tokens']} {split} tokens ({many / counts['tokens']:.2%}) are the "
            "tokenizer's unknown token: it has no tokens for what stands there, and the model "
            "neither sees nor learns it"
        )
    if many := counts.get("special"):
        yield (
            f"{many} {all_rows} ({first('special')}) hold text that the tokenizer reads as a"
            " special token"
        )


def as_tokens(ids: Sequence[int] | Tokens) -> Tokens:
    """A row in compact form: 4 bytes per token, where a list of Python's integers takes up to
    36."""
    return np.asarray(ids, np.int32)


def joined(rows: Sequence[Tokens]) -> Tokens:
    return np.concatenate([np.empty(0, np.int32), *rows])
