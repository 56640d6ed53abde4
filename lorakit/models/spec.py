"""The section `model` of a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from lorakit.models.tasks import TASKS
from lorakit.spec import Spec

if TYPE_CHECKING:
    Name = str
else:
    Name = Literal[tuple(task.name for task in TASKS)]


class Quantization(Spec):
    """A base in few bits (QLoRA, arXiv 2305.14314): the linear layers of the transformer blocks are
    quantised as they are loaded, and their adapters are trained as ever. Embeddings and heads keep
    their type."""

    bits: Literal[4, 8] = 4
    """Bits of a weight."""
    backend: Literal["bitsandbytes", "torchao"] = "bitsandbytes"
    """Package that quantises."""
    quant_type: Literal["nf4", "fp4"] | None = None
    """Code of 4 bits: nf4 unless set; fp4 is bitsandbytes' alone."""
    double_quant: bool | None = None
    """Quantise the scales of 4-bit weights too: true unless set, and always with torchao."""

    @model_validator(mode="after")
    def _all_is_used(self) -> Quantization:
        for name in ("quant_type", "double_quant"):
            if self.bits == 8 and getattr(self, name) is not None:
                raise ValueError(f"{name} has no effect with 8 bits: leave it out, or bits: 4")
        if self.backend == "torchao" and self.quant_type == "fp4":
            raise ValueError("torchao has no fp4: nf4, or backend bitsandbytes")
        if self.backend == "torchao" and self.double_quant is False:
            raise ValueError("torchao quantises the scales too: true, or backend bitsandbytes")
        return self

    @property
    def code(self) -> str:
        """The code of the weights."""
        return "int8" if self.bits == 8 else self.quant_type or "nf4"

    @property
    def quantises_scales(self) -> bool:
        """True if the scales are quantised too."""
        return self.bits == 4 and self.double_quant is not False

    def __str__(self) -> str:
        scales = ", scales quantised too" if self.quantises_scales else ""
        return f"{self.bits} bits ({self.code} by {self.backend}{scales})"


class ModelSpec(Spec):
    """The model to adapt, and its task."""

    name_or_path: str = Field(min_length=1)
    """A model on the hub, `builtin/…`, or a local folder."""
    task: Name
    """Task that the model is trained for."""
    offline: str | None = None
    """Source to use instead when, and only when, the hub cannot be reached: `builtin/…` or a local
    folder."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""
    quantization: Quantization | None = None
    """The base in few bits; left out, it is in train.precision. Needs the extra `quant`, or
    `quant-torchao`."""
