"""Keys of L1RA in a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from lorakit.methods._config import MethodConfig
from lorakit.numerics.schedule import Shape
from lorakit.spec import Spec

if TYPE_CHECKING:
    from lorakit.adapters.layer import Target


class Budget(Spec):
    """How much rank there is in total, along the run."""

    unit: Literal["rank", "params"] = "rank"
    """Cost of one component: 1 (`rank`), or in + out of its layer (`params`: the parameter count
    stays the same)."""
    start: float = Field(1.0, ge=1.0)
    """Budget at the start, as a fraction of the initial cost; nothing is pruned at step 0, so at
    least 1."""
    end: float = Field(1.0, ge=0.0)
    """Budget from the last but one rank update on, as a fraction of the initial cost."""
    shape: Shape = "cubic"
    """The way from start to end (AdaLoRA, arXiv 2303.10512, uses the cubic one)."""

    @model_validator(mode="after")
    def _the_end_is_reached(self) -> Budget:
        if self.shape == "constant" and self.start != self.end:
            raise ValueError(
                f"a constant budget never gets from start {self.start:g} to end {self.end:g}:"
                " choose cubic or linear"
            )
        return self


class Config(MethodConfig):
    """L1RA."""

    ranks_move = True
    name: Literal["l1ra"] = "l1ra"
    l1_share: float | None = Field(None, ge=0)
    """T · eta_c · lambda: the share of a gate that L1 alone would take over the whole run. 0.4
    unless l1ra_lambda is given."""
    l1ra_lambda: float | None = Field(None, ge=0)
    """The raw L1 coefficient of the paper; depends on the number of steps. Give this or l1_share,
    never both."""
    eta_c: float = Field(2e-2, gt=0)
    """Learning rate of the gates: constant, no weight decay."""
    rank_update_ratio: float = Field(0.1, gt=0, le=1)
    """Rank updates every floor(ratio · steps) optimizer steps, at least 1."""
    prune_threshold: float = Field(1e-6, ge=0)
    """A component whose gate is below this at a rank update is pruned."""
    reassign: bool = True
    """Hand freed ranks to other adapters; false only prunes."""
    exclude_pruned: bool = True
    """An adapter that lost a component at a rank update gets none at the same update."""
    l1_step: Literal["proximal", "subgradient"] = "proximal"
    """Soft threshold with exact zeros (ours), or the paper's subgradient step, whose gates straddle
    zero."""
    budget: Budget = Field(default_factory=lambda: Budget.model_validate({}))

    @model_validator(mode="after")
    def _one_strength(self) -> Config:
        if self.l1_share is not None and self.l1ra_lambda is not None:
            raise ValueError(
                "l1_share and l1ra_lambda are two ways to set the same strength: give one of them"
            )
        return self

    def parameters(self, target: Target) -> int:
        return super().parameters(target) + target.rank

    def l1_strength(self, total_steps: int) -> float:
        """The L1 coefficient lambda for a run of `total_steps` optimizer steps."""
        if self.l1ra_lambda is not None:
            return self.l1ra_lambda
        share = DEFAULT_L1_SHARE if self.l1_share is None else self.l1_share
        return share / (self.eta_c * total_steps)


# Chosen by measurement (README, "Choosing l1_share").
DEFAULT_L1_SHARE = 0.4
