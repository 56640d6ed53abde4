"""Format `chat`: conversations as a list of messages, written by a chat template (transformers,
"Chat templates"). Messages are OpenAI's {role, content}, or ShareGPT's {from, value}; whatever else
a message has, such as `tool_calls`, goes to the template. A message of weight 0 is no target."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from lorakit.data.chat_template import Conversation
from lorakit.data.columns import field_texts
from lorakit.data.formats._conversation import ConversationFormat
from lorakit.data.keys import ChosenSpec
from lorakit.data.messages import MessageKeys, conversations_of
from lorakit.data.table import Table


class Chat(ConversationFormat):
    """A column with a list of messages, and perhaps one with the tools that may be called."""

    name = "chat"
    keys = ("column_map", "message_keys", "roles", "chat_template", "loss_on")
    tried = -1
    told_by = ("a column messages or conversations",)
    called_elsewhere = dict.fromkeys(
        ("chatml", "messages", "chat_template", "conversation", "conversational", "openai")
    )
    parts: ClassVar = {
        "messages": ("messages", "conversations", "conversation"),
        "tools": ("tools",),
    }

    def conversations(self, data: Table, spec: ChosenSpec) -> Iterator[Conversation]:
        columns = spec.column_map or {}
        keys = MessageKeys.of(spec.message_keys, spec.roles)
        yield from conversations_of(
            data, columns["messages"], columns.get("tools"), None, keys, _texts
        )


def _texts(data: Table, column: str) -> list[str]:
    return field_texts(data, column, "data.column_map")


FORMAT = Chat()
