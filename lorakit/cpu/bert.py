"""BERT blocks (arXiv 1810.04805, section 3; RoBERTa and XLM-R use the same): they are recognised
by their structure, and a training pass computes each as one operation."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lorakit.cpu.encoder_block import Dropouts, EncoderWeights, Norm, encoder_block
from lorakit.cpu.whole_block import WholeBlock, check_parts
from lorakit.kernels.fast_modules import activation_kernel
from lorakit.kernels.optimisation import Unsupported
from lorakit.kernels.packing import Packing

BLOCK_PARTS, ATTENTION_PARTS = {"attention", "intermediate", "output"}, {"self", "output"}
HEAD_PARTS, OUTPUT_PARTS, FEED_FORWARD_PARTS = (
    {"query", "key", "value", "dropout"},
    {"dense", "LayerNorm", "dropout"},
    {"dense", "intermediate_act_fn"},
)
# Features that are not computed here; each is False or 0 in a block without it.
ABSENT = ("is_decoder", "add_cross_attention", "chunk_size_feed_forward")


class BertBlock(WholeBlock):
    """A BERT block, with four groups of layers: q, k and v; attention's output; the two layers of
    the feed-forward part. Computed by `encoder_block`."""

    parts = BLOCK_PARTS

    def __init__(self, block: Any, config: Any) -> None:
        check_parts(block, BLOCK_PARTS, "a layer")
        check_parts(block.attention, ATTENTION_PARTS, "its attention")
        check_parts(block.attention.self, HEAD_PARTS, "its heads")
        check_parts(block.intermediate, FEED_FORWARD_PARTS, "its feed-forward part")
        for output in self._outputs(block):
            check_parts(output, OUTPUT_PARTS, "its output")
            if type(output.LayerNorm) is not nn.LayerNorm or output.LayerNorm.bias is None:
                raise Unsupported(f"its norm is {type(output.LayerNorm).__name__}")
        heads = block.attention.self
        if missing := [
            name for name in ("attention_head_size", "scaling") if not hasattr(heads, name)
        ]:
            raise Unsupported(f"its heads ({type(heads).__name__}) have no {', '.join(missing)}")
        if present := [
            name for name in ABSENT if getattr(block, name, False) or getattr(config, name, False)
        ]:
            raise Unsupported(f"it has {', '.join(present)}")
        kernel = activation_kernel(block.intermediate.intermediate_act_fn)
        if kernel is None:
            raise Unsupported(
                f"its activation is {type(block.intermediate.intermediate_act_fn).__name__}"
            )
        self.activation = kernel
        super().__init__(
            block, heads.attention_head_size, [output.LayerNorm for output in self._outputs(block)]
        )

    @staticmethod
    def _outputs(block: Any) -> list[Any]:
        return [block.attention.output, block.output]

    @staticmethod
    def layer_groups(block: Any) -> tuple[list[Any], ...]:
        heads = block.attention.self
        return (
            [heads.query, heads.key, heads.value],
            [block.attention.output.dense],
            [block.intermediate.dense],
            [block.output.dense],
        )

    def takes(self, x: Tensor, inputs: dict[str, Any]) -> bool:
        return inputs.get("encoder_hidden_states") is None

    def run(self, x: Tensor, packing: Packing, inputs: dict[str, Any]) -> Tensor:
        heads = self.block.attention.self
        after_attention, after_feed_forward = (
            Norm(norm.weight.detach().float(), norm.bias.detach().float(), float(norm.eps))
            for norm in self.norms
        )
        size = heads.attention_head_size
        weights = EncoderWeights(
            self.products, after_attention, after_feed_forward, size, heads.scaling, self.activation
        )
        layers = [heads.dropout, *(output.dropout for output in self._outputs(self.block))]
        dropouts = Dropouts(*(layer.p if layer.training else 0.0 for layer in layers))
        return encoder_block(x, packing, weights, self.factors(), dropouts, self.read(packing))
