"""Module names as a grid: layers down, kinds of module across, with short column heads that stay
unambiguous."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lorakit.report.history import RankRecord

NO_LAYER = "-"

# More columns than this fit no screen; numbered parts of a layer (experts) are then summed.
MOST_COLUMNS = 24


@dataclass(frozen=True)
class Grid:
    """Modules laid out by layer (rows) and kind (columns), both in the model's own order.

    heads: {kind: a short name for it, unique}; cells: {(layer, kind): its modules}, one each unless
      parts are summed.
    """

    layers: list[str]
    kinds: list[str]
    heads: dict[str, str]
    cells: dict[tuple[str, str], list[str]]
    summed: bool

    def rank(self, record: RankRecord, layer: str, kind: str) -> int | None:
        """The rank in one cell, None where the model has no such module."""
        modules = self.cells.get((layer, kind))
        return None if modules is None else record.sum_of(modules)

    def of_kind(self, kind: str) -> list[str]:
        return [name for (_, k), names in self.cells.items() if k == kind for name in names]

    def of_layer(self, layer: str) -> list[str]:
        return [name for (row, _), names in self.cells.items() if row == layer for name in names]

    def places(self) -> dict[str, str]:
        """{module: its place in words}, such as `output.dense 2`; just the name where there is no
        layer."""
        return {
            name: self.heads[kind] if layer == NO_LAYER else f"{self.heads[kind]} {layer}"
            for (layer, kind), names in self.cells.items()
            for name in names
        }


def split_name(module: str) -> tuple[str | None, int, str]:
    """(stack, block index, kind): the name up to its first integer segment, that integer, and the
    rest.

    A module outside any block has the stack None and its whole name for a kind.
    """
    segments = module.split(".")
    at = next((i for i, segment in enumerate(segments) if segment.isdecimal()), None)
    if at is None:
        return None, 0, module
    stack = ".".join(segments[:at])
    return stack, int(segments[at]), ".".join(segments[at + 1 :]) or stack or module


def layout(modules: Iterable[str]) -> Grid:
    """The grid of `modules`, which come in the model's own order."""
    parts = {module: split_name(module) for module in modules}
    stacks = stack_names([stack for stack, _, _ in parts.values() if stack is not None])
    position = {stack: i for i, stack in enumerate(stacks)}
    order = {NO_LAYER: (len(stacks), 0)}
    for stack, index, _ in parts.values():
        if stack is not None:
            order[_label(stacks[stack], index)] = position[stack], index

    def cells(with_numbers: bool) -> dict[tuple[str, str], list[str]]:
        found: dict[tuple[str, str], list[str]] = {}
        for module, (stack, index, kind) in parts.items():
            layer = NO_LAYER if stack is None else _label(stacks[stack], index)
            found.setdefault((layer, kind if with_numbers else _without_numbers(kind)), []).append(
                module,
            )
        return found

    # Numbers inside a block that tell nothing apart (T5's layer.1.DenseReluDense.wo is layer.2… in
    # the decoder) would only spread one kind over several columns. Those that do (experts.0.w1)
    # stay, as long as they fit a screen.
    grid = cells(with_numbers=False)
    summed = any(len(names) > 1 for names in grid.values())
    if summed:
        numbered = cells(with_numbers=True)
        if len({kind for _, kind in numbered}) <= MOST_COLUMNS:
            grid, summed = numbered, False

    layers = sorted({layer for layer, _ in grid}, key=order.__getitem__)
    kinds = list(dict.fromkeys(kind for _, kind in grid))
    return Grid(layers, kinds, column_heads(kinds), grid, summed)


def _label(stack: str, index: int) -> str:
    return f"{stack} {index}".strip()


def _without_numbers(kind: str) -> str:
    return ".".join(segment for segment in kind.split(".") if not segment.isdecimal()) or kind


def stack_names(stacks: Iterable[str]) -> dict[str, str]:
    """{stack: the part of its name that no other has}: encoder.block, decoder.block → encoder,
    decoder; "" for an only stack."""
    segments = {stack: stack.split(".") for stack in dict.fromkeys(stacks)}
    shortest = min(map(len, segments.values()), default=0)

    def shared(limit: int, step: int) -> int:
        """How many segments all stacks have in common, from the front (step 1) or the back (step
        -1)."""
        count = 0
        while count < limit and len({s[::step][count] for s in segments.values()}) == 1:
            count += 1
        return count

    front = shared(shortest, 1)
    back = shared(shortest - front, -1)
    return {stack: ".".join(s[front : len(s) - back]) for stack, s in segments.items()}


def column_heads(kinds: Sequence[str]) -> dict[str, str]:
    """{kind: the shortest dotted suffix that no other kind ends in}.

    A kind that is itself the end of another (BERT's output.dense and attention.output.dense) keeps
    its whole name; the other one's suffix must then be longer, so heads are unique. A head never
    begins with a number.
    """

    def head(kind: str) -> str:
        segments = kind.split(".")
        for start in range(len(segments) - 1, 0, -1):
            suffix = ".".join(segments[start:])
            shared = any(other != kind and f".{other}".endswith(f".{suffix}") for other in kinds)
            if not shared and not segments[start].isdecimal():
                return suffix
        return kind

    return {kind: head(kind) for kind in kinds}


def stacked(head: str) -> str:
    """A column head that takes a line a segment, and a line a word in a long segment:
    SelfAttention.q takes three."""
    lines = (
        re.sub(r"(?<=[a-z])(?=[A-Z])", "\n", segment) if len(segment) > 10 else segment
        for segment in head.split(".")
    )
    return ".\n".join(lines)
