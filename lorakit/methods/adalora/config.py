"""Keys of AdaLoRA in a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from lorakit.errors import Problem
from lorakit.methods._config import MethodConfig

if TYPE_CHECKING:
    from lorakit.adapters.layer import Target


class Config(MethodConfig):
    """AdaLoRA."""

    ranks_move = True
    dense_factors = "it keeps P and Q orthogonal, which zeros in them would undo"
    called_elsewhere: ClassVar[Mapping[str, str]] = {"ada-lora": "", "ada_lora": ""}
    keys_called_elsewhere: ClassVar[Mapping[str, tuple[str, str]]] = {
        "init_r": ("r", ""),
        "tinit": ("begin", "It is a fraction of the run: tinit divided by all steps."),
        "tfinal": ("end", "It is a fraction of the run: 1 - tfinal divided by all steps."),
        "deltat": ("interval", "It is a fraction of the run: deltaT divided by all steps."),
    }

    name: Literal["adalora"] = "adalora"
    r: int = Field(12, ge=1)
    """Initial rank of every adapter."""
    target_r: float | None = Field(None, ge=0)
    """Mean rank in the end; by default the initial total divided by 1.5."""
    begin: float = Field(0.1, ge=0, le=1)
    """Where the budget begins to fall, as a fraction of the run."""
    end: float = Field(0.5, gt=0, le=1, validate_default=True)
    """Where the budget arrives, as a fraction of the run; the ranks stay from there on."""
    interval: float = Field(0.002, gt=0, le=1)
    """Fraction of the run between two allocations; at least one step."""
    beta1: float = Field(0.85, ge=0, lt=1)
    """Decay of the smoothed sensitivity."""
    beta2: float = Field(0.85, ge=0, lt=1)
    """Decay of its uncertainty."""
    orth_reg_weight: float = Field(0.1, ge=0)
    """Weight γ of the penalty on P and Q that are not orthogonal: of the sum of squares over all
    adapters, as in the paper; PEFT takes the mean of their square roots."""

    @field_validator("end")
    @classmethod
    def _budget_goes_forward(cls, end: float, others: ValidationInfo) -> float:
        if end < others.data.get("begin", 0.0):
            begin = others.data["begin"]
            raise ValueError(f"the budget arrives at {end:g}, before it falls at {begin:g}")
        return end

    def misfits(self, targets: Mapping[str, Target]) -> list[Problem]:
        problems, first = super().misfits(targets), sum(t.rank for t in targets.values())
        if self.target_r is not None and round(self.target_r * len(targets)) > first:
            what = f"the mean rank would grow from {first / len(targets):g} to {self.target_r:g}"
            problems.append(Problem(what, "method.target_r", "at most the mean initial rank"))
        return problems

    def parameters(self, target: Target) -> int:
        return super().parameters(target) + target.rank
