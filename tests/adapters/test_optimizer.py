"""The optimizer: torch's AdamW while shapes stay, and independent components when they change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorakit.adapters.optimizer import AdamW, ParamGroup


class Factor(nn.Module):
    """A parameter whose dimension `dim` counts components."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(value.clone())


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(optimizer: AdamW, module: Factor, grads: list[Tensor], lr: float = 1e-2) -> None:
    for grad in grads:
        module.weight.grad = grad.clone()
        optimizer.step(lr)
        optimizer.zero_grad()


def take(tensor: Tensor, dim: int, indices: list[int]) -> Tensor:
    return tensor.index_select(dim, torch.tensor(indices, dtype=torch.long))


# -- without a resize ------------------------------------------------------------------------------


def test_equals_torch_adamw_over_20_steps_with_weight_decay_and_several_groups() -> None:
    shapes = [(3, 5), (7, 2), (4,), (6, 6)]
    ours = [nn.Parameter(normal(*shape, seed=i)) for i, shape in enumerate(shapes)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizer = AdamW(
        [
            ParamGroup(ours[:2]),
            ParamGroup([ours[2]], lr=3e-2, weight_decay=0.0, clipped=False),
            ParamGroup([ours[3]], lr_factor=0.1, weight_decay=0.5),
        ],
        weight_decay=0.1,
        betas=(0.8, 0.99),
        eps=1e-6,
    )
    reference = torch.optim.AdamW(
        [
            {"params": theirs[:2], "weight_decay": 0.1},
            {"params": [theirs[2]], "weight_decay": 0.0},
            {"params": [theirs[3]], "weight_decay": 0.5},
        ],
        betas=(0.8, 0.99),
        eps=1e-6,
    )
    for step in range(20):
        lr = 1e-2 * (1 - step / 40)
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = normal(*shapes[i], seed=100 * step + i)
            q.grad = p.grad.clone()
        for group, rate in zip(reference.param_groups, (lr, 3e-2, 0.1 * lr), strict=True):
            group["lr"] = rate
        optimizer.step(lr)
        reference.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(ours[0], normal(*shapes[0], seed=0), atol=1e-2)


def test_a_parameter_without_gradient_rests_and_does_not_age() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = AdamW([ParamGroup([used, unused])], weight_decay=0.1)
    used.grad = torch.ones(2)
    optimizer.step(0.1)
    assert unused.tolist() == [1.0, 1.0]
    assert (float(optimizer.state[used].age), float(optimizer.state[unused].age)) == (1.0, 0.0)


def test_zero_grad_forgets_every_gradient() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = AdamW([ParamGroup([parameter])])
    parameter.grad = torch.ones(2)
    optimizer.zero_grad()
    assert parameter.grad is None


# -- resize ----------------------------------------------------------------------------------------

KEEP, NEW = [0, 2, 3], 2


@pytest.fixture(params=[0, 1], ids=["rows", "columns"])
def dim(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def shape_of(dim: int, count: int) -> tuple[int, int]:
    return (count, 4) if dim == 0 else (4, count)


def resized(dim: int, steps_before: int) -> tuple[Factor, AdamW, Factor, AdamW]:
    """A factor of 5 components after some steps, and the same right after a resize."""
    grads = [normal(*shape_of(dim, 5), seed=i) for i in range(steps_before)]
    made = []
    for _ in range(2):
        factor = Factor(normal(*shape_of(dim, 5), seed=50))
        optimizer = AdamW([ParamGroup([factor.weight])], weight_decay=0.1)
        run(optimizer, factor, grads)
        made += [factor, optimizer]
    made[3].resize(made[2], "weight", dim, torch.tensor(KEEP), normal(*shape_of(dim, NEW), seed=60))
    return made[0], made[1], made[2], made[3]


def test_resize_keeps_values_moments_and_ages_of_survivors_and_zeroes_those_of_newcomers(
    dim: int,
) -> None:
    before, optimizer, after, changed = resized(dim, steps_before=7)
    old, new = optimizer.state[before.weight], changed.state[after.weight]
    assert torch.equal(
        after.weight,
        torch.cat([take(before.weight, dim, KEEP), normal(*shape_of(dim, NEW), seed=60)], dim),
    )
    for name in ("first", "second"):
        mine, theirs = getattr(new, name), getattr(old, name)
        assert mine.shape == after.weight.shape
        assert torch.equal(take(mine, dim, [0, 1, 2]), take(theirs, dim, KEEP)), name
        assert take(theirs, dim, KEEP).abs().min() > 0
        assert not take(mine, dim, [3, 4]).any(), name
    assert new.age.flatten().tolist() == [7.0, 7.0, 7.0, 0.0, 0.0]
    assert new.age.shape == ((5, 1) if dim == 0 else (1, 5))


def test_survivors_go_on_as_if_the_others_had_never_been_there(dim: int) -> None:
    _, _, after, changed = resized(dim, steps_before=7)
    alone = Factor(take(normal(*shape_of(dim, 5), seed=50), dim, KEEP))
    optimizer = AdamW([ParamGroup([alone.weight])], weight_decay=0.1)
    run(optimizer, alone, [take(normal(*shape_of(dim, 5), seed=i), dim, KEEP) for i in range(7)])
    later = [normal(*shape_of(dim, 5), seed=200 + i) for i in range(6)]
    run(changed, after, later)
    run(optimizer, alone, [take(grad, dim, [0, 1, 2]) for grad in later])
    # Two kernels, which round differently.
    torch.testing.assert_close(
        take(after.weight, dim, [0, 1, 2]), alone.weight.detach(), atol=1e-6, rtol=1e-5
    )


def test_newcomers_are_updated_as_by_a_fresh_torch_adamw(dim: int) -> None:
    _, _, after, changed = resized(dim, steps_before=30)
    fresh = nn.Parameter(normal(*shape_of(dim, NEW), seed=60))
    reference = torch.optim.AdamW([fresh], lr=1e-2, weight_decay=0.1)
    for i in range(6):
        grad = normal(*shape_of(dim, 5), seed=300 + i)
        run(changed, after, [grad])
        fresh.grad = take(grad, dim, [3, 4])
        reference.step()
        torch.testing.assert_close(
            take(after.weight, dim, [3, 4]), fresh.detach(), atol=1e-6, rtol=1e-6
        )


def test_a_second_resize_tells_three_generations_apart(dim: int) -> None:
    _, _, factor, optimizer = resized(dim, steps_before=7)
    run(optimizer, factor, [normal(*shape_of(dim, 5), seed=1)] * 2)
    optimizer.resize(factor, "weight", dim, torch.tensor([1, 4]), normal(*shape_of(dim, 1), seed=2))
    assert optimizer.state[factor.weight].age.flatten().tolist() == [9.0, 2.0, 0.0]


def test_resize_to_0_and_back_starts_anew(dim: int) -> None:
    _, _, factor, optimizer = resized(dim, steps_before=3)
    optimizer.resize(
        factor, "weight", dim, torch.tensor([], dtype=torch.long), torch.zeros(shape_of(dim, 0))
    )
    assert factor.weight.shape == shape_of(dim, 0)
    run(optimizer, factor, [torch.zeros(shape_of(dim, 0))])  # an empty parameter rests
    optimizer.resize(
        factor, "weight", dim, torch.tensor([], dtype=torch.long), normal(*shape_of(dim, 2), seed=4)
    )
    state = optimizer.state[factor.weight]
    assert state.age.flatten().tolist() == [0.0, 0.0]
    grad = normal(*shape_of(dim, 2), seed=5)
    run(optimizer, factor, [grad])
    # Adam's first update is lr · sign(g), whatever was there before.
    expected = (1 - 1e-2 * 0.1) * normal(*shape_of(dim, 2), seed=4) - 1e-2 * grad.sign()
    torch.testing.assert_close(factor.weight.detach(), expected, atol=1e-5, rtol=0)


def test_resize_replaces_the_parameter_in_its_module_its_group_and_the_state() -> None:
    factor, other = Factor(torch.ones(3, 2)), nn.Parameter(torch.ones(1))
    old = factor.weight
    optimizer = AdamW([ParamGroup([other]), ParamGroup([factor.weight, other])])
    optimizer.resize(factor, "weight", 0, torch.tensor([0]), torch.zeros(1, 2))
    assert factor.weight is not old
    assert factor.weight.requires_grad
    assert optimizer.groups[1].params[0] is factor.weight
    assert optimizer.groups[1].params[1] is other
    assert old not in optimizer.state
    assert dict(factor.named_parameters())["weight"] is factor.weight


# -- masks -----------------------------------------------------------------------------------------


def test_masked_entries_and_their_moments_stay_zero_under_weight_decay_and_clipping() -> None:
    factor, mask = Factor(normal(6, 5, seed=0)), normal(6, 5, seed=1) > 0.3
    optimizer = AdamW([ParamGroup([factor.weight])], weight_decay=0.3)
    run(optimizer, factor, [normal(6, 5, seed=i) for i in range(3)])
    before, state = factor.weight.detach().clone(), optimizer.state[factor.weight]
    moments = state.first.clone(), state.second.clone()
    optimizer.mask({factor.weight: mask})
    assert optimizer.state[factor.weight].mask is mask
    for now, earlier in zip(
        (factor.weight.detach(), state.first, state.second), (before, *moments), strict=True
    ):
        assert torch.equal(now, earlier * mask)
        assert not now[~mask].signbit().any(), "a sparse file would keep -0.0 as a value"
        assert earlier[~mask].abs().min() > 0
    for i in range(30):
        factor.weight.grad = normal(6, 5, seed=10 + i)
        optimizer.mask_gradients()
        assert not factor.weight.grad[~mask].any()
        assert torch.equal(factor.weight.grad[mask], normal(6, 5, seed=10 + i)[mask])
        optimizer.clip_grad_norm(0.5)
        optimizer.step(1e-2)
        for tensor in (factor.weight, state.first, state.second):
            assert not tensor[~mask].any()
            assert tensor[mask].abs().min() > 0


def test_the_live_entries_move_as_if_the_masked_ones_were_not_there() -> None:
    """To clipping, too: what is masked does not count."""
    mask = torch.tensor([[True, False, True, True], [False, True, False, True]])
    factor, alone = Factor(normal(2, 4, seed=0)), Factor(normal(2, 4, seed=0)[mask])
    optimizers = AdamW([ParamGroup([factor.weight])], 0.1), AdamW([ParamGroup([alone.weight])], 0.1)
    optimizers[0].mask({factor.weight: mask})
    for i in range(10):
        factor.weight.grad = 3 * normal(2, 4, seed=20 + i)
        alone.weight.grad = factor.weight.grad[mask]
        optimizers[0].mask_gradients()
        norms = [optimizer.clip_grad_norm(1.0) for optimizer in optimizers]
        assert norms[0] > 1
        torch.testing.assert_close(norms[0], norms[1])
        for optimizer in optimizers:
            optimizer.step(1e-2)
        torch.testing.assert_close(factor.weight[mask], alone.weight, rtol=1e-6, atol=1e-7)


def test_masking_gradients_leaves_parameters_without_a_mask_or_a_gradient_alone() -> None:
    masked, plain, idle = (nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = AdamW([ParamGroup([masked, plain, idle])])
    optimizer.mask_gradients()  # no gradient at all
    optimizer.mask({masked: torch.tensor([True, False, True])})
    optimizer.mask({idle: torch.tensor([True, False, True])})
    masked.grad, plain.grad = torch.ones(3), torch.ones(3)
    optimizer.mask_gradients()
    assert masked.grad.tolist() == [1.0, 0.0, 1.0]
    assert plain.grad.tolist() == [1.0] * 3
    assert idle.grad is None


def test_resize_takes_mask_and_sensitivity_along_and_newcomers_are_dense(dim: int) -> None:
    factor = Factor(normal(*shape_of(dim, 5), seed=0))
    optimizer = AdamW([ParamGroup([factor.weight])])
    mask, score = normal(*shape_of(dim, 5), seed=1) > 0, normal(*shape_of(dim, 5), seed=2)
    optimizer.mask({factor.weight: mask})
    optimizer.state[factor.weight].sensitivity = score
    optimizer.resize(factor, "weight", dim, torch.tensor(KEEP), normal(*shape_of(dim, NEW), seed=3))
    state = optimizer.state[factor.weight]
    assert state.mask is not None
    assert state.sensitivity is not None
    assert state.mask.dtype == torch.bool
    assert torch.equal(take(state.mask, dim, [0, 1, 2]), take(mask, dim, KEEP))
    assert take(state.mask, dim, [3, 4]).all()
    assert torch.equal(take(state.sensitivity, dim, [0, 1, 2]), take(score, dim, KEEP))
    assert not take(state.sensitivity, dim, [3, 4]).any()
    assert not factor.weight[~state.mask].any()
    optimizer.resize(
        factor, "weight", dim, torch.tensor([], dtype=torch.long), torch.zeros(shape_of(dim, 0))
    )
    assert optimizer.state[factor.weight].mask.shape == shape_of(dim, 0)  # type: ignore[union-attr]


def test_resize_invents_neither_mask_nor_sensitivity(dim: int) -> None:
    _, _, factor, optimizer = resized(dim, steps_before=2)
    assert optimizer.state[factor.weight].mask is None
    assert optimizer.state[factor.weight].sensitivity is None


# -- clipping --------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e6])
def test_clip_grad_norm_equals_torchs(max_norm: float) -> None:
    ours = [
        nn.Parameter(torch.zeros(3, 4)),
        nn.Parameter(torch.zeros(5)),
        nn.Parameter(torch.zeros(0, 4)),
    ]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        p.grad = normal(*p.shape, seed=i)
        q.grad = p.grad.clone()
    norm = AdamW([ParamGroup(ours[:1]), ParamGroup(ours[1:])]).clip_grad_norm(max_norm)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs, max_norm))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_no_max_norm_measures_and_scales_nothing() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([30.0, 40.0])
    assert float(AdamW([ParamGroup([parameter])]).clip_grad_norm(None)) == 50.0
    assert parameter.grad.tolist() == [30.0, 40.0]


def test_unclipped_groups_are_neither_counted_nor_scaled() -> None:
    clipped, free = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    clipped.grad, free.grad = torch.tensor([3.0, 4.0]), torch.tensor([100.0])
    norm = AdamW([ParamGroup([clipped]), ParamGroup([free], clipped=False)]).clip_grad_norm(1.0)
    assert float(norm) == 5.0
    assert free.grad.tolist() == [100.0]
    torch.testing.assert_close(clipped.grad, torch.tensor([0.6, 0.8]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["clipped", "free"])
def test_a_gradient_that_is_not_finite_shows_in_the_norm_of_whichever_group(
    bad: float, where: str
) -> None:
    parameters = {"clipped": nn.Parameter(torch.zeros(2)), "free": nn.Parameter(torch.zeros(2))}
    for name, parameter in parameters.items():
        parameter.grad = torch.tensor([1.0, bad if name == where else 1.0])
    groups = [ParamGroup([parameters["clipped"]]), ParamGroup([parameters["free"]], clipped=False)]
    assert not torch.isfinite(AdamW(groups).clip_grad_norm(1.0))


def test_no_gradient_at_all_has_norm_0() -> None:
    assert float(AdamW([ParamGroup([nn.Parameter(torch.zeros(2))])]).clip_grad_norm(1.0)) == 0.0
