"""Text of tokens as they are generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CONTEXT = 8  # tokens before a piece of text that decide how it is written (a blank before a word)


class TextStream:
    """Text of tokens as they come: characters that span several tokens once they are complete, and
    nothing of a stop text."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), special: bool = False) -> None:
        """special: with the text of special tokens."""
        self.tokenizer, self.stops, self.special = tokenizer, stops, special
        self.tokens: list[int] = []
        self.decoded = 0  # tokens whose text is out, or held back
        self.held = ""  # text that may be the beginning of a stop
        self.written = 0  # characters that were given out
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain now."""
        self.tokens.append(token)
        start = max(0, self.decoded - CONTEXT)
        before, now = self._text(self.tokens[start : self.decoded]), self._text(self.tokens[start:])
        if now.endswith("\ufffd") or self.stopped:
            return ""
        self.decoded = len(self.tokens)
        text = self.held + now[len(before) :]
        for stop in self.stops:
            if stop in text:
                text, self.stopped = text.partition(stop)[0], True
        keep = 0 if self.stopped else self._beginning_of_a_stop(text)
        self.held = text[len(text) - keep :]
        text = text[: len(text) - keep]
        self.written += len(text)
        return text

    def _beginning_of_a_stop(self, text: str) -> int:
        """How many characters at the end of the text may be the beginning of a stop."""
        beginnings = (stop[:i] for stop in self.stops for i in range(1, len(stop) + 1))
        return max((len(part) for part in beginnings if text.endswith(part)), default=0)

    def _text(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=not self.special)
        return text
