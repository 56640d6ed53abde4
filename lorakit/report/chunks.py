"""Chunks of a text, and the text coloured by tier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.text import Text

from lorakit.methods import Token
from lorakit.report.grid_table import MUTED
from lorakit.report.tiers import tier_colours


@dataclass(frozen=True)
class Shown:
    """A text that was run in chunks. pieces [tokens]: the text of each; trace: as many, or one
    fewer (the last token that was written was not run); prompt: how many tokens were given; ladder:
    the ranks of the tiers."""

    pieces: Sequence[str]
    trace: Sequence[Token]
    prompt: int
    ladder: Sequence[int]

    @property
    def chunks(self) -> list[tuple[int, int, int]]:
        """(first token, token after the last, tier) of each."""
        starts = [i for i, token in enumerate(self.trace) if token.opened or i == 0]
        return [
            (start, end, self.trace[start].tier)
            for start, end in zip(starts, [*starts[1:], len(self.trace)], strict=True)
        ]

    @property
    def mean_rank(self) -> float:
        """Mean rank of all tokens, fades left out."""
        return sum(self.ladder[token.tier] for token in self.trace) / max(1, len(self.trace))

    @property
    def mean_rank_written(self) -> float | None:
        """Mean rank of the new tokens alone; None where none of them was run."""
        new = self.trace[self.prompt :]
        return sum(self.ladder[token.tier] for token in new) / len(new) if new else None


def coloured(shown: Shown) -> Text:
    """The text, each chunk in the colour of its tier, with a bar between chunks; the prompt is
    dim."""
    colours, text = tier_colours(len(shown.ladder)), Text()
    for start, end, tier in shown.chunks:
        for given, tokens in groupby(range(start, end), lambda i: i < shown.prompt):
            text.append(
                "".join(shown.pieces[i] for i in tokens),
                f"{'dim ' if given else ''}{colours[tier]}",
            )
        text.append("▏", MUTED)
    text.append("".join(shown.pieces[len(shown.trace) :]), "bold")
    return text


def legend(shown: Shown) -> Text:
    """A line that says which colour is which rank."""
    text = Text("tiers  ", MUTED)
    for rank, colour in zip(shown.ladder, tier_colours(len(shown.ladder)), strict=True):
        text.append(f"■ rank {rank}  ", colour)
    return text
