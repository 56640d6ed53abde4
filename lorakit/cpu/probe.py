"""Rows of random tokens through a model, before and after an optimisation: hidden states must be
the same but for roundings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.layer import Adapter
from lorakit.kernels.optimisation import Unsupported, explained
from lorakit.kernels.packing import Packing, using
from lorakit.models.task_model import TaskModel

# Lengths of the rows; how far hidden states may differ, as a share of their spread, or else as a
# multiple of how far roundings alone carry them where rows are padded some more.
LENGTHS, MORE_PADDING = (7, 2, 12, 1), 4
TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 0.05}
TIMES_ROUNDINGS = 2.5


class Probe:
    """A model's hidden states as they were before any optimisation.

    calls: each adapter with what it read, in the order of their calls. packing: how rows are
    packed, once they are.
    """

    packing: Packing | None = None

    @torch.no_grad()
    def __init__(self, task_model: TaskModel, adapters: Mapping[str, Adapter]) -> None:
        """Raises Unsupported for a body that does not run as others do."""
        self.task_model = task_model
        self.calls: list[tuple[Adapter, Tensor]] = []
        handles = [adapter.register_forward_pre_hook(self._seen) for adapter in adapters.values()]
        try:
            with explained("its body does not run by itself"):
                hidden = hidden_states(task_model)
        finally:
            for handle in handles:
                handle.remove()
        real = _mask()
        if hidden.shape[:2] != real.shape:
            found = f"{hidden.shape[1]} hidden states for {real.shape[1]} tokens"
            raise Unsupported(f"its body gives {found}")
        self.expected = hidden[real].float()  # [tokens, hidden]

    def verify(self) -> None:
        """Raises Unsupported where the model gives something else now."""
        # With gradients: what one product gave must not be changed in place, as some models do.
        with using(self.packing), torch.enable_grad():
            found = hidden_states(self.task_model).detach()[_mask()].float()
        with torch.no_grad():
            self._compare(found)

    def _compare(self, found: Tensor) -> None:
        expected = self.expected
        spread = (expected - expected.mean(0)).norm()
        share = float((found - expected).norm() / spread)
        if share <= TOLERANCE.get(self.task_model.model.base_model.dtype, 0.0):
            return
        with using(None):
            wider = hidden_states(self.task_model, MORE_PADDING)[:, : max(LENGTHS)]
        roundings = float((wider[_mask()].float() - expected).norm() / spread)
        if not share <= TIMES_ROUNDINGS * roundings:
            raise Unsupported(f"its hidden states would differ by {share:.1%}")

    def _seen(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, Adapter)
        self.calls.append((module, inputs[0]))


def hidden_states(task_model: TaskModel, more: int = 0) -> Tensor:
    """Of rows of random tokens [rows, longest + more, hidden]; more: places beyond those needed."""
    model, mask = task_model.model, _mask(more)
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    words = model.config.get_text_config().vocab_size
    rng = torch.Generator().manual_seed(0)
    ids[:, : max(LENGTHS)] = torch.randint(words, _mask().shape, generator=rng)
    ids, mask = ids.to(task_model.device), mask.to(task_model.device)
    body = model.base_model(input_ids=ids, attention_mask=mask.long(), **task_model.task.uncached)
    hidden: Tensor = body.last_hidden_state
    return hidden


def _mask(more: int = 0) -> Tensor:
    return torch.arange(max(LENGTHS) + more) < torch.tensor(LENGTHS)[:, None]
