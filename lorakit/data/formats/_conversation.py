"""ConversationFormat: rows become messages, a chat template makes text of them, and the assistant's
turns are targets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from lorakit.data.chat_template import (
    KEY,
    ChatTemplate,
    Conversation,
    Untold,
    named_templates,
)
from lorakit.data.collect import Made
from lorakit.data.columns import listed
from lorakit.data.formats._base import Format, Question, Record, Split, are_there, say_stand_in
from lorakit.data.keys import ChosenSpec, DataKeys
from lorakit.data.messages import wrong_keys
from lorakit.data.spans import Spanned, spanned
from lorakit.data.table import Table
from lorakit.data.tokenise import Tokeniser, special_texts
from lorakit.errors import RecipeError

TARGETS = ("assistant", "last_assistant", "all")


class ConversationFormat(Format):
    """One example per row: the conversation as the chat template writes it, and nothing else. A
    template that ends no turn by a special token is followed by the end-of-sequence token, since a
    model would not learn where to stop."""

    task = "causal-lm"
    column_keys = "data.column_map"
    losses = TARGETS
    has_questions = True
    when_cut = "are cut: they lose their end, and nobody learns from them where to stop"

    parts: ClassVar[dict[str, tuple[str, ...]]]
    """{what a row has: the usual names of its column}; the first must be there."""

    def conversations(self, data: Table, spec: ChosenSpec) -> Iterator[Conversation]:
        """The conversation of each row. Raises RecipeError for a row that is none."""
        raise NotImplementedError

    # -- the choice of columns ---------------------------------------------------------------------

    def detects(self, spec: DataKeys, columns: Sequence[str]) -> bool:
        if spec.prompt is not None or spec.completion is not None or spec.text_columns is not None:
            return False
        found = self._columns(spec, columns)
        return self._must_have() <= found.keys() and are_there(list(found.values()), columns)

    def _must_have(self) -> set[str]:
        return {next(iter(self.parts))}

    def _columns(self, spec: DataKeys, columns: Sequence[str]) -> dict[str, str]:
        """{part: its column}, as named by the recipe or as usual; a column that the recipe names
        may not exist."""
        named = spec.column_map or {}
        usual = {
            part: next((name for name in names if name in columns), None)
            for part, names in self.parts.items()
        }
        return {part: name for part, name in {**usual, **named}.items() if name is not None}

    def chosen(self, spec: DataKeys, columns: Sequence[str], record: Record) -> dict[str, Any]:
        if unknown := set(spec.column_map or {}) - set(self.parts):
            what = f"{self.name} reads no {listed(sorted(unknown))}"
            raise RecipeError.at("data.column_map", what, f"one of {listed(self.parts)}")
        found = self._columns(spec, columns)
        before = record.get("column_map")
        if before and spec.column_map is None:
            if are_there(list(before.values()), columns):
                found = dict(before)
            elif self._must_have() <= found.keys():
                say_stand_in("data.column_map", list(before.values()), list(found.values()))
        if missing := self._must_have() - found.keys():
            usual = [" or ".join(self.parts[part]) for part in self.parts if part in missing]
            what = f"no column {listed(usual)} among {listed(columns)}"
            first = min(missing)
            raise RecipeError.at("data.column_map", what, f"column_map: {{{first}: its name here}}")
        return {"column_map": found}

    def used_columns(self, spec: ChosenSpec, columns: Sequence[str]) -> list[str]:
        used = list((spec.column_map or {}).values())
        if missing := [name for name in used if name not in columns]:
            what = f"there is no column {listed(f'`{name}`' for name in missing)}"
            raise RecipeError.at("data.column_map", what, f"one of {listed(columns)}")
        return used

    def naming_keys(self, spec: ChosenSpec, columns: Sequence[str]) -> dict[str, str]:
        return dict.fromkeys((spec.column_map or {}).values(), "data.column_map")

    def wrong_values(self, spec: DataKeys) -> str | None:
        return wrong_keys(spec.message_keys, spec.roles)

    # -- rows --------------------------------------------------------------------------------------

    def input_keys(self, data: Table, spec: ChosenSpec) -> list[Any]:
        """Everything before the last answer."""
        return [
            json.dumps(_asked(one).messages, ensure_ascii=False)
            for one in self.conversations(data, spec)
        ]

    def questions(self, data: Table, spec: ChosenSpec, tokenizer: Any) -> list[Question]:
        """The prompts are conversations up to their last answer, as the chat template writes
        them."""
        template = ChatTemplate(tokenizer)
        found: dict[str, dict[str, None]] = {}
        for row, one in enumerate(self.conversations(data, spec)):
            if not one.answers:
                what = f"{data.place(row)} has no message of the assistant"
                raise RecipeError.at("data.name_or_path", what, "an answer in every row")
            try:
                prompt = template.render(_asked(one), prompt=True)
            except Untold as error:
                raise _refused(data.place(row), error) from error
            answer = one.messages[one.answers[-1]]["content"]
            found.setdefault(prompt, {})[answer] = None
        return [Question(prompt, list(answers), True) for prompt, answers in found.items()]

    # -- examples ----------------------------------------------------------------------------------

    def check(self, spec: ChosenSpec, tokenizer: Any, max_length: int) -> None:
        super().check(spec, tokenizer, max_length)
        if not tokenizer.chat_template:
            what = "the tokenizer has no chat template"
            raise RecipeError.at(KEY, what, f"{' or '.join(named_templates())}, or a file in Jinja")
        template = ChatTemplate(tokenizer)
        if not template.marks_turns:
            try:
                _ = template.frame
            except Untold as error:
                raise _untold(error) from error

    def read(self, split: Split) -> Made:
        spec, rows = split.spec, split.collector()
        template, tokeniser = ChatTemplate(split.tokenizer), Tokeniser(split.tokenizer)
        make = _by_marks if template.marks_turns else _by_turns
        for start, block in split.data.blocks():
            part = list(self.conversations(block, spec))
            made = make(template, tokeniser, part, spec.loss_on, block.place)
            for row, (one, ended) in enumerate(made, start):
                if not one.exact:
                    rows.count("crossed", row)
                if not ended:
                    rows.count("open", row)
                marks = one.marks if spec.loss_on != "all" else np.ones(len(one.ids), bool)
                rows.add(row, one.ids, len(one.ids), targets=marks)
            rows.end_block(tokeniser, [list(map(_all_text, part))], start)
            split.progress(len(part))
        return rows.made()

    def learned_texts(self, data: Table, spec: ChosenSpec, lines: bool) -> list[str]:
        return [_all_text(one) for one in self.conversations(data, spec)]

    def empty_row(self) -> tuple[str, str]:
        return "data.column_map", "list of the assistant's messages"


T = TypeVar("T")
Row = tuple[Spanned, bool]
"""A row, and whether its last target ends a turn."""
Place = Callable[[int], str]
"""The place in its file of a row of the part."""


def _taken(
    read: Callable[[Conversation], T], part: Sequence[Conversation], place: Place
) -> Iterator[T]:
    """`read` of each conversation. Raises RecipeError for one that the template refuses."""
    for row, one in enumerate(part):
        try:
            yield read(one)
        except Untold as error:
            raise _refused(place(row), error) from error


def _by_turns(
    template: ChatTemplate,
    tokeniser: Tokeniser,
    part: Sequence[Conversation],
    loss_on: str | None,
    place: Place,
) -> Iterator[Row]:
    """Rows whose turns are found by rendering."""
    rendered = list(_taken(template.turns, part, place))
    chosen, ends_learned = [], []
    for one, found in zip(part, rendered, strict=True):
        turns = list(zip(one.answers, found.turns, strict=True))
        turns = turns[-1:] if loss_on == "last_assistant" else turns
        learned = {number: span for number, span in turns if one.messages[number].get("weight", 1)}
        chosen.append(list(learned.values()))
        ends_learned.append(len(one.messages) - 1 in learned)
    end = tokeniser.tokenizer.eos_token_id
    texts = [found.text for found in rendered]
    marked = spanned(tokeniser.tokenizer, texts, chosen)
    for each, found, end_learned in zip(marked, rendered, ends_learned, strict=True):
        if found.closed:
            yield each, True
        else:
            marks = np.append(each.marks, end_learned)
            yield Spanned([*each.ids, end], marks, each.exact), True


def _by_marks(
    template: ChatTemplate,
    tokeniser: Tokeniser,
    part: Sequence[Conversation],
    loss_on: str | None,
    place: Place,
) -> Iterator[Row]:
    """Rows of a template that marks the assistant's tokens itself."""
    special = special_texts(tokeniser.tokenizer)
    for ids, found in _taken(template.marked, part, place):
        marks: NDArray[np.bool_] = np.asarray(found, bool)
        if loss_on == "last_assistant" and marks.any():
            gaps = np.flatnonzero(~marks[: np.flatnonzero(marks)[-1]])
            marks[: gaps[-1] + 1 if len(gaps) else 0] = False
        ended = True
        if marks.any():
            last = tokeniser.tokenizer.decode([ids[np.flatnonzero(marks)[-1]]])
            ended = special is not None and special.search(last) is not None
        yield Spanned(ids, marks, True), ended


def _asked(one: Conversation) -> Conversation:
    """The conversation up to its last answer."""
    return one.until(one.answers[-1]) if one.answers else one


def _all_text(one: Conversation) -> str:
    return "\n".join(message["content"] for message in one.messages)


def _refused(place: str, error: Untold) -> RecipeError:
    what = f"the chat template does not take {place}: {error}"
    return RecipeError.at(KEY, what, "rows as the template wants them, or another chat_template")


def _untold(error: Untold) -> RecipeError:
    what = f"the chat template does not tell what the assistant writes: {error}"
    expected = (
        "a template that writes every answer once, as it is, or one with {% generation %} marks"
    )
    return RecipeError.at(KEY, what, expected)
