"""The first values of A and B by what the model reads, or by what its quantised weights lost
(`init_lora_weights` in a recipe)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lorakit.adapters.base import QuantisedBase, in_out
from lorakit.adapters.layer import Adapter
from lorakit.adapters.quantised import dequantised_to
from lorakit.errors import RunError
from lorakit.methods._base import Calibration, Method
from lorakit.methods._inputs import watch_inputs
from lorakit.numerics.lowrank import LeadingDirections, weighted_svd

log = logging.getLogger("lorakit")
# Training rows that a start looks at.
ROWS = 64
# Bytes of second moments that are kept at once; each group of layers that fit takes a pass over the
# rows.
MOMENTS = 2 << 30


@torch.no_grad()
def prepare(method: Method, calibration: Calibration) -> None:
    """Bring a new run's method to its first step: give the factors their first values, then let the
    method do what it has to. Raises RunError for values that are not finite."""
    start = method.config.init_lora_weights
    adapters = {name: adapter for name, adapter in method.adapters.items() if adapter.rank}
    if start == "eva":
        _along_inputs(method, adapters, calibration)
    elif start == "qera":
        _against_loss(method, adapters, calibration)
    method.prepare(calibration)


def _along_inputs(
    method: Method, adapters: Mapping[str, Adapter], calibration: Calibration
) -> None:
    """Let A begin with the leading right singular vectors of each layer's inputs, and B with zero
    (EVA, Paischer et al., arXiv 2410.07170, section 3.2, without its redistribution of ranks)."""
    directions = {
        name: LeadingDirections(adapter.rank, method.generator(name).initial_seed())
        for name, adapter in adapters.items()
    }

    def see(name: str, x: Tensor) -> None:
        if not bool(x.isfinite().all()):
            raise _not_finite(name)
        directions[name].add(x)

    watch_inputs(adapters, calibration, ROWS, see)
    fewer = []
    for name, adapter in adapters.items():
        rows = directions[name].found()
        adapter.start_rows(rows)
        if len(rows) < adapter.rank:
            fewer.append(name)
    if fewer:
        message = "%d layers, as `%s`, read fewer directions than their rank: the rest is random"
        log.warning(message, len(fewer), fewer[0])


def _against_loss(
    method: Method, adapters: Mapping[str, Adapter], calibration: Calibration
) -> None:
    """Let s B A begin as what makes up best for what quantisation took from the layers' outputs on
    training rows: (W − Q(W)) x (QERA, Zhang et al., arXiv 2410.06040, theorem 1)."""
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    left: list[float] = []
    # Others, as a head that is a target, have lost nothing.
    adapters = {name: a for name, a in adapters.items() if isinstance(a.base, QuantisedBase)}
    weights = calibration.dense_weights(adapters)
    for group in _groups(adapters):
        moments = _second_moments(group, calibration)
        with calibration.stage("starting at what the base lost") as advance:
            for (name, adapter), (_, weight) in zip(group.items(), weights, strict=False):
                with dequantised_to(adapter.base, torch.float32):
                    lost = weight.to(adapter.lora_A) - adapter.base.weight
                moment = moments.pop(name)
                if not bool(moment.isfinite().all()):
                    raise _not_finite(name)
                if not bool(lost.any()):  # a pair of zeros would never learn
                    continue
                seed = method.generator(name).initial_seed()
                a, b, share = weighted_svd(lost, moment, adapter.rank, seed)
                pairs[name] = a, b / adapter.scale
                left.append(share)
                advance(len(pairs), len(adapters))
    method.start_from(pairs)
    log.info(
        "the adapters begin with %.0f%% of what quantisation took from the layers' outputs",
        100 * (1 - sum(left) / max(1, len(left))),
    )


def _groups(adapters: Mapping[str, Adapter]) -> Iterator[dict[str, Adapter]]:
    """The adapters in groups whose inputs' second moments fit MOMENTS bytes together."""
    group: dict[str, Adapter] = {}
    size = 0
    for name, adapter in adapters.items():
        own = 4 * in_out(adapter.base)[0] ** 2
        if group and size + own > MOMENTS:
            yield group
            group, size = {}, 0
        group[name] = adapter
        size += own
    if group:
        yield group


def _second_moments(adapters: Mapping[str, Adapter], calibration: Calibration) -> dict[str, Tensor]:
    """{module: Σ x xᵀ [in, in] over what it reads of the rows}."""
    sums = {
        name: torch.zeros(in_out(a.base)[0], in_out(a.base)[0], device=a.lora_A.device)
        for name, a in adapters.items()
    }

    def add(name: str, x: Tensor) -> None:
        sums[name].addmm_(x.float().T, x.float())

    watch_inputs(adapters, calibration, ROWS, add)
    return sums


def _not_finite(name: str) -> RunError:
    return RunError(f"the inputs of `{name}` are not finite", "Try precision: fp32.")
