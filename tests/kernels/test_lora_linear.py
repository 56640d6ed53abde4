"""The kernel against the formula left to autograd."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from lorakit.adapters.base import dense_weight
from lorakit.adapters.layer import Adapter
from lorakit.kernels.lora_linear import LoraFactors, lora_linear, lora_linears
from lorakit.kernels.tiered_linear import TierPlan, tiered_linear

IN, OUT, RANK, SCALE = 6, 10, 3, 0.75


def plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """The same, in so many words."""
    return linear(x, weight, bias) + scale * linear(linear(x, a), b)


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    in_features: int = IN,
    out_features: int = OUT,
) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng, dtype=torch.float64).to(dtype)

    return {
        "x": normal(*shape, in_features).requires_grad_(),
        "weight": normal(out_features, in_features),
        "bias": normal(out_features),
        "a": normal(RANK, in_features).requires_grad_(),
        "b": normal(out_features, RANK).requires_grad_(),
    }


def gradients(y: Tensor, wanted: list[Tensor]) -> tuple[Tensor, ...]:
    upstream = torch.randn(
        y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(y.dtype)
    return torch.autograd.grad(y, wanted, upstream)


SHAPES = [(), (1,), (5,), (2, 7), (1, 1), (2, 1, 3), (3, 2, 1, 4)]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_every_gradient_equal_autograds(
    shape: tuple[int, ...], with_bias: bool
) -> None:
    given = inputs(shape)
    arguments = (
        given["x"],
        given["weight"],
        given["bias"] if with_bias else None,
        given["a"],
        given["b"],
        SCALE,
    )
    wanted = [given["x"], given["a"], given["b"]]
    ours, theirs = lora_linear(*arguments), plain(*arguments)
    assert ours.shape == (*shape, OUT)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for name, mine, reference in zip(
        "xab", gradients(ours, wanted), gradients(theirs, wanted), strict=True
    ):
        assert mine.shape == reference.shape
        torch.testing.assert_close(
            mine, reference, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_numeric_gradients_agree() -> None:
    given = inputs((2, 3))
    assert torch.autograd.gradcheck(
        lambda x, a, b: lora_linear(x, given["weight"], given["bias"], a, b, SCALE),
        (given["x"], given["a"], given["b"]),
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
    ours = torch.autograd.grad(lora_linear(x, *list(given.values())[1:], SCALE).sum(), given["x"])[
        0
    ]
    theirs = torch.autograd.grad(plain(x, *list(given.values())[1:], SCALE).sum(), given["x"])[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_nothing_that_is_given_is_written_to() -> None:
    given = inputs((2, 3))
    before = {name: tensor.detach().clone() for name, tensor in given.items()}
    lora_linear(*given.values(), SCALE).square().sum().backward()
    assert all(torch.equal(given[name], before[name]) for name in given)


def test_bf16_stays_within_its_rounding_of_float32_and_the_factors_gradients_are_float32() -> None:
    in_features, out_features, tokens = 96, 160, 40
    exact = inputs((tokens,), torch.float32, in_features, out_features)
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
    assert [p.dtype for _, p, _ in pairs] == [
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
        torch.float32,
    ]
    for name, mine, reference in pairs:
        error = (mine.float() - reference).abs().max() / reference.abs().max()
        # bf16 rounds to 2⁻⁹ at each of three places: both factors and the hidden product; then the
        # result.
        assert error < 4 * 2**-9, (name, float(error))
        assert error > 2**-16, name  # it was bf16 that was measured


@pytest.mark.parametrize(("in_features", "out_features"), [(IN, OUT), (OUT, IN)])
def test_conv1ds_transposed_weight_means_the_same_layer(
    in_features: int, out_features: int
) -> None:
    conv = Conv1D(out_features, in_features)
    nn.init.normal_(conv.bias)
    dense = nn.Linear(in_features, out_features)
    with torch.no_grad():
        dense.weight.copy_(conv.weight.T)
        dense.bias.copy_(conv.bias)
    assert dense_weight(conv).shape == dense_weight(dense).shape == (out_features, in_features)
    x = torch.randn(3, 4, in_features, generator=torch.Generator().manual_seed(2)).requires_grad_()
    results = []
    for base in (conv, dense):
        adapter = Adapter(base, RANK, 16.0, 0.0, torch.Generator().manual_seed(3))
        nn.init.normal_(adapter.lora_B, generator=torch.Generator().manual_seed(4))
        y = adapter(x)
        results.append((y, *gradients(y, [x, adapter.lora_A, adapter.lora_B])))
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        results[0][0],
        plain(x, dense.weight, dense.bias, adapter.lora_A, adapter.lora_B, adapter.scale),
    )


# -- a mask for every token ------------------------------------------------------------------------


def masked(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, mask: Tensor
) -> Tensor:
    """The same as `plain`, with a mask [tokens, rank] between the factors."""
    hidden = linear(x, a)
    return linear(x, weight, bias) + scale * linear(mask.view(hidden.shape).to(x.dtype) * hidden, b)


def random_mask(tokens: int, rank: int = RANK) -> Tensor:
    """Some of it 0, some of it 1, the rest between."""
    draws = torch.rand(
        tokens, rank, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    return (draws * 2 - 0.5).clamp(0, 1)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_with_a_mask_forward_and_every_gradient_equal_autograds(
    shape: tuple[int, ...], with_bias: bool
) -> None:
    given, mask = inputs(shape), random_mask(math.prod(shape))
    arguments = (
        given["x"],
        given["weight"],
        given["bias"] if with_bias else None,
        given["a"],
        given["b"],
        SCALE,
        mask,
    )
    wanted = [given["x"], given["a"], given["b"]]
    ours, theirs = lora_linear(*arguments), masked(*arguments)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for mine, reference in zip(gradients(ours, wanted), gradients(theirs, wanted), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)


def test_numeric_gradients_agree_with_a_mask() -> None:
    given, mask = inputs((2, 3)), random_mask(6)
    assert torch.autograd.gradcheck(
        lambda x, a, b: lora_linear(x, given["weight"], given["bias"], a, b, SCALE, mask),
        (given["x"], given["a"], given["b"]),
    )


def test_a_mask_of_ones_changes_no_bit_and_one_of_zeros_leaves_the_base() -> None:
    given = inputs((2, 3))
    wanted = [given["x"], given["a"], given["b"]]
    ones = lora_linear(*given.values(), SCALE, torch.ones(6, RANK, dtype=torch.float64))
    without = lora_linear(*given.values(), SCALE)
    assert torch.equal(ones, without)
    assert all(
        torch.equal(p, q)
        for p, q in zip(gradients(ones, wanted), gradients(without, wanted), strict=True)
    )
    zeros = lora_linear(*given.values(), SCALE, torch.zeros(6, RANK, dtype=torch.float64))
    assert torch.equal(zeros, linear(given["x"], given["weight"], given["bias"]))
    _, grad_a, grad_b = gradients(zeros, wanted)
    assert not grad_a.any()
    assert not grad_b.any()


def test_the_mask_is_not_written_to() -> None:
    given, mask = inputs((2, 3)), random_mask(6)
    before = mask.clone()
    lora_linear(*given.values(), SCALE, mask).square().sum().backward()
    assert torch.equal(mask, before)


# -- several layers that read the same input -------------------------------------------------------

OUTPUTS = [(10, 4), (10, 4, 7), (3, 3, 3)]


def several(
    shape: tuple[int, ...],
    outputs: tuple[int, ...],
    ranks: tuple[int, ...],
    with_bias: bool,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, list[dict[str, Tensor | None]], list[float]]:
    """(x, each layer's weight, bias, a and b, their scales)."""
    rng = torch.Generator().manual_seed(2)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng, dtype=torch.float64).to(dtype)

    layers: list[dict[str, Tensor | None]] = [
        {
            "weight": normal(out, IN),
            "bias": normal(out) if with_bias else None,
            "a": normal(rank, IN).requires_grad_(),
            "b": normal(out, rank).requires_grad_(),
        }
        for out, rank in zip(outputs, ranks, strict=True)
    ]
    return normal(*shape, IN).requires_grad_(), layers, [0.75 + i for i in range(len(outputs))]


def together(
    x: Tensor, layers: list[dict[str, Tensor | None]], scales: list[float]
) -> tuple[Tensor, ...]:
    weight = torch.cat([layer["weight"] for layer in layers])  # type: ignore[misc]
    biases = [layer["bias"] for layer in layers if layer["bias"] is not None]
    factors = [
        LoraFactors(layer["a"], layer["b"], scale)
        for layer, scale in zip(layers, scales, strict=True)
    ]  # type: ignore[arg-type]
    return lora_linears(x, weight, torch.cat(biases) if biases else None, factors)


def apart(x: Tensor, layers: list[dict[str, Tensor | None]], scales: list[float]) -> list[Tensor]:
    return [plain(x, **layer, scale=scale) for layer, scale in zip(layers, scales, strict=True)]  # type: ignore[arg-type]


def wanted_of(x: Tensor, layers: list[dict[str, Tensor | None]]) -> list[Tensor]:
    factors = [layer[name] for layer in layers for name in "ab"]
    return [x, *(factor for factor in factors if factor is not None)]


def assert_all_close(ours: object, theirs: object) -> None:
    torch.testing.assert_close(tuple(ours), tuple(theirs), rtol=1e-12, atol=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("ranks", [(3, 2, 4), (0, 2, 0), (1, 0, 3), (5, 5, 0)], ids=str)
@pytest.mark.parametrize("outputs", OUTPUTS, ids=str)
def test_several_layers_together_equal_each_by_itself(
    outputs: tuple[int, ...], ranks: tuple[int, ...], with_bias: bool
) -> None:
    for shape in SHAPES[1:]:
        given = several(shape, outputs, ranks[: len(outputs)], with_bias)
        ours, theirs = together(*given), apart(*given)
        assert [y.shape for y in ours] == [(*shape, out) for out in outputs]
        assert_all_close(ours, theirs)
        upstream = [
            torch.randn(y.shape, generator=torch.Generator().manual_seed(i)).double()
            for i, y in enumerate(ours)
        ]
        wanted = wanted_of(*given[:2])
        assert_all_close(
            torch.autograd.grad(ours, wanted, upstream),
            torch.autograd.grad(theirs, wanted, upstream),
        )


def test_several_layers_take_one_token_without_a_dimension_for_tokens() -> None:
    given = several((), OUTPUTS[1], (3, 2, 4), True)
    ours, theirs = together(*given), apart(*given)
    assert_all_close(ours, theirs)
    upstream = [torch.ones_like(y) for y in ours]
    assert_all_close(
        *(torch.autograd.grad(y, wanted_of(*given[:2]), upstream) for y in (ours, theirs))
    )


@pytest.mark.parametrize("used", [0, 1, 2])
def test_one_of_several_may_be_all_that_is_used(used: int) -> None:
    given = several((2, 3), OUTPUTS[1], (3, 2, 4), True)
    wanted = wanted_of(*given[:2])
    ours = torch.autograd.grad(together(*given)[used].square().sum(), wanted)
    theirs = torch.autograd.grad(apart(*given)[used].square().sum(), wanted, allow_unused=True)
    filled = [
        torch.zeros_like(x) if grad is None else grad
        for x, grad in zip(wanted, theirs, strict=True)
    ]
    assert_all_close(ours, filled)


@pytest.mark.parametrize(
    "layout",
    ["neighbours", "other order", "every second row", "with a gap", "transposed", "broadcast"],
)
@pytest.mark.parametrize("shape", [(6,), (1, 6), (4, 6), (4, 1), (2, 4, 3)], ids=str)
def test_upstream_gradients_of_any_layout_are_joined_rightly(
    shape: tuple[int, ...], layout: str
) -> None:
    """Parts of one tensor, which may be read as one, and parts that only look like it."""
    outputs = OUTPUTS[2]
    given = several(shape, outputs, (3, 2, 4), True)
    rng = torch.Generator().manual_seed(4)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng, dtype=torch.float64)

    width = sum(outputs)
    if layout == "every second row":
        upstream = normal(2 * shape[0], *shape[1:], width)[::2].split(outputs, -1)
    elif layout == "with a gap":
        upstream = normal(*shape, width + 5)[..., :width].split(outputs, -1)
    elif layout == "transposed":
        dims = list(range(len(shape)))[::-1]
        upstream = normal(*shape[::-1], width).permute(*dims, len(shape)).split(outputs, -1)
    elif layout == "broadcast":
        upstream = normal(width).expand(*shape, width).split(outputs, -1)
    else:
        upstream = normal(*shape, width).split(outputs, -1)
        upstream = upstream[::-1] if layout == "other order" else upstream
    wanted = wanted_of(*given[:2])
    ours = torch.autograd.grad(together(*given), wanted, upstream)
    assert_all_close(ours, torch.autograd.grad(apart(*given), wanted, upstream))


def test_several_layers_give_a_gradient_to_the_factors_that_are_trained_alone() -> None:
    x, layers, scales = several((2, 3), OUTPUTS[1], (3, 2, 4), True)
    every = torch.autograd.grad(
        torch.cat(together(x, layers, scales), -1).square().sum(), wanted_of(x, layers)
    )
    for name in "ab":
        kept = layers[1][name]
        assert kept is not None
        layers[1][name] = kept.detach()
    rest = [tensor for tensor in wanted_of(x.detach(), layers) if tensor.requires_grad]
    found = torch.autograd.grad(
        torch.cat(together(x.detach(), layers, scales), -1).square().sum(), rest
    )
    assert_all_close(found, [*every[1:3], *every[5:]])


def test_several_layers_in_bf16_stay_within_its_rounding() -> None:
    x, layers, scales = several((40,), OUTPUTS[1], (3, 2, 4), True, torch.float32)
    rounded = [
        {
            name: t.bfloat16() if t is not None and name in ("weight", "bias") else t
            for name, t in layer.items()
        }
        for layer in layers
    ]
    same = [{name: t if t is None else t.float() for name, t in layer.items()} for layer in rounded]
    x = x.detach().bfloat16().requires_grad_()
    wanted, upstream = (
        wanted_of(x, layers),
        torch.randn(40, sum(OUTPUTS[1]), generator=torch.Generator().manual_seed(5)),
    )
    found = []
    for y in (together(x, rounded, scales), apart(x.float(), same, scales)):
        joined = torch.cat(tuple(y), -1)
        found.append(
            [joined.detach(), *torch.autograd.grad((joined.float() * upstream).sum(), wanted)]
        )
    assert [mine.dtype for mine in found[0]] == [
        torch.bfloat16,
        torch.bfloat16,
        *[torch.float32] * 6,
    ]
    for mine, right in zip(*found, strict=True):
        assert float((mine.float() - right.float()).norm() / right.float().norm()) < 0.01


# -- tiers: a plan for every token -----------------------------------------------------------------

TIER_RANK, ENDS = 7, [0, 2, 3, 7]


def tier_weights(tokens: int, top: int = 3, seed: int = 6) -> Tensor:
    """[tokens, 3], float32, as chunks give them: 1 or 0, and in a fade between, never growing from
    block to block."""
    rng = torch.Generator().manual_seed(seed)
    draws = torch.randint(0, 5, (tokens, 3), generator=rng) / 4
    draws[:, top:] = 0
    return draws.sort(1, descending=True).values


def tier_inputs(shape: tuple[int, ...]) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(7)
    factors = {
        "a": torch.randn(TIER_RANK, IN, generator=rng),
        "b": torch.randn(OUT, TIER_RANK, generator=rng),
    }
    return inputs(shape) | {
        name: factor.double().requires_grad_() for name, factor in factors.items()
    }


def expanded(weights: Tensor, ends: list[int]) -> Tensor:
    """The weight of every component, one by one: [tokens, rank]."""
    columns = [torch.ones(len(weights))] * ends[0]
    for block, (start, end) in enumerate(pairwise(ends)):
        columns += [weights[:, block]] * (end - start)
    return torch.stack(columns, 1).double()


@pytest.mark.parametrize(
    "ends", [ENDS, [2, 3, 5, 7], [0, 3, 3, 7], [3, 3, 3, 7], [0, 7, 7, 7]], ids=str
)
@pytest.mark.parametrize("top", [0, 1, 2, 3])
@pytest.mark.parametrize("shape", [(5,), (2, 7), (1, 1)], ids=str)
def test_tiers_equal_the_dense_formula(shape: tuple[int, ...], top: int, ends: list[int]) -> None:
    """With components that always act (a residual), and with layers whose ranks give a tier no
    components of its own."""
    given, weights = tier_inputs(shape), tier_weights(math.prod(shape), top)
    plan, wanted = TierPlan.of(weights), [given["x"], given["a"], given["b"]]
    assert plan.top == int((weights > 0).any(0).sum())
    ours = tiered_linear(*given.values(), SCALE, ends, plan)
    theirs = masked(*given.values(), SCALE, expanded(weights, ends))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(ours, wanted, torch.ones_like(ours), allow_unused=True)
    expected = torch.autograd.grad(theirs, wanted, torch.ones_like(theirs))
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(
            reference.new_zeros(reference.shape) if mine is None else mine,
            reference,
            rtol=1e-12,
            atol=1e-12,
        )


@pytest.mark.parametrize("tier", [0, 1, 2, 3])
def test_a_uniform_plan_is_plain_lora_of_the_first_components(tier: int) -> None:
    given, count = tier_inputs((2, 4)), ENDS[tier]
    plan = TierPlan.uniform_at(tier, 3, 8)
    assert (plan.top, plan.uniform) == (tier, True)
    rows = (torch.arange(3) < tier).float().expand(8, 3)
    assert torch.equal(plan.weights, rows)
    same = TierPlan.of(rows)
    assert (same.top, same.uniform) == (tier, True)
    y = tiered_linear(*given.values(), SCALE, ENDS, plan)
    prefix = dict(given, a=given["a"][:count], b=given["b"][:, :count])
    torch.testing.assert_close(y, plain(**prefix, scale=SCALE), rtol=1e-12, atol=1e-12)


def test_a_plan_is_uniform_only_if_all_tokens_are_alike() -> None:
    assert not TierPlan.of(torch.tensor([[1.0, 0.0], [1.0, 1.0]])).uniform
    assert not TierPlan.of(torch.tensor([[1.0, 0.5], [1.0, 0.5]])).uniform
    assert not TierPlan.of(torch.tensor([[1.0, 0.0], [0.0, 0.0]])).uniform
    assert TierPlan.of(torch.zeros(3, 2)).uniform


def test_tier_0_runs_no_low_rank_product(monkeypatch: pytest.MonkeyPatch) -> None:
    given = tier_inputs((2, 4))

    def refuse(*_: object) -> Tensor:
        raise AssertionError("a low-rank product was computed")

    monkeypatch.setattr("lorakit.kernels.tiered_linear.lora_linear", refuse)
    y = tiered_linear(*given.values(), SCALE, ENDS, TierPlan.of(torch.zeros(8, 3)))
    assert torch.equal(y, linear(given["x"], given["weight"], given["bias"]))
    with pytest.raises(AssertionError, match="low-rank"):
        # the residual always acts
        tiered_linear(*given.values(), SCALE, [1, *ENDS[1:]], TierPlan.of(torch.zeros(8, 3)))


def test_only_the_components_up_to_the_highest_tier_are_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given, seen = tier_inputs((8,)), []

    def watched(
        x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, scale: float, mask: Tensor
    ) -> Tensor:
        seen.append((a.shape[0], b.shape[1], mask.shape[1]))
        return lora_linear(x, weight, bias, a, b, scale, mask)

    monkeypatch.setattr("lorakit.kernels.tiered_linear.lora_linear", watched)
    tiered_linear(*given.values(), SCALE, ENDS, TierPlan.of(tier_weights(8, top=2)))
    assert seen == [(3, 3, 3)]
    with torch.no_grad():
        given["a"][3:] = float("nan")
        given["b"][:, 3:] = float("nan")
    y = tiered_linear(*given.values(), SCALE, ENDS, TierPlan.of(tier_weights(8, top=2)))
    assert y.isfinite().all()


def test_the_mask_is_made_once_for_layers_with_the_same_blocks() -> None:
    plan = TierPlan.of(tier_weights(5))
    first = plan.mask(ENDS, torch.float32)
    assert plan.mask(list(ENDS), torch.float32) is first
    assert plan.mask([1, 3, 4, 8], torch.float32).shape == (5, 8)
    assert plan.mask(ENDS, torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(plan.mask([0, 0, 0, 0], torch.float32), torch.ones(5, 0))
