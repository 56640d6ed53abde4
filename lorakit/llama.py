"""Blocks of Llama's make (arXiv 2302.13971, section 2.2): how they are told by their structure, and how a training pass runs them
whole. What the structure says is then proved with random tokens, by whoever asks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from itertools import chain
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


def layer_groups(block: Any) -> tuple[list[Any], ...]:
    """The linear layers of a block, those that read the same input together: q, k and v; o; gate and up; down."""
    attention, feed_forward = block.self_attn, block.mlp
    return (
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [feed_forward.gate_proj, feed_forward.up_proj],
        [feed_forward.down_proj],
    )


class WholeBlock:
    """A block whose training passes are one operation (`kernels.decoder_block`) where they can be, and go through its modules
    elsewhere: padded rows, a cache, a layer that is being watched, a method that does something else for the moment."""

    def __init__(self, block: Any) -> None:
        """Raises Unsupported where no pass could be."""
        attention, feed_forward = block.self_attn, block.mlp
        if any(hasattr(attention, name) for name in HEAD_NORMS):
            raise Unsupported("its queries and keys are normed")
        self.block, self.groups = block, layer_groups(block)
        self.layers: list[Any] = [layer for group in self.groups for layer in group]
        self.norms: list[Any] = [block.input_layernorm, block.post_attention_layernorm]
        self.watched = [*self.layers, attention, feed_forward, *self.norms]
        if not all(isinstance(layer, Adapter) and type(layer.base) is nn.Linear for layer in self.layers):
            raise Unsupported("not all of its linear layers are adapted")
        self.shared = [group[0].shared for group in self.groups]
        if any(
            shared is None or shared.layers != group
            for shared, group in zip(self.shared, self.groups, strict=True)
            if len(group) > 1
        ):
            raise Unsupported("layers that read the same input are not joined")
        products = tuple(
            (group[0].base.weight, group[0].base.bias) if shared is None else (shared.weight, shared.bias)
            for group, shared in zip(self.groups, self.shared, strict=True)
        )
        if not all(hasattr(norm, "weight") and hasattr(norm, "variance_epsilon") for norm in self.norms):
            raise Unsupported(f"its norms ({type(self.norms[0]).__name__}) are others")
        if missing := [name for name in ("head_dim", "scaling", "attention_dropout") if not hasattr(attention, name)]:
            raise Unsupported(f"its attention ({type(attention).__name__}) has no {', '.join(missing)}")
        eps = {norm.variance_epsilon for norm in self.norms}
        if len(eps) > 1 or any(norm.weight.requires_grad for norm in self.norms):
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
        self.weights = Weights(products, *self._norm_weights(), eps.pop(), attention.head_dim, attention.scaling)

    def install(self) -> None:
        self.block.forward = MethodType(self._forward, self.block)

    def remove(self) -> None:
        del self.block.forward

    def _forward(self, block: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        packing, tables = kwargs.get("attention_mask"), kwargs.get("position_embeddings")
        if (
            args
            or kwargs.get("past_key_values") is not None
            or not isinstance(packing, Packing)
            or tables is None
            or not self._can_run(block, hidden_states, tables)
        ):
            return type(block).forward(block, hidden_states, *args, **kwargs)
        # Where transformers computes blocks again for the backward pass (gradient checkpointing), it does so around the class's
        # forward, which this one stands in for; its first versions 5 did around the call, which is around this one too.
        if getattr(block, "gradient_checkpointing", False) and block.training and type(block).__call__ is nn.Module.__call__:
            return block._gradient_checkpointing_func(self._run, hidden_states, tables, packing)
        return self._run(hidden_states, tables, packing)

    def _run(self, x: Tensor, tables: tuple[Tensor, Tensor], packing: Packing) -> Tensor:
        attention = self.block.self_attn
        dropout = attention.attention_dropout if attention.training else 0.0
        attention_norm, feed_forward_norm = self._norm_weights()
        weights = self.weights._replace(attention_norm=attention_norm, feed_forward_norm=feed_forward_norm)
        return decoder_block(x, *tables, packing, weights, [layer.trained() for layer in self.layers], dropout)

    def _norm_weights(self) -> tuple[Tensor, Tensor]:
        before_attention, before_feed_forward = (norm.weight.detach().float() for norm in self.norms)
        return before_attention, before_feed_forward

    def _can_run(self, block: Any, x: Tensor, tables: Sequence[Tensor]) -> bool:
        return (
            all(table.dtype == x.dtype == torch.bfloat16 and table.is_contiguous() for table in tables)
            and all(table.shape == (1, x.shape[1], self.weights.head_dim) for table in tables)
            and x.is_contiguous()
            # They are what they were when the weights were looked up: not merged since, nor those of a copy of the block.
            and all(own is layer for own, layer in zip(chain(*layer_groups(block)), self.layers, strict=True))
            and all(layer.shared is shared for group, shared in zip(self.groups, self.shared, strict=True) for layer in group)
            and all(layer.is_plain and _can_be_read(layer) for layer in self.layers)
            and all(sum(layer.rank for layer in group) <= JOINED_RANK for group in self.groups if len(group) > 1)
            and not any(part._forward_hooks or part._forward_pre_hooks for part in self.watched)
            and not any(norm.weight.requires_grad for norm in self.norms)
        )


def _can_be_read(layer: Adapter) -> bool:
    """Whether its factors are as the kernels take them."""
    return all(factor.dtype == torch.float32 and factor.is_contiguous() for factor in layer.components().values())
