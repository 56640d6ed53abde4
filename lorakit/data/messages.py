"""Conversations: rows with a list of messages become messages of {role, content, …}, as OpenAI's
and transformers' chat data have them; ShareGPT's {from, value} too."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from lorakit.data.cells import NOTHING, Kind
from lorakit.data.chat_template import Conversation, Message
from lorakit.data.columns import WORDS, listed, optional_texts
from lorakit.data.table import Table
from lorakit.errors import RecipeError

KEY = "data.column_map"
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "ipython": "ipython",
}
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")


@dataclass(frozen=True)
class MessageKeys:
    """Names of a message's parts, and {speaker's name: role}."""

    role: tuple[str, ...]
    content: tuple[str, ...]
    roles: Mapping[str, str]

    @classmethod
    def of(cls, keys: Mapping[str, str] | None, roles: Mapping[str, str] | None) -> MessageKeys:
        keys = keys or {}
        role = (keys["role"],) if "role" in keys else ROLE_KEYS
        content = (keys["content"],) if "content" in keys else CONTENT_KEYS
        return cls(role, content, ROLES | dict(roles or {}))


def wrong_keys(keys: Mapping[str, str] | None, roles: Mapping[str, str] | None) -> str | None:
    """Description of a mistake in `data.message_keys` or `data.roles`, or None."""
    if unknown := set(keys or {}) - {"role", "content"}:
        return f"message_keys names role and content, not {listed(sorted(unknown))}"
    known = sorted(set(ROLES.values()))
    if wrong := [role for role in (roles or {}).values() if role not in known]:
        return f"a role is one of {listed(known)}, not {wrong[0]}"
    return None


def read_lists(data: Table, column: str) -> Iterator[list[Any] | None]:
    """The list in each row of a column, None where there is nothing; a text is read as JSON.

    Raises RecipeError for anything else.
    """
    cells = data.cells(column)
    for row, (kind, text) in enumerate(zip(cells.kinds, cells.texts, strict=True)):
        if kind in (*NOTHING, Kind.EMPTY):
            yield None
            continue
        found = None
        if kind in (Kind.LIST, Kind.STRING, Kind.CELL):
            try:
                found = json.loads(text)
            except (ValueError, RecursionError):
                found = None
        if not isinstance(found, list):
            what = f"{data.place(row)} has {WORDS[Kind(kind)]} in `{column}`"
            raise RecipeError.at(KEY, what, "a list in every row")
        yield found


def read_messages(found: Sequence[Any], keys: MessageKeys, place: str) -> tuple[Message, ...]:
    """The messages of a row. Raises RecipeError for one that is none."""
    return tuple(
        _message(one, keys, f"{place}, message {number}") for number, one in enumerate(found, 1)
    )


def _message(found: Any, keys: MessageKeys, place: str) -> Message:
    if not isinstance(found, dict):
        raise RecipeError.at(KEY, f"{place} is not a mapping", "messages of a role and a content")
    role_key = next((name for name in keys.role if name in found), None)
    if role_key is None:
        _lacks(place, found, keys.role, "role")
    role = keys.roles.get(str(found[role_key]))
    if role is None:
        what = f"{place} is by `{found[role_key]}`, whose role is not known"
        names = listed(sorted(keys.roles))
        raise RecipeError.at(
            "data.roles", what, f"one of {names}; or roles: {{{found[role_key]}: user}}"
        )
    content_key = next((name for name in keys.content if name in found), None)
    more = {
        name: value
        for name, value in found.items()
        if name not in (role_key, content_key) and value is not None
    }
    if content_key is None and not more:
        _lacks(place, found, keys.content, "content")
    if "weight" in more and more["weight"] not in (0, 1):
        what = f"{place} has the weight {more['weight']}"
        raise RecipeError.at(KEY, what, "0 (no target) or 1")
    content = _content(None if content_key is None else found[content_key], place)
    return {"role": role, "content": content, **more}


def _content(found: Any, place: str) -> str:
    """The text of a message: a text, nothing, or a list of parts that are texts."""
    if found is None:
        return ""
    if isinstance(found, str):
        return found
    if isinstance(found, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in found
    ):
        return "".join(part["text"] for part in found)
    raise RecipeError.at(KEY, f"the content of {place} is not a text", "text, or parts of text")


def _lacks(place: str, found: Mapping[str, Any], names: Sequence[str], what: str) -> NoReturn:
    there = listed(map(str, found))
    raise RecipeError.at(
        "data.message_keys",
        f"{place} has no {' or '.join(names)}, only {there}",
        f"message_keys: {{{what}: the name that it has there}}",
    )


def conversations_of(
    data: Table, messages: str, tools: str | None, system: str | None, keys: MessageKeys
) -> Iterator[Conversation]:
    """The conversation of each row. messages, tools, system: columns, the last two where there are
    such. Raises RecipeError for a row that holds none."""
    kits = read_lists(data, tools) if tools is not None else iter([None] * len(data))
    systems = [""] * len(data) if system is None else optional_texts(data, system, KEY)
    rows = zip(read_lists(data, messages), kits, systems, strict=True)
    for row, (found, kit, text) in enumerate(rows):
        if found is None:
            what = f"{data.place(row)} has nothing in `{messages}`"
            raise RecipeError.at(KEY, what, "a list of messages in every row")
        read = read_messages(found, keys, data.place(row))
        if text:
            read = ({"role": "system", "content": text}, *read)
        yield Conversation(read, tuple(kit) if kit else None)
