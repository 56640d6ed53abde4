"""The tables of a run: bigrams counted on training text, percentiles and thresholds fitted to
held-out text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorakit.methods._base import Calibration
from lorakit.methods.chunkwise.chunking import chunk_starts, fit_thresholds, opening_means
from lorakit.methods.chunkwise.config import Config
from lorakit.methods.chunkwise.difficulty import (
    BigramTable,
    Difficulty,
    Percentiles,
    Values,
    table_features,
)
from lorakit.methods.chunkwise.scheduler import Tables, predicted, rows_of

# Training tokens that the bigram table is counted on, and held-out tokens that percentiles and
# thresholds are fitted to, where that needs no model and where it does.
COUNTED, CALIBRATED, CALIBRATED_BY_MODEL = 1_000_000, 250_000, 16_384

Rows = list[dict[str, Values]]


def calibrate(
    config: Config,
    calibration: Calibration,
    vocabulary: int,
    by_model: Callable[[str, Tensor, Tensor], Rows],
) -> Tables:
    """by_model(name of a pass, ids, mask): the features of each row's logits, for the source
    `model`."""
    by_table = config.difficulty.source == "table"
    table = _count_bigrams(calibration, vocabulary) if by_table else None

    def features(name: str, ids: Tensor, mask: Tensor) -> Rows:
        if table is None:
            return by_model(name, ids, mask)
        return [table_features(table, own) for own in rows_of(ids, mask.bool())]

    limit = CALIBRATED if by_table else CALIBRATED_BY_MODEL
    by_pass, fitted = {}, {}
    for name, rows in _held_out(config, calibration, features, limit).items():
        difficulty, thresholds, means, lengths = _fit(config, rows)
        by_pass[name] = difficulty, thresholds
        fitted[name] = np.searchsorted(thresholds, means, side="right"), lengths
    tiers, lengths = fitted[""]
    shares = np.bincount(tiers, lengths, len(config.rungs)) / lengths.sum()
    mean_rank, mean_length = float(shares @ config.rungs), float(lengths.mean())
    return Tables(table, by_pass, shares.tolist(), mean_rank, mean_length)


def _held_out(
    config: Config,
    calibration: Calibration,
    features: Callable[[str, Tensor, Tensor], Rows],
    limit: int,
) -> dict[str, Rows]:
    """{name of a pass: the features of each row} over `limit` held-out tokens."""
    found: dict[str, Rows] = {name: [] for name in config.difficulty.passes}
    left = limit
    with calibration.stage("calibrating on held-out text") as advance:
        for batch in calibration.held_out():
            for name, rows in found.items():
                rows += features(name, batch.input_ids, batch.attention_mask)
            left -= int(batch.lengths.sum())
            advance(min(limit, limit - left), limit)
            if left <= 0:
                break
    return found


def _fit(
    config: Config, rows: Rows
) -> tuple[Difficulty, list[float], NDArray[np.float64], NDArray[np.int64]]:
    """The difficulty of a pass and the thresholds of its tiers; opening means and lengths of the
    chunks that they were fitted to."""
    shares, rule = config.difficulty.shares(), config.form.rule
    percentiles = {f: Percentiles.of(np.concatenate([row[f] for row in rows])) for f in shares}
    difficulty = Difficulty(percentiles, shares)
    all_means, all_lengths = [], []
    for row in rows:
        values = difficulty(row)
        starts = chunk_starts(values, rule)
        all_means.append(opening_means(values, starts, rule))
        all_lengths.append(np.diff(starts, append=len(values)))
    means, lengths = np.concatenate(all_means), np.concatenate(all_lengths)
    return difficulty, fit_thresholds(means, lengths, config.rungs, config.target), means, lengths


def _count_bigrams(calibration: Calibration, vocabulary: int) -> BigramTable:
    sequences: list[NDArray[np.int64]] = []
    left = COUNTED
    with calibration.stage("counting bigrams") as advance:
        for batch in calibration.batches(calibration.rows):
            sequences += rows_of(batch.input_ids, batch.attention_mask.bool())
            left -= int(batch.lengths.sum())
            advance(len(sequences), calibration.rows)
            if left <= 0:
                break
    return BigramTable.count(sequences, vocabulary)


@torch.no_grad()
def features_by_model(model: Any, ids: Tensor, mask: Tensor, takes_positions: bool) -> Rows:
    """The features of the source `model` of each row, from one pass."""
    kept = mask.bool()
    places = {"position_ids": (kept.long().cumsum(1) - 1).clamp(min=0)} if takes_positions else {}
    mode = model.training
    model.eval()
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **places).logits
    model.train(mode)
    # Nothing predicted the first token: it is as surprising as one drawn from all.
    unknown = np.float32(np.log(logits.shape[-1]))
    found = []
    for row, own in enumerate(kept):
        tokens = ids[row, own]
        parts = [part.cpu().numpy() for part in predicted(logits[row, own][:-1], tokens[1:])]
        surprisal, entropy = (
            np.concatenate([[unknown], part])[: len(tokens)].astype(np.float32) for part in parts
        )
        found.append({"surprisal": surprisal, "entropy": entropy})
    return found
