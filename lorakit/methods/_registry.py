"""The methods that there are, and their keys. Imports no torch, unless a method of one file
does."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, Union

from pydantic import Field, create_model

from lorakit.methods._config import MethodConfig
from lorakit.spec import Meant

FOLDER = Path(__file__).parent


def method_names() -> list[str]:
    """The names that `method.name` may have."""
    return sorted(
        module.name for module in iter_modules([str(FOLDER)]) if not module.name.startswith("_")
    )


def method_module(name: str, part: str) -> ModuleType:
    """The module with a method's `config` or `method`: its file, or that file of its folder."""
    module = import_module(f"{__package__}.{name}")
    return import_module(f"{module.__name__}.{part}") if hasattr(module, "__path__") else module


@cache
def config_classes() -> dict[str, type[MethodConfig]]:
    """{method name: its Config, whose `with` takes the parts that there are}."""
    modules = {name: method_module(name, "config") for name in method_names()}
    parts = tuple(module.Part for module in modules.values() if hasattr(module, "Part"))
    joined: Any = list[Union[parts]]  # type: ignore[valid-type]  # noqa: UP007
    about = MethodConfig.model_fields["with_"].description
    field: Any = (joined, Field(default_factory=list, alias="with", description=about))

    def complete(config: type[MethodConfig]) -> type[MethodConfig]:
        return create_model(config.__name__, __base__=config, __doc__=config.__doc__, with_=field)

    return {name: complete(module.Config) for name, module in modules.items()}


def adopting_method() -> str:
    """The name of the method that can take over the trained adapters of the others."""
    (found,) = (name for name, config in config_classes().items() if config.adopts)
    return found


def plain_method() -> str:
    """The name of the method whose adapters are plain LoRA."""
    (found,) = (name for name, config in config_classes().items() if config.is_plain)
    return found


# Methods of other tools that none of these comes near to.
NOT_HERE = (
    "dora full full-finetune full_finetune full-finetuning fft freeze none ia3 vera loha lokr oft"
    " boft prefix prefix-tuning prefix_tuning prompt-tuning prompt_tuning p-tuning p_tuning"
    " llama-adapter adaption_prompt galore pissa lora-fa lora_fa loftq fourierft hra bone miss c3a"
    " randlora shira trainable_tokens ln_tuning xlora x-lora vblora lora-xs dpo orpo grpo"
)


def names_elsewhere() -> dict[str, Meant]:
    """{what other tools call a method: what comes nearest to it here, if anything, and how it
    differs}."""
    found = {
        name: Meant(None, f"lorakit has no counterpart of `{name}`.") for name in NOT_HERE.split()
    }
    for name, config in config_classes().items():
        found |= {
            other: Meant(name, difference or None)
            for other, difference in config.called_elsewhere.items()
        }
    return found


def keys_elsewhere() -> dict[str, list[Meant]]:
    """{what other tools call a key of a method, in lower case: its dotted keys here}."""
    found: dict[str, list[Meant]] = {}
    for config in config_classes().values():
        for other, (key, difference) in config.keys_called_elsewhere.items():
            found.setdefault(other, []).append(Meant(f"method.{key}", difference or None))
    return found
