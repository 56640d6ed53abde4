"""Low-rank algebra against torch's full SVD, and the error bound that the residual of a pruned
matrix owes."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lorakit.numerics.lowrank import (
    balanced_product,
    effective_rank,
    product_singular_values,
    truncated_svd,
)
from lorakit.numerics.sparsity import masks

SHAPES = [(12, 12), (20, 9), (9, 20), (1, 7), (7, 1), (48, 33)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def best(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of that rank, in float64 (Eckart and Young, 1936)."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def orthogonal(size: int, columns: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(size, columns, seed=seed).double()).Q


# -- the truncated SVD -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_best_approximation_of_every_rank(shape: tuple[int, int]) -> None:
    matrix = normal(*shape, seed=sum(shape))
    for rank in range(min(shape) + 1):
        a, b = truncated_svd(matrix, rank)
        assert (a.shape, b.shape) == ((rank, shape[1]), (shape[0], rank))
        assert (a.dtype, b.dtype) == (torch.float32, torch.float32)
        torch.testing.assert_close((b @ a).double(), best(matrix, rank), rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("randomised", [False, True])
def test_the_singular_values_are_split_evenly_and_fall(
    shape: tuple[int, int], randomised: bool
) -> None:
    matrix, rank = normal(*shape), min(shape)
    a, b = truncated_svd(matrix, rank, randomised)
    values = torch.linalg.svdvals(matrix)
    roots = values.sqrt().tolist()
    assert torch.linalg.vector_norm(a, dim=1).tolist() == pytest.approx(roots, rel=1e-3)
    assert torch.linalg.vector_norm(b, dim=0).tolist() == pytest.approx(roots, rel=1e-3)
    # Components are orthogonal to each other.
    torch.testing.assert_close(a @ a.T, torch.diag(values), rtol=0, atol=2e-3)
    torch.testing.assert_close(b.T @ b, torch.diag(values), rtol=0, atol=2e-3)


@pytest.mark.parametrize("randomised", [False, True])
@pytest.mark.parametrize("shape", [(8, 12), (12, 8)])
def test_a_matrix_of_lower_rank_is_met_exactly_and_leaves_nothing_that_is_not_a_number(
    shape: tuple[int, int], randomised: bool
) -> None:
    matrix = normal(shape[0], 2) @ normal(2, shape[1], seed=1)
    for rank in (2, 5, 8):
        a, b = truncated_svd(matrix, rank, randomised)
        assert a.isfinite().all()
        assert b.isfinite().all()
        torch.testing.assert_close(b @ a, matrix, rtol=0, atol=1e-5)
    a, b = truncated_svd(torch.zeros(shape), 3, randomised)
    assert not (b @ a).any()
    assert a.isfinite().all()
    assert b.isfinite().all()


@pytest.mark.parametrize("size", [1e-12, 1e-3, 1e6])
@pytest.mark.parametrize("shape", [(8, 12), (12, 8)])
def test_the_size_of_the_matrix_does_not_matter(shape: tuple[int, int], size: float) -> None:
    """Weights of 1e-3 have Gram matrices of 1e-6, and a layer's own error may be far below them."""
    matrix = normal(*shape)
    a, b = truncated_svd(matrix * size, 4)
    torch.testing.assert_close((b @ a).double() / size, best(matrix, 4), rtol=0, atol=2e-5)


def test_values_far_apart_are_all_found() -> None:
    values = torch.tensor([1.0, 1e-1, 1e-2, 1e-3, 1e-4])
    matrix = ((orthogonal(9, 5) * values) @ orthogonal(7, 5, seed=1).T).float()
    a, b = truncated_svd(matrix, 5)
    assert product_singular_values(a, b).tolist() == pytest.approx(values.tolist(), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_matrix_of_another_type_gives_float32_factors(dtype: torch.dtype) -> None:
    matrix = normal(6, 9).to(dtype)
    a, b = truncated_svd(matrix, 6)
    assert a.dtype == b.dtype == torch.float32
    torch.testing.assert_close(b @ a, matrix.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("randomised", [False, True])
def test_a_rank_above_the_smaller_side_is_refused(randomised: bool) -> None:
    with pytest.raises(ValueError, match="rank 6 is above 5, the smaller side"):
        truncated_svd(torch.ones(5, 9), 6, randomised)


# -- what is left of a pruned matrix ---------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_the_residual_leaves_at_most_its_share_of_the_error(
    shape: tuple[int, int], density: float
) -> None:
    """MSE(after) ≤ (1 - r / min(out, in)) · MSE(pruning), arXiv 2601.16991, section 3: the r
    largest of q squared singular values are at least r / q of their sum."""
    for seed in range(3):
        weight = normal(*shape, seed=seed)
        error = weight * ~masks([weight.abs()], density)[0]
        before = error.double().square().mean()
        smaller, left = min(shape), []
        for rank in range(smaller + 1):
            a, b = truncated_svd(error, rank)
            after = (error - b @ a).double().square().mean()
            assert after <= (1 - rank / smaller) * before * (1 + 1e-6) + 1e-12
            left.append(float(after))
        assert left[0] == pytest.approx(float(before))
        assert left[-1] == pytest.approx(0.0, abs=1e-10)
        assert all(later <= earlier + 1e-12 for earlier, later in pairwise(left))
        # a random error is far from the worst case: half of the rank takes more than two thirds of
        # it
        if smaller > 5:
            assert left[smaller // 2] < 0.34 * float(before)


def test_the_bound_is_met_where_all_singular_values_are_equal() -> None:
    error = orthogonal(10, 10).float()
    for rank in (1, 5, 9):
        a, b = truncated_svd(error, rank)
        assert float((error - b @ a).square().mean() / error.square().mean()) == pytest.approx(
            1 - rank / 10, abs=1e-5
        )


# -- the randomised one ----------------------------------------------------------------------------


def decaying(out: int, width: int, seed: int = 0) -> Tensor:
    """A matrix with singular values 1 / i: neither flat nor of low rank."""
    rank = min(out, width)
    values = 1.0 / torch.arange(1, rank + 1)
    return ((orthogonal(out, rank, seed) * values) @ orthogonal(width, rank, seed + 1).T).float()


@pytest.mark.parametrize("shape", [(120, 200), (200, 120)])
@pytest.mark.parametrize("rank", [1, 8, 32])
def test_the_randomised_one_is_close_to_the_best(shape: tuple[int, int], rank: int) -> None:
    for matrix in (decaying(*shape), normal(*shape)):  # the second is as hard as they get
        least = (matrix.double() - best(matrix, rank)).square().sum()
        a, b = truncated_svd(matrix, rank, randomised=True)
        found = (matrix - b @ a).double().square().sum()
        assert least * (1 - 1e-6) <= found <= 1.02 * least


def test_the_randomised_one_keeps_the_bound_on_a_pruned_matrix() -> None:
    weight = normal(96, 160)
    error = weight * ~masks([weight.abs()], 0.5)[0]
    for rank in (4, 16, 64, 96):
        a, b = truncated_svd(error, rank, randomised=True)
        assert (error - b @ a).square().mean() <= (1 - rank / 96) * error.square().mean() + 1e-9


def test_a_seed_gives_the_same_bytes_and_leaves_other_random_numbers_alone() -> None:
    matrix = decaying(60, 80)
    torch.manual_seed(11)
    expected = torch.rand(4)
    torch.manual_seed(11)
    first = truncated_svd(matrix, 4, randomised=True, seed=5)
    assert torch.equal(torch.rand(4), expected)
    torch.manual_seed(12)
    again = truncated_svd(matrix, 4, randomised=True, seed=5)
    other = truncated_svd(matrix, 4, randomised=True, seed=6)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    torch.manual_seed(11)
    truncated_svd(matrix, 4)
    assert torch.equal(torch.rand(4), expected)


# -- singular values of a product, effective rank --------------------------------------------------


@pytest.mark.parametrize(
    ("out", "rank", "width"),
    [(9, 3, 14), (14, 3, 9), (5, 5, 5), (4, 6, 9), (9, 6, 4), (3, 8, 5), (1, 1, 1)],
)
def test_the_singular_values_of_a_product_are_those_of_the_dense_one(
    out: int, rank: int, width: int
) -> None:
    """Also for a rank above a side, which a layer can not have but a residual beside the factors
    can."""
    a, b = normal(rank, width), normal(out, rank, seed=1)
    values = product_singular_values(a, b)
    dense = torch.linalg.svdvals(b.double() @ a.double())
    count = min(len(values), len(dense))
    torch.testing.assert_close(
        values[:count].sort(descending=True).values, dense[:count], rtol=1e-9, atol=1e-9
    )
    assert bool((values[count:] < 1e-9).all())
    assert bool((dense[count:] < 1e-9).all())


def test_the_singular_values_of_nothing() -> None:
    assert product_singular_values(torch.zeros(0, 5), torch.zeros(7, 0)).shape == (0,)
    assert effective_rank(torch.zeros(0, 5), torch.zeros(7, 0)) == 0.0


def test_the_effective_rank_of_one_direction_is_1() -> None:
    a, b = normal(4, 9), normal(7, 4, seed=1)
    one = torch.zeros(4)
    one[2] = 1.0
    assert effective_rank(a * one[:, None], b * one) == pytest.approx(1.0)
    assert effective_rank(a[:1].expand(4, -1), b) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 5, 8])
def test_the_effective_rank_of_equal_singular_values_is_their_number(rank: int) -> None:
    a, b = orthogonal(12, rank).T.float(), orthogonal(9, rank, seed=1).float() * 3
    assert effective_rank(a, b) == pytest.approx(rank, rel=1e-5)


def test_the_effective_rank_is_e_to_the_entropy_of_the_shares() -> None:
    shares = [0.5, 0.25, 0.125, 0.125]
    a, b = orthogonal(6, 4).T.float(), (orthogonal(8, 4, seed=1) * torch.tensor(shares)).float()
    assert effective_rank(a, b) == pytest.approx(
        math.exp(-sum(p * math.log(p) for p in shares)), rel=1e-5
    )
    assert effective_rank(a * 1e-4, b) == pytest.approx(effective_rank(a, b), rel=1e-5)


def test_the_effective_rank_of_a_product_that_is_zero_is_0() -> None:
    assert effective_rank(normal(4, 9), torch.zeros(7, 4)) == 0.0
    assert effective_rank(torch.zeros(4, 9), normal(7, 4)) == 0.0


# -- a product whose components are the singular ones ----------------------------------------------


@pytest.mark.parametrize(
    ("out", "rank", "width"), [(9, 3, 14), (14, 3, 9), (5, 5, 5), (20, 1, 7), (12, 9, 9)]
)
def test_every_prefix_of_a_balanced_product_is_the_best_approximation(
    out: int, rank: int, width: int
) -> None:
    a, b = normal(rank, width, seed=3), normal(out, rank, seed=4) * 0.01
    balanced_a, balanced_b = balanced_product(a, b)
    assert (balanced_a.shape, balanced_b.shape) == (a.shape, b.shape)
    dense = b.double() @ a.double()
    for count in range(rank + 1):
        prefix = balanced_b[:, :count].double() @ balanced_a[:count].double()
        torch.testing.assert_close(
            prefix, best(dense, count), rtol=0, atol=1e-6 * float(dense.abs().max())
        )


def test_its_components_are_orthogonal_and_share_the_singular_values_evenly() -> None:
    a, b = balanced_product(normal(4, 15, seed=5), normal(11, 4, seed=6))
    values = torch.linalg.svdvals(b.double() @ a.double())[:4]
    assert values.tolist() == sorted(values.tolist(), reverse=True)
    torch.testing.assert_close((a @ a.T).double(), torch.diag(values), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((b.T @ b).double(), torch.diag(values), rtol=1e-5, atol=1e-5)


def test_balancing_again_changes_nothing_more() -> None:
    once = balanced_product(normal(4, 15, seed=7), normal(11, 4, seed=8))
    twice = balanced_product(*once)
    for count in range(5):
        products = [b[:, :count] @ a[:count] for a, b in (once, twice)]
        torch.testing.assert_close(products[0], products[1], rtol=0, atol=1e-5)


def test_a_product_of_lower_rank_or_of_nothing_is_balanced_too() -> None:
    a, b = normal(4, 9, seed=9), torch.zeros(6, 4)
    for factors in ((a, b), (torch.zeros(4, 9), normal(6, 4)), (a[:0], b[:, :0])):
        balanced_a, balanced_b = balanced_product(*factors)
        assert balanced_a.isfinite().all()
        assert balanced_b.isfinite().all()
        assert not (balanced_b @ balanced_a).any()
    one = torch.tensor([1.0, 0, 0, 0])
    b = normal(6, 4) * one
    balanced_a, balanced_b = balanced_product(a, b)
    torch.testing.assert_close(balanced_b[:, :1] @ balanced_a[:1], b @ a, rtol=0, atol=1e-5)
    assert balanced_a.dtype == balanced_b.dtype == torch.float32


def test_balancing_changes_neither_of_the_factors_given() -> None:
    a, b = normal(3, 9), normal(6, 3)
    before = a.clone(), b.clone()
    balanced_product(a, b)
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])
