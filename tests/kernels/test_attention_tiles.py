"""Attention of packed rows by tiles, in bfloat16, against float64 and against the kernels without
tiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.kernels import packed_attention
from lorakit.kernels.levels import Level
from lorakit.kernels.packing import Packing
from tests.support.kernels import watch_calls, why_not
from tests.support.packing import (
    RAGGED,
    check,
    dropout_factors,
    inputs,
    packing_of,
    reference,
    upstream_of,
)

if reason := why_not("attention", Level.amx):
    pytest.skip(reason, allow_module_level=True)

# About the sizes of halves of a block, blocks and chunks of blocks.
LENGTHS = (700, 300, 33, 32, 31, 17, 16, 15, 1)
FORMS = [(2, 2, 32), (3, 1, 64), (9, 1, 32), (2, 1, 128), (6, 2, 96)]  # heads, kv heads, width


def without_tiles(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> Any:
    """What `run` returns with the kernels that compute in float32."""
    with monkeypatch.context() as patched:
        patched.setenv("LORAKIT_KERNELS", "avx512")
        return run()


def results(
    tensors: Sequence[Tensor],
    packing: Packing,
    causal: bool,
    scaling: float,
    dropout: float = 0.0,
    seed: int = 0,
) -> list[Tensor]:
    """y and the gradients of query, key and value: [tokens, (kv) heads, width] each, without
    fillers."""
    torch.manual_seed(seed)
    y = packed_attention.packed_attention(*tensors, packing, causal, scaling, dropout)
    real = y[:, : packing.real]
    grads = torch.autograd.grad(real, tensors, upstream_of(real))
    assert not any(grad[:, :, packing.real :].any() for grad in grads), "a gradient for fillers"
    return [x.detach()[0, : packing.real] for x in (y, *(grad.transpose(1, 2) for grad in grads))]


def exact_results(
    tensors: Sequence[Tensor], packing: Packing, causal: bool, scaling: float
) -> list[Tensor]:
    double = [x.detach().double().requires_grad_() for x in tensors]
    y = reference(double, packing.lengths, causal, scaling)
    grads = torch.autograd.grad(y, double, upstream_of(y).bfloat16().double())
    return [x.detach()[0, : packing.real] for x in (y, *(grad.transpose(1, 2) for grad in grads))]


def errors(found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """As shares of the norm, which a row of one token has none of in the gradients of its query and
    its key."""
    return [
        float((x.detach().double() - y).norm() / y.norm().clamp(min=1.0))
        for x, y in zip(found, exact, strict=True)
    ]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), FORMS)
def test_the_error_of_each_row_is_a_few_roundings(
    heads: int, kv_heads: int, width: int, causal: bool
) -> None:
    packing = packing_of(LENGTHS)
    tensors = inputs(packing, heads, kv_heads, width, torch.bfloat16)
    exact = exact_results(tensors, packing, causal, width**-0.5)
    ours = results(tensors, packing, causal, width**-0.5)
    # Each row by itself, so that no short one hides behind the long ones; two to four values that
    # are rounded to 2⁻⁹ meet.
    for name, mine, right in zip(["y", "query", "key", "value"], ours, exact, strict=True):
        for row, (one, other) in enumerate(
            zip(mine.split(packing.lengths), right.split(packing.lengths), strict=True)
        ):
            assert errors([one], [other])[0] <= 3 * 2**-9, (name, packing.lengths[row])


@pytest.mark.parametrize(
    "length", [1, 2, 15, 16, 17, 31, 32, 33, 48, 49, 255, 256, 257, 289, 513, 1100]
)
def test_rows_of_every_length(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    """Against the kernels that compute in float32: with weights and their gradients rounded to
    bfloat16, the error may be twice theirs, of rounding the results and, for the mean of a query's
    gradients, y."""
    packing = packing_of((length,))
    tensors = inputs(packing, 2, 1, 32, torch.bfloat16)
    for causal in (False, True):
        exact = exact_results(tensors, packing, causal, 32**-0.5)
        theirs = without_tiles(
            monkeypatch, lambda causal=causal: results(tensors, packing, causal, 32**-0.5)
        )
        ours = results(tensors, packing, causal, 32**-0.5)
        for mine, other in zip(errors(ours, exact), errors(theirs, exact), strict=True):
            assert mine <= 2 * other + 1e-6


@pytest.mark.parametrize("scaling", [1.0, 0.0, -0.3])
def test_scores_far_apart_and_any_scaling(scaling: float) -> None:
    """The largest score of a query may come in any chunk of keys; weights of only one or two keys
    are left."""
    packing = packing_of((600, 17, 3))
    for causal in (False, True):
        tensors = inputs(packing, 2, 2, 32, torch.bfloat16, spread=12.0)
        y = packed_attention.packed_attention(*tensors, packing, causal, scaling)[:, : packing.real]
        exact = reference(tensors, packing.lengths, causal, scaling)
        assert errors([y], [exact.detach()])[0] <= 3 * 2**-9
        check(
            packing,
            inputs(packing, 2, 2, 32, torch.bfloat16, spread=2.0),
            causal,
            scaling,
            4 * 2**-9,
        )


@pytest.mark.parametrize("layout", ["one tensor", "heads outside"])
def test_queries_keys_and_values_are_read_where_they_stand(layout: str) -> None:
    packing = packing_of(RAGGED)
    joint = torch.randn(
        1, packing.tokens, 3 * 2 * 32, generator=torch.Generator().manual_seed(3)
    ).bfloat16()
    tensors = [part.view(1, -1, 2, 32).transpose(1, 2) for part in joint.split(64, -1)]
    if layout == "heads outside":
        tensors = [x.contiguous() for x in tensors]
    check(packing, [x.detach().requires_grad_() for x in tensors], True, 0.25, 3 * 2**-9)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(40, 12, 2, 1), (530, 20, 1)], ids=str)
def test_dropout_drops_what_the_kernels_without_tiles_drop(
    monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...], causal: bool
) -> None:
    packing = packing_of(lengths)
    tensors = inputs(packing, 4, 2, 64, torch.bfloat16, spread=0.5)
    arguments = packing, tensors[0], tensors[1], causal, 0.125, 0.25, 3
    ours = dropout_factors(*arguments)
    theirs = without_tiles(monkeypatch, lambda: dropout_factors(*arguments))
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine > 0, other > 0)
    exact = [(factor > 0) / 0.75 for factor in ours]
    torch.manual_seed(3)
    check(packing, tensors, causal, 0.125, 3 * 2**-9, exact, 0.25)


@pytest.mark.parametrize(
    "lengths", [(1100, 300, 40, 40, 7, 1), tuple(range(1, 40))], ids=["few tasks", "many tasks"]
)
def test_threads_change_nothing(lengths: tuple[int, ...]) -> None:
    packing = packing_of(lengths)
    tensors = inputs(packing, 4, 2, 32, torch.bfloat16)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(tensors, packing, True, 0.2, dropout=0.1))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize("lengths", [(33, 21, 9, 1), (40,) * 20], ids=["few tasks", "many tasks"])
def test_heads_that_share_keys_add_up(lengths: tuple[int, ...]) -> None:
    """To the gradients of keys and values that each head has by itself."""
    packing = packing_of(lengths)
    query, key, value = inputs(packing, 3, 1, 32, torch.bfloat16)
    shared = results((query, key, value), packing, True, 0.2)
    own = [
        x.detach()
        .expand(1, 3, -1, -1)
        .transpose(1, 2)
        .contiguous()
        .transpose(1, 2)
        .requires_grad_()
        for x in (key, value)
    ]
    apart = results((query, *own), packing, True, 0.2)
    assert all(torch.equal(one, other) for one, other in zip(shared[:2], apart[:2], strict=True))
    sums = [grad.double().sum(1, keepdim=True) for grad in apart[2:]]
    assert max(errors(shared[2:], sums)) <= 2**-8


@pytest.mark.parametrize("row", range(5))
def test_nothing_outside_of_a_row_is_read(row: int) -> None:
    """Bit for bit, with NaN in all other rows and in the fillers; and those of the other rows'
    results do not come in either."""
    packing = packing_of((300, 33, 21, 9, 1))
    own = slice(*packing.firsts[row : row + 2].tolist())
    tensors = inputs(packing, 4, 2, 32, torch.bfloat16)
    found = []
    for value in (0.0, torch.nan):
        upstream = upstream_of(torch.empty(1, packing.tokens, 4, 32, dtype=torch.bfloat16))
        with torch.no_grad():
            for x in (*(x.transpose(1, 2) for x in tensors), upstream):
                x[:, : own.start] = x[:, own.stop :] = value
        y = packed_attention.packed_attention(*tensors, packing, True, 0.25)
        found.append(
            [y[:, own], *(grad[:, :, own] for grad in torch.autograd.grad(y, tensors, upstream))]
        )
    for one, other in zip(*found, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)


def test_the_backward_pass_can_be_taken_twice() -> None:
    packing = packing_of((5, 3, 270))
    tensors = inputs(packing, 2, 1, 32, torch.bfloat16)
    y = packed_attention.packed_attention(*tensors, packing, False, 0.25, 0.25)
    first = torch.autograd.grad(y, tensors, upstream_of(y), retain_graph=True)
    second = torch.autograd.grad(y, tensors, upstream_of(y))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_the_way_follows_the_type_and_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = watch_calls(monkeypatch, "attention", "attention_tiles")

    def in_c(width: int, dtype: torch.dtype) -> list[tuple[str, int]]:
        """(the library, how many rows) of each call of a kernel in C."""
        calls.clear()
        packing = packing_of((2000, 3))
        y = packed_attention.packed_attention(
            *inputs(packing, 1, 1, width, dtype), packing, True, 1.0
        )
        y[:, : packing.real].sum().backward()
        return [(call.library, call.arguments[0].rows) for call in calls]

    assert in_c(32, torch.bfloat16) == [("attention_tiles", 2)] * 2
    assert in_c(16, torch.bfloat16) == in_c(32, torch.float32) == [("attention", 2)] * 2
    monkeypatch.setenv("LORAKIT_KERNELS", "torch")
    assert in_c(32, torch.bfloat16) == []
