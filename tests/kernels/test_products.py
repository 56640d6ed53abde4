"""LoRA linear layers in C (csrc/linear.c, csrc/linear_tiles.c) against the formula in float64, and
against plain products in their own type."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from lorakit.kernels.levels import Level
from lorakit.kernels.lora_linear import LoraFactors, lora_linears
from lorakit.kernels.products import (
    FEWEST_TOKENS,
    backward_in_c,
    forward_in_c,
    frozen_linear,
    kernel_level,
)
from tests.support.kernels import CallInC, watch_calls, why_not


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=str, autouse=True)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    if kernel_level(found) is Level.torch:
        needed = Level.amx if found == torch.bfloat16 else Level.avx2
        pytest.skip(why_not("lora_linear", needed) or f"{found} takes {needed}")
    return found


class Layers(NamedTuple):
    """tokens [tokens, width] go through layers of outs and ranks."""

    tokens: int
    width: int
    outs: list[int]
    ranks: list[int]


SHAPES = {
    "one token": Layers(1, 32, [32], [1]),
    "q, k, v": Layers(100, 96, [96] * 3, [8] * 3),
    "grouped queries": Layers(257, 192, [192, 64, 64], [16, 3, 5]),
    "a layer without components": Layers(20, 64, [32, 64, 32], [4, 0, 9]),
    "odd widths": Layers(33, 64, [40, 24], [33, 2]),
    "a rank above the width": Layers(70, 64, [96], [100]),
    "several chunks of the weight": Layers(40, 64, [20000, 480], [4, 4]),
    "several parts of a row": Layers(65, 3104, [96], [8]),
}


def run(
    layers: Layers,
    dtype: torch.dtype,
    mask: bool = False,
    bias: bool = True,
    transposed: bool = False,
    gates: bool = False,
) -> dict[str, Tensor]:
    """Outputs and gradients in float64; the inputs are bfloat16's numbers whatever the type."""
    rng = torch.Generator().manual_seed(layers.tokens)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng).bfloat16().to(dtype)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    outputs = sum(layers.outs)
    x = normal(layers.tokens, layers.width).requires_grad_()
    weight = normal(outputs, layers.width) / 8
    weight = weight.T.contiguous().T if transposed else weight
    shift, upstream = normal(outputs), [normal(layers.tokens, out) for out in layers.outs]
    factors = [
        LoraFactors(
            (normal(rank, layers.width) / 8).to(wide).requires_grad_(),
            normal(out, rank).to(wide).requires_grad_(),
            2.0 / (1 + number),
        )
        for number, (out, rank) in enumerate(zip(layers.outs, layers.ranks, strict=True))
    ]
    for number in range(0, len(factors) if gates else 0, 2):  # the others have none
        gate = normal(layers.ranks[number]).sigmoid().to(wide).detach().requires_grad_()
        factors[number] = factors[number]._replace(gate=gate)
    kept = (normal(layers.tokens, sum(layers.ranks)) > 0).to(dtype) if mask else None
    ys = lora_linears(x, weight, shift if bias else None, factors, kept)
    torch.autograd.backward(ys, upstream)
    found = {"x": x.grad} | {f"y{number}": y.detach() for number, y in enumerate(ys)}
    for number, own in enumerate(factors):
        found |= {f"a{number}": own.a.grad, f"b{number}": own.b.grad}
        found |= {} if own.gate is None else {f"gate{number}": own.gate.grad}
    assert all(value is not None for value in found.values())
    return {name: value.double() for name, value in found.items() if value is not None}


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    return {
        name: float((value - exact[name]).norm() / exact[name].norm().clamp_min(1e-9))
        for name, value in found.items()
    }


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[CallInC]:
    """The calls of functions in C."""
    return watch_calls(monkeypatch, "linear", "linear_tiles")


@pytest.mark.parametrize(
    "settings", [{}, {"mask": True, "bias": False}, {"transposed": True}, {"gates": True}], ids=str
)
@pytest.mark.parametrize("name", SHAPES)
def test_results_are_as_near_to_float64_as_those_of_plain_products(
    name: str,
    settings: dict[str, bool],
    calls: list[CallInC],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
) -> None:
    exact = run(SHAPES[name], torch.float64, **settings)
    assert not calls
    ours = errors(run(SHAPES[name], dtype, **settings), exact)
    assert [call.function for call in calls] == ["lora_forward", "lora_backward"]
    with monkeypatch.context() as patch:
        patch.setenv("LORAKIT_KERNELS", "torch")
        theirs = errors(run(SHAPES[name], dtype, **settings), exact)
    assert len(calls) == 2
    for part, error in ours.items():
        assert error <= 1.1 * theirs[part] + 1e-4, part
        assert error < 0.008, part


def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(SHAPES["grouped queries"], dtype, gates=True))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(value, found[0][name]) for name, value in other.items())


def test_no_gradient_of_x_where_none_is_wanted(calls: list[CallInC], dtype: torch.dtype) -> None:
    a, b = torch.randn(4, 32, requires_grad=True), torch.randn(64, 4, requires_grad=True)
    x, weight = torch.randn(9, 32).to(dtype), torch.randn(64, 32).to(dtype)
    (y,) = lora_linears(x, weight, None, [LoraFactors(a, b, 1.0)])
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert a.grad is not None
    assert x.grad is None
    expected = x.double().T @ (torch.ones(9, 64).double() @ b.detach().to(dtype).double())
    torch.testing.assert_close(a.grad.double().T, expected, rtol=0.02, atol=0.05)
    assert [call.function for call in calls] == ["lora_forward", "lora_backward"]


@pytest.mark.parametrize("what", ["float16", "width", "outputs", "factors", "no tokens"])
def test_what_tiles_do_not_take_goes_the_other_way(
    what: str, calls: list[CallInC], dtype: torch.dtype
) -> None:
    own = torch.float16 if what == "float16" else dtype
    width, out, tokens = (
        40 if what == "width" else 64,
        40 if what == "outputs" else 64,
        0 if what == "no tokens" else 3,
    )
    wide = torch.float64 if what == "factors" else torch.float32
    x, weight = torch.ones(tokens, width, dtype=own), torch.ones(out, width, dtype=own)
    (y,) = lora_linears(
        x,
        weight,
        None,
        [LoraFactors(torch.ones(2, width, dtype=wide), torch.ones(out, 2, dtype=wide), 0.5)],
    )
    assert y.shape == (tokens, out)
    assert (y == 2 * width).all()
    assert not calls


def test_rows_that_are_columns_of_another_tensor(dtype: torch.dtype) -> None:
    wide = torch.randn(40, 160, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight, factors = (
        torch.randn(32, 64).to(dtype),
        [LoraFactors(torch.randn(2, 64), torch.randn(32, 2), 1.0)],
    )
    (part,) = lora_linears(wide[:, 32:96], weight, None, factors)
    (copy,) = lora_linears(wide[:, 32:96].contiguous(), weight, None, factors)
    assert torch.equal(part, copy)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 16, 97])
def test_a_frozen_layer(tokens: int, bias: bool, calls: list[CallInC], dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, tokens, 64, generator=rng).to(dtype).requires_grad_()
    weight, shift = (
        torch.randn(96, 64, generator=rng).to(dtype),
        torch.randn(96, generator=rng).to(dtype) if bias else None,
    )
    upstream = torch.randn(2, tokens, 96, generator=rng).to(dtype)
    y = frozen_linear(x, weight, shift)
    y.backward(upstream)  # type: ignore[no-untyped-call]
    assert [call.function for call in calls] == (
        [] if 2 * tokens < FEWEST_TOKENS else ["lora_forward", "lora_backward"]
    )
    exact = linear(x.detach().double(), weight.double(), None if shift is None else shift.double())
    assert x.grad is not None
    torch.testing.assert_close(y.detach().double(), exact, rtol=0.005, atol=0.01)
    torch.testing.assert_close(
        x.grad.double(), upstream.double() @ weight.double(), rtol=0.005, atol=0.01
    )


@pytest.mark.parametrize("components", [0, 5])
@pytest.mark.parametrize("tokens", [1, 50])
def test_residuals_are_added_before_rounding(
    tokens: int, components: int, dtype: torch.dtype
) -> None:
    """To y, and to the gradient of x."""
    rng = torch.Generator().manual_seed(0)
    x, weight, onto_y, onto_x, grad_y = (
        torch.randn(*size, generator=rng).to(dtype)
        for size in ((tokens, 64), (96, 64), (tokens, 96), (tokens, 64), (tokens, 96))
    )
    a, b = (
        torch.randn(components, 64, generator=rng).to(dtype),
        torch.randn(96, components, generator=rng).to(dtype),
    )
    factors = [a.float(), b.float(), None]
    y, product = forward_in_c(x, weight, None, [0.5], factors, residual=onto_y)
    grad_x, of_factors = backward_in_c(product, grad_y, factors, True, residual=onto_x)
    plain, same = backward_in_c(product, grad_y, factors, True)
    dense = weight.double() + 0.5 * b.double() @ a.double()
    assert grad_x is not None and plain is not None  # noqa: PT018
    for found, exact in (
        (y, onto_y.double() + x.double() @ dense.T),
        (grad_x, onto_x.double() + grad_y.double() @ dense),
    ):
        assert (found.double() - exact).norm() <= 2**-8 * exact.norm()
    assert (plain.double() - grad_y.double() @ dense).norm() <= 2**-8 * (
        grad_y.double() @ dense
    ).norm()
    assert [None if grad is None else grad.tolist() for grad in of_factors] == [
        None if grad is None else grad.tolist() for grad in same
    ]


def test_what_one_layer_gives_may_be_changed_in_place(dtype: torch.dtype) -> None:
    a, b = torch.randn(4, 32, requires_grad=True), torch.randn(64, 4, requires_grad=True)
    (y,) = lora_linears(
        torch.randn(3, 9, 32).to(dtype),
        torch.randn(64, 32).to(dtype),
        None,
        [LoraFactors(a, b, 1.0)],
    )
    transposed = y.transpose(1, 2)
    transposed /= 2
    transposed.sum().backward()  # type: ignore[no-untyped-call]
    assert b.grad is not None
