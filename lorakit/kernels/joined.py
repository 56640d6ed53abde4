"""Tensors joined into one: weights that are read together, and gradients that are processed
together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def join_rows(
    parameters: Sequence[Tensor], more: Sequence[Tensor] = (), out: Tensor | None = None
) -> Tensor:
    """Join the rows of the parameters, then those of `more`, into one tensor, `out` if it is given.

    The parameters become views of it, so nothing is stored twice and later loads reach both.
    """
    joined = torch.cat([*(parameter.detach() for parameter in parameters), *more], out=out)
    start = 0
    for parameter in parameters:
        parameter.data = joined[start : start + len(parameter)]
        start += len(parameter)
    return joined


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Join tensors [..., out_i] into [..., outputs]: a view where they already are neighbours in
    one tensor, else a copy."""
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
