"""Cross-entropy of a frozen linear head without storing all logits: one tile of the vocabulary at a
time.

The logits [targets, vocabulary] are by far the largest tensor of a training step, and several
passes read them. Here each tile of logits is computed, made unnormalised probabilities and
multiplied by the head again while it is in the cache, so the gradient of the hidden states is ready
together with the loss (as in Liger's fused linear cross-entropy, arXiv 2410.10989, § 3.2; the
running maximum and sum are those of online softmax, Milakov and Gimelshein, arXiv 1805.02867,
algorithm 3). In bfloat16, on a processor with AMX, one call into C does everything, with logits in
float32.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from lorakit.kernels import dispatch
from lorakit.kernels.in_c import FAILS, FLOATS, POINTER, CStructure, Library, address_of
from lorakit.kernels.levels import Level
from lorakit.kernels.softmax import cross_entropy_tile

# Size of a tile of logits on a processor, in whose cache it stays: targets and words of the
# vocabulary.
TARGETS, WORDS = 512, 4096
# Logits of a tile elsewhere, where many small products cost more: 256 MB in float32.
LOGITS = 1 << 26
TILE = 32  # csrc/cross_entropy.c needs a hidden size that is a multiple of this
NO_MEMORY, NO_WORD = 1, 2  # its error codes


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        tile: tuple[int, int],
    ) -> Tensor:
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        grad = (
            torch.empty_like(hidden, memory_format=torch.contiguous_format)
            if ctx.needs_input_grad[0]
            else None
        )
        if _is_for_c(hidden, weight, bias, targets):
            _by_tiles(hidden, weight, bias, targets, losses, grad)
        else:
            for start in range(0, len(hidden), tile[0]):
                part = slice(start, start + tile[0])
                _tokens(
                    hidden[part],
                    weight,
                    bias,
                    targets[part],
                    losses[part],
                    None if grad is None else grad[part],
                    tile[1],
                )
        ctx.save_for_backward(grad)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (grad,) = ctx.saved_tensors
        of_hidden = None if grad is None else (grad * grads[0][:, None]).to(grad.dtype)
        return of_hidden, None, None, None, None


def _tokens(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    losses: Tensor,
    grad: Tensor | None,
    words: int,
) -> None:
    """Fill losses [n] and, unless it is None, grad [n, hidden], for hidden [n, hidden] and targets
    [n], by so many words of the vocabulary at a time. No value is read by the host."""
    maxima = torch.full_like(losses, -torch.inf)
    sums = torch.zeros_like(losses)
    right = torch.zeros_like(losses)  # the logit of the target
    # the mean row of the head under the unnormalised probabilities
    expected = torch.zeros_like(hidden, dtype=torch.float32)
    for first in range(0, len(weight), words):
        rows = weight[first : first + words]
        # [n, words]
        logits = (
            hidden @ rows.T
            if bias is None
            else torch.addmm(bias[first : first + words], hidden, rows.T)
        )
        place = targets - first
        here = (place >= 0) & (place < len(rows))
        found = logits.gather(1, place.clamp(0, len(rows) - 1)[:, None]).squeeze(1)
        right = torch.where(here, found.float(), right)
        shrunk = cross_entropy_tile(logits, maxima, sums)
        if grad is not None:
            expected.mul_(shrunk[:, None]).add_(logits @ rows)
    torch.sub(maxima + sums.log(), right, out=losses)
    if grad is not None:
        grad.copy_(expected.div_(sums[:, None]).sub_(weight[targets]))


# -- in C ------------------------------------------------------------------------------------------


class CrossEntropyCall(CStructure):
    """`CrossEntropyCall` of csrc/cross_entropy.c."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("targets", "width", "words", "threads", "hidden_stride", "weight_stride")
        ),
        *((name, ctypes.c_void_p) for name in ("hidden", "weight", "bias", "right")),
    )


_C = Library(
    "cross_entropy",
    {"cross_entropy": (FAILS, *address_of(CrossEntropyCall), FLOATS, POINTER)},
    [CrossEntropyCall],
)


def _is_for_c(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> bool:
    """True if the kernel in C is available and takes these tensors."""
    in_type = all(
        x is None or (x.dtype == torch.bfloat16 and x.device.type == "cpu")
        for x in (hidden, weight, bias)
    )
    if not in_type or targets.dtype != torch.int64 or targets.device.type != "cpu":
        return False
    if (
        hidden.numel() == 0
        or hidden.shape[1] % TILE
        or weight.stride(1) != 1
        or (bias is not None and bias.stride(0) != 1)
    ):
        return False
    return dispatch.implementation("cross_entropy") is Level.amx


def _by_tiles(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    losses: Tensor,
    grad: Tensor | None,
) -> None:
    """`_tokens` in C, for any number of targets and tensors that `_is_for_c` accepts."""
    hidden, targets = hidden if hidden.stride(1) == 1 else hidden.contiguous(), targets.contiguous()
    call = CrossEntropyCall(
        *(*hidden.shape, len(weight), torch.get_num_threads(), hidden.stride(0), weight.stride(0)),
        *(None if x is None else x.data_ptr() for x in (hidden, weight, bias, targets)),
    )
    failed = _C.call("cross_entropy", call, losses, grad)
    if failed == NO_MEMORY:
        raise MemoryError("no memory for the loss")
    if failed == NO_WORD:
        raise IndexError(f"a target is not among the {len(weight)} words")


# --------------------------------------------------------------------------------------------------


def tile_size(device: torch.device, vocabulary: int) -> tuple[int, int]:
    """(targets, words of the vocabulary) of a tile of logits: what a processor's cache holds;
    elsewhere all words, of as many targets as LOGITS allows."""
    if device.type == "cpu":
        return TARGETS, WORDS
    return max(1, LOGITS // vocabulary), vocabulary


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    tile: tuple[int, int] | None = None,
) -> Tensor:
    """Compute -log softmax(W h + bias)[target] of each token, [n] float32, for a frozen head.

    hidden [n, hidden], weight [vocabulary, hidden] and bias [vocabulary] share a dtype; targets [n]
    are token ids. Gradients go to hidden only. Sums are float32; logits and probabilities have
    hidden's dtype. tile: (targets, words) of the logits that exist at once; by default
    `tile_size`.
    """
    tile = tile or tile_size(hidden.device, len(weight))
    losses: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, targets, tile)  # type: ignore[no-untyped-call]
    return losses
