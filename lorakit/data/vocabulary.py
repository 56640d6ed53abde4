"""Vocabulary: tokens against the rows of a model's embedding."""

from __future__ import annotations

from typing import Any


def embedding_rows(config: Any) -> int | None:
    """Number of tokens for which the model of this configuration has an embedding, or None if it
    does not say."""
    found = getattr(config.get_text_config(), "vocab_size", None)
    return found if isinstance(found, int) and found > 0 else None


def without_embedding(tokenizer: Any, token: int, rows: int) -> str:
    """Description, for a message, of a token that has no row in an embedding of `rows` rows."""
    name = tokenizer.convert_ids_to_tokens(int(token))
    return (
        f"the token `{name}` (id {token}), and the model's embedding has {rows} rows, for the ids 0"
        f" to {rows - 1}"
    )
