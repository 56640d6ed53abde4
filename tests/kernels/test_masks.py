"""The masks of many matrices at once: in C and in torch the same bits, whatever the values and the
number of threads."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from lorakit.kernels.masks import fast_masks, zero_masked
from lorakit.numerics import sparsity
from lorakit.numerics.structure import UNSTRUCTURED, Structure
from tests.support.kernels import why_not

compiled = pytest.mark.skipif(bool(why_not("masks")), reason=why_not("masks"))
# Below a vector, of whole vectors, with rests, of nothing.
SHAPES = [(1, 1), (3, 7), (0, 8), (8, 16), (5, 33), (8, 384), (61, 8)]
DENSITIES = [0.001, 0.29, 0.5, 0.9, 1.0]


@pytest.fixture(params=[pytest.param("C", marks=compiled), "torch"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setenv("LORAKIT_KERNELS", "torch")


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def values(kind: str, seed: int) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    found = [torch.from_numpy(rng.standard_normal(shape, np.float32)) for shape in SHAPES]
    if kind == "ties":
        return [x.round() for x in found]  # many of them -0.0 and 0.0
    if kind == "extremes":
        steps = torch.tensor(
            [0.0, -0.0, 1e-45, -3e-45, 1e-38, 1.0, -1.0, 3e38, math.inf, -math.inf]
        )
        return [steps[torch.from_numpy(rng.integers(0, len(steps), shape))] for shape in SHAPES]
    return found


def some(share: float, seed: int) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.random(shape) < share) for shape in SHAPES]


def masks_of(
    found: list[Tensor], density: float, spared: list[Tensor] | None, gone: list[Tensor]
) -> list[Tensor]:
    return fast_masks(found, density, UNSTRUCTURED, "matrix", spared, gone)


def same(mine: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


# -- which stay ------------------------------------------------------------------------------------


@compiled
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("kind", ["normal", "ties", "extremes"])
@pytest.mark.parametrize("with_spared", [False, True])
def test_the_masks_are_those_of_sparsity(
    kind: str, with_spared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped = 0
    for seed, density in enumerate(DENSITIES):
        found, gone = values(kind, seed), some(0.3, seed + 10)
        spared = some(0.2, seed + 20) if with_spared else None
        expected = sparsity.masks(
            [x.abs() for x in found], density, UNSTRUCTURED, "matrix", spared, gone
        )
        monkeypatch.setattr(sparsity, "masks", None)  # so that it can not be asked
        mine = masks_of(found, density, spared, gone)
        monkeypatch.undo()
        assert same(mine, expected), density
        assert [mask.shape for mask in mine] == [x.shape for x in found]
        dropped += sum(int((~mask & ~out).sum()) for mask, out in zip(mine, gone, strict=True))
    assert dropped


@pytest.mark.usefixtures("form")
def test_the_largest_stay_whatever_their_sign_and_of_equal_ones_the_first() -> None:
    nothing = [torch.zeros(1, 6, dtype=torch.bool)]
    [mask] = masks_of([torch.tensor([[1.0, -3.0, 0.0, 2.0, -2.0, 2.0]])], 0.5, None, nothing)
    assert mask.tolist() == [[False, True, False, True, True, False]]
    [mask] = masks_of([torch.tensor([[-0.0, 0.0, -0.0, 0.0, 1.0, 0.0]])], 0.5, None, nothing)
    assert mask.tolist() == [[True, True, False, False, True, False]]
    # The count has room, but what is gone stays away.
    [mask] = masks_of(
        [torch.ones(1, 6)], 0.9, None, [torch.tensor([[True, False, True, False, True, False]])]
    )
    assert mask.tolist() == [[False, True] * 3]


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1, -0x00400000])
def test_a_value_that_is_no_number_is_refused_unless_it_is_gone_or_spared(bits: int) -> None:
    found, here = values("normal", 0), some(0.0, 0)
    found[4].view(torch.int32)[2, 3] = bits
    assert found[4].isnan().sum() == 1
    with pytest.raises(ValueError, match="not a number"):
        masks_of(found, 0.5, None, some(0.0, 0))
    here[4][2, 3] = True
    assert not masks_of(found, 0.5, None, here)[4][2, 3]
    assert masks_of(found, 0.5, here, some(0.0, 0))[4][2, 3]


@pytest.mark.usefixtures("form")
def test_other_structures_scopes_types_and_layouts_are_sparsitys() -> None:
    fits = [number for number, (_, columns) in enumerate(SHAPES) if columns % 4 == 0]
    found, gone = ([x[number] for number in fits] for x in (values("normal", 0), some(0.1, 0)))
    sizes = [x.abs() for x in found]
    pairs = Structure.parse("2:4")
    assert same(
        fast_masks(found, 0.6, pairs, "matrix", None, gone),
        sparsity.masks(sizes, 0.6, pairs, "matrix", None, gone),
    )
    expected = sparsity.masks(sizes, 0.6, UNSTRUCTURED, "global", None, gone)
    assert same(fast_masks(found, 0.6, UNSTRUCTURED, "global", None, gone), expected)
    for other in ([x.T for x in values("normal", 0)], [x.double() for x in found]):
        nothing = [torch.zeros_like(x, dtype=torch.bool) for x in other]
        assert same(
            masks_of(other, 0.6, None, nothing),
            sparsity.masks([x.abs() for x in other], 0.6, gone=nothing),
        )
    # Of one shape for all rows, as ages of components are.
    young = [(torch.arange(len(x)) < 2)[:, None].expand(x.shape) for x in found]
    assert same(
        masks_of(found, 0.3, young, gone), sparsity.masks(sizes, 0.3, spared=young, gone=gone)
    )
    assert masks_of([], 0.5, None, []) == []


@pytest.mark.usefixtures("form")
def test_no_input_is_changed_and_no_two_masks_share_memory() -> None:
    found, gone = values("ties", 3), some(0.3, 4)
    mine = masks_of(found, 0.5, None, gone)
    assert same(found, values("ties", 3))
    assert same(gone, some(0.3, 4))
    held = [mask.untyped_storage() for mask in mine if mask.numel()]
    assert len({storage.data_ptr() for storage in held}) == len(held)
    assert [len(storage) for storage in held] == [mask.numel() for mask in mine if mask.numel()]


# -- zeros where they do not -----------------------------------------------------------------------


@pytest.mark.usefixtures("form", "threads")
@pytest.mark.parametrize("kind", ["normal", "ties", "extremes"])
def test_what_is_masked_is_plus_zero_and_all_else_is_left(kind: str) -> None:
    tensors, masks = values(kind, 1), some(0.6, 2)
    zero_masked(tensors, masks)
    for now, before, mask in zip(tensors, values(kind, 1), masks, strict=True):
        assert torch.equal(now[mask], before[mask])
        finite = before.isfinite()
        assert not now[~mask & finite].view(torch.int32).any()  # -0.0 has a bit
        assert now[~mask & ~finite].isnan().all()
    assert any((~mask).any() for mask in masks)


@pytest.mark.usefixtures("form")
def test_tensors_and_masks_of_other_layouts_and_types() -> None:
    mask = some(0.5, 5)[5]
    for build in (Tensor.clone, Tensor.double, lambda x: x.T.contiguous().T):
        before = build(values("normal", 5)[5])
        for layout in (mask, mask.T.contiguous().T):
            now = before.clone()
            zero_masked([now], [layout])
            assert torch.equal(now, before * mask)
    zero_masked([], [])


@pytest.mark.usefixtures("form")
def test_parameters_are_set_without_a_trace_for_autograd() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    zero_masked([parameter], [torch.eye(2, 3, dtype=torch.bool)])
    assert parameter.is_leaf
    assert parameter.tolist() == torch.eye(2, 3).tolist()
