"""Base of all methods: hooks that are all no-ops until a method overrides them.

The loop, the checkpoint, the exporter and the command line call the hooks and never name a method.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor, nn

from lorakit.adapters.inject import matches
from lorakit.adapters.layer import Adapter, adapter_parameters
from lorakit.adapters.optimizer import AdamW, ParamGroup
from lorakit.methods._config import MethodConfig
from lorakit.methods._tiers import Tiered


@dataclass(frozen=True)
class RankState:
    """Where the ranks stand. Always: cost + pool = budget, with cost = Σ rank · cost of one
    component."""

    ranks: dict[str, int]
    cost: int
    pool: int
    budget: int


Stage = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


@dataclass(frozen=True)
class Calibration:
    """Data and functions that a method may use before the first step and after the last.
    batches(rows): the first `rows` training rows in the seeded order, never grouped by length, in
    batches, of the `rows` there are; held_out(): the validation rows; forward: runs the model's
    body on a batch; stage: a progress bar, called with (done, total); blocks: the adapted layers in
    the transformer blocks, which embeddings and heads are not; dense_weights(modules): (module, its
    weight [out, in] as it was before it was quantised), read again from where the base lies."""

    rows: int
    batches: Callable[[int], Iterator[Any]]
    held_out: Callable[[], Iterator[Any]]
    forward: Callable[[Any], None]
    stage: Stage
    blocks: Sequence[str]
    dense_weights: Callable[[Collection[str]], Iterator[tuple[str, Tensor]]]


class Method:
    """One run's method. Lives from injection to export; its moving state goes into checkpoints,
    never into its Config."""

    def __init__(self, config: MethodConfig, seed: int = 0) -> None:
        self.config = config
        self.seed = seed
        self.adapters: dict[str, Adapter] = {}

    # -- building ----------------------------------------------------------------------------------

    def make_adapter(self, name: str, linear: nn.Module, rank: int) -> Adapter:
        """The adapter for module `name`. A starts the same in every method: its seed comes from the
        name."""
        scale, dropout = self.scale(name, rank), self.config.lora_dropout
        return Adapter(linear, rank, scale, dropout, self.generator(name))

    def scale(self, name: str, rank: int) -> float:
        """s of the adapter of module `name`, of this initial rank."""
        return self.config.scale(self._lora_alpha(name), rank)

    def alpha(self, name: str, rank: int) -> float:
        """The lora_alpha at which an adapter of this rank has the scale of module `name`'s: the
        recipe's own where it gives exactly that."""
        own, scale = self._lora_alpha(name), self.adapters[name].scale
        return own if self.config.scale(own, rank) == scale else scale * self.config.divisor(rank)

    def _lora_alpha(self, name: str) -> float:
        """The recipe's lora_alpha for module `name`."""
        patterns = self.config.alpha_pattern.items()
        found = (alpha for pattern, alpha in patterns if matches(pattern, name))
        return next(found, self.config.lora_alpha)

    def generator(self, name: str) -> Generator:
        """A random generator of its own for `name`, from the run's seed."""
        # torch's CPU generator takes the lowest 32 bits of a seed and no more; a CRC that starts at
        # the seed uses them all.
        return Generator().manual_seed(zlib.crc32(name.encode(), self.seed))

    def attach(self, adapters: dict[str, Adapter], model: nn.Module) -> None:
        """Called once the adapters are in the model."""
        self.adapters = adapters

    def prepare(self, calibration: Calibration) -> None:
        """Preparation before the first step of a new run (pruning the base, calibrating tables); a
        resumed run finds it done."""

    def adopt(self, adapters: Mapping[str, dict[str, Tensor]]) -> None:
        """Take over {module name: tensors of a plain adapter} from another method's trained
        adapters; asked of the method whose Config `adopts`."""
        for name, adapter in self.adapters.items():
            adapter.load_tensors(adapters[name])

    def start_from(self, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Begin at {module name: (A [rank, in], B [out, rank])} of a trained adapter with the
        scales of these, whose ranks are not below those; other modules stay as they are. Called
        before `prepare`."""
        for name, pair in pairs.items():
            self.adapters[name].start_from(*pair)

    def param_groups(self) -> list[ParamGroup]:
        """The optimizer's groups for the adapters; the loop adds one for the heads."""
        return [ParamGroup(adapter_parameters(list(self.adapters.values())))]

    # -- training ----------------------------------------------------------------------------------

    def begin(self, optimizer: AdamW, total_steps: int) -> None:
        """Called once when training starts or resumes, with the optimizer that holds the
        adapters.

        total_steps is larger than before where a run is extended. Schedules then go by the new
        total, on which the step at hand lies further back; but what a schedule has brought to its
        end must stay there, and nothing that was dropped for good comes back.
        """

    def before_forward(self, batch: Any) -> None:
        """Called before each micro-batch's forward."""

    def before_step(self, step: int) -> None:
        """Called when the gradients of optimizer step `step` (the first is 1) are there, before
        they are clipped."""

    def after_step(self, step: int) -> dict[str, float]:
        """Called after optimizer step `step`; returns metrics for metrics.jsonl."""
        return {}

    @property
    def is_final(self) -> bool:
        """True if the model is in the form that it will end in: before, no evaluation can be the
        best or end the run."""
        return True

    def conclude(self, calibration: Calibration) -> bool:
        """Called after the last step: what has to be done to the trained adapters. Returns whether
        the model computes something else since, so that it is evaluated again. A run that was
        stopped here does it all again."""
        return False

    def finish(self) -> list[str]:
        """Called after the last step; returns warnings for the user."""
        return []

    # -- state -------------------------------------------------------------------------------------

    def rank_state(self) -> RankState:
        ranks = {name: adapter.rank for name, adapter in self.adapters.items()}
        total = sum(ranks.values())
        return RankState(ranks, total, 0, total)

    def state_dict(self) -> dict[str, Any]:
        """All that moves while training, beside the adapters' own tensors: JSON values only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""

    def tensors(self) -> dict[str, Tensor]:
        """Tensors that belong to the adapters as a whole (tables): saved with them, in checkpoints
        too."""
        return {}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` gave. Raises ValueError when something is missing."""

    # -- running -----------------------------------------------------------------------------------

    @property
    def tiers(self) -> Tiered | None:
        """The hooks of a method whose tokens run at tiers; None where all components act on every
        token."""
        return None

    # -- what is left ------------------------------------------------------------------------------

    def export(self, adapter: Adapter) -> tuple[Tensor, Tensor]:
        """(A [rank, in], B [out, rank]) that a plain LoRA layer of the same scale needs to act as
        `adapter` does on the base as it is kept. A residual's rank is added."""
        a, b = adapter.effective()
        return a.detach(), b.detach()

    def summary(self) -> dict[str, Any]:
        """Entries of result.json about the method, beside the ranks."""
        return {}
