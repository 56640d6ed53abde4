"""Things of other packages, found by name; an error says which of them is gone."""

from __future__ import annotations

import pkgutil
from functools import cache
from inspect import signature
from typing import Any

from lorakit.compat.versions import gone


@cache
def part(place: str, takes: tuple[str, ...] = ()) -> Any:
    """The thing at a place such as `torch.nn.Linear`. takes: arguments that it must have.

    Raises RunError where it is not there, or takes other arguments.
    """
    package = place.partition(".")[0]
    try:
        found = pkgutil.resolve_name(place)
    except (ImportError, AttributeError) as error:
        raise gone(package, f"`{place}`") from error
    if missing := [name for name in takes if name not in signature(found).parameters]:
        raise gone(package, f"argument `{missing[0]}` of `{place}`")
    return found


def attribute(thing: Any, name: str, package: str) -> Any:
    """The attribute of an object that the package made. Raises RunError where it has none."""
    try:
        return getattr(thing, name)
    except AttributeError as error:
        raise gone(package, f"`{name}` of {type(thing).__name__}") from error
