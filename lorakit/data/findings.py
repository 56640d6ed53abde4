"""Findings: warnings about the examples of a split that only all of them together, or their tokens,
tell. Those about single rows are in lorakit/data/collect.py."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit import compat
from lorakit.data.formats import Format
from lorakit.data.keys import ChosenSpec
from lorakit.data.part import Part, Uncut, cut_examples
from lorakit.data.preview import Finding
from lorakit.data.shown import special_ids
from lorakit.data.tokenise import Tokeniser

BLANKS = 4  # most tokens of white space after the end-of-turn token


def all_findings(
    parts: Sequence[tuple[Part, Uncut]],
    form: Format,
    spec: ChosenSpec,
    tokenizer: Any,
    config: Any,
) -> list[Finding]:
    """The findings of training and, if there is one, of validation, and of the two together."""
    found: list[Finding | None] = []
    for part, whole in parts:
        found += [
            double_beginning(part, tokenizer),
            without_end(part, whole, tokenizer, end_tokens(tokenizer, config)),
            without_target(part),
        ]
    train = parts[0][0]
    found.append(duplicates(train, form, spec))
    found += [overlap(train, validation, form, spec) for validation, _ in parts[1:]]
    return [finding for finding in found if finding is not None]


def double_beginning(part: Part, tokenizer: Any) -> Finding | None:
    """Rows with two beginning-of-sequence tokens next to each other. A token that is the
    end-of-sequence token too stands between joined rows."""
    begins = {*Tokeniser(tokenizer).begin, tokenizer.bos_token_id} - {None}
    if part.is_joined:
        begins -= {tokenizer.eos_token_id}
    tokens = part.examples.tokens
    twice = np.flatnonzero((tokens[1:] == tokens[:-1]) & np.isin(tokens[1:], list(begins)))
    rows = np.searchsorted(part.examples.offsets, twice, side="right") - 1
    inside = twice + 1 < part.examples.offsets[rows + 1]
    if not inside.any():
        return None
    name = tokenizer.convert_ids_to_tokens(int(tokens[twice[inside][0]]))
    what = (
        f"have the beginning-of-sequence token `{name}` twice in a row: the text spells it out, and"
        " it is added once more"
    )
    return _finding("double BOS", part, np.unique(rows[inside]), what)


def end_tokens(tokenizer: Any, config: Any) -> set[int]:
    """Tokens that may end a row or a turn: those that generation stops at, and all special tokens
    that have no other role."""
    stops = getattr(config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])} - {None}
    names = ("bos_token_id", "unk_token_id", "pad_token_id", "mask_token_id", "cls_token_id")
    others = {getattr(tokenizer, name) for name in names}
    return ends | (special_ids(tokenizer) - others)


def without_end(part: Part, whole: Uncut, tokenizer: Any, ends: set[int]) -> Finding | None:
    """Rows whose last target, apart from white space, is none of the tokens `ends`. Rows that are
    cut have a warning of their own, and joined rows end where a piece ends."""
    examples = part.examples
    if part.targets is None or part.is_joined or not len(examples):
        return None
    places = np.where(part.targets, np.arange(len(examples.tokens)), -1)
    last = np.maximum.reduceat(places, examples.offsets[:-1])
    kept = last >= 0
    last = np.where(kept, last, 0)
    for _ in range(BLANKS):
        blank = np.isin(examples.tokens[last], _blank(tokenizer, np.unique(examples.tokens[last])))
        last = np.where(blank & (last > examples.offsets[:-1]), last - 1, last)
    open_ = kept & ~np.isin(examples.tokens[last], list(ends))
    open_[cut_examples(part, whole)] = False
    what = (
        "have targets that do not end in an end-of-sequence or end-of-turn token: the model does"
        " not learn from them where to stop"
    )
    return _finding("no end", part, np.flatnonzero(open_), what)


def without_target(part: Part) -> Finding | None:
    """Rows that nothing is learned from; formats leave such rows out."""
    if part.targets is None or not len(part.examples):
        return None
    counts = np.add.reduceat(part.targets.astype(np.int64), part.examples.offsets[:-1])
    what = "have no target: the model learns nothing from them"
    return _finding("no target", part, np.flatnonzero(counts == 0), what)


def duplicates(train: Part, form: Format, spec: ChosenSpec) -> Finding | None:
    """Training rows that are to the model what an earlier row is. Lines of one text may well be
    alike."""
    first: dict[Hashable, int] = {}
    keys = _row_keys(train, form, spec)
    again = [(row, first[key]) for row, key in enumerate(keys) if _is_known(first, key, row)]
    what = "are the same to the model as an earlier row: it learns them more than once"
    return _about_pairs("duplicate", train, train, again, what)


def overlap(train: Part, validation: Part, form: Format, spec: ChosenSpec) -> Finding | None:
    """Validation rows with the input of a training row."""
    keys = _input_keys(train, form, spec), _input_keys(validation, form, spec)
    what = "have the input of a training row: metrics on them are those of what was learned"
    return _about_pairs("in training", validation, train, _alike(*keys), what)


@dataclass(frozen=True)
class SetParts:
    """The parts of a data set among others, and how its rows are read."""

    name: str
    train: Part
    validation: Part | None
    form: Format
    spec: ChosenSpec


def between(one: SetParts, other: SetParts) -> list[Finding]:
    """Findings about rows of `other` that another data set `one` has too: training rows that are
    the same to the model, and validation rows with the input of a training row. Inputs are compared
    between sets of one format."""
    found: list[tuple[str, Finding | None]] = []
    if one.train.is_joined == other.train.is_joined:
        same = _alike(*(_row_keys(of.train, of.form, of.spec) for of in (one, other)))
        what = f"are the same to the model as a row of {one.name}: it learns them more than once"
        finding = _about_pairs("duplicate", other.train, one.train, same, what)
        found.append((other.name, finding))
    for train, held in ((one, other), (other, one)):
        if held.validation is None or train.form.name != held.form.name:
            continue
        inputs = (
            _input_keys(train.train, train.form, train.spec),
            _input_keys(held.validation, held.form, held.spec),
        )
        what = (
            f"have the input of a training row of {train.name}: metrics on them are those of what"
            " was learned"
        )
        finding = _about_pairs("in training", held.validation, train.train, _alike(*inputs), what)
        found.append((held.name, finding))
    return [about_set(name, finding) for name, finding in found if finding is not None]


def about_set(name: str, finding: Finding) -> Finding:
    """The finding with the name of the data set, of several."""
    return replace(finding, text=f"{name}: {finding.text}", first=f"{name}: {finding.first}")


def _row_keys(part: Part, form: Format, spec: ChosenSpec) -> list[Hashable]:
    """A key of what each row is to the model; none for lines of a text, which may well be alike."""
    if part.is_joined:
        return [] if part.lines else _joined_texts(part, form, spec)
    return list(_contents(part))


def _input_keys(part: Part, form: Format, spec: ChosenSpec) -> list[Hashable]:
    """The input of each row; none for lines of a text."""
    if part.is_joined:
        return [] if part.lines else _joined_texts(part, form, spec)
    return form.input_keys(part.data.select(part.rows), spec)


def _alike(keys: Sequence[Hashable], later: Sequence[Hashable]) -> list[tuple[int, int]]:
    """[(a row of the later ones, the first row with the same key)]; None is no key."""
    first: dict[Hashable, int] = {}
    for row, key in enumerate(keys):
        first.setdefault(key, row)
    first.pop(None, None)
    return [(row, first[key]) for row, key in enumerate(later) if key in first]


def _is_known(first: dict[Hashable, int], key: Hashable, row: int) -> bool:
    """True if the key was met before row `row`; None is no key."""
    return key is not None and first.setdefault(key, row) != row


def _contents(part: Part) -> Iterator[bytes]:
    """Everything of each example that training depends on."""
    examples = part.examples
    parallel = [a for a in (examples.tokens, examples.token_types, part.targets) if a is not None]
    for example in range(len(examples)):
        span = slice(*examples.offsets[example : example + 2].tolist())
        label = b"" if examples.labels is None else examples.labels[example].tobytes()
        yield b"".join([label, *(array[span].tobytes() for array in parallel)])


def _joined_texts(part: Part, form: Format, spec: ChosenSpec) -> list[Hashable]:
    """The text of each row that is joined with others; None for one without a word."""
    texts = form.learned_texts(part.data, spec, part.lines)
    return [text if text.strip() else None for text in texts]


def _blank(tokenizer: Any, tokens: NDArray[np.int32]) -> NDArray[np.int32]:
    """Those of the tokens that are white space."""
    texts = compat.decode(tokenizer, tokens[:, None].tolist())
    return tokens[[not text.strip() for text in texts]]


def _about_pairs(
    mark: str, part: Part, other: Part, pairs: Sequence[tuple[int, int]], what: str
) -> Finding | None:
    """The finding about rows of `part`, each with its like in `other`; rows of the data where they
    are joined, else examples."""
    if not pairs:
        return None
    place, like = (
        one.data.place(row) if one.is_joined else one.place(row)
        for one, row in zip((part, other), pairs[0], strict=True)
    )
    rows = np.array([row for row, _ in pairs], np.int64)
    total = len(part.data) if part.is_joined else len(part.examples)
    where = f"{len(rows)} of {total} {part.name} rows (the first is {place}, like {like})"
    examples = rows[:0] if part.is_joined else rows
    return Finding(mark, part.name, f"{where} {what}", len(rows), place, examples)


def _finding(mark: str, part: Part, examples: NDArray[np.int64], what: str) -> Finding | None:
    if not len(examples):
        return None
    first = part.place(int(examples[0]))
    kind = "pieces" if part.is_joined else "rows"
    where = f"{len(examples)} of {len(part.examples)} {part.name} {kind} (the first is {first})"
    return Finding(mark, part.name, f"{where} {what}", len(examples), first, examples)
