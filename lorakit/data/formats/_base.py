"""Format: how rows of one kind become examples; and helpers that formats share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lorakit.data.collect import Collector, Made
from lorakit.data.columns import text_columns
from lorakit.data.examples import Examples
from lorakit.data.keys import ChosenSpec, DataKeys
from lorakit.data.labels import Labels
from lorakit.data.store import Memory, Store
from lorakit.data.table import Table
from lorakit.errors import RecipeError

log = logging.getLogger("lorakit")

Record = Mapping[str, Any]
"""A run's record of its choice of format, columns and templates (`lorakit.data.choice`). Runs of
earlier versions have fewer of its keys."""


@dataclass(frozen=True)
class Split:
    """The rows of a split, and everything that determines how they are read. name: training or
    validation; stride: of windows, for validation; lines: rows are lines of one running text;
    progress(rows): called with the number of newly tokenised rows; store: where the examples go."""

    name: str
    data: Table
    spec: ChosenSpec
    labels: Labels | None
    tokenizer: Any
    max_length: int
    lines: bool
    stride: int | None
    progress: Callable[[int], None]
    store: Store = field(default_factory=Memory)

    def collector(self) -> Collector:
        return Collector(self.spec, self.max_length, self.data, self.store)


@dataclass(frozen=True)
class Question:
    """A prompt to answer, and its accepted answers. templated: the prompt is a chat template's
    text, which begins the sequence itself."""

    prompt: str
    references: list[str]
    templated: bool = False


class Format:
    """A format of data. Every hook that is not abstract has a default: no effect, or the behaviour
    of most formats."""

    name: ClassVar[str]
    """The name in recipes."""
    task: ClassVar[str]
    """The `model.task` that its rows are for."""
    keys: ClassVar[tuple[str, ...]] = ()
    """The keys of DataKeys that apply to this format and not to all others."""
    column_keys: ClassVar[str] = "data.text_columns"
    """The keys that name other columns than the usual ones, for messages."""
    losses: ClassVar[tuple[str, ...]] = ()
    """The allowed values of `data.loss_on`, the default first."""
    tried: ClassVar[int] = 0
    """Position in the order in which a task's formats are matched against columns. A format whose
    columns others may have too comes last."""
    told_by: ClassVar[tuple[str, ...]] = ()
    """Identifying features of the format, in words: columns, then keys of the recipe."""
    called_elsewhere: ClassVar[Mapping[str, str | None]] = {}
    """{its name in another tool, in lower case: how that tool's format differs}."""
    predicts_tokens: ClassVar[bool] = True
    """True if targets are tokens, False if rows have labels."""
    has_questions: ClassVar[bool] = False
    """True if rows hold prompts that can be answered: `questions`."""
    when_cut: ClassVar[str]
    """Treatment of rows with too many tokens, for a warning."""

    # -- the choice of columns ---------------------------------------------------------------------

    def detects(self, spec: DataKeys, columns: Sequence[str]) -> bool:
        """True if rows with these columns are of this format; always True for a task's only
        format."""
        return True

    def is_recorded(self, record: Record, columns: Sequence[str]) -> bool:
        """True if a run was trained on this format and on columns that all exist, so that no other
        columns have to be found."""
        return False

    def chosen(self, spec: DataKeys, columns: Sequence[str], record: Record) -> dict[str, Any]:
        """{key of ChosenSpec: the columns and templates to read rows by}: those that the recipe
        names, else those of `record` where they exist, else the usual names."""
        raise NotImplementedError

    def say_choice(self, spec: ChosenSpec, columns: Sequence[str]) -> None:
        """Log a choice that the recipe does not name and that users should know of."""

    def used_columns(self, spec: ChosenSpec, columns: Sequence[str]) -> list[str]:
        """The columns that rows are read from. Raises RecipeError where one is missing or named
        twice."""
        raise NotImplementedError

    def naming_keys(self, spec: ChosenSpec, columns: Sequence[str]) -> dict[str, str]:
        """{column that is read: the recipe key that can name it}."""
        raise NotImplementedError

    def wrong_values(self, spec: DataKeys) -> str | None:
        """Description of a mistake in the format's own keys of a recipe, whatever the rows, or
        None."""
        return None

    # -- rows --------------------------------------------------------------------------------------

    def input_keys(self, data: Table, spec: ChosenSpec) -> list[Any]:
        """The model input of each row as a key: rows with equal keys must not be in both training
        and validation."""
        raise NotImplementedError

    def strata(self, data: Table, spec: ChosenSpec) -> list[str] | None:
        """The class of each row, for a draw that keeps class proportions; None where there are no
        classes."""
        return None

    def check_labels(self, data: Table, spec: ChosenSpec) -> None:
        """Raise RecipeError for labels that rule out a draw by classes."""

    def count_labels(self, train: Table, spec: ChosenSpec) -> Labels | None:
        """The label space of the training rows; None where targets are tokens."""
        return None

    def questions(self, data: Table, spec: ChosenSpec, tokenizer: Any) -> list[Question]:
        """The distinct prompts of the rows, in their order, each with the answers of all its rows.
        tokenizer: its chat template writes conversations.

        Raises RecipeError for a row that lacks one.
        """
        raise NotImplementedError

    # -- examples ----------------------------------------------------------------------------------

    def check(self, spec: ChosenSpec, tokenizer: Any, max_length: int) -> None:
        """Raise RecipeError for settings that cannot work, before anything is tokenised."""
        if self.predicts_tokens and tokenizer.eos_token is None:
            what = "the tokenizer has no end-of-sequence token"
            raise RecipeError.at("model.name_or_path", what, "a model that writes text")

    def read(self, split: Split) -> Made:
        """The examples of a split, and counts of its rows. Implementations go through the rows
        block by block (`Table.blocks`), tokenise through lorakit.data.tokenise and collect with
        `Split.collector`."""
        raise NotImplementedError

    def is_joined(self, spec: ChosenSpec) -> bool:
        """True if rows are joined and cut into pieces. An example is then a piece, and its row the
        one in which it begins; nothing is cut away."""
        return False

    def learned_texts(self, data: Table, spec: ChosenSpec, lines: bool) -> list[str]:
        """The text of each row, where targets are tokens; for lines that are joined, the one joined
        text."""
        raise NotImplementedError

    def empty_row(self) -> tuple[str, str]:
        """(recipe key, columns in words) to name in the error for a row without a token."""
        raise NotImplementedError

    def check_examples(self, examples: Examples, data: Table, tokenizer: Any, config: Any) -> None:
        """Raise RecipeError for an example that the model of `config` cannot learn from.

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
    # otherwise the data is of another shape, which is an error of its own
    if len(found) == len(named):
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
    """Warn that a run's columns `named` do not exist and others are read."""
    before, now = (" + ".join(f"`{name}`" for name in names) for names in (named, found))
    log.warning(
        "the run was trained on %s, which this data does not have: %s stands in; %s names another",
        before,
        now,
        key,
    )
