"""Chat templates: conversations become text, with the places of the assistant's turns in it.

A template is a program, so where a turn stands is found by rendering: the conversation is rendered
twice, once with a mark in place of every answer. What the two texts share is the template's; what
stands in place of a mark is the answer. Two things belong to a turn beside its content: what the
template writes between the generation prompt and the content (Qwen 3's empty thinking block), and
the end-of-turn token behind it. Both are learned from a conversation of two messages. Templates
that mark the assistant's tokens themselves, by `{% generation %}` (transformers, "Chat templates"),
are taken at their word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lorakit.data.spans import Span
from lorakit.data.tokenise import Tokeniser, special_texts
from lorakit.errors import RecipeError
from lorakit.files import expanded

KEY = "data.chat_template"
NAMED = Path(__file__).parent / "chat_templates"
Message = Mapping[str, Any]
# Stands for the content of a message; no template changes it, and no content contains it.
MARK = "\u27e6%s %d\u27e7"
# Whatever else an assistant's message has is written by the template behind or in place of its
# content.
PLAIN = {"role", "content", "weight"}


class Untold(Exception):
    """The template does not tell which part of a text the assistant writes; str() is the reason."""


@dataclass(frozen=True)
class Conversation:
    """Messages, each with at least role and content, and the tools that may be called."""

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] | None = None

    def until(self, message: int) -> Conversation:
        """The messages before this one."""
        return replace(self, messages=self.messages[:message])

    def masked(self, turns: Sequence[int]) -> Conversation:
        """The conversation with a mark in place of the content of these messages."""
        found = [
            {**message, "content": MARK % ("turn", number)} if number in turns else message
            for number, message in enumerate(self.messages)
        ]
        return replace(self, messages=tuple(found))

    @property
    def answers(self) -> list[int]:
        """The numbers of the assistant's messages."""
        return [n for n, message in enumerate(self.messages) if message["role"] == "assistant"]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text. turns: the span of characters that the assistant writes, for each of
    its messages; closed: True if the last of these ends in a token that ends a turn, or does not
    end the text."""

    text: str
    turns: list[Span]
    closed: bool


@dataclass(frozen=True)
class _Frame:
    """Text that a template writes around an answer. prompt: the generation prompt, "" for none;
    lead: text between it and the content; ends: what may close a turn, the longest first; special:
    True if these end in special tokens."""

    prompt: str
    lead: str
    ends: tuple[str, ...]
    special: bool


class ChatTemplate:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @property
    def marks_turns(self) -> bool:
        """True if the template marks what the assistant writes."""
        texts = self.tokenizer.chat_template
        every = texts.values() if isinstance(texts, dict) else [texts]
        return all(re.search(r"\{%-?\s*generation\b", text) for text in every)

    def render(self, conversation: Conversation, prompt: bool = False) -> str:
        """The text of a conversation; with `prompt`, open for an answer of the assistant.

        Raises Untold with the template's own words if it refuses the conversation.
        """
        found: str = self._applied(conversation, add_generation_prompt=prompt, tokenize=False)
        return found

    def marked(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        """(token ids, 1 for each that the assistant writes) of a conversation, by the template's
        own marks. Raises Untold."""
        found = self._applied(
            conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(found["input_ids"]), list(found["assistant_masks"])

    def _applied(self, conversation: Conversation, **options: Any) -> Any:
        messages = [dict(message) for message in conversation.messages]
        tools = None if conversation.tools is None else list(conversation.tools)
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, **options)
        except Exception as error:  # a template is a program, with errors of every kind
            raise Untold(str(error).strip() or type(error).__name__) from error

    @cached_property
    def frame(self) -> _Frame:
        """Raises Untold if it cannot be found out."""
        user, answer = MARK % ("question", 0), MARK % ("answer", 0)
        messages = (
            {"role": "user", "content": user},
            {"role": "assistant", "content": answer},
        )
        whole, asked = Conversation(messages), Conversation(messages[:1])
        plain, opened, text = self.render(asked), self.render(asked, True), self.render(whole)
        if text.count(answer) != 1:
            raise Untold(f"it writes an answer {text.count(answer)} times")
        before, _, behind = text.partition(answer)
        prompt = opened.removeprefix(plain) if opened.startswith(plain) else ""
        lead = before.removeprefix(opened) if before.startswith(opened) else ""
        # Without a generation prompt, words before the content are a header, which nobody writes.
        if not prompt.strip() and lead.strip():
            lead = ""
        pattern = special_texts(self.tokenizer)
        special = [found.end() for found in pattern.finditer(behind)] if pattern else []
        ends = tuple(behind[:end] for end in reversed(special)) or (behind,)
        return _Frame(prompt, lead, ends, bool(special))

    @property
    def end_of_turn(self) -> int | None:
        """The token that ends a turn of the assistant; None where there is no single one."""
        try:
            frame = self.frame
        except Untold:
            return None
        if not frame.special:
            return None
        ids = self.tokenizer(frame.ends[-1].strip(), add_special_tokens=False)["input_ids"]
        return int(ids[0]) if len(ids) == 1 else None

    def turns(self, conversation: Conversation) -> Rendered:
        """The text of a conversation and the assistant's turns in it. Raises Untold."""
        text, frame = self.render(conversation), self.frame
        plain = [
            number for number in conversation.answers if not _more(conversation.messages[number])
        ]
        found = dict(self._plain_turns(conversation, text, plain))
        for number in conversation.answers:
            if number not in found:
                found[number] = self._turn_with_calls(conversation, text, number)
        spans = [found[number] for number in conversation.answers]
        closed = True
        if spans and not text[spans[-1][1] :].strip():
            closed = frame.special and text[slice(*spans[-1])].endswith(frame.ends)
        return Rendered(text, spans, closed)

    def _plain_turns(
        self, conversation: Conversation, text: str, numbers: Sequence[int]
    ) -> Iterator[tuple[int, Span]]:
        """(number, span) of messages that are nothing but content."""
        if not numbers:
            return
        masked = self.render(conversation.masked(numbers))
        pieces, rest = [], masked
        for number in numbers:
            mark = MARK % ("turn", number)
            if rest.count(mark) != 1:
                raise Untold(f"it writes message {number + 1} {rest.count(mark)} times")
            piece, _, rest = rest.partition(mark)
            pieces.append(piece)
        pieces.append(rest)
        place = len(pieces[0])
        spans: list[Span] = []
        if text.startswith(pieces[0]):
            for number, behind in zip(numbers, pieces[1:], strict=True):
                last = behind is pieces[-1]
                content = _content_at(text, place, conversation.messages[number], behind, last)
                if content is None:
                    break
                spans.append((place, place + len(content)))
                place += len(content) + len(behind)
        if len(spans) < len(numbers):
            spans = [self._differing(conversation, text, number) for number in numbers]
        for number, span in zip(numbers, spans, strict=True):
            yield number, self._widened(conversation, text, number, span)

    def _differing(self, conversation: Conversation, text: str, number: int) -> Span:
        """The span that changes with the content of one message: more than the content, where the
        template moves a part of it, as thinking."""
        mark = MARK % ("turn", number)
        other = self.render(conversation.masked([number]))
        start = _alike(text, other)
        end = _alike(text[start:][::-1], other[start:][::-1])
        inside = other[start : len(other) - end]
        if inside.count(mark) != 1 or not inside.endswith(mark):
            raise Untold(f"it does not write message {number + 1} in one piece")
        if inside != mark and not self._opened(conversation, text, number, start):
            raise Untold(f"what it writes before message {number + 1} depends on the message")
        return start, len(text) - end

    def _opened(self, conversation: Conversation, text: str, number: int, end: int) -> int:
        """The end of the generation prompt of a message, if the text up to it is what a model is
        prompted with; else 0."""
        opened = self.render(conversation.until(number), True)
        return len(opened) if text[:end].startswith(opened) else 0

    def _widened(self, conversation: Conversation, text: str, number: int, span: Span) -> Span:
        """The span of content, with what the assistant writes before and behind it."""
        frame, (start, end) = self.frame, span
        before = text[:start]
        if frame.prompt.strip():
            # The usual cases first: they need no further rendering.
            for lead in (frame.lead, ""):
                if before.endswith(frame.prompt + lead):
                    start -= len(lead)
                    break
            else:
                start = self._opened(conversation, text, number, start) or start
        elif frame.lead and before.endswith(frame.lead):
            start -= len(frame.lead)
        closing = next((one for one in frame.ends if text.startswith(one, end)), "")
        return start, end + len(closing)

    def _turn_with_calls(self, conversation: Conversation, text: str, number: int) -> Span:
        """The span of a message with more than content, such as calls of tools: from the generation
        prompt to the next end of a turn."""
        start = self._opened(conversation, text, number, len(text))
        shortest = self.frame.ends[-1]
        end = text.find(shortest, start) if shortest else -1
        if not start or end < 0:
            raise Untold(f"where message {number + 1} begins and ends is not known")
        return start, end + len(shortest)


def _alike(one: str, other: str) -> int:
    """Number of characters that both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _more(message: Message) -> bool:
    """True if a message has more than a content."""
    return any(value for name, value in message.items() if name not in PLAIN)


def _content_at(text: str, place: int, message: Message, behind: str, last: bool) -> str | None:
    """The text at `place` for the content of a message, followed by `behind`; None if it is neither
    the content nor the content without blanks around it."""
    content = message["content"] or ""
    for one in dict.fromkeys((content, content.strip(), content.rstrip(), content.lstrip())):
        if text.startswith(one + behind, place) and (
            not last or len(text) == place + len(one) + len(behind)
        ):
            return str(one)
    return None


def ends_of_turn(tokenizer: Any) -> tuple[int, ...]:
    """The token that the chat template ends the assistant's turns with, as a tuple; () for none."""
    end = ChatTemplate(tokenizer).end_of_turn if tokenizer.chat_template else None
    return () if end is None else (end,)


def named_templates() -> list[str]:
    """The names of lorakit's own templates."""
    return sorted(file.stem for file in NAMED.glob("*.jinja"))


def use_template(tokenizer: Any, name: str | None) -> None:
    """Give the tokenizer the chat template that a recipe names: one of lorakit's own or a file of
    Jinja. None keeps the tokenizer's.

    lorakit's own begin as the tokenizer begins a text. Raises RecipeError if there is no such
    template.
    """
    if name is None:
        return
    if name in named_templates():
        text = (NAMED / f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")
        begin = Tokeniser(tokenizer).begin
        starts = bool(begin) and begin == [tokenizer.bos_token_id]
        tokenizer.chat_template = "{{- bos_token -}}\n" * starts + text
        return
    file = expanded(name)
    expected = f"{', '.join(named_templates())}, or a file with a template in Jinja"
    if not file.is_file():
        raise RecipeError.at(KEY, f"there is no chat template `{name}`", expected)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = f"the chat template `{name}` can not be read: {error}"
        raise RecipeError.at(KEY, what, expected) from error
    tokenizer.chat_template = text
