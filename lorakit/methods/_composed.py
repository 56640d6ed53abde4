"""One method with others that join it (`with:` in a recipe): every hook of the one, then of the
others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lorakit.adapters.layer import Adapter
from lorakit.adapters.optimizer import AdamW, ParamGroup
from lorakit.methods._base import Calibration, Method, RankState
from lorakit.methods._tiers import Tiered


class Composed(Method):
    """`main` makes the adapters and owns the ranks; `parts` act on the same adapters."""

    def __init__(self, main: Method, parts: Sequence[Method]) -> None:
        super().__init__(main.config, main.seed)
        self.main, self.parts = main, list(parts)
        self.all = [main, *self.parts]

    def make_adapter(self, name: str, linear: nn.Module, rank: int) -> Adapter:
        return self.main.make_adapter(name, linear, rank)

    def attach(self, adapters: dict[str, Adapter], model: nn.Module) -> None:
        super().attach(adapters, model)
        for method in self.all:
            method.attach(adapters, model)

    def prepare(self, calibration: Calibration) -> None:
        for method in self.all:
            method.prepare(calibration)

    def adopt(self, adapters: Mapping[str, dict[str, Tensor]]) -> None:
        self.main.adopt(adapters)

    def start_from(self, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self.main.start_from(pairs)

    def param_groups(self) -> list[ParamGroup]:
        groups: list[ParamGroup] = []
        for method in self.all:
            # A part brings what it added; all else is the main method's to group.
            held = {id(p) for group in groups for p in group.params}
            for group in method.param_groups():
                group.params = [p for p in group.params if id(p) not in held]
                if group.params:
                    groups.append(group)
        return groups

    def begin(self, optimizer: AdamW, total_steps: int) -> None:
        for method in self.all:
            method.begin(optimizer, total_steps)

    def before_forward(self, batch: Any) -> None:
        for method in self.all:
            method.before_forward(batch)

    def before_step(self, step: int) -> None:
        for method in self.all:
            method.before_step(step)

    def after_step(self, step: int) -> dict[str, float]:
        metrics = [method.after_step(step) for method in self.all]
        return {name: value for found in metrics for name, value in found.items()}

    @property
    def is_final(self) -> bool:
        return all(method.is_final for method in self.all)

    def conclude(self, calibration: Calibration) -> bool:
        changed = [method.conclude(calibration) for method in self.all]
        return any(changed)

    def finish(self) -> list[str]:
        return [warning for method in self.all for warning in method.finish()]

    def rank_state(self) -> RankState:
        return self.main.rank_state()

    def state_dict(self) -> dict[str, Any]:
        return {"main": self.main.state_dict(), "with": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.main.load_state_dict(state["main"])
        for part, saved in zip(self.parts, state["with"], strict=True):
            part.load_state_dict(saved)

    def tensors(self) -> dict[str, Tensor]:
        return self.main.tensors()

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.main.load_tensors(tensors)

    @property
    def tiers(self) -> Tiered | None:
        return self.main.tiers

    def export(self, adapter: Adapter) -> tuple[Tensor, Tensor]:
        return self.main.export(adapter)

    def summary(self) -> dict[str, Any]:
        return {name: value for method in self.all for name, value in method.summary().items()}
