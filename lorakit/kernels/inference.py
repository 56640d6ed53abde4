"""Inference form of an adapted layer whose weights no longer change: values are precomputed, and
zeros are skipped where that is faster.

- The factors are cast, scaled and joined with the residual once.
- Inputs that no component reads, and outputs that none writes, are skipped in the low-rank products
  of a few tokens (as in generation) if they are the majority. For many tokens gathering costs more
  than it saves: measured on a CPU at 128 tokens, 1.5 to 2 times the time of the dense product with
  half the columns dead, and 1.0 to 1.6 times with 80 %.
- A base with zeros in 2 of every 4 inputs uses the sparse tensor cores of a GPU that has them
  (PyTorch's semi-structured tensors; Mishra et al., arXiv 2104.08378). On a CPU no kernel beats the
  dense product at that share of zeros, so the dense product stays; the same holds for unstructured
  zeros on every device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.kernels.stored import Weight, linear

# Smallest share of dead columns, and largest number of tokens, for which they are skipped.
WORTHWHILE, FEW_TOKENS = 0.5, 8
# Both sizes of a semi-structured weight must be multiples of this.
SEMI_STRUCTURED_MULTIPLE = 64


@dataclass(frozen=True)
class FrozenLayer:
    """y = W x + bias + B (A x), with the scale folded into B.

    weight: [out, in], dense, semi-structured or stored; a [rank, in] and b [out, rank]; inputs and
    outputs: the indices of the live ones, or None where all are used; live_a [rank, live inputs]
    and live_b [live outputs, rank].
    """

    weight: Weight
    bias: Tensor | None
    a: Tensor
    b: Tensor
    inputs: Tensor | None
    outputs: Tensor | None
    live_a: Tensor
    live_b: Tensor

    @property
    def multiply_adds(self) -> int:
        """The multiply-adds of the low-rank products for a single token."""
        return self.live_a.numel() + self.live_b.numel()

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # [tokens, in]
        y = linear(rows, self.weight, self.bias)
        if len(rows) > FEW_TOKENS or (self.inputs is None and self.outputs is None):
            y = y.addmm_(rows @ self.a.T, self.b.T)
        else:
            hidden = (
                rows if self.inputs is None else rows.index_select(1, self.inputs)
            ) @ self.live_a.T
            if self.outputs is None:
                y = y.addmm_(hidden, self.live_b.T)
            else:
                y.index_add_(1, self.outputs, hidden @ self.live_b.T)
        return y.view(*x.shape[:-1], y.shape[-1])


@torch.no_grad()
def freeze(weight: Weight, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> FrozenLayer:
    """Make a FrozenLayer of W [out, in], bias and the pair A [rank, in], B [out, rank] with its
    scale; all of it in W's dtype."""
    a, b = a.to(weight.dtype), (b * scale).to(weight.dtype)
    inputs, outputs = _live(a.any(0)), _live(b.any(1))
    live_a = a if inputs is None else a[:, inputs].contiguous()
    live_b = b if outputs is None else b[outputs].contiguous()
    if isinstance(weight, Tensor):
        weight = semi_structured(weight)
    return FrozenLayer(weight, bias, a, b, inputs, outputs, live_a, live_b)


def _live(used: Tensor) -> Tensor | None:
    """The indices of used entries, or None where too few are unused to be worth skipping."""
    indices = used.nonzero().squeeze(1)
    return indices if 1 - len(indices) / len(used) >= WORTHWHILE else None


def semi_structured(weight: Tensor) -> Tensor:
    """Convert the weight [out, in] to the form for sparse tensor cores if it has at most 2
    non-zeros in every 4 consecutive inputs, is on a GPU with such cores (compute capability 8.0 and
    up), is in half precision and has sizes they take; otherwise return the weight itself."""
    if not weight.is_cuda or weight.dtype not in (torch.float16, torch.bfloat16):
        return weight
    if torch.cuda.get_device_capability(weight.device) < (8, 0) or any(
        n % SEMI_STRUCTURED_MULTIPLE for n in weight.shape
    ):
        return weight
    if int((weight.reshape(-1, 4) != 0).sum(1).max()) > 2:
        return weight
    return torch.sparse.to_sparse_semi_structured(weight.contiguous())
