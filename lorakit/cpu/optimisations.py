"""Optimisations of training passes on the CPU, in the order in which they are tried."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lorakit import compat
from lorakit.adapters.base import Linear, in_out
from lorakit.adapters.layer import Adapter
from lorakit.adapters.quantised import QuantisedLinear
from lorakit.adapters.shared_input import SharedInput, can_share
from lorakit.cpu.bert import BertBlock
from lorakit.cpu.blocks import blocks_of
from lorakit.cpu.llama import LlamaBlock
from lorakit.cpu.probe import LENGTHS, Probe, logits
from lorakit.cpu.whole_block import WholeBlock
from lorakit.kernels.attention import NAME as ATTENTION
from lorakit.kernels.levels import Level
from lorakit.kernels.optimisation import Optimisation, Unsupported
from lorakit.kernels.packing import BlockHooks, Packing
from lorakit.kernels.products import frozen_linear, kernel_level, multiple

WHOLE_BLOCKS: tuple[type[LlamaBlock] | type[BertBlock], ...] = (LlamaBlock, BertBlock)


def has_products(model: Any) -> bool:
    """True if there are kernels in C for products of the model's type."""
    return kernel_level(model.base_model.dtype) is not Level.torch


class ProbedOptimisation(Optimisation):
    """An optimisation that is verified on the model's hidden states."""

    trouble = "its body does not run so"

    def __init__(self, probe: Probe) -> None:
        self.probe, self.model = probe, probe.task_model.model

    def verify(self) -> None:
        self.probe.verify()


class FrozenLinears(ProbedOptimisation):
    """Frozen linear layers computed in C; only `forward` of the instances changes."""

    def install(self) -> None:
        self._changed: list[nn.Module] = []
        for module in self.model.modules():
            if type(module) is nn.Linear and "forward" not in vars(module):
                module.forward = MethodType(_in_c, module)  # type: ignore[method-assign]
                self._changed.append(module)

    def undo(self) -> None:
        for module in self._changed:
            vars(module).pop("forward", None)


class PackedRows(ProbedOptimisation):
    """Rows packed without padding while they pass through the blocks."""

    trouble = "its blocks do not take packed rows"

    def __init__(self, probe: Probe) -> None:
        """Raises Unsupported where it is clear without trying that rows can not be packed."""
        super().__init__(probe)
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise Unsupported("an encoder-decoder reads two rows for each example")
        self.hooks = BlockHooks(packable_blocks(self.model))

    def install(self) -> None:
        self.hooks.install()
        task_model = self.probe.task_model
        self.probe.packing = Packing(LENGTHS, max(LENGTHS), task_model.device)
        task_model.packs = True
        # oneDNN compiles a product for each number of tokens; lorakit's kernels do not.
        in_c = has_products(self.model) and all(map(fits_kernels, self.hooks.blocks))
        task_model.compiles = not in_c

    def undo(self) -> None:
        self.hooks.remove()
        self.probe.packing = None
        self.probe.task_model.packs, self.probe.task_model.compiles = False, True


class SharedInputs(ProbedOptimisation):
    """Joined computation of adapted layers that were called in turn with the same tensor."""

    def __init__(self, probe: Probe, adapters: Mapping[str, Adapter]) -> None:
        super().__init__(probe)
        self.adapters = adapters

    def install(self) -> None:
        for group in self._groups():
            if can_share(group) and not any(layer.dropout for layer in group):
                shared = SharedInput(group)
                for layer in group:
                    layer.shared = shared

    def verify(self) -> None:
        if any(adapter.shared is not None for adapter in self.adapters.values()):
            super().verify()

    def undo(self) -> None:
        for adapter in self.adapters.values():
            adapter.shared = None

    def _groups(self) -> Iterator[list[Adapter]]:
        group: list[Adapter] = []
        calls = self.probe.calls
        for number, (adapter, x) in enumerate(calls):
            group.append(adapter)
            if number + 1 == len(calls) or calls[number + 1][1] is not x:
                yield group
                group = []


class WholeBlocks(ProbedOptimisation):
    """Blocks of known architectures, computed as one operation each."""

    trouble = "they do not run as one operation"

    def __init__(self, probe: Probe, blocks: Sequence[nn.Module]) -> None:
        super().__init__(probe)
        self.blocks, self.whole = blocks, list[WholeBlock]()

    def install(self) -> None:
        first = self.blocks[0]
        reason = f"{type(first).__name__} is neither of Llama's make nor of BERT's"
        for make in WHOLE_BLOCKS:
            try:
                self.whole = [make(block, self.model.config) for block in self.blocks]
                break
            except Unsupported as error:
                if make.parts == {name for name, _ in first.named_children()}:
                    reason = str(error)
        else:
            raise Unsupported(reason)
        self.whole[-1].is_last = True
        for block in self.whole:
            block.install()

    def undo(self) -> None:
        for block in self.whole:
            block.undo()


class FirstTokens(ProbedOptimisation):
    """The last block computed only for the first token of each row, where the class is read at it
    alone."""

    trouble = "its head does not run so"

    def __init__(self, probe: Probe, last: nn.Module) -> None:
        super().__init__(probe)
        self.last = last

    def install(self) -> None:
        self.probe.task_model.reads_first = True

    @torch.no_grad()
    def verify(self) -> None:
        """Compare logits before and after all other hidden states become random."""
        expected = logits(self.probe.task_model)
        handle = self.last.register_forward_hook(_with_other_tokens)
        try:
            found = logits(self.probe.task_model)
        finally:
            handle.remove()
        if not torch.equal(found, expected):
            raise Unsupported("its head reads other tokens than the first")

    def undo(self) -> None:
        self.probe.task_model.reads_first = False


def _with_other_tokens(module: nn.Module, inputs: Any, output: Any) -> Any:
    hidden = output[0] if isinstance(output, tuple) else output
    other = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
    other[:, 0] = hidden[:, 0]
    return (other, *output[1:]) if isinstance(output, tuple) else other


def packable_blocks(model: Any) -> list[nn.Module]:
    """The model's blocks. Raises Unsupported where it is clear that their rows can not be
    packed."""
    if (attention := compat.attention_name(model.config)) != ATTENTION:
        raise Unsupported(f"the model's attention is `{attention}`")
    blocks = blocks_of(model)
    if not blocks:
        raise Unsupported("the model has no list of blocks")
    settings = model.config.get_text_config().to_dict()
    at_random = [name for name, value in settings.items() if name.endswith("layerdrop") and value]
    if at_random:
        raise Unsupported(f"the model leaves blocks out at random ({', '.join(at_random)})")
    return blocks


def fits_kernels(block: nn.Module) -> bool:
    """True if kernels in C take every product of a block except those of its attention."""
    adapted = [module.base.layer for module in block.modules() if isinstance(module, Adapter)]
    layers = [module for module in block.modules() if isinstance(module, Linear)]
    plain = all(
        type(layer) in (nn.Linear, QuantisedLinear) or any(layer is base for base in adapted)
        for layer in layers
    )
    return plain and all(
        size % multiple(_dtype(layer)) == 0 for layer in layers for size in in_out(layer)
    )


def _dtype(layer: nn.Module) -> torch.dtype:
    weight = layer.stored if isinstance(layer, QuantisedLinear) else layer.weight
    dtype: torch.dtype = weight.dtype  # type: ignore[assignment]
    return dtype


def _in_c(self: nn.Linear, x: Tensor) -> Tensor:
    if self.weight.requires_grad:
        return nn.Linear.forward(self, x)
    return frozen_linear(x, self.weight, self.bias)
