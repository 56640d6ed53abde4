"""The methods. Each is one file here: its name is the file's name, its `Config` and its `Method` are found there."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from lorakit.methods._base import Method, MethodConfig


def method_names() -> list[str]:
    """The names that `method.name` may have."""
    return sorted(module.name for module in iter_modules(__path__) if not module.name.startswith("_"))


def method_class(name: str) -> type[Method]:
    """The Method subclass of `lorakit/methods/NAME.py`."""
    module = import_module(f"{__name__}.{name}")
    found: type[Method] = module.METHOD
    return found


def config_classes() -> dict[str, type[MethodConfig]]:
    """{method name: its Config}."""
    return {name: method_class(name).config_class for name in method_names()}


__all__ = ["Method", "MethodConfig", "config_classes", "method_class", "method_names"]
