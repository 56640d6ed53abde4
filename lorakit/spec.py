"""The base of every recipe section: strict, frozen, unknown keys forbidden.

Each module declares its own Spec beside the code it configures; `lorakit.recipes.recipe` composes
them. Defaults live in the Spec and nowhere else; state that moves during a run never goes into one.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict


class Spec(BaseModel):
    """One section of a recipe."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


@dataclass(frozen=True)
class Meant:
    """Most likely meaning of a name: the valid name that comes nearest, or None, and a hint to show
    with it, or None."""

    nearest: str | None
    hint: str | None = None
