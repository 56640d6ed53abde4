"""Llama blocks (arXiv 2302.13971, section 2.2): they are recognised by their structure, and a
training pass computes each as one operation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lorakit.cpu.decoder_block import DecoderWeights, decoder_block
from lorakit.cpu.whole_block import WholeBlock, check_parts
from lorakit.kernels.optimisation import Unsupported
from lorakit.kernels.packing import Packing
from lorakit.kernels.rotary import turns_halves

BLOCK_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
ATTENTION_PARTS, HEAD_NORMS = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"q_norm", "k_norm"}
FEED_FORWARD_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
# Features that neither this nor the decoder computes; each is None in the config of a model
# without it. Verification with few tokens would not notice a window.
ABSENT = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")


def check_blocks(blocks: Iterable[Any], config: Any) -> None:
    """Raise Unsupported unless the blocks' parts and the model's settings are those of a Llama.
    Heads may be normalised, as in Qwen3."""
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
        # Verification with few random tokens can miss a factor near 1.
        if numbers := [name for name, value in vars(block).items() if isinstance(value, float)]:
            raise Unsupported(f"a layer has a number of its own ({', '.join(numbers)})")
    for key in ABSENT:
        if getattr(config, key, None) is not None:
            raise Unsupported(f"{key} is {getattr(config, key)}")
    if kinds := set(getattr(config, "layer_types", None) or []) - {"full_attention"}:
        raise Unsupported(f"it has layers of {', '.join(sorted(kinds))}")


class LlamaBlock(WholeBlock):
    """A Llama block, with four groups of layers: q, k and v; o; gate and up; down. Computed by
    `decoder_block`."""

    parts = BLOCK_PARTS

    def __init__(self, block: Any, config: Any) -> None:
        check_blocks([block], config)
        attention, norms = block.self_attn, [block.input_layernorm, block.post_attention_layernorm]
        if any(hasattr(attention, name) for name in HEAD_NORMS):
            raise Unsupported("its queries and keys are normed")
        # Verification can miss this where random weights attend to all tokens alike.
        if not turns_halves(attention):
            raise Unsupported("its rotary embeddings are others")
        if missing := [
            name
            for name in ("head_dim", "scaling", "attention_dropout")
            if not hasattr(attention, name)
        ]:
            raise Unsupported(
                f"its attention ({type(attention).__name__}) has no {', '.join(missing)}"
            )
        if not all(hasattr(norm, "weight") and hasattr(norm, "variance_epsilon") for norm in norms):
            raise Unsupported(f"its norms ({type(norms[0]).__name__}) are others")
        if len({norm.variance_epsilon for norm in norms}) > 1:
            raise Unsupported("its norms differ")
        super().__init__(block, attention.head_dim, norms)

    @staticmethod
    def layer_groups(block: Any) -> tuple[list[Any], ...]:
        attention, feed_forward = block.self_attn, block.mlp
        return (
            [attention.q_proj, attention.k_proj, attention.v_proj],
            [attention.o_proj],
            [feed_forward.gate_proj, feed_forward.up_proj],
            [feed_forward.down_proj],
        )

    def takes(self, x: Tensor, inputs: dict[str, Any]) -> bool:
        tables, shape = (
            inputs.get("position_embeddings"),
            (1, x.shape[1], self.block.self_attn.head_dim),
        )
        return tables is not None and all(
            table.dtype == x.dtype and table.shape == shape and table.is_contiguous()
            for table in tables
        )

    def run(self, x: Tensor, packing: Packing, inputs: dict[str, Any]) -> Tensor:
        cos, sin = inputs["position_embeddings"]
        attention, eps = self.block.self_attn, self.norms[0].variance_epsilon
        before_attention, before_feed_forward = (
            norm.weight.detach().float() for norm in self.norms
        )
        weights = DecoderWeights(
            self.products,
            before_attention,
            before_feed_forward,
            eps,
            attention.head_dim,
            attention.scaling,
        )
        dropout = attention.attention_dropout if attention.training else 0.0
        read = self.read(packing)
        return decoder_block(x, cos, sin, packing, weights, self.factors(), dropout, read)
