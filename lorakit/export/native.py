"""lorakit's own adapter folder: everything that the method trained, with nothing folded in.

adapter_model.safetensors has PEFT's key names. If the tensors are a plain LoRA, adapter_config.json
is PEFT's own and PEFT loads the folder. If they are not (gates, tiers), its peft_type is LORAKIT,
so that PEFT refuses the folder instead of ignoring tensors it does not know. method.safetensors, if
present, holds the method's tables; lorakit.json holds the rest: method, task, labels, base.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorakit.data.labels import Labels
from lorakit.errors import RunError
from lorakit.export.peft import CONFIG_FILE, peft_config
from lorakit.files import fill_json, new_folder, read_json
from lorakit.methods import Method
from lorakit.models.task_model import TaskModel
from lorakit.models.tokenizer import save_tokenizer
from lorakit.sources.resolve import Source
from lorakit.training.trained import (
    ADAPTER_FILE,
    TABLES_FILE,
    load_trained,
    own_name,
    read_trained,
    write_trained,
)

FACTS_FILE = "lorakit.json"
# The files of an adapter, in its own folder as in a checkpoint; the last is not in every one.
FILES = (ADAPTER_FILE, CONFIG_FILE, FACTS_FILE, TABLES_FILE)


@dataclass(frozen=True)
class AdapterFacts:
    """Facts that an adapter folder records about itself. `source` is the place from which the base
    model was loaded; `heads` are the modules trained in full, None for those of the task."""

    method: dict[str, Any]
    task: str
    labels: Labels | None
    source: Source
    heads: list[str] | None = None

    @property
    def base(self) -> str:
        """The name of the adapter's base: the hub model with the same weights, else the base's
        folder."""
        return self.source.base

    @property
    def revision(self) -> str | None:
        """The commit of a base from the hub."""
        return self.source.commit

    @property
    def on_hub(self) -> bool:
        """True if `base` is a name on the hub."""
        kind = self.source.kind
        return kind.startswith("hub") or (kind == "builtin" and self.base != self.source.location)

    def base_in_words(self) -> list[str]:
        """Facts about the base that a user of the adapter has to know, one line each."""
        source, base = self.source, self.base
        if source.kind == "local":
            elsewhere = (
                "elsewhere, load the base from where it is and give it to PeftModel.from_pretrained"
            )
            return [f"its base is {base}, a folder of this machine: {elsewhere}"]
        if source.kind != "builtin":
            return [
                f"its base is {base}" + (f" at the commit {self.revision}" if self.revision else "")
            ]
        altered = source.altered
        same = (
            f", but it was trained on those weights {altered},"
            if altered
            else "; the very same weights"
        )
        return [
            f"its base is {base}{same} lie in {source.location}: load that folder where the hub is"
            " out of reach"
        ]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> AdapterFacts:
        labels = value["labels"]
        return cls(
            value["method"],
            value["task"],
            None if labels is None else Labels(**labels),
            Source(**value["source"]),
            value.get("heads"),
        )


def save_native(folder: Path, task_model: TaskModel, method: Method, facts: AdapterFacts) -> None:
    """Write the adapter folder; an existing one is replaced once the new one is complete."""
    with new_folder(folder) as staging:
        write_trained(staging, task_model.model, method)
        describe(staging, task_model, method, facts)
        save_tokenizer(task_model.tokenizer, staging)


def describe(folder: Path, task_model: TaskModel, method: Method, facts: AdapterFacts) -> None:
    """Write the files that say what the tensors of an adapter are into the folder of `new_folder`
    that has them."""
    config = peft_config(task_model, method, facts.base, facts.revision)
    plain = not method.tensors() and all(
        adapter.own_tensors().keys() == {"lora_A", "lora_B"} for adapter in method.adapters.values()
    )
    fill_json(folder / CONFIG_FILE, config if plain else config | {"peft_type": "LORAKIT"})
    fill_json(folder / FACTS_FILE, facts.as_json())


def read_facts(folder: Path) -> AdapterFacts:
    """Read the facts of an adapter folder. Raises RunError if it is not a complete folder written
    by lorakit."""
    try:
        return AdapterFacts.from_json(read_json(folder / FACTS_FILE))
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise RunError(f"`{folder}` is not an adapter of lorakit: {error}") from error


def load_native(folder: Path, task_model: TaskModel, method: Method) -> None:
    """Load adapters, heads and the method's own tensors into a model with the same structure.
    Raises RunError if they do not fit."""
    trained, tables = read_native(folder)
    try:
        method.load_tensors(tables)
    except ValueError as error:
        raise _unreadable(folder, error) from error
    load_trained(task_model.model, trained, f"the adapter in `{folder}`")


def read_native(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(tensors of adapters and heads by name, the method's tables by name) of an adapter folder.
    Raises RunError where they can not be read, there are none, or a value is not finite."""
    try:
        trained, tables = read_trained(folder)
    except (OSError, SafetensorError, ValueError) as error:
        raise _unreadable(folder, error) from error
    if not trained:
        raise _unreadable(folder, f"{ADAPTER_FILE} has no tensors")
    return trained, tables


def adapted_modules(folder: Path) -> list[str]:
    """Names of the modules for which the adapter folder has factors. Raises RunError if it can not
    be read."""
    try:
        with safe_open(folder / ADAPTER_FILE, framework="pt") as file:
            names = [own_name(key) for key in file.keys()]  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _unreadable(folder, error) from error
    return [name.removesuffix(".lora_A") for name in names if name.endswith(".lora_A")]


def _unreadable(folder: Path, why: object) -> RunError:
    return RunError(
        f"the adapter in `{folder}` can not be read: {why}",
        "Take another checkpoint of the run as RUN, or train it again.",
    )
