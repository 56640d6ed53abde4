"""Tasks that a model can be trained for. Each is one file here, which does not import torch."""

from __future__ import annotations

from lorakit.models.tasks._base import Task
from lorakit.models.tasks.causal_lm import CausalLM
from lorakit.models.tasks.sequence_classification import SequenceClassification
from lorakit.spec import Meant

TASKS: tuple[Task, ...] = (SequenceClassification(), CausalLM())


def task_named(name: str) -> Task:
    return next(task for task in TASKS if task.name == name)


def names_elsewhere() -> dict[str, Meant]:
    """{name of a task in other tools: its name here}."""
    return {name: Meant(task.name) for task in TASKS for name in task.called_elsewhere}


__all__ = ["TASKS", "Task", "names_elsewhere", "task_named"]
