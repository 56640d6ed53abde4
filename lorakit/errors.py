"""Errors that a user sees, with their exit codes.

Every error says what is wrong, where, and what to do. Code below the CLI raises them; only the CLI
catches them and prints them as one block, without a traceback.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
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

    `key` is the dotted recipe key ("method.r"), or "" for the recipe as a whole; `where` is a
    place such as `recipes/x.yaml:12:3`, filled in by the recipe if the code that found the problem
    does not know it; `expected` describes a correct value; `nearest` is the valid name closest to a
    wrong one; `hint` is a sentence on how to get the intended effect; `left_out` is True if the
    recipe lacks the key, so that `where` is only the place of its section.
    """

    what: str
    key: str = ""
    expected: str | None = None
    nearest: str | None = None
    where: str | None = None
    hint: str | None = None
    left_out: bool = False

    @property
    def names_its_key(self) -> bool:
        """True if the sentences make clear which key is meant; a mere `prompt` may be an ordinary
        word."""
        name = self.key.rpartition(".")[2]
        said = " ".join(filter(None, (self.what, self.expected, self.hint)))
        words = [
            rf"\b{re.escape(name)}:",
            f"`{re.escape(name)}`",
            re.escape(self.key),
            *([rf"\b{re.escape(name)}\b"] if "_" in name else []),
        ]
        return re.search("|".join(words), said) is not None

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.nearest:
            lines.append(f"  did you mean `{self.nearest}`?")
        if self.hint:
            lines.append(f"  {self.hint}")
        if self.left_out and not self.names_its_key:
            lines.append(f"  the key is {self.key}, which is not in the recipe")
        return "\n".join(lines)


class RecipeError(LorakitError):
    """The recipe (or an override of it) is wrong: exit code 2. Carries every problem found, not
    only the first."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = list(problems)

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))

    @classmethod
    def at(
        cls, key: str, what: str, expected: str | None = None, nearest: str | None = None
    ) -> RecipeError:
        """Make an error with one problem at recipe key `key`; the recipe adds file, line and
        column later."""
        return cls([Problem(what, key, expected, nearest)])

    def located(self, places: Mapping[str, str]) -> RecipeError:
        """The same error with the places of its problems filled in from `places`, {dotted recipe
        key: place}."""
        return RecipeError([located(p, places) for p in self.problems])


def place_of(places: Mapping[str, str], key: str) -> str:
    """The place of `key`, else of its nearest ancestor in `places`, else of the file, whose key is
    ""."""
    while key and key not in places:
        key = key.rpartition(".")[0]
    return places[key]


def located(problem: Problem, places: Mapping[str, str]) -> Problem:
    """The problem with its place filled in, unless it has one already."""
    if problem.where:
        return problem
    return replace(problem, where=place_of(places, problem.key), left_out=problem.key not in places)


@contextlib.contextmanager
def collecting(problems: list[Problem]) -> Iterator[None]:
    """Gather the problems of a RecipeError instead of raising it, so that several checks can report
    together."""
    try:
        yield
    except RecipeError as error:
        problems += error.problems


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the name of its type if it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
