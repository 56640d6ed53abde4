"""The kernel against the formula left to autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from lorakit.adapter import Adapter, dense_weight
from lorakit.kernels.lora_linear import lora_linear

IN, OUT, RANK, SCALE = 6, 10, 3, 0.75


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The same, in so many words."""
    return linear(x, weight, bias) + scale * linear(linear(x, a), b)


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, width: int = IN, height: int = OUT) -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=chance, dtype=torch.float64).to(dtype)

    return {
        "x": normal(*shape, width).requires_grad_(),
        "weight": normal(height, width),
        "bias": normal(height),
        "a": normal(RANK, width).requires_grad_(),
        "b": normal(height, RANK).requires_grad_(),
    }


def gradients(y: Tensor, wanted: list[Tensor]) -> tuple[Tensor, ...]:
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return torch.autograd.grad(y, wanted, upstream)


SHAPES = [(), (1,), (5,), (2, 7), (1, 1), (2, 1, 3), (3, 2, 1, 4)]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_every_gradient_equal_autograds(shape: tuple[int, ...], with_bias: bool) -> None:
    given = inputs(shape)
    arguments = (given["x"], given["weight"], given["bias"] if with_bias else None, given["a"], given["b"], SCALE)
    wanted = [given["x"], given["a"], given["b"]]
    ours, theirs = lora_linear(*arguments), plain(*arguments)
    assert ours.shape == (*shape, OUT)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for name, mine, reference in zip("xab", gradients(ours, wanted), gradients(theirs, wanted), strict=True):
        assert mine.shape == reference.shape
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def test_numeric_gradients_agree() -> None:
    given = inputs((2, 3))
    assert torch.autograd.gradcheck(
        lambda x, a, b: lora_linear(x, given["weight"], given["bias"], a, b, SCALE), (given["x"], given["a"], given["b"])
    )


def test_an_input_that_needs_no_gradient_gets_none_and_the_factors_the_same() -> None:
    given = inputs((2, 3))
    with_x = gradients(lora_linear(*given.values(), SCALE), [given["a"], given["b"]])
    given["x"] = given["x"].detach()
    without = gradients(lora_linear(*given.values(), SCALE), [given["a"], given["b"]])
    assert all(torch.equal(p, q) for p, q in zip(with_x, without, strict=True))


@pytest.mark.parametrize("frozen", ["a", "b"])
def test_a_frozen_factor_does_not_change_the_other_gradients(frozen: str) -> None:
    given = inputs((2, 3))
    rest = [name for name in ("x", "a", "b") if name != frozen]
    both = gradients(lora_linear(*given.values(), SCALE), [given[name] for name in rest])
    given[frozen] = given[frozen].detach()
    one = gradients(lora_linear(*given.values(), SCALE), [given[name] for name in rest])
    assert all(torch.equal(p, q) for p, q in zip(both, one, strict=True))


def test_a_transposed_input_and_an_expanded_upstream_gradient_are_read_rightly() -> None:
    given = inputs((4, 5))
    x = given["x"].transpose(0, 1)
    ours = torch.autograd.grad(lora_linear(x, *list(given.values())[1:], SCALE).sum(), given["x"])[0]
    theirs = torch.autograd.grad(plain(x, *list(given.values())[1:], SCALE).sum(), given["x"])[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_nothing_that_is_given_is_written_to() -> None:
    given = inputs((2, 3))
    before = {name: tensor.detach().clone() for name, tensor in given.items()}
    lora_linear(*given.values(), SCALE).square().sum().backward()
    assert all(torch.equal(given[name], before[name]) for name in given)


def test_bf16_stays_within_its_rounding_of_float32_and_the_factors_gradients_are_float32() -> None:
    width, height, tokens = 96, 160, 40
    exact = inputs((tokens,), torch.float32, width, height)
    low = {name: tensor.detach() for name, tensor in exact.items()}
    for name in ("x", "weight", "bias"):
        low[name] = low[name].bfloat16()
        exact[name] = low[name].float()  # the same numbers: what differs is the arithmetic
    for name in ("x", "a", "b"):
        low[name].requires_grad_()
        exact[name].requires_grad_()
    ours = lora_linear(*low.values(), SCALE)
    theirs = plain(*exact.values(), SCALE)
    assert ours.dtype == torch.bfloat16
    pairs = [("y", ours, theirs)]
    found = gradients(ours, [low[n] for n in "xab"]), gradients(theirs, [exact[n] for n in "xab"])
    pairs += list(zip("xab", *found, strict=True))
    assert [p.dtype for _, p, _ in pairs] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for name, mine, reference in pairs:
        error = (mine.float() - reference).abs().max() / reference.abs().max()
        # bf16 rounds to 2⁻⁹ at each of three places: both factors and the hidden product; then the result.
        assert error < 4 * 2**-9, (name, float(error))
        assert error > 2**-16, name  # it was bf16 that was measured


@pytest.mark.parametrize(("width", "height"), [(IN, OUT), (OUT, IN)])
def test_conv1ds_transposed_weight_means_the_same_layer(width: int, height: int) -> None:
    conv = Conv1D(height, width)
    nn.init.normal_(conv.bias)
    dense = nn.Linear(width, height)
    with torch.no_grad():
        dense.weight.copy_(conv.weight.T)
        dense.bias.copy_(conv.bias)
    assert dense_weight(conv).shape == dense_weight(dense).shape == (height, width)
    x = torch.randn(3, 4, width, generator=torch.Generator().manual_seed(2)).requires_grad_()
    results = []
    for base in (conv, dense):
        adapter = Adapter(base, RANK, 16.0, 0.0, torch.Generator().manual_seed(3))
        nn.init.normal_(adapter.lora_B, generator=torch.Generator().manual_seed(4))
        y = adapter(x)
        results.append((y, *gradients(y, [x, adapter.lora_A, adapter.lora_B])))
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[0][0], plain(x, dense.weight, dense.bias, adapter.lora_A, adapter.lora_B, adapter.scale))
