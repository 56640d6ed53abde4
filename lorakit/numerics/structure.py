"""Structures of masks: the units that are kept or dropped as one, and the scopes in which they
compete."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

Scope = Literal["matrix", "global"]


@dataclass(frozen=True)
class Structure:
    """The unit that is kept or dropped as one. `unstructured`: an entry; `n:m`: n of every m
    consecutive entries of a row; `group`: m consecutive entries of a row together; `rank`: a
    component, which the mask of a single matrix can not express."""

    kind: Literal["unstructured", "n:m", "group", "rank"]
    n: int = 1
    m: int = 1

    @classmethod
    def parse(cls, text: str, group_size: int = 1) -> Structure:
        """Parse a recipe's name of a structure; `group_size` is m of a `group`. Raises ValueError
        for an unknown name."""
        if text == "unstructured":
            return cls("unstructured")
        if text == "rank":
            return cls("rank")
        if text == "group":
            return cls("group", m=group_size)
        if found := re.fullmatch(r"(\d+):(\d+)", text):
            n, m = int(found[1]), int(found[2])
            if not 1 <= n < m:
                raise ValueError(
                    f"{text} keeps nothing or drops nothing: n is at least 1 and below m"
                )
            return cls("n:m", n, m)
        near = get_close_matches(text, ("unstructured", "group", "rank"), 1)
        meant = f"; did you mean `{near[0]}`?" if near else ""
        raise ValueError(
            f"there is no structure `{text}`: choose unstructured, group, rank or n:m, as"
            f" 2:4{meant}"
        )

    @property
    def share(self) -> float | None:
        """The density that the structure itself implies, n / m; None if any density is
        possible."""
        return self.n / self.m if self.kind == "n:m" else None

    @property
    def width(self) -> int:
        """The number that row lengths must be multiples of."""
        return self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.kind == "n:m" else self.kind


UNSTRUCTURED = Structure("unstructured")
