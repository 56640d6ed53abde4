"""Packs: rows put together so that each pack has at most a number of tokens."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
from numpy.typing import NDArray


def pack(lengths: NDArray[np.int64], limit: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(indices of rows, pack by pack [rows]; where packs begin and end in them [packs + 1]): best
    fit decreasing (Johnson, "Fast algorithms for bin packing", 1974), which takes at most 11/9 of
    the fewest packs, and one more.

    lengths [rows], each at most `limit`. Rows of equal length keep their order, so the result is
    the same every time. Packs are in the order in which they were begun.
    """
    order = np.argsort(-lengths, kind="stable")
    packs = np.zeros(len(lengths), np.int64)  # of each row of `order`
    begun = 0
    room: dict[int, list[int]] = {}  # {tokens left: packs}
    sizes: list[int] = []  # the keys of `room`, rising
    for place, row in enumerate(order):
        length = int(lengths[row])
        fit = bisect_left(sizes, length)
        if fit == len(sizes):
            number, left = begun, limit
            begun += 1
        else:
            left = sizes[fit]
            number = room[left].pop()
            if not room[left]:
                del room[left], sizes[fit]
        packs[place] = number
        left -= length
        if left not in room:
            room[left] = []
            insort(sizes, left)
        room[left].append(number)
    ends = np.cumsum([0, *np.bincount(packs, minlength=begun)], dtype=np.int64)
    return order[np.argsort(packs, kind="stable")], ends
