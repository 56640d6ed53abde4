"""Settings of tiny models that plain transformers loads."""

from __future__ import annotations

from tests.support.tiny import VOCABULARY

EOS, PAD = VOCABULARY["[EOS]"], VOCABULARY["[PAD]"]
SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA = {
    **SIZES,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": EOS,
}
