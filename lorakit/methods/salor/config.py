"""Keys of SALOR in a recipe, by itself and in another method's `with`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from lorakit.errors import Problem
from lorakit.methods._config import MethodConfig, MethodPart
from lorakit.numerics.structure import Scope, Structure
from lorakit.spec import Spec

if TYPE_CHECKING:
    from lorakit.adapters.layer import Target

DEFAULT_DENSITY = 0.5
# Magnitude alone wrecks a model at half: the perplexity of the 135M model rises from 6 to 79.
MAGNITUDE_BASE_DENSITY = 0.75


class _Sparse(Spec):
    """Keys that both parts share."""

    density: float | None = Field(None, gt=0, le=1)
    """Share of the entries that stay; n / m for a structure n:m, else 0.5 (0.75 for a base pruned
    by magnitude)."""
    structure: str = "unstructured"
    """Unit of entries that is kept or dropped as one."""

    @field_validator("structure")
    @classmethod
    def _structure_is_known_and_fits(cls, text: str, others: ValidationInfo) -> str:
        share, density = Structure.parse(text).share, others.data.get("density")
        if share is not None and density is not None and not math.isclose(share, density):
            raise ValueError(
                f"structure {text} keeps {share:g} of the entries, density says {density:g}"
            )
        return text

    def refuse_unused(self, key: str, used: bool, needs: str) -> None:
        """Raises ValueError for a key that was changed and would do nothing."""
        if not used and getattr(self, key) != type(self).model_fields[key].default:
            raise ValueError(f"{key} does nothing here: it needs {needs}")

    @property
    def target(self) -> float:
        """The density in the end."""
        return self.density or Structure.parse(self.structure).share or DEFAULT_DENSITY


class Factors(_Sparse):
    """Sparse A and B."""

    structure: str = "unstructured"
    """unstructured; n:m (as 2:4) of the consecutive entries of a row; group: group_size consecutive
    entries of a row; rank: whole components, by |A_i| |B_i|, which makes the adapter smaller on
    every device."""
    group_size: int = Field(4, ge=2)
    """Entries of a group."""
    criterion: Literal["magnitude", "sensitivity"] = "magnitude"
    """Score of an entry: its magnitude (without the gate, if another method has one), or a running
    mean of |entry · gradient|."""
    scope: Scope = "matrix"
    """Every matrix to the same density, or all As and all Bs together."""
    shape: Literal["cubic", "linear", "one-shot"] = "cubic"
    """The way of the density from 1 at `begin` to its target at `end`; one-shot prunes all at
    `end`."""
    begin: float = Field(0.15, ge=0, le=1)
    """Where the ramp begins, as a fraction of the run. B starts at zero: too early, its size means
    nothing."""
    end: float = Field(0.7, gt=0, le=1, validate_default=True)
    """Where the ramp ends, as a fraction of the run; the masks stay from there on."""
    interval: float = Field(0.01, gt=0, le=1)
    """Fraction of the run between two changes of the masks; at least one step."""

    @field_validator("end")
    @classmethod
    def _ramp_goes_forward(cls, end: float, others: ValidationInfo) -> float:
        if end < others.data.get("begin", 0.0):
            raise ValueError(
                f"the ramp ends at {end:g}, before it begins at {others.data['begin']:g}"
            )
        return end

    @model_validator(mode="after")
    def _all_is_used(self) -> Factors:
        self.refuse_unused("group_size", self.structure == "group", "structure group")
        self.refuse_unused(
            "interval", self.shape != "one-shot", "a ramp; one-shot prunes once, at `end`"
        )
        return self

    @property
    def form(self) -> Structure:
        return Structure.parse(self.structure, self.group_size)


class Base(_Sparse):
    """A pruned base: the layers of the transformer blocks that have an adapter."""

    structure: str = "unstructured"
    """unstructured, or n:m (as 2:4) of the consecutive inputs of an output row."""
    criterion: Literal["magnitude", "wanda", "2:4"] = "wanda"
    """Score of an entry: |W|, or Wanda's |W| · |x| (arXiv 2306.11695), which looks at training rows
    first and prunes each output row to the same density (with scope layer). `2:4` is short for
    magnitude with structure 2:4."""
    scope: Literal["layer", "global"] = "layer"
    """Every layer to the same density, or all together, which needs the scores of all at once."""
    calibration_rows: int = Field(128, ge=1)
    """Training rows that Wanda looks at."""
    r_res: int = Field(16, ge=0)
    """Rank of the residual pair that starts as the truncated SVD of what was dropped; 0 for
    none."""
    svd: Literal["auto", "exact", "randomised"] = "auto"
    """auto: exact for layers up to 1024 wide or high, randomised for larger ones."""
    residual_lr_factor: float = Field(1.0, ge=0)
    """Learning rate of the residual pair as a factor of the run's; 0 freezes it. With 0.1 it learns
    less than fresh factors of its rank would (scripts/README.md)."""

    @field_validator("structure")
    @classmethod
    def _no_whole_pieces(cls, text: str) -> str:
        if text in ("rank", "group"):
            raise ValueError(f"a base is pruned unstructured or n:m, not by {text}")
        return text

    @model_validator(mode="after")
    def _one_structure(self) -> Base:
        if self.criterion == "2:4" and self.structure not in ("unstructured", "2:4"):
            raise ValueError(
                f"criterion 2:4 and structure {self.structure} are two structures: give one of them"
            )
        if self.criterion == "2:4" and self.density not in (None, 0.5):
            raise ValueError(
                f"criterion 2:4 keeps 0.5 of the entries, density says {self.density:g}"
            )
        self.refuse_unused("calibration_rows", self.criterion == "wanda", "criterion wanda")
        self.refuse_unused("svd", self.r_res > 0, "r_res above 0")
        self.refuse_unused("residual_lr_factor", self.r_res > 0, "r_res above 0")
        return self

    @property
    def form(self) -> Structure:
        return Structure.parse("2:4" if self.criterion == "2:4" else self.structure)

    @property
    def target(self) -> float:
        if self.criterion == "magnitude" and self.density is None and self.form.share is None:
            return MAGNITUDE_BASE_DENSITY
        return super().target


class _Keys(Spec):
    """The keys of salor, by itself and in another method's `with`."""

    factors: Factors | None = Field(default_factory=lambda: Factors.model_validate({}))
    """Sparse A and B; null leaves them dense."""
    base: Base | None = None
    """The pruned base; left out, it stays whole."""

    @model_validator(mode="after")
    def _something_is_on(self) -> _Keys:
        if self.factors is None and self.base is None:
            raise ValueError(
                "salor with neither factors nor base does nothing: give one of them, or name"
                " vanilla"
            )
        return self

    def residual_parameters(self, target: Target) -> int:
        """Number of parameters that the residual pair of one layer trains."""
        if self.base is None or not self.base.residual_lr_factor or not target.block:
            return 0
        return self.base.r_res * (target.in_features + target.out_features)

    def problems(self, targets: Mapping[str, Target], key: str) -> list[Problem]:
        """Problems of keys that do not fit the layers; `key` is the place of these keys."""
        found = []
        if self.factors is not None and (piece := self.factors.form.width) > 1:
            for side, size in (("input of", "in_features"), ("rank of the adapter of", "rank")):
                odd = [name for name, t in targets.items() if getattr(t, size) % piece]
                if odd:
                    what = (
                        f"the {side} `{odd[0]}` is {getattr(targets[odd[0]], size)} wide: no"
                        f" multiple of {piece}"
                    )
                    more = f", and {len(odd) - 1} more do not fit" if len(odd) > 1 else ""
                    found.append(
                        Problem(
                            what + more,
                            f"{key}.factors.structure",
                            "unstructured, rank, or another size",
                        )
                    )
        if self.base is None:
            return found
        pruned = {name: target for name, target in targets.items() if target.block}
        if targets and not pruned:
            what = "no layer of the transformer blocks has an adapter, and only those are pruned"
            found.append(Problem(what, f"{key}.base", "target_modules in the blocks, or no base"))
        uneven = [name for name, t in pruned.items() if t.in_features % self.base.form.width]
        if uneven:
            wide, piece = pruned[uneven[0]].in_features, self.base.form.width
            what = f"the input of `{uneven[0]}` is {wide} wide: no multiple of {piece}"
            where = "structure" if self.base.criterion != "2:4" else "criterion"
            found.append(
                Problem(
                    what,
                    f"{key}.base.{where}",
                    "an unstructured base for this model, or exclude_modules",
                )
            )
        sides = {name: (t.in_features, t.out_features) for name, t in pruned.items()}
        smallest = min(sides, key=lambda name: min(sides[name]), default="")
        if smallest and self.base.r_res > (limit := min(sides[smallest])):
            shape = " → ".join(map(str, sides[smallest]))
            what = f"r_res {self.base.r_res} is larger than a layer: `{smallest}` is {shape}"
            found.append(Problem(what, f"{key}.base.r_res", f"at most {limit}"))
        return found


class Config(_Keys, MethodConfig):
    """SALOR by itself."""

    name: Literal["salor"] = "salor"

    @property
    def changes_base(self) -> list[str]:
        own = [] if self.base is None else ["method.base"]
        return [*own, *super().changes_base]

    def misfits(self, targets: Mapping[str, Target]) -> list[Problem]:
        return [*self.problems(targets, "method"), *super().misfits(targets)]

    def parameters(self, target: Target) -> int:
        return super().parameters(target) + self.residual_parameters(target)


class Part(_Keys, MethodPart):
    """SALOR joining another method."""

    name: Literal["salor"]

    def changes_base(self, key: str) -> list[str]:
        return [] if self.base is None else [f"{key}.base"]

    def conflicts(self, main: MethodConfig, key: str) -> list[Problem]:
        if self.factors is not None and main.dense_factors is not None:
            what = f"sparse factors can not join {main.name}: {main.dense_factors}"
            return [Problem(what, f"{key}.factors", "factors: null")]
        if self.factors is None or not main.ranks_move or self.factors.structure == "unstructured":
            return []
        why = (
            "prunes whole components already"
            if self.factors.structure == "rank"
            else "moves ranks, which tears rows of B apart"
        )
        what = f"structure {self.factors.structure} can not join {main.name}, which {why}"
        return [Problem(what, f"{key}.factors.structure", "unstructured")]

    def misfits(self, targets: Mapping[str, Target], key: str) -> list[Problem]:
        return self.problems(targets, key)

    def more_parameters(self, target: Target) -> int:
        return self.residual_parameters(target)
