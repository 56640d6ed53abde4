"""Plain LoRA (Hu et al., arXiv 2106.09685): y = W x + s · B (A x), s = lora_alpha / r. The
baseline.

Every hook is that of all methods, so there are keys alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from lorakit.methods._config import MethodConfig


class Config(MethodConfig):
    """LoRA with one fixed rank."""

    called_elsewhere: ClassVar[Mapping[str, str]] = {
        "lora": "",
        "peft": "",
        "plain": "",
        "standard": "",
        "qlora": "lorakit has no 4-bit base: this is LoRA over a base in bf16 or fp32.",
        "rslora": (
            "lorakit scales the update by lora_alpha / r, not by lora_alpha / √r: set lora_alpha to"
            " √r times the value."
        ),
        "lora+": "lorakit trains A and B at one learning rate.",
    }

    name: Literal["vanilla"] = "vanilla"
