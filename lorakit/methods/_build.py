"""Methods are built from their Configs."""

from __future__ import annotations

from lorakit.methods._base import Method
from lorakit.methods._composed import Composed
from lorakit.methods._config import MethodConfig, MethodPart
from lorakit.methods._registry import config_classes, method_module


def method_class(name: str) -> type[Method]:
    """The Method subclass of a method, or Method itself for one that has keys alone."""
    found: type[Method] = getattr(method_module(name, "method"), "METHOD", Method)
    return found


def build_method(config: MethodConfig, seed: int) -> Method:
    """The method of a recipe, with all that join it."""
    main = method_class(config.name)(config, seed)
    joined = [method_class(part.name)(_by_itself(part, config), seed) for part in config.with_]
    return Composed(main, joined) if joined else main


def _by_itself(part: MethodPart, main: MethodConfig) -> MethodConfig:
    """The Config of a method that joins: its own keys, and what all methods have from the main
    one."""
    shared = {
        name: getattr(main, name)
        for name in MethodConfig.model_fields
        if name not in ("name", "with_")
    }
    own = {name: getattr(part, name) for name in type(part).model_fields}
    return config_classes()[part.name].model_validate(shared | own)
