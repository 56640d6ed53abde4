"""Blocks of Llama's make (arXiv 2302.13971, section 2.2): how they are told by their structure, and how a training pass runs them
whole. What the structure says is then proved with random tokens, by whoever asks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapter import Adapter
from lorakit.kernels import native
from lorakit.kernels.decoder_block import Weights, decoder_block
from lorakit.kernels.lora_linear import JOINED_RANK, TILE
from lorakit.kernels.packed_attention import TILES
from lorakit.kernels.packing import Packing

BLOCK_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
ATTENTION_PARTS, HEAD_NORMS = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"q_norm", "k_norm"}
FEED_FORWARD_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
# What is computed neither here nor by the decoder: None in the config of a model without it. A proof with few tokens would fit any
# window.
ABSENT = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")


class Unsupported(Exception):
    """The reason why a model can not be run by kernels for whole blocks."""


def check_parts(module: nn.Module, needed: Set[str], what: str, optional: Set[str] = frozenset()) -> None:
    """Raises Unsupported unless the module's children have these names."""
    parts = {name for name, _ in module.named_children()}
    if needed - parts or parts - needed - optional:
        raise Unsupported(f"{what} ({type(module).__name__}) consists of {', '.join(sorted(parts)) or 'nothing'}")


def check_blocks(blocks: Iterable[Any], config: Any) -> None:
    """Raises Unsupported unless the blocks' parts, and the model's settings, are those of a Llama; heads may be normed as Qwen3's."""
    for block in blocks:
        check_parts(block, BLOCK_PARTS, "a layer")
        check_parts(block.self_attn, ATTENTION_PARTS, "its attention", HEAD_NORMS)
        check_parts(block.mlp, FEED_FORWARD_PARTS, "its feed-forward part")
        if (act := type(block.mlp.act_fn).__name__) not in ("SiLU", "SiLUActivation"):
            raise Unsupported(f"its activation is {act}")
        attention = block.self_attn
        for norm in (getattr(attention, name) for name in HEAD_NORMS if hasattr(attention, name)):
            if norm.weight.shape != (attention.head_dim,):
                raise Unsupported("its queries or keys are normed across heads")
    for key in ABSENT:
        if getattr(config, key, None) is not None:
            raise Unsupported(f"{key} is {getattr(config, key)}")
    if kinds := set(getattr(config, "layer_types", None) or []) - {"full_attention"}:
        raise Unsupported(f"it has layers of {', '.join(sorted(kinds))}")


class WholeBlock:
    """A block whose training passes are one operation (`kernels.decoder_block`) where they can be, and go through its modules
    elsewhere: padded rows, a cache, a layer that is being watched, a method that does something else for the moment."""

    def __init__(self, block: Any) -> None:
        """Raises Unsupported where no pass could be."""
        attention, feed_forward = block.self_attn, block.mlp
        if any(hasattr(attention, name) for name in HEAD_NORMS):
            raise Unsupported("its queries and keys are normed")
        groups = (
            [attention.q_proj, attention.k_proj, attention.v_proj],
            [attention.o_proj],
            [feed_forward.gate_proj, feed_forward.up_proj],
            [feed_forward.down_proj],
        )
        self.block, self.groups = block, groups
        self.layers: list[Any] = [layer for group in groups for layer in group]
        self.watched = [*self.layers, attention, feed_forward, block.input_layernorm, block.post_attention_layernorm]
        if not all(isinstance(layer, Adapter) and type(layer.base) is nn.Linear for layer in self.layers):
            raise Unsupported("not all of its linear layers are adapted")
        self.shared = [group[0].shared for group in groups]
        if any(
            shared is None or shared.layers != group for shared, group in zip(self.shared, groups, strict=True) if len(group) > 1
        ):
            raise Unsupported("layers that read the same input are not joined")
        products = tuple(
            (group[0].base.weight, group[0].base.bias) if shared is None else (shared.weight, shared.bias)
            for group, shared in zip(groups, self.shared, strict=True)
        )
        norms = block.input_layernorm, block.post_attention_layernorm
        if norms[0].variance_epsilon != norms[1].variance_epsilon or any(norm.weight.requires_grad for norm in norms):
            raise Unsupported("its norms are trained, or differ")
        sizes = [size for weight, _ in products for size in weight.shape]
        if any(size % TILE for size in sizes) or attention.head_dim % TILE or {w.dtype for w, _ in products} != {torch.bfloat16}:
            raise Unsupported("its sizes, or its type, are not for tiles")
        if (
            native.load_with_tiles(TILES) is None
            or native.load_with_tiles("linear") is None
            or native.load("elementwise") is None
        ):
            raise Unsupported("there are no kernels in C")
        weights = (norm.weight.detach().float() for norm in norms)
        self.weights = Weights(products, *weights, norms[0].variance_epsilon, attention.head_dim, attention.scaling)

    def install(self) -> None:
        self.block.forward = MethodType(self._forward, self.block)

    def remove(self) -> None:
        del self.block.forward

    def _forward(self, block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        packing, tables = kwargs.get("attention_mask"), kwargs.get("position_embeddings")
        if args or kwargs.get("past_key_values") is not None or not isinstance(packing, Packing) or not self._can_run(x, tables):
            return type(block).forward(block, x, *args, **kwargs)
        assert tables is not None
        dropout = block.self_attn.attention_dropout if block.self_attn.training else 0.0
        return decoder_block(x, *tables, packing, self.weights, [layer.trained() for layer in self.layers], dropout)

    def _can_run(self, x: Tensor, tables: Sequence[Tensor] | None) -> bool:
        return (
            tables is not None
            and all(table.dtype == x.dtype == torch.bfloat16 and table.is_contiguous() for table in tables)
            and all(table.shape == (1, x.shape[1], self.weights.head_dim) for table in tables)
            and x.is_contiguous()
            and all(layer.is_plain for layer in self.layers)
            # They are what they were when the weights were looked up.
            and all(layer.shared is shared for group, shared in zip(self.groups, self.shared, strict=True) for layer in group)
            and all(sum(layer.rank for layer in group) <= JOINED_RANK for group in self.groups if len(group) > 1)
            and not any(part._forward_hooks or part._forward_pre_hooks for part in self.watched)
        )
