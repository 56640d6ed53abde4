"""Shown rows: examples token by token, each with its role, and the tokens that a cut removes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.data.labels import Labels, shown_class
from lorakit.data.part import Part, Uncut
from lorakit.data.preview import Finding, Role, ShownRow, Token
from lorakit.data.token_texts import token_texts

Item = tuple[int, int | None]
"""(row of the data, its example, or None if it is left out)."""


def items_of(part: Part) -> list[Item]:
    """Everything of a part that can be shown: its rows, also those that are left out; or its
    pieces, where rows are joined."""
    if part.is_joined:
        return [(row, example) for example, row in enumerate(part.rows.tolist())]
    return [(row, part.example_of.get(row)) for row in range(len(part.data))]


def items_of_row(part: Part, row: int) -> list[Item]:
    """A row of the data; where rows are joined, the pieces that begin in it, or else the piece that
    it lies in."""
    if not part.is_joined:
        return [(row, part.example_of.get(row))]
    last = int(np.searchsorted(part.rows, row, side="right")) - 1
    first = int(np.searchsorted(part.rows, row, side="left"))
    return [(int(part.rows[i]), i) for i in range(min(first, last), last + 1)]


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of the items, at equal distances, since files may be sorted; all where there are
    fewer."""
    if count >= len(items):
        return list(items)
    if count == 1:
        return [items[0]]
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def notable_first(items: Sequence[Item], notable: set[int], count: int) -> list[Item]:
    """`count` of the items, in their order: up to half of them are examples in `notable`, or left
    out; the others are spread over the rest."""
    marked = [item for item in items if item[1] in notable or item[1] is None]
    chosen = set(marked[: max(count // 2, count - len(items) + len(marked))])
    rest = [item for item in items if item not in chosen]
    return sorted(chosen.union(spread(rest, count - len(chosen))))


def shown_rows(
    part: Part,
    items: Sequence[Item],
    whole: Uncut,
    findings: Sequence[Finding],
    tokenizer: Any,
    labels: Labels | None,
) -> list[ShownRow]:
    """The items, token by token."""
    read = [_tokens_and_roles(part, item, whole) for item in items]
    special = {token: _name(tokenizer, token) for token in special_ids(tokenizer)}
    texts = token_texts(tokenizer, [ids for ids, _ in read])
    found = []
    for (row, example), (ids, roles), words in zip(items, read, texts, strict=True):
        tokens = (
            Token(token, special.get(token, text), role, token in special)
            for token, text, role in zip(ids, words, roles, strict=True)
        )
        place = part.data.place(row)
        if part.is_joined and example is not None:
            place = f"piece {example + 1} of {len(part.examples)}, from {place}"
        warnings = (
            finding.mark
            for finding in findings
            if finding.split == part.name and example is not None and example in finding.examples
        )
        label = None if example is None else _label(part, example, labels)
        number = int(part.data.row_numbers[row])
        about = (label, tuple(warnings), example is None)
        found.append(ShownRow(number, place, tuple(tokens), *about))
    return found


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of the special tokens: those that the tokenizer names, and those that were added as
    such."""
    added = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added.union(tokenizer.all_special_ids)


def _name(tokenizer: Any, token: int) -> str:
    return str(tokenizer.convert_ids_to_tokens(token))


def kept_places(kept: Sequence[int], whole: Sequence[int]) -> list[bool] | None:
    """Marks of the tokens of a whole row that are left of it after a cut, wherever the cut was: at
    the end, before an end token, or in both texts of a pair. None where `kept` is not a part of
    `whole`.

    The longest common beginning and end are kept; between them, each token is the first that fits.
    """
    most = min(len(kept), len(whole))
    head = next((i for i in range(most) if kept[i] != whole[i]), most)
    tail = next((i for i in range(most - head) if kept[-1 - i] != whole[-1 - i]), most - head)
    marks = [True] * head + [False] * (len(whole) - head - tail) + [True] * tail
    at = head
    for token in kept[head : len(kept) - tail]:
        while at < len(whole) - tail and whole[at] != token:
            at += 1
        if at == len(whole) - tail:
            return None
        marks[at] = True
        at += 1
    return marks


def _tokens_and_roles(part: Part, item: Item, whole: Uncut) -> tuple[list[int], list[Role]]:
    row, example = item
    ids, roles = [], []
    if example is not None:
        span = slice(*part.examples.offsets[example : example + 2].tolist())
        ids = part.examples.tokens[span].tolist()
        roles = _roles(part.targets, span)
    number = whole.number_of.get(row)
    if number is None:
        return ids, roles
    all_ids = whole.examples.tokens[
        slice(*whole.examples.offsets[number : number + 2].tolist())
    ].tolist()
    marks = kept_places(ids, all_ids)
    if marks is None:
        return ids, roles
    left = iter(roles)
    return all_ids, [next(left) if mark else "cut" for mark in marks]


def _roles(targets: NDArray[np.bool_] | None, span: slice) -> list[Role]:
    if targets is None:
        return ["context"] * (span.stop - span.start)
    return ["target" if mark else "context" for mark in targets[span].tolist()]


def _label(part: Part, example: int, labels: Labels | None) -> str | None:
    if labels is None or part.examples.labels is None:
        return None
    value = part.examples.labels[example]
    return f"{value:g}" if labels.regression else shown_class(labels.names[int(value)])
