"""Packing: batches without padding. Inside a model's blocks the real tokens of all rows form one
long row.

Every part of a block except its attention processes one token at a time and need not know where
rows end; the attention (lorakit.kernels.attention) knows. Hooks pack the first block's input and
unpack the last block's output, so embeddings and heads see ordinary rows. The number of packed
tokens may be rounded up with fillers, whose values are never read: oneDNN compiles a kernel for
every new shape, which took 2 to 4 ms each where it was measured.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

# Counts are rounded up to multiples of an eighth of the power of two below them.
SIZES_PER_OCTAVE = 8


def rounded(count: int) -> int:
    """The smallest allowed number of packed tokens that is at least `count`; at most an eighth
    more."""
    step = max(1, (1 << (count.bit_length() - 1)) // SIZES_PER_OCTAVE)
    return -(-count // step) * step


class Packing:
    """Positions of the real tokens in a padded batch and in a packed one.

    read: the packed tokens whose last hidden states are read, in ascending order; None where any
    may be. The last block may leave out what only the others need.
    """

    read: Tensor | None = None

    def __init__(
        self,
        lengths: Sequence[int],
        longest: int,
        device: torch.device | str = "cpu",
        round_up: bool = True,
    ) -> None:
        """lengths: the length of each row, at most `longest`, the length of the padded batch.
        Packed rows are ordered from the longest. round_up: round the number of tokens up with
        `rounded`."""
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        self.lengths, self.longest = [lengths[row] for row in order], longest
        self.real = sum(self.lengths)
        # At least one filler, to which positions without a token point.
        self.tokens = rounded(self.real + 1) if round_up else self.real + 1
        place = torch.arange(len(self.lengths) * longest).view(-1, longest)[order]
        kept = torch.arange(longest) < torch.tensor(self.lengths)[:, None]
        fill = torch.zeros(self.tokens - self.real, dtype=torch.int64)
        # [tokens]: the position of each packed token in the padded batch
        self.padded_place = torch.cat([place[kept], fill]).to(device)
        packed_place = torch.full((kept.numel(),), self.tokens - 1)
        packed_place[place[kept]] = torch.arange(self.real)
        # [rows · longest]: the packed token at each position of the padded batch
        self.packed_place = packed_place.to(device)
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def rows(self) -> int:
        return len(self.lengths)

    def pack(self, x: Tensor) -> Tensor:
        """[rows, longest, …] → [1, tokens, …]."""
        packed: Tensor = _Pack.apply(x, self)  # type: ignore[no-untyped-call]
        return packed

    def unpack(self, x: Tensor) -> Tensor:
        """[1, tokens, …] → [rows, longest, …]; positions without a token hold a filler's
        values."""
        unpacked: Tensor = _Unpack.apply(x, self)  # type: ignore[no-untyped-call]
        return unpacked

    def of_rows(self, x: Tensor) -> Tensor:
        """Pack a tensor [rows or 1, longest, …] that blocks read beside the hidden states. The
        result is cached, since every block reads the same one, unless it needs a gradient."""
        if x.requires_grad:
            return self.pack(x.expand(self.rows, *x.shape[1:]))
        if id(x) not in self._kept:
            self._kept[id(x)] = x, self.pack(x.expand(self.rows, *x.shape[1:]))
        return self._kept[id(x)][1]

    @cached_property
    def firsts(self) -> Tensor:
        """The packed position of each row's first token, and the end of the last row: [rows + 1],
        on the CPU."""
        return torch.tensor([0, *self.lengths]).cumsum(0)


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        packed = x.flatten(0, 1).index_select(0, packing.padded_place)
        # Fillers hold no data of any row, since the padding of every row points to them.
        packed[packing.real :] = 0
        return packed[None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        packing: Packing = ctx.packing
        # A filler's gradient is zero, since its output is never read; so are the gradients of
        # positions without a token.
        grad = grads[0][0].index_select(0, packing.packed_place)
        return grad.view(packing.rows, packing.longest, *grad.shape[1:]), None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return (
            x[0]
            .index_select(0, packing.packed_place)
            .view(packing.rows, packing.longest, *x.shape[2:])
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        packing: Packing = ctx.packing
        grad = grads[0].flatten(0, 1).index_select(0, packing.padded_place)
        grad[packing.real :] = 0
        return grad[None], None


_current: ContextVar[Packing | None] = ContextVar("packing", default=None)


def current() -> Packing | None:
    """The packing of the current pass, or None."""
    return _current.get()


@contextmanager
def using(packing: Packing | None) -> Iterator[None]:
    """Context in which passes use this packing, or none."""
    token = _current.set(packing)
    try:
        yield
    finally:
        _current.reset(token)


@dataclass
class BlockHooks:
    """The hooks on a model's blocks, which do nothing without a current packing."""

    blocks: list[nn.Module]
    handles: list[Any] = field(default_factory=list)

    def install(self) -> None:
        for number, block in enumerate(self.blocks):
            hook = _entering(inspect.signature(block.forward), first=number == 0)
            self.handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
        self.handles.append(self.blocks[-1].register_forward_hook(_leaving))

    def remove(self) -> None:
        while self.handles:
            self.handles.pop().remove()


def _entering(signature: inspect.Signature, first: bool) -> Callable[..., Any]:
    """Make the hook that runs before a block. It replaces the attention mask by the packing, which
    `lorakit.kernels.attention` accepts."""
    names = list(signature.parameters)
    mask_place = names.index("attention_mask") if "attention_mask" in names else None

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        packing = current()
        if packing is None:
            return None
        hidden, *others = args if args else (kwargs.pop("hidden_states"),)
        if first:
            hidden = packing.pack(hidden)
        others = [_packed(value, packing) for value in others]
        kwargs = {name: _packed(value, packing) for name, value in kwargs.items()}
        if mask_place is not None and mask_place <= len(others):
            others[mask_place - 1] = packing
        else:
            kwargs["attention_mask"] = packing
        return (hidden, *others), kwargs

    return hook


def _leaving(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    packing = current()
    if packing is None:
        return None
    if isinstance(output, tuple):
        return packing.unpack(output[0]), *output[1:]
    return packing.unpack(output)


def _packed(value: Any, packing: Packing) -> Any:
    """Pack tensors with a value for each token, alone or in a tuple; leave everything else
    unchanged."""
    if isinstance(value, tuple):
        return tuple(_packed(item, packing) for item in value)
    if (
        isinstance(value, Tensor)
        and value.ndim >= 2
        and value.shape[0] in (1, packing.rows)
        and value.shape[1] == packing.longest
    ):
        return packing.of_rows(value)
    return value
