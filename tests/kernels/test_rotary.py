"""Rotary embeddings in one pass against transformers' own function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.llama import modeling_llama

from lorakit.kernels.rotary import faster, use_fast_rotary
from tests.support.kernels import why_not

needs_c = pytest.mark.skipif(bool(why_not("rotary")), reason=why_not("rotary"))
THEIRS = getattr(modeling_llama.apply_rotary_pos_emb, "theirs", modeling_llama.apply_rotary_pos_emb)
OURS = faster(THEIRS)


def inputs(
    heads: int, tokens: int, width: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """q and k with tokens outside of heads in memory, as projections give them; cos and sin [1,
    tokens, width]."""
    rng = torch.Generator().manual_seed(heads + tokens + width)
    q, k = (
        torch.randn(1, tokens, n, width, generator=rng).to(dtype).transpose(1, 2)
        for n in (heads, 1)
    )
    angles = torch.randn(1, tokens, width // 2, generator=rng).repeat(1, 1, 2)
    return q, k, angles.cos().to(dtype), angles.sin().to(dtype)


@needs_c
@pytest.mark.parametrize("width", [2, 6, 16, 64, 80])
@pytest.mark.parametrize("tokens", [0, 1, 7, 300])
@pytest.mark.parametrize("transposed", [False, True])
def test_values_and_gradients_are_theirs(tokens: int, width: int, transposed: bool) -> None:
    """Whatever the layout of the gradient that comes back: that of a key in a product with its
    transpose is transposed."""
    q, k, cos, sin = inputs(3, tokens, width)
    found = []
    for function in (OURS, THEIRS):
        a, b = q.clone().requires_grad_(), k.clone().requires_grad_()
        results = function(a, b, cos, sin)
        rng = torch.Generator().manual_seed(1)
        for y in results:
            weight = torch.randn(*y.shape[:2], y.shape[3], y.shape[2], generator=rng)
            (
                y.transpose(2, 3) * weight
                if transposed
                else y * weight.transpose(2, 3).contiguous()
            ).sum().backward()
        found.append([*results, a.grad, b.grad])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@needs_c
def test_bf16_is_within_a_rounding_of_float32() -> None:
    q, k, cos, sin = inputs(4, 50, 32, torch.bfloat16)
    exact = THEIRS(*(x.double() for x in (q, k, cos, sin)))
    for ours, right in zip(OURS(q, k, cos, sin), exact, strict=True):
        assert ((ours.double() - right).abs() <= right.abs() * 2**-8 + 1e-6).all()


@pytest.mark.parametrize("rows", [2, 3])
def test_several_rows_are_left_to_theirs(rows: int) -> None:
    q, k, cos, sin = (x.expand(rows, *x.shape[1:]).contiguous() for x in inputs(2, 5, 8))
    for ours, theirs in zip(OURS(q, k, cos, sin), THEIRS(q, k, cos, sin), strict=True):
        assert torch.equal(ours, theirs)


@needs_c
def test_the_function_is_replaced_once() -> None:
    class Model(torch.nn.Module):
        __module__ = modeling_llama.__name__

    use_fast_rotary(Model())
    once = modeling_llama.apply_rotary_pos_emb
    use_fast_rotary(Model())
    assert modeling_llama.apply_rotary_pos_emb is once
    assert once.theirs is THEIRS
