"""Tokenizers: the Rust library beneath transformers' fast ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorakit.compat.lookup import attribute, part


def backend(tokenizer: Any) -> Any:
    """The tokenizer of the Rust library that a fast tokenizer wraps."""
    return attribute(tokenizer, "backend_tokenizer", "transformers")


def decode(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    """Decode rows of tokens to texts, with special tokens and without clean-up.

    If the tokenizer's class uses the common decoding of fast tokenizers, the Rust library decodes
    all rows at once; otherwise transformers decodes row by row.
    """
    if not rows:
        return []
    fast = part("transformers.PreTrainedTokenizerFast")
    usual = {name: attribute(fast, name, "transformers") for name in ("decode", "_decode")}
    own = type(tokenizer)
    if tokenizer.is_fast and all(getattr(own, name) is method for name, method in usual.items()):
        texts: list[str] = backend(tokenizer).decode_batch(rows, skip_special_tokens=False)
        return texts
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return [tokenizer.decode(list(row), **options) for row in rows]
