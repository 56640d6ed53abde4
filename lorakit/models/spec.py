"""The section `model` of a recipe."""

from __future__ import annotations

from lorakit.data.labels import Task
from lorakit.spec import Spec


class ModelSpec(Spec):
    """Which model to adapt, and for what."""

    name_or_path: str
    """A model on the hub, `builtin/…`, or a local folder."""
    task: Task
    """Task that the model is trained for."""
    offline: str | None = None
    """Source to use instead when, and only when, the hub can not be reached: `builtin/…` or a local folder."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""
