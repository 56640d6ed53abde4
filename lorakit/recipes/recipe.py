"""Recipes: the sections that the modules declare, put together, and an explanation of every mistake
in one.

Validation is pydantic's, by the Spec of each section; `lorakit.recipes.explain` puts its errors
into plain words, and the places of the keys come from `lorakit.recipes.yaml_data`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import ConfigDict, Field, ValidationError, create_model

from lorakit.data import formats
from lorakit.data.spec import DataSpec
from lorakit.errors import Problem, RecipeError, located
from lorakit.methods import MethodConfig, config_classes, keys_elsewhere, names_elsewhere
from lorakit.models import tasks
from lorakit.models.spec import ModelSpec
from lorakit.recipes.explain import explain, not_finite, takes_text
from lorakit.recipes.yaml_data import COMMAND_LINE, YamlData, apply_overrides, dump, read_yaml
from lorakit.spec import Spec
from lorakit.training.spec import DistributedSpec, TrainSpec

_SECTIONS = ("model", "data", "method", "train", "distributed")


@dataclass(frozen=True)
class Recipe:
    """Complete description of a run. `path` is its file; `places` is {dotted key: its place in the
    file}."""

    model: ModelSpec
    data: DataSpec
    method: MethodConfig
    train: TrainSpec
    distributed: DistributedSpec
    output_dir: str
    path: str = field(default="", compare=False)
    places: dict[str, str] = field(default_factory=dict, compare=False, repr=False)


class _AnyMethod(MethodConfig):
    """Keys that all methods share: those that can be checked while the method is unknown."""

    model_config = ConfigDict(extra="ignore")


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the file at `path`, with `dotted.key=VALUE` overrides.

    Raises RecipeError with all mistakes at once, sorted by position; a syntax error comes alone.
    """
    return _checked(read_yaml(path), str(path), overrides)


def recipe_of(data: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in `data`, a mapping as YAML would give it (paths may be Path), with overrides.
    Raises RecipeError as `load_recipe` does; problems name keys instead of lines."""
    plain: dict[str, Any] = json.loads(json.dumps(data, default=str))
    places = {"": "the recipe"} | {key: f"the recipe, {key}" for key in _keys(plain)}
    return _checked(YamlData(plain, places), "recipe", overrides)


def _keys(data: Any, above: str = "") -> Iterator[str]:
    """The dotted keys of nested mappings and lists."""
    inner = data.items() if isinstance(data, dict) else enumerate(data)
    for name, value in inner:
        yield (key := f"{above}{name}")
        if isinstance(value, dict | list):
            yield from _keys(value, f"{key}.")


def _checked(written: YamlData, path: str, overrides: Sequence[str]) -> Recipe:
    if overrides:
        any_method = _whole(_chosen_by_name())
        apply_overrides(written, overrides, lambda key: takes_text(any_method, key))
    # A section whose keys are all commented out is null in YAML: it is as good as left out.
    data = {
        key: value
        for key, value in written.data.items()
        if value is not None or key not in _SECTIONS
    }
    whole = _whole(_method_type(data), f"runs/{Path(path).stem}")
    problems = list(written.problems)
    try:
        # JSON instead of Python objects, since a strict tuple accepts a JSON array but not a list.
        valid: Any = whole.model_validate_json(json.dumps(data))
    except ValidationError as error:
        values = {
            "method.name": names_elsewhere(),
            "data.format": formats.names_elsewhere(),
            "model.task": tasks.names_elsewhere(),
        }
        problems += explain(error, whole, data, values, keys_elsewhere())
    else:
        problems += valid.method.conflicts(tasks.task_named(valid.model.task))
        if valid.train.torch_compile and (reason := valid.method.not_compiled):
            problems.append(Problem(reason, "train.torch_compile", "false"))
        if valid.model.quantization is not None:
            problems += _not_quantised(valid.method, valid.train)
        elif valid.method.init_lora_weights == "qera":
            what = "qera begins at what quantisation lost, and nothing is quantised"
            key = "method.init_lora_weights"
            problems.append(Problem(what, key, "model.quantization, or another start"))
        if os.path.expanduser(valid.output_dir).startswith("~"):
            problems.append(
                Problem(
                    f"`{valid.output_dir}` is in the home folder of nobody",
                    "output_dir",
                    "~/… or another path",
                )
            )
    problems += not_finite(data, problems)
    if problems:
        # Where reading found a problem there is no value, so what validation says about it is
        # noise.
        unread = {p.key for p in written.problems if p.key}
        kept = [
            p
            for p in problems
            if p in written.problems or not any(_within(p.key, key) for key in unread)
        ]
        placed = [located(p, written.places) for p in kept]
        raise RecipeError(sorted(placed, key=lambda problem: _position(problem, overrides)))
    sections: dict[str, Any] = {name: getattr(valid, name) for name in _SECTIONS}
    output_dir = os.path.expanduser(valid.output_dir)
    return Recipe(**sections, output_dir=output_dir, path=path, places=written.places)


def _not_quantised(method: MethodConfig, train: TrainSpec) -> Iterator[Problem]:
    """Problems of keys that a quantised base excludes."""
    if train.torch_compile:
        what = "torch.compile would keep the dequantised weights for the backward pass"
        yield Problem(what, "train.torch_compile", "false with model.quantization")
    for key in method.changes_base:
        what = "zeros of a pruned base are not kept by a quantised one"
        yield Problem(what, key, "null with model.quantization")


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe with every default filled in, as plain data for JSON or YAML."""
    sections: dict[str, Spec] = {name: getattr(recipe, name) for name in _SECTIONS}
    plain: dict[str, Any] = {
        name: spec.model_dump(mode="json", by_alias=True) for name, spec in sections.items()
    }
    return plain | {"output_dir": recipe.output_dir}


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of a nested mapping; items of a list of mappings are named by their
    index."""
    is_list = isinstance(value, list) and all(isinstance(item, dict) for item in value)
    if not value or not (is_list or isinstance(value, dict)):
        return {prefix: value}
    found: dict[str, Any] = {}
    for name, inner in enumerate(value) if is_list else value.items():
        found |= flat(inner, f"{prefix}.{name}" if prefix else str(name))
    return found


def dump_yaml(recipe: Recipe) -> str:
    """`resolved(recipe)` as YAML; loading it gives an equal recipe."""
    return dump(resolved(recipe))


@contextmanager
def locating(recipe: Recipe) -> Iterator[None]:
    """Context that adds the places of the keys to any RecipeError raised by code that knows no
    lines."""
    try:
        yield
    except RecipeError as error:
        raise error.located({"": recipe.path} | recipe.places) from error


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe, for editors; the keys of `method` depend on its
    name."""
    schema = _whole(_chosen_by_name()).model_json_schema()
    # A Config has its own name as the default; in a recipe the name chooses the Config.
    for reference in schema["properties"]["method"]["discriminator"]["mapping"].values():
        branch = schema["$defs"][reference.rpartition("/")[2]]
        branch["required"] = ["name", *branch.get("required", [])]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _chosen_by_name() -> Any:
    """The type of a method section: one of the Configs, by its name."""
    return Annotated[Union[tuple(config_classes().values())], Field(discriminator="name")]  # noqa: UP007


def _whole(method: Any, output_dir: str = "") -> type[Spec]:
    """The class of a whole recipe whose method section is of type `method`."""
    return create_model(
        "Recipe",
        __base__=Spec,
        __doc__="A lorakit recipe: what to train, on what, how.",
        model=(ModelSpec, ...),
        data=(DataSpec, ...),
        method=(method, ...),
        train=(TrainSpec, TrainSpec.model_validate({})),
        distributed=(DistributedSpec, DistributedSpec.model_validate({})),
        # A factory keeps the default, which depends on the file's name, out of the schema.
        output_dir=(
            str,
            Field(
                default_factory=lambda: output_dir,
                min_length=1,
                description="The run's folder; by default runs/<file name>.",
            ),
        ),
    )


def _method_type(data: dict[str, Any]) -> type[MethodConfig]:
    """The Config that `method.name` chooses; for a missing or unknown name, a class whose error
    lists the valid names."""
    classes = config_classes()
    section = data.get("method")
    name = section.get("name") if isinstance(section, dict) else None
    if isinstance(name, str) and name in classes:
        return classes[name]
    names: Any = Literal[tuple(classes)]
    return create_model(
        "AnyMethod", __base__=_AnyMethod, name=(names, Field(description="The method."))
    )


def _within(key: str, above: str) -> bool:
    return key == above or key.startswith(above + ".")


def _position(problem: Problem, overrides: Sequence[str]) -> tuple[int, int, int]:
    """Sort key: the file as a whole first, then line and column, then the overrides in their
    order."""
    where = problem.where or ""
    if where.startswith(COMMAND_LINE):
        return (2, list(overrides).index(where[len(COMMAND_LINE) :]), 0)
    found = re.search(r":(\d+):(\d+)$", where)
    return (1, int(found[1]), int(found[2])) if found else (0, 0, 0)
