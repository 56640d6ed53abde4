"""Plain LoRA (Hu et al., arXiv 2106.09685): y = W x + s · B (A x), s = lora_alpha / r. The baseline."""

from __future__ import annotations

from typing import Literal

from lorakit.methods._base import Method, MethodConfig


class Config(MethodConfig):
    """LoRA with one fixed rank."""

    name: Literal["vanilla"] = "vanilla"


class Vanilla(Method):
    """LoRA: every hook is the base's."""

    config_class = Config


METHOD = Vanilla
