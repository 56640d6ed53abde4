"""The section `model` of a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lorakit.models.tasks import TASKS
from lorakit.spec import Spec

if TYPE_CHECKING:
    Name = str
else:
    Name = Literal[tuple(task.name for task in TASKS)]


class ModelSpec(Spec):
    """The model to adapt, and its task."""

    name_or_path: str = Field(min_length=1)
    """A model on the hub, `builtin/…`, or a local folder."""
    task: Name
    """Task that the model is trained for."""
    offline: str | None = None
    """Source to use instead when, and only when, the hub cannot be reached: `builtin/…` or a local
    folder."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""
