"""Low-rank algebra: the truncated SVD of a matrix, and the singular values of a product B A
without forming it."""

from __future__ import annotations

import torch
from torch import Tensor

# Oversampling and power iterations of the randomised SVD (Halko, Martinsson and Tropp, arXiv
# 0909.4061, sections 4.2 and 4.5).
OVERSAMPLING, PASSES = 16, 4
# What every direction of an input counts at least, as a share of the mean.
DAMPING = 1e-4
# Up to this smaller side an exact SVD takes below a second on two cores.
EXACT_LIMIT = 1024


def is_wide(matrix: Tensor) -> bool:
    """True for a matrix whose truncated SVD is better randomised."""
    return min(matrix.shape) > EXACT_LIMIT


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
        left = _sketched(matrix, rank, seed)[0].double()  # [out, rank]
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


def weighted_svd(
    matrix: Tensor, moment: Tensor, rank: int, seed: int = 0
) -> tuple[Tensor, Tensor, float]:
    """(A [rank, in], B [out, rank], share) whose product B A is nearest to `matrix` [out, in] for
    inputs x with the second moment E[x xᵀ] = `moment` [in, in]: it makes E‖(matrix − B A) x‖²
    least. share: of E‖matrix x‖² that is left.

    By the truncated SVD of `matrix` times a root of the moment (QERA, Zhang et al., arXiv
    2410.06040, theorem 1; its Cholesky factor is a root too). Directions that no input has count a
    little, so that the root can be inverted. A and B of each component have the same length. Wide
    matrices are randomised by `seed`. `matrix` must not be zero, and both must be finite.
    """
    exact = moment.double()
    exact = exact + DAMPING * exact.diagonal().mean().clamp_min(1e-30) * torch.eye(
        len(exact), dtype=torch.float64, device=exact.device
    )
    root: Tensor = torch.linalg.cholesky(exact)
    weighted = matrix.double() @ root
    a, b = truncated_svd(weighted, rank, is_wide(weighted), seed)
    left = (weighted - b.double() @ a.double()).square().sum() / weighted.square().sum()
    a = torch.linalg.solve_triangular(root, a.double(), upper=False, left=False)
    # Each component's A and B of one length, or an optimizer's steps would be much for one of them.
    lengths = torch.linalg.vector_norm(a, dim=1), torch.linalg.vector_norm(b.double(), dim=0)
    least = torch.finfo(torch.float64).tiny
    factor = (lengths[1].clamp_min(least) / lengths[0].clamp_min(least)).sqrt()
    return (a * factor[:, None]).float(), (b / factor).float(), float(left)


def _leading(gram: Tensor, rank: int) -> Tensor:
    """The eigenvectors [n, rank] of the largest eigenvalues, several times faster than the full
    SVD of a tall matrix."""
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors  # ascending
    return vectors[:, gram.shape[0] - rank :].flip(1)


def _sketched(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U [m, rank], σ [rank], V [n, rank]) of the largest singular values of `matrix` [m, n], up to
    a small error, in float32."""
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(seed)
        size = min(rank + OVERSAMPLING, *matrix.shape)
        u, values, v = torch.svd_lowrank(matrix.float(), q=size, niter=PASSES)
    return u[:, :rank], values[:rank], v[:, :rank]


class LeadingDirections:
    """The directions in which rows that come in parts are largest: the leading right singular
    vectors of all of them, without keeping them.

    Each part is put below Σ Vᵀ of what came before, and a truncated SVD of both replaces it (Brand,
    "Incremental singular value decomposition of uncertain data with missing values", ECCV 2002),
    with 16 directions more than asked for, so that little is lost.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._sketch: Tensor | None = None  # Σ Vᵀ [at most count + 16, in]

    def add(self, rows: Tensor) -> None:
        """Take in rows [n, in]."""
        rows = rows.float()
        both = rows if self._sketch is None else torch.cat([self._sketch, rows])
        if len(both):
            _, values, v = _sketched(both, min(self.count + OVERSAMPLING, *both.shape), self.seed)
            self._sketch = values[:, None] * v.T

    def found(self) -> Tensor:
        """The directions [at most count, in], of length 1, orthogonal, the largest first; fewer
        where the rows have no more."""
        if self._sketch is None:
            return torch.zeros(0, 0)
        sizes = torch.linalg.vector_norm(self._sketch, dim=1)
        least = torch.finfo(sizes.dtype).eps * len(self._sketch) * sizes.max()
        kept = self._sketch[: self.count][sizes[: self.count] > least]
        directions: Tensor = kept / torch.linalg.vector_norm(kept, dim=1, keepdim=True)
        return directions


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
