"""Format: how rows of one kind become examples; and what formats share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lorakit.data.collect import Made
from lorakit.data.columns import text_columns
from lorakit.data.examples import Examples
from lorakit.data.keys import ChosenSpec, DataKeys
from lorakit.data.labels import Labels
from lorakit.data.table import Table
from lorakit.errors import RecipeError

log = logging.getLogger("lorakit")

Record = Mapping[str, Any]
"""Record that a run keeps of its choice of format, columns and templates (`lorakit.data.choice`).
Runs of earlier versions have fewer of its keys."""


@dataclass(frozen=True)
class Split:
    """The rows of a split, and all that their reading depends on. name: training or validation;
    stride: of windows, for validation; lines: rows are lines of one running text;
    progress(rows): called after so many more rows are tokenised."""

    name: str
    data: Table
    spec: ChosenSpec
    labels: Labels | None
    tokenizer: Any
    max_length: int
    lines: bool
    stride: int | None
    progress: Callable[[int], None]


@dataclass(frozen=True)
class Question:
    """A prompt to be answered, and the answers that are accepted."""

    prompt: str
    references: list[str]


class Format:
    """A format of data. Every hook that is not abstract does nothing, or what most formats do."""

    name: ClassVar[str]
    """The name in recipes."""
    task: ClassVar[str]
    """The `model.task` that its rows are for."""
    keys: ClassVar[tuple[str, ...]] = ()
    """The keys of DataKeys that mean nothing for formats without them."""
    column_keys: ClassVar[str] = "data.text_columns"
    """The keys that name other columns than the usual ones, for messages."""
    losses: ClassVar[tuple[str, ...]] = ()
    """The values that `data.loss_on` may have."""
    tried: ClassVar[int] = 0
    """Formats of a task are tried on columns in this order. Last is one of columns that others may
    have too."""
    told_by: ClassVar[tuple[str, ...]] = ()
    """What tells the format, in words: columns, then keys of the recipe."""
    called_elsewhere: ClassVar[Mapping[str, str | None]] = {}
    """{name that other tools have for it, in lower case: how theirs differs}."""
    predicts_tokens: ClassVar[bool] = True
    """True if targets are tokens, False if rows have labels."""
    has_questions: ClassVar[bool] = False
    """True if rows hold prompts that can be answered: `questions`."""
    when_cut: ClassVar[str]
    """The fate of rows of too many tokens, for a warning."""

    # -- the choice of columns ---------------------------------------------------------------------

    def detects(self, spec: DataKeys, columns: Sequence[str]) -> bool:
        """True if rows of these columns are of this format; all rows are, for the only one of a
        task."""
        return True

    def is_recorded(self, record: Record, columns: Sequence[str]) -> bool:
        """True if a run was trained on this format and columns that are all there, so that other
        columns need not be looked for."""
        return False

    def chosen(self, spec: DataKeys, columns: Sequence[str], record: Record) -> dict[str, Any]:
        """{key of ChosenSpec: the columns and templates that rows are read by}: what the recipe
        names, else what `record` has where it is there, else the usual names."""
        raise NotImplementedError

    def say_choice(self, spec: ChosenSpec, columns: Sequence[str]) -> None:
        """Log a choice that the recipe does not name and users would want to know of."""

    def used_columns(self, spec: ChosenSpec, columns: Sequence[str]) -> list[str]:
        """The columns that rows are read from. Raises RecipeError where one is missing or named
        twice."""
        raise NotImplementedError

    def naming_keys(self, spec: ChosenSpec, columns: Sequence[str]) -> dict[str, str]:
        """{column that is read: the key of the recipe that can name it}."""
        raise NotImplementedError

    def wrong_values(self, spec: DataKeys) -> str | None:
        """What is wrong with the format's own keys in a recipe, whatever the rows."""
        return None

    # -- rows --------------------------------------------------------------------------------------

    def input_keys(self, data: Table, spec: ChosenSpec) -> list[Any]:
        """Input that a model is given of each row, as a key: rows of equal keys must not be in both
        training and validation."""
        raise NotImplementedError

    def strata(self, data: Table, spec: ChosenSpec) -> list[str] | None:
        """The class of each row, by which rows are drawn in shares; None where there are none."""
        return None

    def check_labels(self, data: Table, spec: ChosenSpec) -> None:
        """Raises RecipeError for labels that a draw by classes could not do with."""

    def count_labels(self, train: Table, spec: ChosenSpec) -> Labels | None:
        """The label space of the training rows; None where targets are tokens."""
        return None

    def questions(self, data: Table, spec: ChosenSpec) -> list[Question]:
        """The distinct prompts of the rows, in their order, each with the answers of all its rows.

        Raises RecipeError for what a row lacks.
        """
        raise NotImplementedError

    # -- examples ----------------------------------------------------------------------------------

    def check(self, spec: ChosenSpec, tokenizer: Any, max_length: int) -> None:
        """Raises RecipeError for what can not work, before anything is tokenised."""
        if self.predicts_tokens and tokenizer.eos_token is None:
            what = "the tokenizer has no end-of-sequence token"
            raise RecipeError.at("model.name_or_path", what, "a model that writes text")

    def read(self, split: Split) -> Made:
        """The examples of a split, and counts of its rows. Tokenise through lorakit.data.tokenise
        and collect with lorakit.data.collect."""
        raise NotImplementedError

    def learned_texts(self, data: Table, spec: ChosenSpec, lines: bool) -> list[str]:
        """The text that each row is, where targets are tokens; the one text of lines that are
        joined."""
        raise NotImplementedError

    def empty_row(self) -> tuple[str, str]:
        """(the key of the recipe, the columns in words) that a row without a token is empty in."""
        raise NotImplementedError

    def check_examples(self, examples: Examples, data: Table, tokenizer: Any, config: Any) -> None:
        """Raises RecipeError for an example that the model of `config` can not learn from.

        data: the rows that the examples' row_ids count.
        """


def chosen_texts(spec: DataKeys, columns: Sequence[str], record: Record) -> list[str]:
    """The text columns to read, for formats whose rows are texts."""
    named = record.get("columns")
    if spec.text_columns is not None or not named:
        return text_columns(spec, columns)
    if are_there(named, columns):
        return list(named)
    found = text_columns(spec, columns)
    if len(found) == len(named):  # else the data is of another shape, which is an error of its own
        say_stand_in("data.text_columns", named, found)
    return found


def named_texts(spec: ChosenSpec) -> dict[str, str]:
    """`Format.naming_keys` of the text columns."""
    texts = spec.text_columns or []
    return dict.fromkeys([texts] if isinstance(texts, str) else texts, "data.text_columns")


def text_keys(data: Table, spec: ChosenSpec) -> list[Any]:
    """`Format.input_keys` of rows that are texts."""
    columns = [data.cells(name).texts for name in text_columns(spec, data.column_names)]
    return list(zip(*columns, strict=True))


def are_there(names: Sequence[str], columns: Sequence[str]) -> bool:
    return all(name in columns for name in names)


def say_stand_in(key: str, named: Sequence[str], found: Sequence[str]) -> None:
    """Warn that a run's columns `named` are not there and others are read."""
    before, now = (" + ".join(f"`{name}`" for name in names) for names in (named, found))
    log.warning(
        "the run was trained on %s, which this data does not have: %s stands in; %s names another",
        before,
        now,
        key,
    )
