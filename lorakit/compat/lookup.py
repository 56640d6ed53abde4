"""Look-up of names in other packages, with an error that says which one is gone."""

from __future__ import annotations

import pkgutil
from functools import cache
from inspect import signature
from typing import Any

from lorakit.compat.versions import gone


@cache
def part(place: str, takes: tuple[str, ...] = ()) -> Any:
    """Find the object at a place such as `torch.nn.Linear`. takes: arguments that it must have.

    Raises RunError if it is missing or lacks one of these arguments.
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
    """Get an attribute of another package's object. Raises RunError if it is missing."""
    try:
        return getattr(thing, name)
    except AttributeError as error:
        raise gone(package, f"`{name}` of {type(thing).__name__}") from error
