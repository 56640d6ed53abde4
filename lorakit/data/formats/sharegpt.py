"""Format `sharegpt`: a column `conversations` of {from, value}, as ShareGPT's exports and
LLaMA-Factory have it, with the system message in a column of its own."""

from __future__ import annotations

from typing import ClassVar

from lorakit.data.formats._message_list import MessageListFormat


class ShareGPT(MessageListFormat):
    """As `chat`, with a column `system`."""

    name = "sharegpt"
    tried = -2
    told_by = ("columns conversations and system",)
    called_elsewhere = dict.fromkeys(("share_gpt", "vicuna"))
    parts: ClassVar = {
        "conversations": ("conversations",),
        "system": ("system",),
        "tools": ("tools",),
    }


FORMAT = ShareGPT()
