"""The methods. Each is one file here: its name is the file's name, its `Config` and its `Method` are found there.

A method that can join another one (`with:`) has a `Part` there too: the keys it has then.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Union

from pydantic import Field, create_model

from lorakit.methods._base import (
    Calibration,
    KVPolicies,
    KVPolicy,
    Method,
    MethodConfig,
    MethodPart,
    Schedule,
    Scheduler,
    Stage,
    Token,
)
from lorakit.methods._composed import Composed
from lorakit.spec import Meant


def method_names() -> list[str]:
    """The names that `method.name` may have."""
    return sorted(module.name for module in iter_modules(__path__) if not module.name.startswith("_"))


def method_class(name: str) -> type[Method]:
    """The Method subclass of `lorakit/methods/NAME.py`."""
    module = import_module(f"{__name__}.{name}")
    found: type[Method] = module.METHOD
    return found


@cache
def config_classes() -> dict[str, type[MethodConfig]]:
    """{method name: its Config, whose `with` takes the parts that there are}."""
    parts = tuple(part for name in method_names() if (part := getattr(import_module(f"{__name__}.{name}"), "Part", None)))
    joined: Any = list[Union[parts]]  # type: ignore[valid-type]  # noqa: UP007
    about = MethodConfig.model_fields["with_"].description
    field: Any = (joined, Field(default_factory=list, alias="with", description=about))

    def complete(name: str) -> type[MethodConfig]:
        config = method_class(name).config_class
        return create_model(config.__name__, __base__=config, __doc__=config.__doc__, with_=field)

    return {name: complete(name) for name in method_names()}


# Methods of other tools that none of these comes near to.
NOT_HERE = (
    "dora full full-finetune full_finetune full-finetuning fft freeze none ia3 vera loha lokr oft boft prefix prefix-tuning "
    "prefix_tuning prompt-tuning prompt_tuning p-tuning p_tuning llama-adapter adaption_prompt galore pissa lora-fa lora_fa "
    "loftq fourierft hra bone miss c3a randlora shira trainable_tokens ln_tuning xlora x-lora vblora lora-xs dpo orpo grpo"
)


def names_elsewhere() -> dict[str, Meant]:
    """{what other tools call a method: what comes nearest to it here, if anything, and how it differs}."""
    found = {name: Meant(None, f"lorakit has no counterpart of `{name}`.") for name in NOT_HERE.split()}
    for name, config in config_classes().items():
        found |= {other: Meant(name, difference or None) for other, difference in config.called_elsewhere.items()}
    return found


def keys_elsewhere() -> dict[str, list[Meant]]:
    """{what other tools call a key of a method, in lower case: its dotted keys here}."""
    found: dict[str, list[Meant]] = {}
    for config in config_classes().values():
        for other, (key, difference) in config.keys_called_elsewhere.items():
            found.setdefault(other, []).append(Meant(f"method.{key}", difference or None))
    return found


def build_method(config: MethodConfig, seed: int) -> Method:
    """The method of a recipe, with all that join it."""
    main = method_class(config.name)(config, seed)
    joined = [method_class(part.name)(_by_itself(part, config), seed) for part in config.with_]
    return Composed(main, joined) if joined else main


def _by_itself(part: MethodPart, main: MethodConfig) -> MethodConfig:
    """The Config of a method that joins: its own keys, and what all methods have from the main one."""
    shared = {name: getattr(main, name) for name in MethodConfig.model_fields if name not in ("name", "with_")}
    own = {name: getattr(part, name) for name in type(part).model_fields}
    return config_classes()[part.name].model_validate(shared | own)


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
    "Token",
    "build_method",
    "config_classes",
    "keys_elsewhere",
    "method_class",
    "method_names",
    "names_elsewhere",
]
