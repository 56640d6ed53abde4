"""Attention for training on the CPU: plain matrix products where torch's own kernels are slower.

With dropout, torch falls back to its slow reference path on the CPU; without dropout, the backward
pass of its fused kernel is several times slower than plain products at short lengths. In all other
cases transformers' SDPA is used.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from lorakit import compat
from lorakit.errors import RunError
from lorakit.kernels.dropout import fast_dropout
from lorakit.kernels.packed_attention import packed_attention
from lorakit.kernels.packing import Packing

log = logging.getLogger("lorakit")

NAME = "lorakit"
SDPA = compat.sdpa_attention()  # looked up once: torch.compile can not follow the look-up
# Largest number of keys for which plain products are faster, measured on two cores in bf16 with
# head_dim 32 and 64.
LONGEST = 96
LONGEST_WITH_DROPOUT = 512


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Packing | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention in transformers' calling convention.

    query [rows, heads, queries, head_dim], key and value [rows, kv heads, keys, head_dim]; the mask
    is None, boolean (True: attend) or additive, broadcastable to [rows, heads, queries, keys].
    Returns [rows, queries, heads, head_dim]. A key tensor with a `kv_store`
    (lorakit.inference.kv.policy_cache.PolicyCache) holds only the newest keys; the store then
    computes the attention.

    Raises RunError for a soft cap on the scores (`softcap`), which SDPA would silently ignore.
    """
    if kwargs.get("softcap") is not None:
        what = (
            f"{type(module).__name__} puts a soft cap on its attention scores, which lorakit's"
            " attention and SDPA lack"
        )
        raise RunError(what, 'Load the model with attn_implementation="eager".')
    compiling = torch.compiler.is_compiling()
    if not compiling and (cache := getattr(key, "kv_store", None)) is not None:
        return cache.attend(query, attention_mask, scaling), None
    dropout = dropout if module.training else 0.0
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(attention_mask, Packing):
        return packed_attention(query, key, value, attention_mask, causal, scale, dropout), None
    short = key.shape[2] <= (LONGEST_WITH_DROPOUT if dropout else LONGEST)
    plain = not compiling and short and torch.is_grad_enabled() and query.device.type == "cpu"
    if not plain or kwargs.get("position_bias") is not None:
        result: tuple[Tensor, None] = SDPA(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
        return result
    return _plain(query * scale, key, value, attention_mask, causal, dropout), None


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    causal: bool,
    dropout: float,
) -> Tensor:
    """Attention of scaled queries by matrix products and a softmax, which is faster than SDPA for
    short rows."""
    heads, queries = query.shape[1:3]
    groups = heads // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3)  # [rows, heads, queries, keys]
    lowest = torch.finfo(scores.dtype).min
    if attention_mask is not None:
        allowed = attention_mask.dtype == torch.bool
        scores = scores.masked_fill(~attention_mask, lowest) if allowed else scores + attention_mask
    elif causal and queries > 1:
        future = torch.ones(queries, key.shape[2], dtype=torch.bool).triu(
            key.shape[2] - queries + 1
        )
        scores = scores.masked_fill(future, lowest)
    weights = fast_dropout(scores.softmax(-1), dropout)
    return (weights @ value).transpose(1, 2).contiguous()


def use_attention(model: Any) -> None:
    """Replace SDPA in a model by `attention`.

    Neither applies a soft cap on attention scores, and some versions of transformers choose SDPA
    even for models that have one; such models get transformers' eager attention, which applies it.
    A model that accepts no registered attention keeps its own.
    """
    if compat.attention_name(model.config) != "sdpa":
        return
    if compat.caps_scores(model):
        log.warning(
            "%s puts a soft cap on its attention scores, which this version of transformers leaves"
            ' out unless it is told attn_implementation="eager": lorakit uses that, and whoever'
            " loads the exported model should too",
            type(model).__name__,
        )
        compat.set_attention(model, "eager")
    elif compat.takes_attention(model):
        compat.register_attention(NAME, attention)
        compat.set_attention(model, NAME)
