"""Tasks: what a model is trained for. Each is one file here, which imports nothing of torch."""

from __future__ import annotations

from lorakit.models.tasks._base import Task
from lorakit.models.tasks.causal_lm import CausalLM
from lorakit.models.tasks.sequence_classification import SequenceClassification
from lorakit.spec import Meant

TASKS: tuple[Task, ...] = (SequenceClassification(), CausalLM())


def task_named(name: str) -> Task:
    return next(task for task in TASKS if task.name == name)


def names_elsewhere() -> dict[str, Meant]:
    """{what other tools call a task: what it is here}."""
    return {name: Meant(task.name) for task in TASKS for name in task.called_elsewhere}


__all__ = ["TASKS", "Task", "names_elsewhere", "task_named"]
