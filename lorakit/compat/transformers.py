"""transformers: embeddings, names of experts, attention, activation checkpointing."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from lorakit.compat.lookup import attribute, part
from lorakit.compat.versions import gone


def input_embeddings(model: Any) -> Any:
    """The model's token embeddings, or None if it has none."""
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # a plain module; CANINE, which hashes characters
        return None


def old_experts(model_type: str) -> str | None:
    """The architecture whose names of experts this one used before they became one parameter.

    None if it has no experts, or if transformers is older than its table of these names.
    """
    conversion = importlib.import_module("transformers.conversion_mapping")
    table = getattr(conversion, "_MODEL_TO_CONVERSION_PATTERN", {})
    found: str | None = table.get(model_type)
    return found


# -- attention -------------------------------------------------------------------------------------


def register_attention(name: str, function: Callable[..., Any]) -> None:
    """Let models use the function as their attention, with the masks of SDPA."""
    part("transformers.AttentionInterface").register(name, function)
    mask = part("transformers.masking_utils.sdpa_mask")
    part("transformers.AttentionMaskInterface").register(name, mask)


def sdpa_attention() -> Callable[..., Any]:
    """transformers' own attention by torch's scaled_dot_product_attention."""
    takes = ("module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal")
    place = "transformers.integrations.sdpa_attention.sdpa_attention_forward"
    found: Callable[..., Any] = part(place, takes)
    return found


def attention_name(config: Any) -> str | None:
    """The name of the attention implementation of a model with this configuration."""
    name: str | None = attribute(config, "_attn_implementation", "transformers")
    return name


def takes_attention(model: Any) -> bool:
    """True if transformers lets the model use a registered attention.

    Before 5.1 ModernBERT accepts only a list of its own.
    """
    return bool(attribute(model, "_can_set_attn_implementation", "transformers")())


def set_attention(model: Any, name: str) -> None:
    """Let the model use the registered attention."""
    attribute(model, "set_attn_implementation", "transformers")(name)


def caps_scores(model: Any) -> bool:
    """True if layers of the model put a soft cap on their attention scores.

    Those of Gemma 2, T5Gemma and VaultGemma do.
    """
    caps = (getattr(module, "attn_logit_softcapping", None) for module in model.modules())
    return any(cap is not None for cap in caps)


# -- activation checkpointing ----------------------------------------------------------------------


def can_checkpoint(model: Any) -> bool:
    """True if transformers can recompute the blocks of the model."""
    return bool(attribute(model, "supports_gradient_checkpointing", "transformers"))


def checkpoint(model: Any, settings: dict[str, Any]) -> None:
    """Let the blocks be recomputed for the backward pass. settings: arguments of
    torch.utils.checkpoint."""
    # The newer name first, since the older one still exists beside it.
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        if hasattr(model, name):
            getattr(model, name)(settings)
            return
    raise gone("transformers", f"`activation_checkpointing_enable` of {type(model).__name__}")


def checkpoint_around_forward(block: Any) -> Callable[..., Any] | None:
    """The function that checkpoints a block's forward.

    None if the block is not checkpointed, or if transformers checkpoints around the call of the
    block, as early 5.x versions do.
    """
    if not getattr(block, "gradient_checkpointing", False) or not block.training:
        return None
    if type(block).__call__ is not part("torch.nn.Module").__call__:
        return None
    found: Callable[..., Any] = attribute(block, "_gradient_checkpointing_func", "transformers")
    return found
