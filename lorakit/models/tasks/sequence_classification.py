"""Task `sequence-classification`: a class or a number for each row."""

from __future__ import annotations

from typing import Any

from lorakit.models.tasks._base import Task


class SequenceClassification(Task):
    """Classification, or regression: a head on top of the model gives the logits of a row."""

    name = "sequence-classification"
    auto_class = "AutoModelForSequenceClassification"
    peft_type = "SEQ_CLS"
    called_elsewhere = ("seq_cls", "text-classification", "classification", "regression", "glue")
    predicts_tokens = False

    def head_names(self, model: Any) -> list[str]:
        """The modules on top of the base model, and the base model's pooler."""
        prefix = model.base_model_prefix
        heads = [
            name
            for name, child in model.named_children()
            if name != prefix and any(True for _ in child.parameters())
        ]
        base = getattr(model, prefix, None)
        inside = [] if base is None else [name for name, _ in base.named_children()]
        return [f"{prefix}.{name}" for name in inside if "pooler" in name] + heads

    def class_token(self, config: Any) -> int | None:
        """The end-of-sequence token for BART, T5 and their relatives."""
        if not getattr(config, "is_encoder_decoder", False):
            return None
        end = config.eos_token_id
        return end if isinstance(end, int) else None

    def logits_width(self, config: Any) -> int:
        return int(config.num_labels)

    def row_losses(self, model: Any, batch: Any) -> tuple[Any, Any]:
        found: tuple[Any, Any] = model.label_losses(batch)
        return found
