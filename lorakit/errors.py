"""The errors that a user sees, and the exit code of each.

Every error says what is wrong, where, and what to do. Code below the CLI raises them; only the CLI catches
them and prints them as one block (no traceback).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace


class LorakitError(Exception):
    """Base of all errors that lorakit raises on purpose.

    `remedy` is a sentence that tells the user what to do about it.
    """

    exit_code = 1

    def __init__(self, what: str, remedy: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.what}\n  {self.remedy}" if self.remedy else self.what


class RunError(LorakitError):
    """The run failed: exit code 1."""


class UsageError(LorakitError):
    """The command line is wrong (a run that is not there, a folder that exists): exit code 2."""

    exit_code = 2


class Interrupted(LorakitError):
    """The user (or the cluster) stopped the run: exit code 130."""

    exit_code = 130


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a recipe.

    `key` is the dotted recipe key it concerns ("method.r"), "" for the recipe as a whole; `where` is a
    place such as `recipes/x.yaml:12:3`, filled in by the recipe when the code that found the problem does
    not know it; `expected` says what would have been right; `nearest` is the valid name closest to a wrong one; `hint` is a
    sentence on how to get what was meant.
    """

    what: str
    key: str = ""
    expected: str | None = None
    nearest: str | None = None
    where: str | None = None
    hint: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.nearest:
            lines.append(f"  did you mean `{self.nearest}`?")
        if self.hint:
            lines.append(f"  {self.hint}")
        return "\n".join(lines)


class RecipeError(LorakitError):
    """The recipe (or an override of it) is wrong: exit code 2. Carries every problem found, not only the first."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = list(problems)

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))

    @classmethod
    def at(cls, key: str, what: str, expected: str | None = None, nearest: str | None = None) -> RecipeError:
        """An error with one problem at recipe key `key`; the recipe adds file, line and column later."""
        return cls([Problem(what, key, expected, nearest)])

    def located(self, locate: dict[str, str]) -> RecipeError:
        """The same error with `where` filled in from `locate` {dotted key: place} where it was missing."""
        return RecipeError([p if p.where else replace(p, where=locate.get(p.key)) for p in self.problems])


@contextlib.contextmanager
def collecting(problems: list[Problem]) -> Iterator[None]:
    """Gather the problems of a RecipeError instead of raising it, so that several checks can report together."""
    try:
        yield
    except RecipeError as error:
        problems += error.problems
