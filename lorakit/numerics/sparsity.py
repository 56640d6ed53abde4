"""Masks: the choice of the entries of matrices that stay, by scores, a density and a structure.
Pure functions of tensors.

Counts are exact, and of equal scores the lowest index wins, so that equal scores give equal masks
on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lorakit.numerics.structure import UNSTRUCTURED, Scope, Structure


def keep_count(density: float, total: int, spared: int = 0) -> int:
    """The number of `total` entries that stay: the spared ones, and `density` of the others,
    rounded down but at least one if there are any."""
    others = total - spared
    # 0.29 · 100 is a hair below 29 in floating point.
    return spared + min(others, max(1, math.floor(density * others + 1e-9)))


def strongest(scores: Tensor, keep: int) -> Tensor:
    """The mask [..., n] of the `keep` highest scores along the last dimension; of equal scores the
    first win.

    Raises ValueError for a NaN score, which has no order.
    """
    n = scores.shape[-1]
    if bool(torch.isnan(scores).any()):
        raise ValueError("a score is not a number")
    if keep >= n or n == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if keep <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    least = torch.kthvalue(scores, n - keep + 1, dim=-1, keepdim=True).values
    above = scores > least
    ties = scores == least
    open_places = keep - above.sum(-1, keepdim=True)
    return above | (ties & (ties.cumsum(-1) <= open_places))


def masks(
    scores: Sequence[Tensor],
    density: float,
    structure: Structure = UNSTRUCTURED,
    scope: Scope = "matrix",
    spared: Sequence[Tensor] | None = None,
    gone: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """A mask for each matrix of non-negative `scores` [rows, columns]: True where an entry stays.

    With scope `matrix`, every matrix keeps `keep_count(density, entries)` entries. With `global`,
    all matrices together do, with scores divided by their matrix's root mean square; otherwise a
    matrix of large entries would wipe out one of small ones. A density above that of an n:m
    structure keeps n of every m and the highest of the rest, so that a ramp can come down to the
    structure. `spared` entries stay and do not count; `gone` entries never come back, even where
    the count has room.

    Raises ValueError for rows whose length the structure does not divide, and for the structure
    `rank`, which is chosen by component.
    """
    if structure.kind == "rank":
        raise ValueError("components are chosen by `strongest`, not by a mask of one matrix")
    for score in scores:
        if score.shape[1] % structure.width:
            raise ValueError(
                f"rows of {score.shape[1]} entries can not be cut into pieces of {structure.width}"
            )
    if structure == UNSTRUCTURED and scope == "matrix" and spared is None and gone is not None:
        return _masks_of_matrices(scores, density, gone)
    spared_of = [None] * len(scores) if spared is None else spared
    gone = [torch.zeros_like(score, dtype=torch.bool) for score in scores] if gone is None else gone
    relative = [_relative(score) for score in scores] if scope == "global" else list(scores)
    units = [
        _units(score, free, out, structure)
        for score, free, out in zip(relative, spared_of, gone, strict=True)
    ]
    chosen: list[Tensor]
    if scope == "global":
        joint = strongest(
            torch.cat([unit for unit, _ in units]), _places(units, density, structure)
        )
        chosen = list(torch.split(joint, [len(unit) for unit, _ in units]))
    else:
        chosen = _strongest_of_each(
            [unit for unit, _ in units], [_places([unit], density, structure) for unit in units]
        )
    return [
        _expand(mask, score, structure) & ~out
        for mask, score, out in zip(chosen, scores, gone, strict=True)
    ]


def _masks_of_matrices(
    scores: Sequence[Tensor], density: float, gone: Sequence[Tensor]
) -> list[Tensor]:
    """`masks` for the common case, without structure and spared entries. Matrices of one shape are
    processed at once, since an operation on one of them is mostly overhead."""
    alike: dict[torch.Size, list[int]] = {}
    for number, score in enumerate(scores):
        alike.setdefault(score.shape, []).append(number)
    found = list(scores)
    for numbers in alike.values():
        out = torch.stack([gone[number] for number in numbers])
        ordered = _below_all(torch.stack([scores[number] for number in numbers]), out).flatten(1)
        chosen = strongest(ordered, keep_count(density, ordered.shape[1])).view(out.shape) & ~out
        for number, mask in zip(numbers, chosen, strict=True):
            found[number] = mask.clone()  # not a view of the stacked masks
    return found


def _below_all(score: Tensor, gone: Tensor) -> Tensor:
    """The scores, with -1 for gone entries, whose own scores are ignored."""
    return torch.where(gone, -1.0, score)


def _strongest_of_each(units: Sequence[Tensor], keeps: Sequence[int]) -> list[Tensor]:
    """`strongest` of each. Tensors of one size are processed at once, since a selection from a few
    thousand numbers is mostly overhead."""
    alike: dict[tuple[int, int], list[int]] = {}
    for number, (unit, keep) in enumerate(zip(units, keeps, strict=True)):
        alike.setdefault((len(unit), keep), []).append(number)
    chosen = list(units)
    for (_, keep), numbers in alike.items():
        together = strongest(torch.stack([units[number] for number in numbers]), keep)
        for number, mask in zip(numbers, together, strict=True):
            chosen[number] = mask
    return chosen


def _relative(score: Tensor) -> Tensor:
    size = score.float().square().mean().sqrt() if score.numel() else score.new_ones([])
    return score / size if float(size) > 0 else score


def _units(
    score: Tensor, spared: Tensor | None, gone: Tensor, structure: Structure
) -> tuple[Tensor, int]:
    """(flat scores of the units that are chosen as one, infinite for spared units and below all
    others for gone units; the number of spared units)."""
    if structure.kind == "group":
        pieces = (
            score.reshape(-1, structure.m)
            .sum(-1)
            .masked_fill(gone.reshape(-1, structure.m).all(-1), -1.0)
        )
        if spared is None:
            return pieces, 0
        free = spared.reshape(-1, structure.m).any(-1)
        return pieces.masked_fill(free, math.inf), int(free.sum())
    score = _below_all(score, gone)
    if spared is not None:
        score = score.masked_fill(spared, math.inf)
    if structure.kind == "n:m":
        # The n entries that every group of m keeps precede all others.
        first = strongest(score.reshape(-1, structure.m), structure.n).reshape(score.shape)
        score = score.masked_fill(first, math.inf)
    return score.reshape(-1), 0 if spared is None else int(spared.sum())


def _places(units: Sequence[tuple[Tensor, int]], density: float, structure: Structure) -> int:
    """The number of units that stay."""
    keep = keep_count(
        density, sum(len(unit) for unit, _ in units), sum(count for _, count in units)
    )
    if structure.kind == "n:m":
        keep = max(keep, sum(int(torch.isinf(unit).sum()) for unit, _ in units))
    return keep


def _expand(mask: Tensor, score: Tensor, structure: Structure) -> Tensor:
    if structure.kind == "group":
        mask = mask[:, None].expand(-1, structure.m).reshape(-1)
    return mask.reshape(score.shape)


# -- bitmaps ---------------------------------------------------------------------------------------


def pack_bits(mask: Tensor) -> Tensor:
    """A mask of n entries as a bitmap: uint8 [⌈n / 8⌉] on the CPU, the first entry in the lowest
    bit, padded with 0."""
    return torch.from_numpy(np.packbits(mask.detach().cpu().numpy().reshape(-1), bitorder="little"))


def unpack_bits(bitmap: Tensor, count: int) -> Tensor:
    """The flat mask [count] of a bitmap. Raises ValueError if its length or a padding bit is
    wrong."""
    if bitmap.dtype != torch.uint8 or bitmap.ndim != 1 or len(bitmap) != -(-count // 8):
        raise ValueError(
            f"a bitmap of {count} entries has {-(-count // 8)} bytes, not {list(bitmap.shape)} of"
            f" {bitmap.dtype}"
        )
    bits = np.unpackbits(bitmap.cpu().numpy(), bitorder="little")
    if bits[count:].any():
        raise ValueError("bits beyond its last entry are set")
    return torch.from_numpy(bits[:count].astype(bool))
