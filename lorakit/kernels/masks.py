"""Masks of many small matrices at once: choosing the entries that stay, and zeroing the others.

A torch operation on a matrix of a few thousand entries is mostly overhead, and a model has dozens
of adapters. The kernels in C (csrc/masks.c) process all matrices in one call. They take contiguous
float32 tensors on the CPU; for all others, and without a compiler, torch's operations give the same
bits.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from lorakit.compat import foreach
from lorakit.kernels import dispatch
from lorakit.kernels.in_c import FAILS, INT, INT32S, NOTHING, POINTER, THREADS, Library
from lorakit.kernels.levels import Level
from lorakit.numerics import sparsity
from lorakit.numerics.sparsity import keep_count
from lorakit.numerics.structure import UNSTRUCTURED, Scope, Structure

_C = Library(
    "masks",
    {
        "keep_strongest": (FAILS, *[POINTER] * 6, INT32S, *[INT] * 2, THREADS),
        "zero_masked": (NOTHING, *[POINTER] * 3, INT, THREADS),
    },
)


def fast_masks(
    values: Sequence[Tensor],
    density: float,
    structure: Structure,
    scope: Scope,
    spared: Sequence[Tensor] | None,
    gone: Sequence[Tensor],
) -> list[Tensor]:
    """`sparsity.masks` with the absolute values of `values` as scores. It is faster for the
    structure `unstructured` and the scope `matrix`, where the values need not be copied.
    """
    if not _is_for_c(values) or structure != UNSTRUCTURED or scope != "matrix":
        return sparsity.masks(
            [value.abs() for value in values], density, structure, scope, spared, gone
        )
    found = [torch.empty(out.shape, dtype=torch.bool) for out in gone]
    gone = [out.contiguous() for out in gone]
    free = None if spared is None else [some.contiguous() for some in spared]
    sizes = [value.numel() for value in values]
    counts = [0] * len(sizes) if free is None else [int(some.count_nonzero()) for some in free]
    keeps = [keep_count(density, size, count) for size, count in zip(sizes, counts, strict=True)]
    longest = max(sizes, default=0)
    keys = torch.empty(torch.get_num_threads() * longest, dtype=torch.int32)
    tables = (
        _addresses(values),
        None if free is None else _addresses(free),
        _addresses(gone),
        _addresses(found),
    )
    settings = array("q", sizes), array("q", keeps), keys, len(sizes), longest
    if _C.call("keep_strongest", *tables, *settings):
        raise ValueError("a score is not a number")
    return found


@torch.no_grad()
def zero_masked(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Set the entries of each tensor where its mask is False to exactly +0.0, in place; a
    non-finite entry there becomes NaN."""
    if not tensors:
        return
    if not _is_for_c(tensors) or not all(mask.is_contiguous() for mask in masks):
        foreach.mul_(list(tensors), list(masks))  # three times as fast as masked_fill_
        foreach.add_(list(tensors), 0.0)  # -0.0 + 0.0 is 0.0
        return
    sizes = array("q", [x.numel() for x in tensors])
    _C.call("zero_masked", _addresses(tensors), _addresses(masks), sizes, len(tensors))


def _is_for_c(tensors: Sequence[Tensor]) -> bool:
    fits = all(
        x.dtype == torch.float32 and x.is_cpu and x.is_contiguous() and x.numel() < 2**31
        for x in tensors
    )
    return fits and dispatch.implementation("masks") is not Level.torch


def _addresses(tensors: Sequence[Tensor]) -> array[int]:
    """The addresses of the tensors' data. An array is filled in a third of the time of a ctypes
    array."""
    return array("Q", [x.data_ptr() for x in tensors])
