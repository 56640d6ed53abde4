"""Packed rows against padded ones, and their attention against a loop over rows in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from lorakit.kernels import levels, packed_attention
from lorakit.kernels.attention import attention
from lorakit.kernels.levels import Level
from lorakit.kernels.packing import (
    SIZES_PER_OCTAVE,
    current,
    rounded,
    using,
)
from tests.support.kernels import watch_calls, why_not
from tests.support.packing import (
    RAGGED,
    check,
    dropout_factors,
    inputs,
    packing_of,
    reference,
    rows_of,
    upstream_of,
)

LENGTHS = [(1,), (5,), (1, 1, 1), RAGGED, tuple(range(1, 21))]
# Over blocks of the kernels in C, at their borders, and with rows of one token among them.
BLOCK = 128  # BLOCK in csrc/attention_products.h
LONG = (BLOCK + 1, 1, BLOCK, 4 * BLOCK + 40, 33)


# -- where tokens stand ----------------------------------------------------------------------------


def packed_order(lengths: Sequence[int]) -> list[int]:
    """The rows, longest first; those of one length as they come."""
    return sorted(range(len(lengths)), key=lambda row: -lengths[row])


def padded(lengths: Sequence[int], longest: int, *shape: int) -> Tensor:
    return torch.randn(
        len(lengths),
        longest,
        *shape,
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float64,
    )


def test_rounded_counts_are_few_and_at_most_an_eighth_more() -> None:
    sizes = [rounded(count) for count in range(1, 2**14)]
    assert all(
        count <= size <= count * (1 + 1 / SIZES_PER_OCTAVE) for count, size in enumerate(sizes, 1)
    )
    assert sizes == sorted(sizes)
    assert all(rounded(size) == size for size in sizes)
    assert len(set(sizes)) <= 15 * SIZES_PER_OCTAVE


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed_tokens_are_those_of_the_rows_and_come_back_to_their_places(
    lengths: tuple[int, ...], extra: int
) -> None:
    packing = packing_of(lengths, extra)
    x = padded(lengths, packing.longest, 3)
    packed = packing.pack(x)
    assert packed.shape == (1, packing.tokens, 3)
    assert packing.tokens == rounded(sum(lengths) + 1)
    assert packing.lengths == sorted(lengths, reverse=True)
    assert packing.firsts.tolist() == [
        sum(packing.lengths[:row]) for row in range(len(lengths) + 1)
    ]
    for own, row in zip(rows_of(packed, packing), packed_order(lengths), strict=True):
        assert torch.equal(own, x[row, : lengths[row]])
    back = packing.unpack(packed)
    assert back.shape == x.shape
    for row, length in enumerate(lengths):
        assert torch.equal(back[row, :length], x[row, :length])


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_gradients_go_to_real_tokens_alone(lengths: tuple[int, ...]) -> None:
    packing = packing_of(lengths, extra=2)
    x = padded(lengths, packing.longest, 3).requires_grad_()
    upstream = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    packed = packing.pack(x).tanh()
    grad_packed, grad = torch.autograd.grad(packing.unpack(packed), [packed, x], upstream)
    real = torch.arange(packing.longest) < torch.tensor(lengths)[:, None]
    assert not grad_packed[:, packing.real :].any()  # what is read of fillers does not count
    expected = (upstream * (1 - x.detach().tanh() ** 2)) * real[..., None]
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)


def test_other_tensors_of_a_block_are_packed_once_each() -> None:
    packing = packing_of(RAGGED)
    own, same_for_all = padded(RAGGED, packing.longest, 2), padded([12], packing.longest, 2)
    assert torch.equal(packing.of_rows(own), packing.pack(own))
    for packed, length in zip(
        rows_of(packing.of_rows(same_for_all), packing), packing.lengths, strict=True
    ):
        assert torch.equal(packed, same_for_all[0, :length])
    assert packing.of_rows(own) is packing.of_rows(own)
    for seed in range(20):  # tensors that are gone must not be taken for new ones at their address
        x = torch.full((4, packing.longest, 2), float(seed))
        assert (packing.of_rows(x)[:, : packing.real] == seed).all()
        del x


def test_the_packing_of_a_pass_ends_with_it() -> None:
    outer, inner = packing_of((2,)), packing_of((3,))
    assert current() is None
    with using(outer):
        with using(inner):
            assert current() is inner
        assert current() is outer
        with using(None):
            assert current() is None
        assert current() is outer
    assert current() is None


def test_the_packing_of_a_pass_that_fails_ends_too() -> None:
    def fail() -> None:
        with using(packing_of((2,))):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert current() is None


# -- attention -------------------------------------------------------------------------------------


@pytest.fixture(params=["kernels in C", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The ways to compute it without tiles (test_attention_tiles.py)."""
    if request.param == "torch":
        monkeypatch.setenv("LORAKIT_KERNELS", "torch")
    elif reason := why_not("attention"):
        pytest.skip(reason)
    elif levels.used() is Level.amx:
        monkeypatch.setenv("LORAKIT_KERNELS", "avx512")
    return str(request.param)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [*LENGTHS, LONG], ids=str)
def test_attention_and_its_gradients_are_those_of_each_row_by_itself(
    way: str, lengths: tuple[int, ...], causal: bool
) -> None:
    packing = packing_of(lengths)
    check(packing, inputs(packing, 4, 2, 16), causal, 0.25, 3e-6)


@pytest.mark.parametrize("width", [16, 32, 64, 80, 128, 8, 20, 5, 1])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_head_sizes_and_shared_key_heads(way: str, heads: int, kv_heads: int, width: int) -> None:
    packing = packing_of((19, 1, 16, 4, 37))
    for causal in (False, True):
        check(
            packing, inputs(packing, heads, kv_heads, width, seed=width), causal, width**-0.5, 3e-6
        )


@pytest.mark.parametrize("lengths", [RAGGED, LONG], ids=str)
def test_bfloat16_is_close_to_float64(way: str, lengths: tuple[int, ...]) -> None:
    packing = packing_of(lengths)
    for causal in (False, True):
        check(packing, inputs(packing, 4, 2, 32, torch.bfloat16), causal, 32**-0.5, 0.02)


def test_scores_far_apart_neither_overflow_nor_vanish(way: str) -> None:
    packing = packing_of((17, 3, 40))
    for causal in (False, True):
        check(packing, inputs(packing, 2, 2, 16, spread=12.0), causal, 1.0, 1e-4)


@pytest.mark.parametrize("layout", ["one tensor", "heads outside"])
def test_queries_keys_and_values_are_read_where_they_stand(way: str, layout: str) -> None:
    """Thirds of one product, as in GPT-2; contiguous [1, heads, tokens, width], as rotary
    embeddings may leave them."""
    packing = packing_of(RAGGED)
    joint = torch.randn(1, packing.tokens, 3 * 2 * 16, generator=torch.Generator().manual_seed(3))
    tensors = [part.view(1, -1, 2, 16).transpose(1, 2) for part in joint.split(32, -1)]
    if layout == "heads outside":
        tensors = [x.contiguous() for x in tensors]
    check(packing, [x.detach().requires_grad_() for x in tensors], True, 0.25, 3e-6)


def test_an_upstream_gradient_of_any_layout_is_read_rightly(way: str) -> None:
    packing = packing_of(RAGGED)
    tensors = inputs(packing, 2, 2, 16)
    y = packed_attention.packed_attention(*tensors, packing, False, 0.25)
    flat = torch.zeros(1, 2, packing.tokens, 16)
    flat[:, :, : packing.real] = torch.randn(
        1, 2, packing.real, 16, generator=torch.Generator().manual_seed(5)
    )
    strided = torch.autograd.grad(y, tensors, flat.transpose(1, 2), retain_graph=True)
    contiguous = torch.autograd.grad(y, tensors, flat.transpose(1, 2).contiguous())
    for one, other in zip(strided, contiguous, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("row", [0, 2, 4])
def test_other_rows_change_nothing(way: str, row: int) -> None:
    """Bit for bit: a row's result and the gradients of its queries, keys and values, with other
    tokens, or NaN, in the other rows."""
    packing = packing_of((300, 21, 21, 9, 1))
    own = slice(*packing.firsts[row : row + 2].tolist())
    found = []
    for scale in (1.0, -7.0, torch.nan):
        tensors = inputs(packing, 4, 2, 16)
        factor = torch.full((packing.tokens, 1), scale)
        factor[own] = 1
        with torch.no_grad():
            for x in tensors:
                x *= factor
        y = packed_attention.packed_attention(*tensors, packing, True, 0.25)
        upstream = upstream_of(y) * factor[:, None]
        upstream[:, packing.real :] = 0
        found.append(
            [y[:, own], *(grad[:, :, own] for grad in torch.autograd.grad(y, tensors, upstream))]
        )
    for first, *others in zip(*found, strict=True):
        assert first.isfinite().all()
        assert all(torch.equal(first, other) for other in others)


def test_the_way_follows_the_type_and_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := why_not("attention"):
        pytest.skip(reason)
    calls = watch_calls(monkeypatch, "attention", "attention_tiles")

    def in_c(width: int = 16, dtype: torch.dtype = torch.float32) -> list[int]:
        """How many rows the kernels do, in each call of them."""
        calls.clear()
        packing = packing_of((3, 2000, 12))
        y = packed_attention.packed_attention(
            *inputs(packing, 2, 2, width, dtype), packing, True, 1.0
        )
        y[:, : packing.real].sum().backward()
        assert {call.library for call in calls} <= {"attention"}
        return [call.arguments[0].rows for call in calls]

    assert in_c() == in_c(dtype=torch.bfloat16) == [3, 3]
    assert in_c(width=20) == in_c(dtype=torch.float64) == []
    monkeypatch.setenv("LORAKIT_KERNELS", "torch")
    assert in_c() == []


@pytest.mark.parametrize("wanted", [(0,), (1, 2), (2,)], ids=str)
def test_gradients_that_are_not_wanted_change_nothing(way: str, wanted: tuple[int, ...]) -> None:
    """As where keys and values come from frozen layers of the first block."""
    packing = packing_of(RAGGED)
    tensors = inputs(packing, 2, 1, 16)
    some = [x if i in wanted else x.detach() for i, x in enumerate(tensors)]
    found = []
    for given in (tensors, some):
        y = packed_attention.packed_attention(*given, packing, True, 0.25)
        found.append(
            torch.autograd.grad(y[:, : packing.real].square().sum(), [given[i] for i in wanted])
        )
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_nothing_that_is_given_is_written_to(way: str) -> None:
    packing = packing_of(RAGGED)
    tensors = inputs(packing, 2, 1, 16)
    before = [x.detach().clone() for x in tensors]
    torch.manual_seed(0)
    packed_attention.packed_attention(*tensors, packing, True, 0.25, 0.25).square().sum().backward()
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


def test_the_backward_pass_can_be_taken_twice(way: str) -> None:
    """As with retain_graph: nothing that is saved may be overwritten."""
    packing = packing_of((5, 3, 270))
    tensors = inputs(packing, 2, 1, 16)
    y = packed_attention.packed_attention(*tensors, packing, False, 0.25, 0.25)
    upstream = torch.zeros_like(y)
    upstream[:, : packing.real] = upstream_of(y[:, : packing.real])
    first = torch.autograd.grad(y, tensors, upstream.clone(), retain_graph=True)
    second = torch.autograd.grad(y, tensors, upstream.clone())
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


# -- dropout of the weights ------------------------------------------------------------------------

P = 0.25


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [RAGGED, (300, 20, 1)], ids=str)
def test_dropped_weights_are_zero_or_scaled_and_gradients_know_which(
    way: str, lengths: tuple[int, ...], causal: bool
) -> None:
    packing = packing_of(lengths)
    tensors = inputs(packing, 4, 2, 16, spread=0.5)
    factors = dropout_factors(packing, tensors[0], tensors[1], causal, 0.25, P, seed=3)
    for factor in factors:
        kept = (factor - 1 / (1 - P)).abs() < 1e-4
        assert (kept | (factor == 0)).all()
    exact = [(factor > 0) / (1 - P) for factor in factors]
    torch.manual_seed(3)
    check(packing, tensors, causal, 0.25, 3e-6, exact, P)


def test_the_gradient_is_the_slope_under_one_mask(way: str) -> None:
    """Finite differences along a random direction, each with the same seed."""
    packing = packing_of((5, 1, 17))
    tensors = inputs(packing, 2, 1, 16)
    upstream = upstream_of(torch.empty(1, packing.real, 2, 16))

    def loss(parts: Sequence[Tensor]) -> Tensor:
        torch.manual_seed(5)
        y = packed_attention.packed_attention(*parts, packing, True, 0.25, P)
        return (y[:, : packing.real] * upstream).double().sum()

    gradients = torch.autograd.grad(loss(tensors), tensors)
    for number, gradient in enumerate(gradients):
        direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(number))
        with torch.no_grad():
            ends = [
                loss([x + step * direction if i == number else x for i, x in enumerate(tensors)])
                for step in (5e-3, -5e-3)
            ]
        slope = float(ends[0] - ends[1]) / 1e-2
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=2e-3, abs=2e-3)


def test_a_seed_decides_what_is_dropped(way: str) -> None:
    packing = packing_of(RAGGED)
    tensors = inputs(packing, 2, 2, 16)

    def result(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return packed_attention.packed_attention(*tensors, packing, True, 0.25, P)

    assert torch.equal(result(0), result(0))
    assert not torch.equal(result(0), result(1))


def test_the_mean_over_seeds_is_the_result_without_dropout(way: str) -> None:
    packing = packing_of((6, 2, 9))
    tensors = [x.detach() for x in inputs(packing, 2, 2, 16)]
    exact = packed_attention.packed_attention(*tensors, packing, False, 0.25)[:, : packing.real]
    torch.manual_seed(0)
    draws = torch.stack(
        [
            packed_attention.packed_attention(*tensors, packing, False, 0.25, P)[:, : packing.real]
            for _ in range(400)
        ]
    )
    error = (draws.mean(0) - exact) / (draws.std(0) / len(draws) ** 0.5 + 1e-6)
    assert float(error.abs().max()) < 6


def test_the_right_share_is_dropped_and_no_weight_tells_of_another(way: str) -> None:
    """Neighbouring keys and queries, heads, rows and calls."""
    packing, heads = packing_of((150, 150)), 2
    tensors = [x.detach() for x in inputs(packing, heads, 2, 32, spread=0.3)]
    calls = [
        dropout_factors(packing, tensors[0], tensors[1], False, 0.1, P, seed) for seed in (0, 1)
    ]
    # [calls, rows, heads, queries, keys]
    masks = torch.stack([torch.stack(factors) for factors in calls]).gt(0).double()
    noise = (P * (1 - P) / masks.numel()) ** 0.5
    assert abs(float(masks.mean()) - (1 - P)) < 5 * noise
    centred = masks - (1 - P)
    for dimension, distance in [(0, 1), (1, 1), (2, 1), *product((3, 4), (1, 2, 4, 16))]:
        size = masks.shape[dimension] - distance
        pairs = centred.narrow(dimension, 0, size) * centred.narrow(dimension, distance, size)
        correlation = float(pairs.mean()) / (P * (1 - P))
        assert abs(correlation) < 5 / pairs.numel() ** 0.5, (dimension, distance)


# -- threads ---------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_number_of_threads_changes_nothing(
    way: str, threads: None, kv_heads: int, causal: bool
) -> None:
    """Not a bit in the kernels, and nothing but roundings in torch."""
    packing = packing_of((5 * BLOCK - 3, 300, 7, 1, 90, 64))
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        tensors = inputs(packing, 4, kv_heads, 16)
        torch.manual_seed(2)
        y = packed_attention.packed_attention(*tensors, packing, causal, 0.25, P)
        upstream = torch.zeros_like(y)
        upstream[:, : packing.real] = upstream_of(y[:, : packing.real])
        found.append([y, *torch.autograd.grad(y, tensors, upstream)])
    for first, *others in zip(*found, strict=True):
        for other in others:
            if way == "kernels in C":
                assert torch.equal(first, other)
            torch.testing.assert_close(first, other, rtol=1e-4, atol=1e-5)


# -- as transformers calls it ----------------------------------------------------------------------


def test_a_packing_in_the_masks_place_is_attended_by(way: str) -> None:
    """Causal or not as the module or the call says, scaled by 1/√width unless the call says how,
    dropout while training alone."""
    packing = packing_of(RAGGED)
    tensors = inputs(packing, 4, 2, 16)
    module = nn.Module()
    module.is_causal = True  # type: ignore[assignment]
    module.eval()
    for call, causal, scaling in [
        ({}, True, 0.25),
        ({"is_causal": False, "scaling": 0.5}, False, 0.5),
    ]:
        y, weights = attention(module, *tensors, packing, dropout=0.5, **call)
        assert weights is None
        exact = reference(tensors, packing.lengths, causal, scaling)
        torch.testing.assert_close(y[:, : packing.real].double(), exact, rtol=1e-5, atol=1e-5)
    module.train()
    assert not torch.equal(
        attention(module, *tensors, packing, dropout=0.5)[0],
        attention(module, *tensors, packing)[0],
    )
