"""LoRA linear layers by AMX tiles (csrc/linear.c) against the formula in float64, and against plain
products in bfloat16."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from lorakit.kernels.linear_tiles import FEWEST_TOKENS, backward_in_c, forward_in_c, frozen_linear
from torch import Tensor
from torch.nn.functional import linear

from lorakit.kernels.levels import Level
from lorakit.kernels.lora_linear import LoraFactors, lora_linears
from tests.support.kernels import CallInC, watch_calls, why_not

pytestmark = pytest.mark.skipif(
    bool(why_not("lora_linear", Level.amx)), reason=why_not("lora_linear", Level.amx)
)


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
def tiles(monkeypatch: pytest.MonkeyPatch) -> list[CallInC]:
    """The calls of functions in C."""
    return watch_calls(monkeypatch, "linear")


@pytest.mark.parametrize(
    "settings", [{}, {"mask": True, "bias": False}, {"transposed": True}, {"gates": True}], ids=str
)
@pytest.mark.parametrize("name", SHAPES)
def test_results_are_as_near_to_float64_as_those_of_plain_products(
    name: str, settings: dict[str, bool], tiles: list[CallInC], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = run(SHAPES[name], torch.float64, **settings)
    assert not tiles
    ours = errors(run(SHAPES[name], torch.bfloat16, **settings), exact)
    assert [call.function for call in tiles] == ["lora_forward", "lora_backward"]
    with monkeypatch.context() as patch:
        patch.setenv("LORAKIT_KERNELS", "torch")
        theirs = errors(run(SHAPES[name], torch.bfloat16, **settings), exact)
    assert len(tiles) == 2
    for part, error in ours.items():
        assert error <= 1.1 * theirs[part] + 1e-4, part
        assert error < 0.008, part


def test_the_number_of_threads_changes_no_bit() -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(SHAPES["grouped queries"], torch.bfloat16, gates=True))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(value, found[0][name]) for name, value in other.items())


def test_no_gradient_of_x_where_none_is_wanted(tiles: list[CallInC]) -> None:
    a, b = torch.randn(4, 32, requires_grad=True), torch.randn(64, 4, requires_grad=True)
    x, weight = torch.randn(9, 32).bfloat16(), torch.randn(64, 32).bfloat16()
    (y,) = lora_linears(x, weight, None, [LoraFactors(a, b, 1.0)])
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert a.grad is not None
    assert x.grad is None
    expected = x.double().T @ (torch.ones(9, 64).double() @ b.detach().bfloat16().double())
    torch.testing.assert_close(a.grad.double().T, expected, rtol=0.02, atol=0.05)
    assert [call.function for call in tiles] == ["lora_forward", "lora_backward"]


@pytest.mark.parametrize("what", ["float32", "width", "outputs", "factors", "no tokens"])
def test_what_tiles_do_not_take_goes_the_other_way(what: str, tiles: list[CallInC]) -> None:
    dtype = torch.float32 if what == "float32" else torch.bfloat16
    width, out, tokens = (
        40 if what == "width" else 64,
        40 if what == "outputs" else 64,
        0 if what == "no tokens" else 3,
    )
    wide = torch.float64 if what == "factors" else torch.float32
    x, weight = torch.ones(tokens, width, dtype=dtype), torch.ones(out, width, dtype=dtype)
    (y,) = lora_linears(
        x,
        weight,
        None,
        [LoraFactors(torch.ones(2, width, dtype=wide), torch.ones(out, 2, dtype=wide), 0.5)],
    )
    assert y.shape == (tokens, out)
    assert (y == 2 * width).all()
    assert not tiles


def test_rows_that_are_columns_of_another_tensor() -> None:
    wide = torch.randn(40, 160, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight, factors = (
        torch.randn(32, 64).bfloat16(),
        [LoraFactors(torch.randn(2, 64), torch.randn(32, 2), 1.0)],
    )
    (part,) = lora_linears(wide[:, 32:96], weight, None, factors)
    (copy,) = lora_linears(wide[:, 32:96].contiguous(), weight, None, factors)
    assert torch.equal(part, copy)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 16, 97])
def test_a_frozen_layer(tokens: int, bias: bool, tiles: list[CallInC]) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, tokens, 64, generator=rng).bfloat16().requires_grad_()
    weight, shift = (
        torch.randn(96, 64, generator=rng).bfloat16(),
        torch.randn(96, generator=rng).bfloat16() if bias else None,
    )
    upstream = torch.randn(2, tokens, 96, generator=rng).bfloat16()
    y = frozen_linear(x, weight, shift)
    y.backward(upstream)  # type: ignore[no-untyped-call]
    assert [call.function for call in tiles] == (
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
def test_residuals_are_added_before_rounding(tokens: int, components: int) -> None:
    """To y, and to the gradient of x."""
    rng = torch.Generator().manual_seed(0)
    x, weight, onto_y, onto_x, grad_y = (
        torch.randn(*size, generator=rng).bfloat16()
        for size in ((tokens, 64), (96, 64), (tokens, 96), (tokens, 64), (tokens, 96))
    )
    a, b = (
        torch.randn(components, 64, generator=rng).bfloat16(),
        torch.randn(96, components, generator=rng).bfloat16(),
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


def test_what_one_layer_gives_may_be_changed_in_place() -> None:
    a, b = torch.randn(4, 32, requires_grad=True), torch.randn(64, 4, requires_grad=True)
    (y,) = lora_linears(
        torch.randn(3, 9, 32).bfloat16(),
        torch.randn(64, 32).bfloat16(),
        None,
        [LoraFactors(a, b, 1.0)],
    )
    transposed = y.transpose(1, 2)
    transposed /= 2
    transposed.sum().backward()  # type: ignore[no-untyped-call]
    assert b.grad is not None
