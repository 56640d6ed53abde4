"""Tensors that are one in memory, side by side: weights that are read together, and gradients that
are taken together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def join_rows(
    parameters: Sequence[Tensor], more: Sequence[Tensor] = (), out: Tensor | None = None
) -> Tensor:
    """The rows of the parameters, and then those of `more`, as one tensor, `out` if it is given.

    The parameters become views of it, so that nothing is held twice and they can be loaded anew.
    """
    joined = torch.cat([*(parameter.detach() for parameter in parameters), *more], out=out)
    start = 0
    for parameter in parameters:
        parameter.data = joined[start : start + len(parameter)]
        start += len(parameter)
    return joined


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors [..., out_i] as one [..., outputs]: a view where they are neighbours in one
    already."""
    if len(parts) == 1:
        return parts[0].contiguous()
    first, width = parts[0], sum(part.shape[-1] for part in parts)
    start = first.storage_offset()
    for part in parts:
        if (
            part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            or part.storage_offset() != start
            or part.ndim < 2
            or part.stride() != first.stride()
            or part.stride(-1) != 1
            or part.stride(-2) != width
        ):
            return torch.cat(list(parts), -1)
        start += part.shape[-1]
    return first.as_strided((*first.shape[:-1], width), first.stride(), first.storage_offset())
