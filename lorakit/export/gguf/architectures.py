"""Architectures that llama.cpp has too: their names there, and how their settings and weights
differ.

The sources are the conversion scripts of llama.cpp (convert_hf_to_gguf.py) and, for what its
runtime takes for granted, its src/models. For each architecture whose `whole` is True the
log-probabilities of tiny random models were compared between llama.cpp and transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf
from torch import Tensor

from lorakit.errors import UsageError

# Remedy for what this export does not know to be right.
ELSEWHERE = (
    "llama.cpp's own converter may know it: `lorakit export RUN --merge`, then `python"
    " convert_hf_to_gguf.py RUN/merged --outfile model.gguf`."
)
# {hidden_act of transformers: activation function}; the names of one are one.
ACTIVATIONS = {"swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


@dataclass(frozen=True)
class Architecture:
    """name: general.architecture of the file. paired: the two halves of a rotation's pair stand
    side by side in the rows of queries and keys. norm_shift: added to the weights of norms.
    activation: the one that llama.cpp computes. whole: merged models can be written; else adapters
    alone. keys: {method of gguf.GGUFWriter without `add_`: value} beside the common ones. refusal:
    why llama.cpp would compute another model from this configuration, or None."""

    name: str
    paired: bool = False
    norm_shift: float = 0.0
    activation: str = "silu"
    whole: bool = True
    keys: Callable[[Any], dict[str, Any]] = lambda config: {}
    refusal: Callable[[Any], str | None] = lambda config: None

    @property
    def number(self) -> Any:
        """The architecture's member of gguf.MODEL_ARCH."""
        return {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[self.name]


def architecture_of(config: Any) -> Architecture | None:
    """The architecture of a text configuration, or None where llama.cpp or the gguf package that
    is installed does not have it."""
    found = ARCHITECTURES.get(config.model_type)
    return found if found and found.name in gguf.MODEL_ARCH_NAMES.values() else None


def model_keys(config: Any) -> dict[str, Any]:
    """{method of gguf.GGUFWriter without `add_`: value} for the sizes and settings of a model.
    Raises UsageError where llama.cpp would compute another model."""
    architecture = ARCHITECTURES[config.model_type]
    if reason := _refusal(architecture, config):
        raise UsageError(f"llama.cpp would compute another model: {reason}", ELSEWHERE)
    heads = config.num_attention_heads
    width = head_width(config)
    keys = {
        "block_count": config.num_hidden_layers,
        "context_length": context_length(config),
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "head_count": heads,
        "head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "key_length": width,
        "value_length": width,
        "rope_dimension_count": width,
        "vocab_size": config.vocab_size,
    }
    return keys | _rope(config) | architecture.keys(config)


def head_width(config: Any) -> int:
    """Numbers of a head."""
    width = getattr(config, "head_dim", None)
    return int(width or config.hidden_size // config.num_attention_heads)


def context_length(config: Any) -> int:
    """The longest text that llama.cpp computes as transformers does: a sliding window that it does
    not know is no limit within its own length."""
    longest, window = int(config.max_position_embeddings), getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None) or ["sliding_attention"]
    known = "sliding_window" in ARCHITECTURES[config.model_type].keys(config)
    if known or not window or "sliding_attention" not in layers:
        return longest
    return min(longest, int(window))


def rope_parameters(config: Any, kind: str = "full_attention") -> dict[str, Any]:
    """The rotary settings of layers of this kind."""
    settings = config.rope_parameters
    found: dict[str, Any] = settings.get(kind, settings)
    return found


def _rope(config: Any) -> dict[str, Any]:
    """The keys of the rotary settings; of a scaling that has none there is a tensor
    (lorakit.export.gguf.tensors)."""
    rope = rope_parameters(config)
    keys = {"rope_freq_base": float(rope["rope_theta"])}
    if rope["rope_type"] == "linear":
        keys["rope_scaling_type"] = gguf.RopeScalingType.LINEAR
        keys["rope_scaling_factor"] = float(rope["factor"])
    return keys


def _refusal(architecture: Architecture, config: Any) -> str | None:
    act = str(getattr(config, "hidden_activation", None) or config.hidden_act)
    if ACTIVATIONS.get(act, act) != architecture.activation:
        return f"the activation is {act}"
    rope = rope_parameters(config)
    factors = ("llama3",) if architecture.name == "llama" else ()
    if rope["rope_type"] not in ("default", "linear", *factors):
        return f"the rotary embedding is scaled by `{rope['rope_type']}`"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "only a part of each head is rotated"
    return architecture.refusal(config)


# -- what single architectures have beside ---------------------------------------------------------


def _gemma_scale(config: Any) -> str | None:
    # By the number of layers llama.cpp tells the largest models, which it scales in another way.
    if config.query_pre_attn_scalar != head_width(config) or config.num_hidden_layers in (46, 62):
        return f"the attention is scaled by query_pre_attn_scalar {config.query_pre_attn_scalar}"
    return None


def _slides_every(config: Any, pattern: int) -> str | None:
    expected = [
        "full_attention" if (layer + 1) % pattern == 0 else "sliding_attention"
        for layer in range(config.num_hidden_layers)
    ]
    return None if list(config.layer_types) == expected else "other layers have a sliding window"


def _gemma2_keys(config: Any) -> dict[str, Any]:
    return {
        "sliding_window": config.sliding_window,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
    }


def _gemma3_keys(config: Any) -> dict[str, Any]:
    local = rope_parameters(config, "sliding_attention")
    keys = {
        "sliding_window": config.sliding_window,
        "rope_freq_base_swa": float(local["rope_theta"]),
    }
    if config.final_logit_softcapping:
        keys["final_logit_softcapping"] = config.final_logit_softcapping
    return keys


def _gemma3_refusal(config: Any) -> str | None:
    if config.attn_logit_softcapping:
        return "attn_logit_softcapping is set"
    if rope_parameters(config, "sliding_attention")["rope_type"] != "default":
        return "the rotary embedding of the layers with a sliding window is scaled"
    return _gemma_scale(config) or _slides_every(config, 6)


def _granite_keys(config: Any) -> dict[str, Any]:
    return {
        "attention_scale": config.attention_multiplier,
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": config.logits_scaling,
    }


def _smollm3_refusal(config: Any) -> str | None:
    rotated = [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]
    return None if list(config.no_rope_layers) == rotated else "other layers are not rotated"


# {model type of transformers: architecture}
ARCHITECTURES = {
    **dict.fromkeys(("llama", "mistral"), Architecture("llama", paired=True)),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "smollm3": Architecture("smollm3", paired=True, refusal=_smollm3_refusal),
    "granite": Architecture("granite", paired=True, keys=_granite_keys),
    "gemma": Architecture("gemma", norm_shift=1.0, activation="gelu_tanh"),
    "gemma2": Architecture(
        "gemma2",
        norm_shift=1.0,
        activation="gelu_tanh",
        keys=_gemma2_keys,
        refusal=lambda config: _gemma_scale(config) or _slides_every(config, 2),
    ),
    "gemma3_text": Architecture(
        "gemma3",
        norm_shift=1.0,
        activation="gelu_tanh",
        keys=_gemma3_keys,
        refusal=_gemma3_refusal,
    ),
    "olmo2": Architecture("olmo2"),
    "phi3": Architecture("phi3", whole=False),
    "starcoder2": Architecture("starcoder2", whole=False),
}


def side_by_side(rows: Tensor, heads: int) -> Tensor:
    """A tensor [out, …] with the rows of each head in the order 0, half, 1, half + 1 …:
    transformers pairs row i with row i + half in a rotation, llama.cpp rows 2 i and 2 i + 1."""
    shape = rows.shape
    return rows.reshape(heads, 2, -1, *shape[1:]).transpose(1, 2).reshape(shape)


def paired_heads(config: Any) -> dict[str, int]:
    """{name of a projection whose rows are rotated: its heads}, {} where llama.cpp pairs rows as
    transformers does."""
    heads = config.num_attention_heads
    if not ARCHITECTURES[config.model_type].paired:
        return {}
    return {"q_proj": heads, "k_proj": getattr(config, "num_key_value_heads", None) or heads}
