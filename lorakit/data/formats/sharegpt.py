"""Format `sharegpt`: a column `conversations` of {from, value}, as ShareGPT's exports and
LLaMA-Factory have it, with the system message in a column of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from lorakit.data.chat_template import Conversation
from lorakit.data.columns import optional_texts
from lorakit.data.formats._conversation import ConversationFormat
from lorakit.data.keys import ChosenSpec
from lorakit.data.messages import MessageKeys, conversations_of
from lorakit.data.table import Table


class ShareGPT(ConversationFormat):
    """As `chat`, with a column `system`."""

    name = "sharegpt"
    keys = ("column_map", "message_keys", "roles", "chat_template", "loss_on")
    tried = -2
    told_by = ("columns conversations and system",)
    called_elsewhere = dict.fromkeys(("share_gpt", "vicuna"))
    parts: ClassVar = {
        "conversations": ("conversations",),
        "system": ("system",),
        "tools": ("tools",),
    }

    def _must_have(self) -> set[str]:
        return {"conversations"}

    def conversations(self, data: Table, spec: ChosenSpec) -> Iterator[Conversation]:
        columns = spec.column_map or {}
        keys = MessageKeys.of(spec.message_keys, spec.roles)
        yield from conversations_of(
            data,
            columns["conversations"],
            columns.get("tools"),
            columns.get("system"),
            keys,
            lambda table, column: optional_texts(table, column, "data.column_map"),
        )


FORMAT = ShareGPT()
