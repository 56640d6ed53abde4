"""Layers that are computed together against the same layers by themselves."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.adapters import shared_input
from lorakit.adapters.base import PrunedBase
from lorakit.adapters.layer import Adapter
from lorakit.adapters.shared_input import SharedInput, can_share
from lorakit.kernels.lora_linear import JOINED_RANK

IN = 80


def adapter(out: int, rank: int, bias: bool = True, seed: int = 0, width: int = IN) -> Adapter:
    """With random factors, none of them zero."""
    rng = torch.Generator().manual_seed(seed)
    base = nn.Linear(width, out, bias=bias)
    made = Adapter(base, rank, 0.5 + seed, 0.0, rng)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3, generator=rng)
    return made


def joined(
    ranks: tuple[int, ...] = (3, 0, 4), bias: bool = True
) -> tuple[list[Adapter], list[Adapter]]:
    """(layers of different outputs that share their input, the same ones that do not)."""
    alone = [adapter(12 + 7 * i, rank, bias, seed=i) for i, rank in enumerate(ranks)]
    together = copy.deepcopy(alone)
    share(together)
    return together, alone


def share(layers: list[Adapter]) -> None:
    assert can_share(layers)
    shared = SharedInput(layers)
    for layer in layers:
        layer.shared = shared


def input_of(seed: int = 0) -> Tensor:
    return torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each joint product was of, as they are made."""
    made: list[int] = []

    def counted(
        x: Tensor, weight: Tensor, bias: Tensor | None, layers: list[object]
    ) -> tuple[Tensor, ...]:
        made.append(len(layers))
        return real(x, weight, bias, layers)  # type: ignore[arg-type]

    real = shared_input.lora_linears
    monkeypatch.setattr(shared_input, "lora_linears", counted)
    return made


def assert_same(
    together: list[Adapter],
    alone: list[Adapter],
    order: list[int] | None = None,
    inputs: list[Tensor] | None = None,
) -> None:
    """Results and every gradient, when the layers are called in this order, each with its own of
    `inputs` or all with one."""
    order = list(range(len(alone))) if order is None else order
    inputs = [input_of()] * len(order) if inputs is None else inputs
    upstream = torch.Generator().manual_seed(1)
    weights = [torch.randn(2, 5, len(alone[i].base.weight), generator=upstream) for i in order]  # type: ignore[arg-type]
    wanted = list({id(x): x for x in inputs}.values())
    found = []
    for layers in (together, alone):
        results = [layers[i](x) for i, x in zip(order, inputs, strict=True)]
        factors = [p for layer in layers for p in layer.components().values()]
        total = torch.stack([(y * w).sum() for y, w in zip(results, weights, strict=True)]).sum()
        gradients = torch.autograd.grad(total, [*wanted, *factors], allow_unused=True)
        # A layer that was not called, or has rank 0, may be given no gradient or one of zeros.
        filled = [
            torch.zeros_like(p) if g is None else g
            for g, p in zip(gradients, [*wanted, *factors], strict=True)
        ]
        found.append([*results, *filled])
    for mine, right in zip(*found, strict=True):
        assert mine.shape == right.shape
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ranks", [(3, 4), (3, 0, 4), (0, 0, 2), (5, 1, 0), (20, 20, 20)], ids=str)
def test_layers_together_are_the_same_layers(
    ranks: tuple[int, ...], bias: bool, products: list[int]
) -> None:
    together, alone = joined(ranks, bias)
    assert_same(together, alone)
    assert products == [len(ranks)]


def test_every_pass_is_computed_anew(products: list[int]) -> None:
    """With the same tensor too: factors have moved, and what waits from the pass before is not
    taken."""
    together, alone = joined()
    x = input_of()
    for step in range(3):
        with torch.no_grad():
            for layer in [*together, *alone]:
                layer.lora_A += step
        assert_same(together, alone, inputs=[x] * 3)
    assert products == [3] * 3


@pytest.mark.parametrize(
    "order",
    [
        [1],
        [2],
        [1, 0, 2],
        [2, 1, 0],
        [0, 2, 1],
        [0, 0, 1, 2],
        [0, 1, 1, 2],
        [0, 2, 1, 2, 1, 0],
        [1, 2],
    ],
)
def test_any_order_of_calls_gives_the_same(order: list[int]) -> None:
    together, alone = joined()
    assert_same(together, alone, order)
    assert_same(together, alone)  # and the pass after it too


@pytest.mark.parametrize("other", [0, 1, 2])
def test_a_layer_called_with_another_tensor_is_computed_for_that_one(other: int) -> None:
    together, alone = joined()
    x = input_of()
    inputs = [input_of(seed=1) if i == other else x for i in range(3)]
    assert_same(together, alone, inputs=inputs)
    # equal numbers, but a tensor of its own with its own gradient
    equal = [x, x.detach().clone().requires_grad_(), x]
    assert_same(together, alone, inputs=equal)


def test_what_was_computed_without_gradients_is_not_taken_where_they_are_wanted() -> None:
    together, alone = joined()
    x = input_of()
    with torch.no_grad():
        together[0](x)
    assert_same(together, alone, [1, 2], [x, x])


def test_what_waits_is_not_taken_after_the_ranks_became_too_high() -> None:
    together, alone = joined((3, 2))
    x = input_of()
    together[0](x)
    grow(together[0], 70)
    grow(alone[0], 70)
    with torch.no_grad():
        for layer in (together[1], alone[1]):
            layer.lora_B += 1
    assert_same(together, alone, inputs=[x, x])


def grow(layer: Adapter, rank: int) -> None:
    rng = torch.Generator().manual_seed(rank)
    a, b = (p.shape for p in (layer.lora_A, layer.lora_B))
    layer.lora_A = nn.Parameter(torch.randn(rank, a[1], generator=rng) * 0.1)
    layer.lora_B = nn.Parameter(torch.randn(b[0], rank, generator=rng) * 0.1)


def test_ranks_may_move_between_passes(products: list[int]) -> None:
    """Up and down, to 0 and beyond what pays, in which case each layer is computed by itself."""
    together, alone = joined((3, 2, 4))
    expected = []
    for ranks in [
        (3, 2, 4),
        (0, 2, 5),
        (0, 0, 0),
        (1, 0, 0),
        (JOINED_RANK - 2, 1, 1),
        (JOINED_RANK - 1, 1, 1),
        (2, 2, 2),
    ]:
        for layers in (together, alone):
            for layer, rank in zip(layers, ranks, strict=True):
                grow(layer, rank)
        x = input_of()
        if sum(ranks):
            assert_same(together, alone)
        else:
            assert all(
                torch.equal(one(x), other(x)) for one, other in zip(together, alone, strict=True)
            )
        expected += [3] * (0 < sum(ranks) <= JOINED_RANK)
        assert products == expected


def test_a_residual_of_a_pruned_base_takes_part(products: list[int]) -> None:
    together, alone = joined((3, 2, 4))
    rng = torch.Generator().manual_seed(3)
    for one, other in zip(together, alone, strict=True):
        mask = torch.rand(one.base.weight.shape, generator=rng) < 0.5  # type: ignore[arg-type]
        a, b = torch.randn(2, IN, generator=rng), torch.randn(len(mask), 2, generator=rng)
        for layer in (one, other):
            layer.set_base(PrunedBase(layer.base.layer, mask, (a, b)))
    assert_same(together, alone)
    assert products == [3]


def test_weights_are_held_once_and_changes_of_a_base_are_seen() -> None:
    together, alone = joined()
    shared = together[0].shared
    assert shared is not None
    for layer in together:
        base: Tensor = layer.base.weight  # type: ignore[assignment]
        assert base.untyped_storage().data_ptr() == shared.weight.untyped_storage().data_ptr()
        assert base.is_contiguous()
        assert not base.requires_grad
    for one, other in zip(together, alone, strict=True):
        one.base.load_state_dict(other.base.state_dict())
        with torch.no_grad():
            one.base.weight.mul_(2)  # type: ignore[operator]
            other.base.weight.mul_(2)  # type: ignore[operator]
    assert_same(together, alone)
    merged = [(one.merge(), other.merge()) for one, other in zip(together, alone, strict=True)]
    for mine, right in merged:
        torch.testing.assert_close(mine.weight, right.weight)


def test_layers_that_were_frozen_are_run_as_such_without_gradients(products: list[int]) -> None:
    together, alone = joined((3, 2, 4))
    for layer in together:
        layer.eval().freeze()
    x = input_of()
    with torch.no_grad():
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one(x), other(x), rtol=1e-4, atol=1e-4)
    assert products == []
    assert_same(together, alone)


def test_a_model_that_is_cast_afterwards_still_runs() -> None:
    together, alone = joined((3, 2))
    for layer in [*together, *alone]:
        layer.double()
    x = input_of().double().detach()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one(x), other(x), rtol=1e-4, atol=1e-4)


def refused() -> Iterator[tuple[str, list[Adapter]]]:
    one = adapter(12, 2)
    yield "one layer", [one]
    yield "one layer twice", [one, one]
    yield "other widths", [one, adapter(12, 2, width=IN + 1)]
    yield "with and without a bias", [one, adapter(12, 2, bias=False)]
    yield "other types", [one, adapter(12, 2).bfloat16()]
    yield (
        "weights kept as [in, out]",
        [Adapter(Conv1D(12, IN), 2, 1.0, 0.0, torch.Generator()) for _ in range(2)],
    )


@pytest.mark.parametrize(
    ("why", "layers"), list(refused()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_layers_whose_weights_can_not_be_one_matrix_are_not_joined(
    why: str, layers: list[Adapter]
) -> None:
    assert not can_share(layers), why
