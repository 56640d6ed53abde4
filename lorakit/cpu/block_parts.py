"""Building blocks of `decoder_block` and `encoder_block`: adapted products, and attention.

Each backward pass can run only once: it overwrites saved tensors with gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, TypeVar

from torch import Tensor

from lorakit.kernels import packed_attention as attention
from lorakit.kernels.products import LinearCall, Product, backward_in_c, forward_in_c

T = TypeVar("T")


class ForwardProducts:
    """The products of a block in its forward pass, one per call. `made` holds what the backward
    pass needs."""

    def __init__(
        self,
        weights: Sequence[tuple[Tensor, Tensor | None]],
        layers: Sequence[int],
        scales: Sequence[float],
        factors: Sequence[Tensor | None],
    ) -> None:
        """weights: weight and bias of each product; layers: the number of layers of each product;
        scales: one for each layer; factors: three tensors for each layer."""
        self.weights, self.scales = weights, _of_products(scales, layers)
        self.factors = _of_products(factors, [3 * count for count in layers])
        self.made: list[Product] = []

    def __call__(self, rows: Tensor, residual: Tensor | None = None) -> Tensor:
        """Compute the next product [tokens, outputs] of rows [tokens, in], plus the residual."""
        number = len(self.made)
        scales, factors = self.scales[number], self.factors[number]
        y, product = forward_in_c(rows, *self.weights[number], scales, factors, residual=residual)
        self.made.append(product)
        return y

    @property
    def calls(self) -> list[LinearCall]:
        return [product.call for product in self.made]

    @property
    def hidden(self) -> list[Tensor]:
        """Hidden values of each product, as `BackwardProducts` takes them."""
        return [product.hidden for product in self.made]


class BackwardProducts:
    """The products of a block in its backward pass."""

    def __init__(
        self, calls: Sequence[LinearCall], layers: Sequence[int], kept: Sequence[Tensor]
    ) -> None:
        """layers: the number of layers of each product; kept: the hidden values of each product,
        then the factors of all layers."""
        self.calls, self.hidden = calls, kept[: len(calls)]
        self.factors: list[Sequence[Tensor | None]] = [
            *_of_products(kept[len(calls) :], [3 * count for count in layers])
        ]
        self._found: list[list[Tensor | None]] = [[] for _ in calls]

    def __call__(
        self, number: int, rows: Tensor, grad_y: Tensor, residual: Tensor | None = None
    ) -> Tensor:
        """Compute the gradient of rows [tokens, in], plus the residual."""
        grad = self.where_wanted(True, number, rows, grad_y, residual)
        assert grad is not None
        return grad

    def where_wanted(
        self,
        wanted: bool,
        number: int,
        rows: Tensor,
        grad_y: Tensor,
        residual: Tensor | None = None,
    ) -> Tensor | None:
        product = Product(self.calls[number], rows, self.hidden[number])
        factors = self.factors[number]
        grad, self._found[number] = backward_in_c(product, grad_y, factors, wanted, None, residual)
        return grad

    @property
    def gradients(self) -> list[Tensor | None]:
        """The gradients of the factors, product by product."""
        return [gradient for of_product in self._found for gradient in of_product]


def attend(
    form: attention.AttentionForm, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, attention.AttentionCall]:
    """Compute attention [1, tokens, heads, head_dim] of packed rows, without autograd. Returns it
    with the sums and the call that `attend_backward` needs."""
    packing = form.packing
    attended = q.new_empty(1, packing.tokens, q.shape[1], q.shape[3])
    attended[:, packing.real :] = 0
    sums, call = attention.forward_in_c(form, q, k, v, attended)
    return attended, sums, call


def attend_backward(
    form: attention.AttentionForm,
    call: attention.AttentionCall,
    kept: Sequence[Tensor],
    grad: Tensor,
) -> Tensor:
    """Compute the gradient of q/k/v [tokens, …] from the gradient of attention's output. kept: q,
    k, v, attended, sums."""
    _, k, _, attended, _ = kept
    results = attention.room_for_gradients(form.packing, grad.view(attended.shape), k.shape[1])
    attention.backward_in_c(form, call, kept, grad, results)
    size = results[0].stride(1)  # one token's queries, keys and values, side by side
    return results[0].as_strided((len(grad), size), (size, 1))


def taken(x: Tensor, read: Tensor | None) -> Tensor:
    """The rows of x [tokens, width] that are read: [read, width]; all where `read` is None."""
    return x if read is None else x.index_select(0, read)


def put_back(x: Tensor, read: Tensor | None, tokens: int) -> Tensor:
    """Inverse of `taken`: [tokens, width] with zeros in the other rows."""
    return x if read is None else x.new_zeros(tokens, x.shape[1]).index_copy_(0, read, x)


def go_through_once(ctx: Any) -> None:
    """Raise RuntimeError on the second call."""
    if hasattr(ctx, "spent"):
        what = "this block's gradients took the place of what it had saved"
        raise RuntimeError(f"{what}: it can not be gone through again")
    ctx.spent = True


def _of_products(values: Sequence[T], counts: Sequence[int]) -> list[Sequence[T]]:
    ends = list(accumulate(counts))
    return [values[end - count : end] for count, end in zip(counts, ends, strict=True)]
