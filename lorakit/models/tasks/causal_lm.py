"""Task `causal-lm`: each token is predicted from those before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lorakit.models.tasks._base import Task


class CausalLM(Task):
    """Language modelling: the loss is over the tokens that the data marks as targets."""

    name = "causal-lm"
    auto_class = "AutoModelForCausalLM"
    peft_type = "CAUSAL_LM"
    called_elsewhere = ("causal_lm", "text-generation", "clm", "lm", "language-modeling", "sft")
    predicts_tokens = True
    uncached: ClassVar[Mapping[str, Any]] = {"use_cache": False}

    def logits_width(self, config: Any) -> int:
        return int(config.get_text_config().vocab_size)

    def row_losses(self, model: Any, batch: Any) -> tuple[Any, Any]:
        return model.token_losses(batch), None
