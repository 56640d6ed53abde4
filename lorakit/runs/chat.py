"""A conversation with a run: questions and answers, as its chat template writes them."""

from __future__ import annotations

from typing import Any

from lorakit.data.chat_template import ChatTemplate, Conversation, Message, Untold
from lorakit.data.tokenise import prompt_tokens
from lorakit.errors import UsageError


class Chat:
    """A conversation so far. system: its system message, or None."""

    def __init__(self, system: str | None = None) -> None:
        self.messages: list[Message] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})

    def check(self, tokenizer: Any) -> None:
        """Raise UsageError for a tokenizer that cannot write conversations."""
        if not tokenizer.chat_template:
            raise UsageError("the run's tokenizer has no chat template", "Leave --chat out.")

    def asked(self, tokenizer: Any, question: str) -> list[int]:
        """The token ids of the conversation with one more question, open for its answer. Raises
        UsageError for one that the template refuses."""
        self.messages.append({"role": "user", "content": question})
        try:
            text = ChatTemplate(tokenizer).render(Conversation(tuple(self.messages)), prompt=True)
        except Untold as error:
            what = f"the run's chat template does not take the conversation: {error}"
            raise UsageError(what, "Ask otherwise, or leave --system out.") from error
        (ids,) = prompt_tokens(tokenizer, [text], templated=True)
        return ids

    def answered(self, text: str) -> None:
        """Add the answer to the last question."""
        self.messages.append({"role": "assistant", "content": text})
