"""Low-rank algebra: the truncated SVD of a matrix, and the singular values of a product B A
without forming it."""

from __future__ import annotations

import torch
from torch import Tensor

# Oversampling and power iterations of the randomised SVD (Halko, Martinsson and Tropp, arXiv
# 0909.4061, sections 4.2 and 4.5).
OVERSAMPLING, PASSES = 16, 4


def truncated_svd(
    matrix: Tensor, rank: int, randomised: bool = False, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(A [rank, in], B [out, rank]) whose product B A is the best approximation of `matrix` [out,
    in] of that rank.

    The singular values are split evenly, Σ^½ each (Eckart and Young, 1936). The result is exact,
    in float64, from the eigenvectors of the smaller Gram matrix. `randomised` computes it up to a
    small error from a sketch of `rank` + 16 columns, deterministically for a given `seed`. Raises
    ValueError for a rank above min(out, in).
    """
    if rank > min(matrix.shape):
        raise ValueError(
            f"rank {rank} is above {min(matrix.shape)}, the smaller side of {tuple(matrix.shape)}"
        )
    exact = matrix.double()
    if randomised:
        with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
            torch.manual_seed(seed)
            u, _, _ = torch.svd_lowrank(
                matrix.float(), q=min(rank + OVERSAMPLING, *matrix.shape), niter=PASSES
            )
        left = u[:, :rank].double()  # [out, rank]
        right = left.T @ exact  # [rank, in]: Σ Vᵀ
    elif matrix.shape[0] <= matrix.shape[1]:
        left = _leading(exact @ exact.T, rank)
        right = left.T @ exact
    else:
        right = _leading(exact.T @ exact, rank).T
        left = exact @ right.T
    # One factor is orthonormal; the norms of the other's rows or columns are the singular values.
    of_left, of_right = (
        torch.linalg.vector_norm(left, dim=0),
        torch.linalg.vector_norm(right, dim=1),
    )
    root, least = (of_left * of_right).sqrt(), torch.finfo(torch.float64).tiny
    return (right * (root / of_right.clamp_min(least))[:, None]).float(), (
        left * (root / of_left.clamp_min(least))
    ).float()


def _leading(gram: Tensor, rank: int) -> Tensor:
    """The eigenvectors [n, rank] of the largest eigenvalues, several times faster than the full
    SVD of a tall matrix."""
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors  # ascending
    return vectors[:, gram.shape[0] - rank :].flip(1)


def product_singular_values(a: Tensor, b: Tensor) -> Tensor:
    """The singular values [rank] of B A, for A [rank, in] and B [out, rank], computed from the QR
    of each, without forming [out, in]."""
    if len(a) == 0:
        return a.new_zeros(0)
    inner_b = torch.linalg.qr(b.double(), mode="r").R
    inner_a = torch.linalg.qr(a.double().T, mode="r").R
    values: Tensor = torch.linalg.svdvals(inner_b @ inner_a.T)
    return values


def balanced_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(A' [rank, in], B' [out, rank]) with B' A' = B A, whose components are the singular
    components, largest first.

    So, for every ρ, the first ρ components are the best approximation of the product of rank ρ
    (Eckart and Young, 1936). Σ^½ goes to each side. Computed in float64 from the QR of B and Aᵀ and
    the SVD of a [rank, rank] matrix, without forming [out, in].
    """
    if len(a) == 0:
        return a.clone(), b.clone()
    left, inner_b = torch.linalg.qr(b.double())
    right, inner_a = torch.linalg.qr(a.double().T)
    u, values, vh = torch.linalg.svd(inner_b @ inner_a.T)
    root = values.sqrt()
    return (root[:, None] * (vh @ right.T)).to(a.dtype), ((left @ u) * root).to(b.dtype)


def effective_rank(a: Tensor, b: Tensor) -> float:
    """The effective rank of B A: the exponential of the entropy of its normalised singular values
    (Roy and Vetterli, EUSIPCO 2007).

    Between 1 and the rank; 0 for a zero product.
    """
    values = product_singular_values(a, b)
    if not bool(values.sum() > 0):
        return 0.0
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float(torch.exp(-(shares * shares.log()).sum()))
