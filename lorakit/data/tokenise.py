"""Tokenising: texts become token ids, in the same way for training, evaluation and generation.

A text's tokens depend on its position for three reasons, and each is handled here, once:

- Tokens that the tokenizer puts around a text (the beginning-of-sequence token, BERT's [CLS] and
  [SEP], T5's end token). A sequence begins as the tokenizer begins a text, exactly once, even if
  the text itself spells that token out. The end is decided here and not by the tokenizer, since a
  prompt must stay open.
- The blank that SentencePiece-style tokenizers put in front of every text. Text in the middle of a
  sequence must not get one: its tokens decode to the text itself, which is verified by decoding.
- Cuts. Running text gets the tokens of the whole text. Where it is too long to be tokenised at
  once, it is cut only where the tokenizer itself puts a boundary.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from lorakit import compat

Ids = list[int]
# Texts that any tokenizer knows, to find the tokens that it puts around a text.
PROBES = ("a", "A", "the", "0", ".", "?")
# Prefixes with which a text is tokenised as if in the middle of a sequence: nothing, and characters
# that rarely begin a token that continues with a letter. The first one whose result decodes to the
# text is used.
LEADS = ("", "\n", "=", "a", "0", ")")
# characters on either side of a prompt's end, extended to a blank, that show if a token crosses it
NEAR = 16
CONTEXT = 8  # tokens before a text that affect how a decoder writes it (a blank before a word)
CHUNK = 200_000  # characters of running text that are tokenised as one
THREADS = min(8, os.cpu_count() or 1)  # such parts that are tokenised at the same time
# characters on either side of a cut that affect where tokens end; far more than a token has
AROUND = 256
CUTS_TRIED = 64  # line ends that are tried as a cut before more text is taken


@dataclass(frozen=True)
class Completed:
    """A prompt with its completion. ids: all tokens; first: number of the prompt's tokens; exact:
    True if the completion's tokens decode to exactly its text (a tokenizer that lower-cases or
    splits at blanks cannot always do that)."""

    ids: Ids
    first: int
    exact: bool


@dataclass(frozen=True)
class Classified:
    """A text, or a pair, as a classifier reads it. length: number of tokens before it was cut."""

    ids: Ids
    types: Ids | None
    length: int


class Tokeniser:
    """A tokenizer of transformers with rules for the position of a text. begin and end: ids that it
    puts around a single text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.begin, self.end = _frame(tokenizer)

    @property
    def unknown(self) -> tuple[int, str] | None:
        """The unknown token, and its text. None where there is none, or where the token also has
        another meaning: GPT-2's is the end-of-sequence token."""
        token = self.tokenizer.unk_token_id
        others = (*self.begin, *self.end, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return None if token is None or token in others else (token, self.tokenizer.unk_token)

    def prompts(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of texts to be continued: begun as the tokenizer begins a text, and not
        closed."""
        return [self._begun(ids) for ids in self._bare(texts)]

    def completed(self, prompts: Sequence[str], completions: Sequence[str]) -> list[Completed]:
        """Prompts, with the tokens that `prompts` gives, and their completions, each closed by the
        end-of-sequence token.

        The tokens after the prompt are those of prompt and completion tokenised together, if these
        begin with the prompt's own tokens and the rest decodes to the completion; otherwise they
        are the tokens of the completion as a text in the middle of a sequence. A completion that
        already ends in the text of the end-of-sequence token is not closed again.
        """
        heads = self._bare(prompts)
        tails = self._tails(prompts, heads, completions)
        exact = [False] * len(heads)
        self._verify(range(len(heads)), prompts, heads, tails, completions, exact)
        for lead in LEADS:
            rows = [row for row, well in enumerate(exact) if not well]
            found = dict(
                zip(rows, self._behind(lead, [completions[row] for row in rows]), strict=True)
            )
            self._verify(rows, prompts, heads, found, completions, exact)
            for row in rows:
                if exact[row]:
                    tails[row] = found[row]
        # The remaining rows cannot be written exactly (letters are lower-cased, or blanks are lost)
        # and need not be: the tokens of the whole text are used.
        left = [row for row, well in enumerate(exact) if not well]
        for row, whole in zip(
            left, self._bare([prompts[row] + completions[row] for row in left]), strict=True
        ):
            own = tails[row]
            candidates = (
                [own]
                if own is not None
                else [self._behind(lead, [completions[row]])[0] for lead in LEADS]
            )
            (aim,) = self._decode([whole])
            good = (
                ids
                for ids in candidates
                if ids is not None and self._decode([heads[row] + ids]) == [aim]
            )
            tails[row] = next(good, None)
            exact[row] = tails[row] is not None
            if not exact[row]:
                (tails[row],) = self._bare([completions[row]])
        begun = map(self._begun, heads)
        return [
            Completed(head + self._closed(tail or []), len(head), well)
            for head, tail, well in zip(begun, tails, exact, strict=True)
        ]

    def documents(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of whole texts, each begun as the tokenizer begins a text and closed by the
        end-of-sequence token."""
        return [self._closed(self._begun(ids)) for ids in self._bare(texts)]

    def running(
        self, lines: Iterable[str], progress: Callable[[int], None], size: int = CHUNK
    ) -> Iterator[tuple[Ids, list[int]]]:
        """The tokens of the single text that `lines` form together, in parts: (ids, number of
        tokens that begin in each line).

        The first part begins as the tokenizer begins a text; the last part is not closed. A part
        has about `size` characters and ends with a line. It ends there only if the tokenizer, given
        the AROUND characters before and after, puts a boundary between them: tokens depend on no
        more than that, so the parts are the tokens of the whole text. Where there is no such place,
        a part grows. A tokenizer in Python does not report the line of a token: all tokens of a
        part are then counted to its first line. Lines are taken as they are needed. progress(lines
        done) is called after each part.
        """
        parts, first = self._parts(lines, size), True
        # Several parts at once, since the tokenizer's threads share texts among them.
        while some := list(islice(parts, THREADS)):
            for (_, part), (ids, counts) in zip(some, self._inside(some), strict=True):
                if first:
                    begun = self._begun(ids)
                    counts[0] += len(begun) - len(ids)
                    ids, first = begun, False
                yield ids, counts
                progress(len(part))

    def _parts(self, lines: Iterable[str], size: int) -> Iterator[tuple[str, list[str]]]:
        """(text before, lines) of the parts of a text that can be tokenised one by one."""
        rest, before, pending = iter(lines), "", list[str]()
        letters, wanted, ended = 0, size, False
        while not ended or pending:
            while not ended and letters < wanted + AROUND:
                line = next(rest, None)
                if line is None:
                    ended = True
                else:
                    pending.append(line)
                    letters += len(line)
            if not pending:
                return
            ready = len(pending) if ended else self._safe_cut(before, pending)
            if ready == 0:
                wanted *= 2
                continue
            yield before, pending[:ready]
            text = "".join(pending[:ready])
            before = (before + text)[-AROUND:]
            pending, wanted = pending[ready:], size
            letters -= len(text)

    def classified(self, parts: Sequence[Sequence[str]], max_length: int) -> list[Classified]:
        """One or two texts per row as the tokenizer prepares them for a classifier, cut by its own
        rules to `max_length` tokens.

        parts: the rows' first texts and, for pairs, their second ones.
        """
        options = {"return_attention_mask": False, "verbose": False}
        encoded = self.tokenizer(*map(list, parts), **options)
        ids: list[Ids] = encoded["input_ids"]
        types: list[Ids | None] = encoded.get("token_type_ids") or [None] * len(ids)
        lengths = list(map(len, ids))
        rows = [row for row, length in enumerate(lengths) if length > max_length]
        if rows:
            long = [[part[row] for row in rows] for part in parts]
            encoded = self.tokenizer(*long, truncation=True, max_length=max_length, **options)
            for place, row in enumerate(rows):
                ids[row] = encoded["input_ids"][place]
                types[row] = encoded["token_type_ids"][place] if types[row] is not None else None
        return [Classified(*row) for row in zip(ids, types, lengths, strict=True)]

    # -- inside ------------------------------------------------------------------------------------

    def _bare(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids without those that the tokenizer puts around a text."""
        return _encode(self.tokenizer, texts, False)

    def _begun(self, ids: Ids) -> Ids:
        return ids if ids[: len(self.begin)] == self.begin else self.begin + ids

    def _closed(self, ids: Ids) -> Ids:
        end = self.tokenizer.eos_token_id
        return ids if ids and ids[-1] == end else [*ids, end]

    def _decode(self, rows: Sequence[Ids]) -> list[str]:
        """The texts of rows of tokens, special tokens included."""
        return compat.decode(self.tokenizer, rows)

    def _tails(
        self, prompts: Sequence[str], heads: Sequence[Ids], completions: Sequence[str]
    ) -> list[Ids | None]:
        """Tokens after the prompt's own in the tokens of prompt and completion together; None where
        these do not begin with the prompt's own.

        Usually the end of the prompt and the first words of the completion (NEAR characters on
        either side, up to a blank) show that the joint tokens begin differently. This is relied on
        where the tokens of that end, except the first, are those at the end of the prompt; all
        other rows are tokenised in full.
        """
        tails: list[Ids | None] = [None] * len(heads)
        ends = [_from_blank(prompt) for prompt in prompts]
        alone = self._bare(ends)
        beside = self._bare(
            [end + _to_blank(text) for end, text in zip(ends, completions, strict=True)]
        )
        rows = []
        for row, (end, both, head) in enumerate(zip(alone, beside, heads, strict=True)):
            known = len(end) > 1 and end[1:] == head[len(head) - len(end) + 1 :]
            if not known or both[: len(end)] == end:
                rows.append(row)
        for row, whole in zip(
            rows, self._bare([prompts[row] + completions[row] for row in rows]), strict=True
        ):
            if whole[: len(heads[row])] == heads[row]:
                tails[row] = whole[len(heads[row]) :]
        return tails

    def _behind(self, lead: str, texts: Sequence[str]) -> list[Ids | None]:
        """The tokens of texts after `lead`; None where a token crosses the boundary."""
        (before,) = self._bare([lead]) if lead else [[]]
        return [
            ids[len(before) :] if ids[: len(before)] == before else None
            for ids in self._bare([lead + text for text in texts])
        ]

    def _verify(
        self,
        rows: Sequence[int],
        prompts: Sequence[str],
        heads: Sequence[Ids],
        tails: Sequence[Ids | None] | dict[int, Ids | None],
        completions: Sequence[str],
        exact: list[bool],
    ) -> None:
        """Mark in `exact` the rows whose tail, after the prompt's tokens, decodes to exactly the
        completion."""
        there = [(row, tail) for row in rows if (tail := tails[row]) is not None]
        nears = [heads[row][-CONTEXT:] for row, _ in there]
        before = self._decode(nears)
        behind = self._decode([near + tail for near, (_, tail) in zip(nears, there, strict=True)])
        rest = []
        for (row, tail), start, whole in zip(there, before, behind, strict=True):
            exact[row] = whole == start + completions[row]
            if not exact[row]:
                rest.append((row, tail))
        # Some decoders write a blank at the end of the prompt only together with the next word.
        for (row, _), whole in zip(
            rest, self._decode([heads[row] + tail for row, tail in rest]), strict=True
        ):
            exact[row] = whole == prompts[row] + completions[row]

    def _safe_cut(self, before: str, lines: Sequence[str]) -> int:
        """Number of lines after `before` that may be tokenised without the rest: as many as
        possible, 0 if none is known to be safe."""
        text, tried, after = before + "".join(lines), 0, 0
        for count in range(len(lines) - 1, 0, -1):
            after += len(lines[count])
            if after < AROUND:
                continue
            place = len(text) - after
            left, right = text[max(0, place - AROUND) : place], text[place : place + AROUND]
            one, both = self._bare([left, left + right])
            if both[: len(one)] == one:
                return count
            tried += 1
            if tried == CUTS_TRIED:
                break
        return 0

    def _inside(self, parts: Sequence[tuple[str, Sequence[str]]]) -> list[tuple[Ids, list[int]]]:
        """For each part, (text before, lines), the tokens of its lines after that text, and how
        many of them begin in each line."""
        texts = [before + "".join(lines) for before, lines in parts]
        heads = list(map(len, self._bare([before for before, _ in parts])))
        if not self.tokenizer.is_fast:
            found = []
            for whole, head, (_, lines) in zip(self._bare(texts), heads, parts, strict=True):
                ids = whole[head:]
                found.append((ids, [len(ids)] + [0] * (len(lines) - 1)))
            return found
        options = {
            "return_attention_mask": False,
            "return_token_type_ids": False,
            "return_offsets_mapping": True,
        }
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False, **options)
        rows = zip(encoded["input_ids"], encoded["offset_mapping"], heads, parts, strict=True)
        return [
            (ids[head:], _begun_in(offsets[head:], len(before), lines))
            for ids, offsets, head, (before, lines) in rows
        ]


def _begun_in(offsets: Sequence[tuple[int, int]], start: int, lines: Sequence[str]) -> list[int]:
    """Number of tokens that begin in each of the lines, the first of which is at `start`."""
    # A blank that the tokenizer adds in front has the offset of the first letter.
    begins = np.fromiter((begin for begin, _ in offsets), np.int64, len(offsets))
    ends = start + np.cumsum(list(map(len, lines)))
    # Offsets rise, but for tokens that share a letter.
    found = np.minimum(np.searchsorted(ends, begins, side="right"), len(lines) - 1)
    counts: list[int] = np.bincount(np.maximum.accumulate(found), minlength=len(lines)).tolist()
    return counts


def prompt_tokens(tokenizer: Any, texts: Sequence[str], templated: bool = False) -> list[Ids]:
    """Token ids of prompts, the same for training and for generation. templated: texts of a chat
    template, which writes the beginning of a sequence itself."""
    return _encode(tokenizer, texts, False) if templated else Tokeniser(tokenizer).prompts(texts)


def special_texts(tokenizer: Any) -> re.Pattern[str] | None:
    """Pattern of text that the tokenizer reads as one of its special tokens; None where it has
    none."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    names = {name for name in [*added, *tokenizer.all_special_tokens] if name.strip()}
    return (
        re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
        if names
        else None
    )


def _encode(tokenizer: Any, texts: Sequence[str], special: bool) -> list[Ids]:
    """Token ids of the texts; equal texts, which are common among prompts, share one list."""
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        return []
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    found: list[Ids] = tokenizer(distinct, add_special_tokens=special, **options)["input_ids"]
    if len(distinct) == len(texts):
        return found
    by_text = dict(zip(distinct, found, strict=True))
    return [by_text[text] for text in texts]


def _from_blank(text: str) -> str:
    """The end of a text from a blank on, at least NEAR characters; the whole text if there is no
    blank."""
    return text[max(0, text.rfind(" ", 0, max(0, len(text) - NEAR))) :]


def _to_blank(text: str) -> str:
    """The beginning of a text up to a blank, at least NEAR characters; the whole text if there is
    no blank."""
    place = text.find(" ", NEAR)
    return text if place < 0 else text[:place]


def _frame(tokenizer: Any) -> tuple[Ids, Ids]:
    """Tokens that the tokenizer puts before and after a text, found by tokenising probes."""
    plain, framed = (_encode(tokenizer, PROBES, special) for special in (False, True))
    for inside, whole in zip(plain, framed, strict=True):
        for start in range(len(whole) - len(inside) + 1):
            if inside and whole[start : start + len(inside)] == inside:
                return whole[:start], whole[start + len(inside) :]
    # none of the probes is in its vocabulary: the tokens of an empty text are the frame
    (nothing,) = _encode(tokenizer, [""], True)
    closed = bool(nothing) and nothing[-1] == tokenizer.eos_token_id
    return (nothing[:-1], nothing[-1:]) if closed else (nothing, [])
