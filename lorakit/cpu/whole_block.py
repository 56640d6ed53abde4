"""Transformer blocks whose training passes are one operation each (`decoder_block`,
`encoder_block`).

Such blocks are recognised by their structure (`llama`, `bert`) and then verified with random tokens
by the optimisation that installs them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence, Set
from inspect import signature
from itertools import chain
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorakit import compat
from lorakit.adapters.base import in_out
from lorakit.adapters.layer import Adapter
from lorakit.adapters.quantised import QuantisedLinear
from lorakit.kernels.levels import Level
from lorakit.kernels.lora_linear import LoraFactors
from lorakit.kernels.optimisation import Unsupported
from lorakit.kernels.packing import Packing
from lorakit.kernels.products import kernel_level, multiple


def check_parts(
    module: nn.Module, needed: Set[str], what: str, optional: Set[str] = frozenset()
) -> None:
    """Raise Unsupported unless the names of the module's children are the needed and optional
    ones."""
    parts = {name for name, _ in module.named_children()}
    if needed - parts or parts - needed - optional:
        raise Unsupported(
            f"{what} ({type(module).__name__}) consists of {', '.join(sorted(parts)) or 'nothing'}"
        )


class WholeBlock(ABC):
    """A block whose training passes are one operation where possible. Other passes go through its
    modules: padded rows, a cache, a layer with hooks, an adapter that is not plain at the moment.

    block: the module. is_last: it is the model's last one. norms: its norms, frozen. products:
    weight [outputs, in] and bias [outputs] or None of each group of layers.
    """

    parts: ClassVar[Set[str]]  # the names of the block's children
    is_last = False

    def __init__(self, block: Any, head_dim: int, norms: Sequence[Any]) -> None:
        """Raises Unsupported for a block whose passes can never be one operation."""
        self.block, self.groups, self.norms = block, self.layer_groups(block), list(norms)
        self.layers: list[Any] = [layer for group in self.groups for layer in group]
        # Names of forward's inputs; the first must be the hidden states.
        own, *self.names = list(signature(type(block).forward).parameters)[1:]
        if own != "hidden_states" or "attention_mask" not in self.names:
            raise Unsupported(f"its first input is `{own}`, its others {', '.join(self.names)}")
        self.watched = [module for module in block.modules() if module is not block]
        if not all(isinstance(layer, Adapter) and layer.base.is_joinable for layer in self.layers):
            if any(isinstance(module, QuantisedLinear) for module in self.watched):
                raise Unsupported("its weights are quantised")
            raise Unsupported("not all of its linear layers are adapted")
        self.shared = [group[0].shared for group in self.groups]
        if any(
            shared is None or shared.layers != group
            for shared, group in zip(self.shared, self.groups, strict=True)
            if len(group) > 1
        ):
            raise Unsupported("layers that read the same input are not joined")
        self.products: tuple[tuple[Tensor, Tensor | None], ...] = tuple(
            (
                (group[0].base.weight, group[0].base.bias)
                if shared is None
                else (shared.weight, shared.bias)
            )
            for group, shared in zip(self.groups, self.shared, strict=True)
        )
        if self._trains_norms():
            raise Unsupported("its norms are trained")
        sizes = [head_dim, *(size for weight, _ in self.products for size in weight.shape)]
        types = {weight.dtype for weight, _ in self.products}
        self.dtype = types.pop()
        if types or any(size % multiple(self.dtype) for size in sizes):
            raise Unsupported("its sizes, or its types, are not for the kernels")
        if kernel_level(self.dtype, "block") is Level.torch:
            raise Unsupported("there are no kernels in C")

    @staticmethod
    @abstractmethod
    def layer_groups(block: Any) -> tuple[list[Any], ...]:
        """The linear layers of a block, grouped by the input they read."""

    @abstractmethod
    def takes(self, x: Tensor, inputs: dict[str, Any]) -> bool:
        """True if the operation computes a pass with these further inputs of the block's
        forward."""

    @abstractmethod
    def run(self, x: Tensor, packing: Packing, inputs: dict[str, Any]) -> Tensor:
        """Compute the block's output [1, tokens, hidden] for packed tokens x."""

    def install(self) -> None:
        self.block.forward = MethodType(self._forward, self.block)

    def undo(self) -> None:
        vars(self.block).pop("forward", None)

    def read(self, packing: Packing) -> Tensor | None:
        """The tokens whose outputs are read; None if all may be."""
        return packing.read if self.is_last else None

    def factors(self) -> list[LoraFactors]:
        """The factors of all layers, in the order of the groups."""
        return [layer.trained() for layer in self.layers]

    def _forward(self, block: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        inputs = dict(zip(self.names, args, strict=False)) | kwargs
        packing = inputs.pop("attention_mask", None)
        if not isinstance(packing, Packing) or not self._can_run(block, hidden_states, inputs):
            return type(block).forward(block, hidden_states, *args, **kwargs)
        # Some versions of transformers checkpoint a block around its class's forward, which this
        # method replaces.
        if (checkpointed := compat.checkpoint_around_forward(block)) is not None:
            return checkpointed(self.run, hidden_states, packing, inputs)
        return self.run(hidden_states, packing, inputs)

    def _can_run(self, block: Any, x: Tensor, inputs: dict[str, Any]) -> bool:
        return (
            x.dtype == self.dtype
            and x.is_contiguous()
            and compat.cache_in(inputs) is None
            and self.takes(x, inputs)
            # The layers are those whose weights were looked up: not merged since, nor a copy's.
            and all(
                own is layer
                for own, layer in zip(chain(*self.layer_groups(block)), self.layers, strict=True)
            )
            and all(
                layer.shared is shared
                for group, shared in zip(self.groups, self.shared, strict=True)
                for layer in group
            )
            and all(layer.is_plain and _can_be_read(layer) for layer in self.layers)
            and all(
                sum(layer.rank for layer in group) <= self._most_components(group)
                for group in self.groups
            )
            and not any(map(compat.has_forward_hooks, self.watched))
            and not self._trains_norms()
        )

    def _trains_norms(self) -> bool:
        """True if a norm is trained, for which the operation gives no gradient."""
        return any(
            parameter.requires_grad for norm in self.norms for parameter in norm.parameters()
        )

    @staticmethod
    def _most_components(group: Sequence[Any]) -> float:
        """Largest total rank of layers that read the same input for which the block-diagonal
        product is not slower. Measured on two cores, time of whole blocks relative to modules with
        a product for each layer: SmolLM2 (hidden size 576) 0.88 at rank 32, 0.93 at 64, 0.98 at
        128; MiniLM (384) 0.85, 0.89, 0.93."""
        return math.inf if len(group) == 1 else in_out(group[0].base)[0]


def _can_be_read(layer: Adapter) -> bool:
    """True if the adapter's factors are contiguous float32, as the kernels need."""
    return all(
        factor.dtype == torch.float32 and factor.is_contiguous()
        for factor in layer.components().values()
    )
