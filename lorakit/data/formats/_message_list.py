"""MessageListFormat: conversations that are a list of messages in one column."""

from __future__ import annotations

from collections.abc import Iterator

from lorakit.data.chat_template import Conversation
from lorakit.data.formats._conversation import ConversationFormat
from lorakit.data.keys import ChosenSpec
from lorakit.data.messages import MessageKeys, conversations_of
from lorakit.data.table import Table


class MessageListFormat(ConversationFormat):
    """The first of `parts` is the column of the lists; `tools` and `system` may be others."""

    keys = ("column_map", "message_keys", "roles", "chat_template", "loss_on")

    def conversations(self, data: Table, spec: ChosenSpec) -> Iterator[Conversation]:
        columns, (messages, *_) = spec.column_map or {}, self.parts
        keys = MessageKeys.of(spec.message_keys, spec.roles)
        others = columns.get("tools"), columns.get("system")
        yield from conversations_of(data, columns[messages], *others, keys)
