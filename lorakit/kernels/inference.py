"""An adapted layer whose weights will not change any more: what can be worked out once is, and
zeros are left out where leaving them out is faster.

- The factors are cast, scaled and joined with the residual once.
- Inputs that no component reads, and outputs that none writes, are left out of the low-rank
  products of a few tokens (as
  when generating) where they are most of them. For many tokens gathering costs more than it saves:
    measured on a CPU, at
  128 tokens 1.5 to 2 times the dense product with half the columns dead, and 1.0 to 1.6 times with
    80 %.
- A base with 2 of every 4 inputs at zero uses the sparse tensor cores of a GPU that has them
  (PyTorch's semi-structured
  tensors; Mishra et al., arXiv 2104.08378). On a CPU there is no kernel that beats the dense
    product at half the zeros, so
  the dense product stays. The same holds for unstructured zeros everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

# Dead columns are skipped from this share on, for this many tokens at the most.
WORTHWHILE, FEW_TOKENS = 0.5, 8
# Sizes of which both sides of a semi-structured weight must be a multiple.
SEMI_STRUCTURED_MULTIPLE = 64


@dataclass(frozen=True)
class FrozenLayer:
    """y = W x + bias + B (A x), the scale within B.

    weight: dense [out, in], or semi-structured; a [rank, in] and b [out, rank]; inputs and outputs:
      the indices of the
    live ones, or None where all are used, with live_a [rank, live inputs] and live_b [live outputs,
    rank].
    """

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    inputs: Tensor | None
    outputs: Tensor | None
    live_a: Tensor
    live_b: Tensor

    @property
    def multiply_adds(self) -> int:
        """Of the low-rank products, for one token by itself."""
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
def freeze(weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> FrozenLayer:
    """From W [out, in], bias and the pair A [rank, in], B [out, rank] with its scale; all computed
    in W's dtype."""
    a, b = a.to(weight.dtype), (b * scale).to(weight.dtype)
    inputs, outputs = _live(a.any(0)), _live(b.any(1))
    live_a = a if inputs is None else a[:, inputs].contiguous()
    live_b = b if outputs is None else b[outputs].contiguous()
    return FrozenLayer(semi_structured(weight), bias, a, b, inputs, outputs, live_a, live_b)


def _live(used: Tensor) -> Tensor | None:
    """The indices of what is used, or None where too little is unused to be worth leaving out."""
    indices = used.nonzero().squeeze(1)
    return indices if 1 - len(indices) / len(used) >= WORTHWHILE else None


def semi_structured(weight: Tensor) -> Tensor:
    """The weight [out, in] in the form of sparse tensor cores, if it has at most 2 non-zeros in
    every 4 consecutive inputs, is on a GPU that has them (compute capability 8.0 and up), in half
    precision and of sizes they take; else the weight itself."""
    if not weight.is_cuda or weight.dtype not in (torch.float16, torch.bfloat16):
        return weight
    if torch.cuda.get_device_capability(weight.device) < (8, 0) or any(
        n % SEMI_STRUCTURED_MULTIPLE for n in weight.shape
    ):
        return weight
    if int((weight.reshape(-1, 4) != 0).sum(1).max()) > 2:
        return weight
    return torch.sparse.to_sparse_semi_structured(weight.contiguous())
