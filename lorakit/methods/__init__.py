"""The methods: each is one file here, or one folder, whose name is the method's name in a recipe.

There are its keys (`Config`) and what it does (`METHOD`, a subclass of `Method`; without one it
does what all methods do). A method that can join another one (`with:`) has a `Part` there too: the
keys it has then. A folder has the keys in config.py and the rest in method.py, so that recipes can
be checked without torch.

What needs torch (`Method`, `build_method` …) is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lorakit.methods._config import KVPolicies, KVPolicy, MethodConfig, MethodPart
from lorakit.methods._registry import (
    adopting_method,
    config_classes,
    keys_elsewhere,
    method_names,
    names_elsewhere,
    plain_method,
)

if TYPE_CHECKING:
    from lorakit.methods._base import Calibration, Method, Stage
    from lorakit.methods._build import build_method, method_class
    from lorakit.methods._initial import prepare
    from lorakit.methods._tiers import Schedule, Scheduler, Tiered, Token

__all__ = [
    "Calibration",
    "KVPolicies",
    "KVPolicy",
    "Method",
    "MethodConfig",
    "MethodPart",
    "Schedule",
    "Scheduler",
    "Stage",
    "Tiered",
    "Token",
    "adopting_method",
    "build_method",
    "config_classes",
    "keys_elsewhere",
    "method_class",
    "method_names",
    "names_elsewhere",
    "plain_method",
    "prepare",
]
WITH_TORCH = {
    **dict.fromkeys(("Calibration", "Method", "Stage"), "_base"),
    **dict.fromkeys(("Schedule", "Scheduler", "Tiered", "Token"), "_tiers"),
    **dict.fromkeys(("build_method", "method_class"), "_build"),
    "prepare": "_initial",
}


def __getattr__(name: str) -> Any:
    if name in WITH_TORCH:
        return getattr(import_module(f"{__name__}.{WITH_TORCH[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
