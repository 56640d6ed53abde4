"""Formats of data. Each is one file here that defines `FORMAT`; adding one needs no other file.

A format declares the task that its rows are for, the columns that identify it, its keys of the
recipe, and how its rows become examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from lorakit.data.columns import listed
from lorakit.data.formats._base import Format, Question, Record, Split, chosen_texts
from lorakit.data.keys import ChosenSpec, DataKeys
from lorakit.errors import Problem, RecipeError
from lorakit.spec import Meant


@cache
def formats() -> tuple[Format, ...]:
    """All formats, by their names."""
    names = (module.name for module in iter_modules(__path__) if not module.name.startswith("_"))
    found = (import_module(f"{__name__}.{name}").FORMAT for name in names)
    return tuple(sorted(found, key=lambda form: form.name))


def format_named(name: str) -> Format:
    return next(form for form in formats() if form.name == name)


def format_of(spec: ChosenSpec) -> Format:
    """The format of a section that names it."""
    assert spec.format is not None
    return format_named(spec.format)


def formats_of_task(task: str) -> list[Format]:
    """The formats whose rows are for a task, in the order in which they are matched against
    columns."""
    return sorted((form for form in formats() if form.task == task), key=lambda form: form.tried)


@cache
def formats_of_keys() -> dict[str, list[str]]:
    """{key that only some formats have: their names}, in the order of the keys."""
    found = {
        key: [form.name for form in formats() if key in form.keys] for key in DataKeys.model_fields
    }
    return {key: names for key, names in found.items() if names}


def detect_format(task: str, spec: DataKeys, columns: Sequence[str]) -> Format:
    """The recipe's format, or the one that task and columns suggest.

    Raises RecipeError when they do not fit.
    """
    forms = formats_of_task(task)
    names = [form.name for form in forms]
    if spec.format is not None and spec.format not in names:
        what = f"`{spec.format}` is not for the task {task}"
        raise RecipeError.at("data.format", what, f"format: {' or '.join(names)}")
    if spec.format is not None:
        return format_named(spec.format)
    found = next((form for form in forms if form.detects(spec, columns)), None)
    if found is None:
        told_by = [form.told_by[0] for form in forms] + [
            by for form in forms for by in form.told_by[1:]
        ]
        what = f"the columns {listed(columns)} do not tell how to read a row"
        raise RecipeError.at("data.format", what, ", ".join(told_by[:-1]) + f", or {told_by[-1]}")
    return found


def check_keys(spec: DataKeys, form: Format) -> None:
    """Raise RecipeError for every key of the recipe that does not apply to this format."""
    problems = [
        Problem(
            f"`{name}` has no effect: rows are read as {form.name}",
            f"data.{name}",
            f"null, or format: {' or '.join(names)}",
        )
        for name, names in formats_of_keys().items()
        if form.name not in names and getattr(spec, name) != DataKeys.model_fields[name].default
    ]
    if spec.loss_on is not None and form.losses and spec.loss_on not in form.losses:
        what = f"`{spec.loss_on}` is not for rows that are read as {form.name}"
        problems.append(Problem(what, "data.loss_on", f"one of {', '.join(form.losses)}"))
    if problems:
        raise RecipeError(problems)


def what_a_format_is() -> str:
    """Explanation for users who take `format` for something else."""
    names = [form.name for form in formats()]
    kinds = f"{', '.join(names[:-1])} or {names[-1]}"
    return f"It is {kinds}: how rows are read, not what kind of file they are in."


def names_elsewhere() -> dict[str, Meant]:
    """{name of a format in other tools: its name here}."""
    return {
        name: Meant(form.name, how)
        for form in formats()
        for name, how in form.called_elsewhere.items()
    }


__all__ = [
    "Format",
    "Question",
    "Record",
    "Split",
    "check_keys",
    "chosen_texts",
    "detect_format",
    "format_named",
    "format_of",
    "formats",
    "formats_of_keys",
    "formats_of_task",
    "names_elsewhere",
    "what_a_format_is",
]
