"""Packs: rows put together so that each pack has at most a number of tokens."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Indices of rows, pack by pack: best fit decreasing (Johnson, "Fast algorithms for bin
    packing", 1974), which takes at most 11/9 of the fewest packs, and one more.

    lengths [rows], each at most `limit`. Rows of equal length keep their order, so the result is
    the same every time. Packs are in the order in which they were begun.
    """
    packs: list[list[int]] = []
    room: dict[int, list[int]] = {}  # {tokens left: packs}
    sizes: list[int] = []  # the keys of `room`, rising
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        place = bisect_left(sizes, lengths[row])
        if place == len(sizes):
            packs.append([])
            number, left = len(packs) - 1, limit
        else:
            left = sizes[place]
            number = room[left].pop()
            if not room[left]:
                del room[left], sizes[place]
        packs[number].append(row)
        left -= lengths[row]
        if left not in room:
            room[left] = []
            insort(sizes, left)
        room[left].append(number)
    return packs
