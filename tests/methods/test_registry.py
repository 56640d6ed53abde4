"""Methods are found by the name of their file or folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lorakit.methods import Method, build_method, config_classes, method_class, method_names
from lorakit.methods import _registry as registry

ONE_FILE = """
from typing import Literal
import torch
from lorakit.methods._base import Method
from lorakit.methods._config import MethodConfig, MethodPart

class Part(MethodPart):
    name: Literal["one"] = "one"

class Config(MethodConfig):
    name: Literal["one"] = "one"

class One(Method):
    half = torch.tensor(0.5)

METHOD = One
"""


def test_a_folder_has_its_keys_and_the_rest_apart() -> None:
    for name in ("l1ra", "salor", "chunkwise"):
        assert registry.method_module(name, "config").__name__ == f"lorakit.methods.{name}.config"
        assert method_class(name).__module__ == f"lorakit.methods.{name}.method"


def test_a_method_of_keys_alone_does_what_all_do() -> None:
    assert method_class("vanilla") is Method


def test_a_method_may_be_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lorakit.methods

    (tmp_path / "one.py").write_text(ONE_FILE)
    monkeypatch.setattr(registry, "FOLDER", tmp_path)
    monkeypatch.setattr(lorakit.methods, "__path__", [str(tmp_path)])
    config_classes.cache_clear()
    try:
        assert method_names() == ["one"]
        config = config_classes()["one"].model_validate({"r": 2})
        method = build_method(config, 0)
        assert type(method).__name__ == "One"
        assert (config.name, config.r) == ("one", 2)
    finally:
        sys.modules.pop("lorakit.methods.one", None)
        config_classes.cache_clear()
