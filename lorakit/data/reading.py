"""Reading: rows become examples, in the chosen format."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn

import numpy as np

from lorakit.data import shards
from lorakit.data.collect import Counts, Made, warnings_of
from lorakit.data.draw import limited
from lorakit.data.examples import Examples
from lorakit.data.formats import Format, Split, format_of
from lorakit.data.keys import ChosenSpec
from lorakit.data.labels import Labels
from lorakit.data.load import Rows
from lorakit.data.lost import LOOKED_AT as EXAMINED
from lorakit.data.lost import listed_lost, lost_characters
from lorakit.data.store import Memory, Store
from lorakit.data.table import Table
from lorakit.data.token_cache import kept
from lorakit.data.vocabulary import embedding_rows, without_embedding
from lorakit.errors import RecipeError

log = logging.getLogger("lorakit")

NO_LIMIT = 1 << 30  # tokens; more than any row has
LOOKED_AT = 10_000  # rows that are searched for characters that the tokenizer loses
# Keys that select rows, and keys whose effect Reader passes to the cache in another form.
ABOUT_ROWS = {"name_or_path", "subset", "offline", "revision", "train_split", "validation_split"}
ABOUT_ROWS |= {"max_train_samples", "max_eval_samples", "references", "max_seq_length", "stride"}
ABOUT_ROWS |= {"cache", "streaming"}


@dataclass(frozen=True)
class Reader:
    """How rows of a recipe become examples: everything but the rows.

    `progress(rows done, rows in all)` is called along the way.
    """

    labels: Labels | None
    spec: ChosenSpec
    tokenizer: Any
    max_length: int
    progress: Callable[[int, int], None]
    config: Any = None
    """The model's configuration, to check that the model can read the examples."""

    @property
    def format(self) -> Format:
        return format_of(self.spec)

    def train(self, rows: Rows) -> Examples:
        return self._read("training", self.training_rows(rows), rows.lines, None)

    def validation(self, rows: Rows) -> Examples:
        data = self.validation_rows(rows)
        return self._read("validation", data, rows.lines, self.spec.stride)

    def unlabelled(self, data: Table) -> Examples:
        """The examples of rows whose labels are not known, by a Reader without labels."""
        return self._read("given", data, False, None)

    def training_rows(self, rows: Rows) -> Table:
        """The training rows that are read, where the recipe limits their number."""
        return limited(rows.train, self.spec.max_train_samples, self.spec, rows.lines)

    def validation_rows(self, rows: Rows) -> Table:
        """The validation rows that are read, where the recipe limits their number."""
        return limited(rows.validation, self.spec.max_eval_samples, self.spec, rows.lines)

    def uncut(self, name: str, data: Table) -> Examples:
        """The examples that these rows of a split would be if no length were too long; `row_ids`
        are indices into `data`. For formats whose rows stay apart (`Format.is_joined`). Logs
        nothing."""
        spec = self.spec.model_copy(update={"truncation": "cut"})
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self.progress(done, len(data))

        given = (self.labels, self.tokenizer, NO_LIMIT)
        examples, _ = self.format.read(Split(name, data, spec, *given, False, None, advance))
        return examples

    def _read(self, name: str, data: Table, lines: bool, stride: int | None) -> Examples:
        """The examples of a split. Raises RecipeError when none is left, or the model cannot read
        one."""
        spec, form = self.spec, self.format
        form.check(spec, self.tokenizer, self.max_length)
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self.progress(done, len(data))

        split = Split(
            name, data, spec, self.labels, self.tokenizer, self.max_length, lines, stride, advance
        )
        examples, counts = self._made(split)
        if done < len(data):  # all rows at once, if they were in the cache
            advance(len(data) - done)
        if len(examples) == 0:
            self._refuse_nothing(split, counts)
        # A classifier may not need capitals or line breaks.
        if form.predicts_tokens and name == "training":
            self._say_lost(split)
        for message in warnings_of(counts, name, data, self.max_length, self._fate_of_long()):
            log.warning(message)
        self._check(examples, data)
        # Row numbers of the source, counted from 1 as an editor does.
        return replace(examples, row_ids=data.row_numbers[examples.row_ids])

    def _made(self, split: Split) -> Made:
        """The examples of the split, from the cache if they are in it."""

        def make(store: Store) -> Made:
            return self.format.read(replace(split, store=store))

        if not self.spec.cache:
            return shards.unnamed(make) if split.data.is_spilled else make(Memory())
        settings = {
            "labels": None if self.labels is None else asdict(self.labels),
            "max_length": split.max_length,
            "stride": split.stride,
            "lines": split.lines,
            "spec": self.spec.model_dump(exclude=ABOUT_ROWS),
        }
        return kept(split.data, self.tokenizer, settings, make)

    def _fate_of_long(self) -> str:
        return "are left out" if self.spec.truncation == "drop" else self.format.when_cut

    def _refuse_nothing(self, split: Split, counts: Counts) -> NoReturn:
        """Raise the RecipeError for a split without any example left."""
        # Nothing was cut: packed text of one token, or empty rows.
        if self.max_length > 1 and not counts.keys() & {"no_target", "long"}:
            self._refuse_empty(split, counts.get("empty_row", 0))
        limit = f"max_seq_length {self.max_length}"
        what = f"no {split.name} row has a target left after cutting to {limit}"
        if self.spec.truncation == "drop":
            what = f"all {split.name} rows are longer than {limit} or have no target"
        raise RecipeError.at("data.max_seq_length", what, "more tokens, or shorter prompts")

    def _refuse_empty(self, split: Split, row: int) -> NoReturn:
        """Raise the RecipeError for a split whose rows have no target, though nothing was cut;
        `row` is the first of them."""
        key, columns = self.format.empty_row()
        one = split.data.select(range(row, row + 1))
        (text,) = self.format.learned_texts(one, self.spec, False)
        alone = "a single token, which has nothing before it to be predicted from"
        why = alone if text.strip() else f"an empty {columns}"
        what = f"no {split.name} row has a target: {split.data.place(row)} has {why}"
        raise RecipeError.at(key, what, "text of at least two tokens in a row")

    def _say_lost(self, split: Split) -> None:
        """Warn of characters that the tokenizer loses in all the training text."""
        first = split.data.select(range(min(len(split.data), LOOKED_AT)))
        if lost := lost_characters(self.tokenizer, self._learned(first, split.lines)):
            what = "the text that is trained on is not that of the data"
            log.warning("%s: the tokenizer loses its %s", what, listed_lost(lost))

    def _learned(self, data: Table, lines: bool) -> Iterator[str]:
        """The texts of `Format.learned_texts`; of lines that are joined, one text of as many as
        are examined."""
        texts = (
            text
            for _, block in data.blocks()
            for text in self.format.learned_texts(block, self.spec, lines)
        )
        if not (lines and self.format.is_joined(self.spec)):
            yield from texts
            return
        letters, found = 0, []
        for text in texts:
            found.append(text)
            letters += len(text)
            if letters >= EXAMINED:
                break
        yield "".join(found)

    def _check(self, examples: Examples, data: Table) -> None:
        """Raise RecipeError for a row with a token or a token type that the model lacks, or without
        a token that it requires. data: the rows that the examples' row_ids count."""
        if self.config is None:
            return
        for _, block in examples.blocks():
            self._check_tokens(block, data)
            self.format.check_examples(block, data, self.tokenizer, self.config)

    def _check_tokens(self, examples: Examples, data: Table) -> None:
        rows = embedding_rows(self.config)
        if rows is not None and len(examples.tokens) and examples.tokens.max() >= rows:
            place = int(np.argmax(examples.tokens >= rows))
            token = without_embedding(self.tokenizer, examples.tokens[place], rows)
            what = f"{data.place(_row_at(examples, place))} has {token}"
            resized = "a model whose embedding was resized for the tokens that were added"
            expected = f"the model's own tokenizer, or {resized}"
            raise RecipeError.at("model.name_or_path", what, expected)
        types = getattr(self.config, "type_vocab_size", None)
        seen = examples.token_types
        if types and seen is not None and seen.max(initial=0) >= types:
            row = _row_at(examples, int(np.argmax(seen >= types)))
            where = f"{data.place(row)} has the token type {types}"
            what = f"{where}, and the model has types 0 to {types - 1}"
            raise RecipeError.at("model.name_or_path", what, "a tokenizer of this model")


def _row_at(examples: Examples, place: int) -> int:
    """The row that contains the token at `place`."""
    return int(examples.row_ids[np.searchsorted(examples.offsets, place, side="right") - 1])
