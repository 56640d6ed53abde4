"""The tiers of a chunkwise run, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

# From the lowest tier to the highest; spread over as many as there are.
COLOURS = ("#4575b4", "#74add1", "#d9b44a", "#f46d43", "#d73027")
BAR = 30  # characters of a full bar


def tier_colours(count: int) -> list[str]:
    """A colour for each of `count` tiers."""
    return [COLOURS[round(i * (len(COLOURS) - 1) / max(1, count - 1))] for i in range(count)]


def tier_table(result: Mapping[str, Any]) -> Group | None:
    """Table of the tiers in result.json: ranks, shares of the held-out tokens, policies; None where
    there are none."""
    tiers = result.get("tiers")
    if not tiers:
        return None
    cached = any(tier["kv"] for tier in tiers)
    title = tiers_in_words(result)
    table = Table("tier", "rank", "share", "", *(["cache"] if cached else []), box=None)
    for place, (tier, colour) in enumerate(zip(tiers, tier_colours(len(tiers)), strict=True)):
        bar = Text("█" * round(tier["share"] * BAR), colour)
        row = [
            str(place),
            str(tier["rank"]),
            f"{tier['share']:.1%}",
            bar,
            *([tier["kv"]] if cached else []),
        ]
        table.add_row(*row)
    return Group(Text(title), table)


def tiers_in_words(result: Mapping[str, Any]) -> str:
    """The mean rank, the tokens that it is of, and the mean length of a chunk."""
    of = (
        f"new tokens (a prompt runs at {result['prompt_rank']})"
        if result.get("prompt_rank")
        else "held-out tokens"
    )
    return (
        f"mean rank {result['mean_rank']:.2f} over {of}, chunks of"
        f" {result['mean_chunk_length']:.1f} tokens"
    )
