"""Format `alpaca`: instruction, input and output (Stanford Alpaca,
github.com/tatsu-lab/stanford_alpaca), with LLaMA-Factory's system and history.

Without `data.chat_template` a row becomes Stanford's prompt (`alpaca`); any other template gets the
instruction, and the input below it, as one message.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from lorakit.data.chat_template import Conversation, Message
from lorakit.data.columns import field_texts, optional_texts
from lorakit.data.formats._base import Record
from lorakit.data.formats._conversation import ConversationFormat
from lorakit.data.keys import ChosenSpec, DataKeys
from lorakit.data.messages import read_lists
from lorakit.data.table import Table
from lorakit.errors import RecipeError

STANFORD = "alpaca"


class Alpaca(ConversationFormat):
    """A conversation of one instruction and its output; earlier turns are in `history`, a list of
    pairs."""

    name = "alpaca"
    keys = ("column_map", "chat_template", "loss_on")
    tried = -1
    told_by = ("columns instruction, input and output",)
    called_elsewhere = dict.fromkeys(("alpaca_chat", "instruct", "instruction"))
    parts: ClassVar = {
        "instruction": ("instruction",),
        "output": ("output",),
        "input": ("input",),
        "system": ("system",),
        "history": ("history",),
    }

    def detects(self, spec: DataKeys, columns: Sequence[str]) -> bool:
        # An instruction without a column of inputs may be anybody's.
        return super().detects(spec, columns) and "input" in self._columns(spec, columns)

    def _must_have(self) -> set[str]:
        return {"instruction", "output"}

    def chosen(self, spec: DataKeys, columns: Sequence[str], record: Record) -> dict[str, Any]:
        found = super().chosen(spec, columns, record)
        return found | {"chat_template": spec.chat_template or STANFORD}

    def conversations(self, data: Table, spec: ChosenSpec) -> Iterator[Conversation]:
        columns, key = spec.column_map or {}, "data.column_map"

        def texts(part: str) -> list[str]:
            if part not in columns:
                return [""] * len(data)
            return optional_texts(data, columns[part], key)

        asked = field_texts(data, columns["instruction"], key)
        answered = field_texts(data, columns["output"], key)
        history = columns.get("history")
        earlier = [None] * len(data) if history is None else read_lists(data, history)
        rows = zip(texts("system"), earlier, asked, texts("input"), answered, strict=True)
        for row, (system, before, instruction, more, output) in enumerate(rows):
            messages: list[Message] = [{"role": "system", "content": system}] if system else []
            for pair in before or []:
                messages += _pair(pair, data, row, history)
            messages.append(_asked(instruction, more, spec))
            messages.append({"role": "assistant", "content": output})
            yield Conversation(tuple(messages))


def _asked(instruction: str, more: str, spec: ChosenSpec) -> Message:
    if not more.strip():
        return {"role": "user", "content": instruction}
    if spec.chat_template == STANFORD:
        return {"role": "user", "content": instruction, "input": more}
    return {"role": "user", "content": f"{instruction}\n{more}"}


def _pair(pair: Any, data: Table, row: int, history: str | None) -> list[Message]:
    """The two messages of an earlier turn."""
    if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, str) for x in pair)):
        what = f"{data.place(row)} has something else than pairs of texts in `{history}`"
        raise RecipeError.at("data.column_map", what, '[["instruction", "answer"], …]')
    return [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]


FORMAT = Alpaca()
