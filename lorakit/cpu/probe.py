"""Verification of an optimisation with rows of random tokens: the model's hidden states before and
after it must agree up to rounding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.layer import Adapter
from lorakit.kernels.optimisation import Unsupported
from lorakit.kernels.packing import Packing, using
from lorakit.models.task_model import TaskModel

# Lengths of the rows. Hidden states may differ by TOLERANCE, a share of their spread, or by
# TIMES_ROUNDINGS times the difference that rounding alone makes when each row gets MORE_PADDING.
LENGTHS, MORE_PADDING = (7, 2, 12, 1), 4
TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 0.05}
TIMES_ROUNDINGS = 2.5


class Probe:
    """A model's hidden states before any optimisation.

    calls: (adapter, its input) in the order of the calls. packing: the packing of the probe's rows,
    once rows are packed.
    """

    packing: Packing | None = None

    @torch.no_grad()
    def __init__(self, task_model: TaskModel, adapters: Mapping[str, Adapter]) -> None:
        """Raises Unsupported for a model body that does not run by itself or does not give one
        hidden state for each token."""
        self.task_model = task_model
        self.calls: list[tuple[Adapter, Tensor]] = []
        handles = [adapter.register_forward_pre_hook(self._seen) for adapter in adapters.values()]
        try:
            hidden = hidden_states(task_model)
        except Exception as error:  # of the model itself: nothing is installed yet
            what = f"its body does not run by itself ({type(error).__name__}: {error})"
            raise Unsupported(what) from error
        finally:
            for handle in handles:
                handle.remove()
        real = _mask()
        if hidden.shape[:2] != real.shape:
            found = f"{hidden.shape[1]} hidden states for {real.shape[1]} tokens"
            raise Unsupported(f"its body gives {found}")
        self.expected = hidden[real].float()  # [tokens, hidden]

    def verify(self) -> None:
        """Raise Unsupported if the model's hidden states now differ."""
        # With gradients: some models change a product's output in place, which may only then fail.
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
    """The model's hidden states [rows, longest + more, hidden] of rows of random tokens; more:
    additional padding of each row."""
    hidden: Tensor = task_model.model.base_model(**_rows(task_model, more)).last_hidden_state
    return hidden


def logits(task_model: TaskModel) -> Tensor:
    """The model's logits of the same rows."""
    found: Tensor = task_model.model(**_rows(task_model)).logits
    return found


def _rows(task_model: TaskModel, more: int = 0) -> dict[str, Any]:
    mask = _mask(more)
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    words = task_model.model.config.get_text_config().vocab_size
    rng = torch.Generator().manual_seed(0)
    ids[:, : max(LENGTHS)] = torch.randint(words, _mask().shape, generator=rng)
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    return {name: x.to(task_model.device) for name, x in inputs.items()} | dict(
        task_model.task.uncached
    )


def _mask(more: int = 0) -> Tensor:
    return torch.arange(max(LENGTHS) + more) < torch.tensor(LENGTHS)[:, None]
