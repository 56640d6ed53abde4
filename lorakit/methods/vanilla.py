"""Plain LoRA (Hu et al., arXiv 2106.09685): y = W x + s · B (A x), s = lora_alpha / r. The
baseline.

Every hook is that of all methods, so there are keys alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from lorakit.methods._config import MethodConfig


class Config(MethodConfig):
    """LoRA with one fixed rank."""

    is_plain = True
    called_elsewhere: ClassVar[Mapping[str, str]] = {
        "lora": "",
        "peft": "",
        "plain": "",
        "standard": "",
        "qlora": "Set model.quantization, as {bits: 4}.",
        "rslora": "Set use_rslora: true.",
        "lora+": "Set train.lora_plus_ratio, as 16.",
        "loraplus": "Set train.lora_plus_ratio, as 16.",
    }

    name: Literal["vanilla"] = "vanilla"
