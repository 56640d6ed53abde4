"""The pruned base of SALOR: W' = W⊙M by magnitude or by Wanda's scores (arXiv 2306.11695), and the
truncated SVD of what was dropped."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.adapters.base import PrunedBase
from lorakit.adapters.layer import Adapter
from lorakit.errors import RunError
from lorakit.methods._base import Calibration
from lorakit.methods._inputs import input_norms
from lorakit.methods.salor.config import Base
from lorakit.numerics.lowrank import is_wide, truncated_svd
from lorakit.numerics.sparsity import keep_count, masks, strongest

log = logging.getLogger("lorakit")


@torch.no_grad()
def prune_bases(
    adapters: Mapping[str, Adapter],
    config: Base,
    calibration: Calibration,
    svd_seed: Callable[[str], int],
) -> None:
    """Give each adapter {module: adapter} a pruned base. svd_seed(module): for a randomised SVD."""
    scores = _scores(adapters, config, calibration)
    kept: dict[str, Tensor] = {}
    if config.scope == "global":
        every = [scores(name) for name in adapters]
        kept = dict(zip(adapters, masks(every, config.target, config.form, "global"), strict=True))
    loss = Loss()
    with calibration.stage("pruning the base") as advance:
        for done, (name, adapter) in enumerate(adapters.items(), 1):
            mask = kept[name] if kept else _layer_mask(scores(name), config)
            _prune(adapter, mask, config, svd_seed(name), loss)
            advance(done, len(adapters))
    _report(adapters, config, loss)


def base_densities(adapters: Mapping[str, Adapter]) -> tuple[float, dict[str, float]]:
    """(share of non-zeros in all pruned weights, {module: in its own})."""
    pruned = {name: a.base.weight for name, a in adapters.items() if a.base.is_changed}
    live = {name: int(torch.count_nonzero(weight)) for name, weight in pruned.items()}
    total = sum(live.values()) / max(1, sum(weight.numel() for weight in pruned.values()))
    return total, {name: live[name] / weight.numel() for name, weight in pruned.items()}


@dataclass
class Loss:
    """Squares of what was dropped from all layers, and of what the residuals leave of it."""

    dropped: float = 0.0
    left: float = 0.0


def _prune(adapter: Adapter, mask: Tensor, config: Base, svd_seed: int, loss: Loss) -> None:
    """Give one adapter its pruned base, and add what that loses to `loss`."""
    # [out, in]: what is dropped, W - W'
    error = adapter.base.weight.float().masked_fill(mask, 0.0)
    loss.dropped += float(error.square().sum())
    residual = None
    if config.r_res and bool(error.any()):  # a pair of zeros would never learn
        randomised = config.svd == "randomised" or (config.svd == "auto" and is_wide(error))
        residual = a, b = truncated_svd(error, config.r_res, randomised, svd_seed)
        error -= b @ a
    loss.left += float(error.square().sum())
    adapter.set_base(PrunedBase(adapter.base.layer, mask, residual))


def _report(adapters: Mapping[str, Adapter], config: Base, loss: Loss) -> None:
    recovered = (
        f"; the residual of rank {config.r_res} recovers {1 - loss.left / loss.dropped:.1%} of it"
        if config.r_res and loss.dropped
        else ""
    )
    kept = sum(float(a.base.weight.float().square().sum()) for a in adapters.values())
    log.info(
        "base pruned to density %.3g in %d layers: %.2f %% of its squared weights are dropped%s",
        base_densities(adapters)[0],
        len(adapters),
        100 * loss.dropped / (kept + loss.dropped),
        recovered,
    )


# -- what is kept ----------------------------------------------------------------------------------


def _scores(
    adapters: Mapping[str, Adapter], config: Base, calibration: Calibration
) -> Callable[[str], Tensor]:
    """The function that scores the weight [out, in] of a module: |W|, times the norms of its inputs
    if those are asked for and it saw any."""
    norms: dict[str, Tensor] = {}
    if config.criterion == "wanda":
        norms = input_norms(adapters, calibration, config.calibration_rows)
    unseen = [name for name, norm in norms.items() if not bool(norm.any())]
    if unseen:
        log.warning(
            "%d layers saw no token while calibrating, as `%s`: pruned by magnitude",
            len(unseen),
            unseen[0],
        )

    def scores(name: str) -> Tensor:
        size = adapters[name].base.weight.float().abs()
        score = size * norms[name] if norms and name not in unseen else size
        if not bool(score.isfinite().all()):
            raise RunError(
                f"`{name}` can not be pruned: its weights or its inputs are not finite",
                "Try precision: fp32.",
            )
        return score

    return scores


def _layer_mask(scores: Tensor, config: Base) -> Tensor:
    """The mask of one layer's weight [out, in]; Wanda compares within a row."""
    if config.form.kind == "unstructured" and config.criterion == "wanda":
        return strongest(scores, keep_count(config.target, scores.shape[1]))
    return masks([scores], config.target, config.form)[0]
