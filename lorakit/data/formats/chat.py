"""Format `chat`: conversations as a list of messages, written by a chat template (transformers,
"Chat templates"). Messages are OpenAI's {role, content}, or ShareGPT's {from, value}; whatever else
a message has, such as `tool_calls`, goes to the template. A message of weight 0 is no target."""

from __future__ import annotations

from typing import ClassVar

from lorakit.data.formats._message_list import MessageListFormat


class Chat(MessageListFormat):
    """A column with a list of messages, and perhaps one with the tools that may be called."""

    name = "chat"
    tried = -1
    told_by = ("a column messages or conversations",)
    called_elsewhere = dict.fromkeys(
        ("chatml", "messages", "chat_template", "conversation", "conversational", "openai")
    )
    parts: ClassVar = {
        "messages": ("messages", "conversations", "conversation"),
        "tools": ("tools",),
    }


FORMAT = Chat()
