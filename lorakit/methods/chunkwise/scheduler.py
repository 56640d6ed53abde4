"""Schedulers: difficulty, chunks and tiers of sequences while they are read and written, in one
pass, in real time.

What difficulty is measured against are `Tables`, counted once; what a forward pass takes from here
is a `Schedule`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorakit.errors import RunError
from lorakit.kernels.tiered_linear import TierPlan
from lorakit.methods._tiers import Schedule, Token
from lorakit.methods.chunkwise.chunking import Chunks, ChunkStream, Ladder, block_weights, chunk
from lorakit.methods.chunkwise.difficulty import (
    BASE,
    BigramTable,
    Difficulty,
    Percentiles,
    TableStream,
    Values,
    table_features,
)


@dataclass
class Tables:
    """Tables that difficulty is measured against. table: for the source table; by_pass: {prefix of
    the pass: how its features become difficulty, and the thresholds of the tiers}; shares,
    mean_rank and mean_length: of tiers, ranks and chunks on held-out text."""

    table: BigramTable | None
    by_pass: dict[str, tuple[Difficulty, list[float]]]
    shares: list[float]
    mean_rank: float
    mean_length: float

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        kept: dict[str, Any] = (
            {}
            if self.table is None
            else {f"table.{name}": value for name, value in vars(self.table).items()}
        )
        for prefix, (difficulty, thresholds) in self.by_pass.items():
            kept |= {
                f"percentiles.{prefix}{name}": p.quantiles
                for name, p in difficulty.percentiles.items()
            }
            kept[f"thresholds.{prefix}"] = np.asarray(thresholds, np.float64)
        kept["held_out"] = np.asarray([self.mean_rank, self.mean_length, *self.shares], np.float64)
        return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in kept.items()}

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, Tensor],
        weights: Mapping[str, float],
        passes: Sequence[str],
        by_table: bool,
    ) -> Tables:
        """Tables from what `tensors` gave, for difficulties of these features' weights. Raises
        ValueError when something is missing."""
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        try:
            parts = ("keys", "surprisals", "unigrams", "backoffs")
            table = BigramTable(*(arrays[f"table.{part}"] for part in parts)) if by_table else None
            by_pass = {}
            for prefix in passes:
                percentiles = {
                    name: Percentiles(arrays[f"percentiles.{prefix}{name}"]) for name in weights
                }
                by_pass[prefix] = (
                    Difficulty(percentiles, weights),
                    arrays[f"thresholds.{prefix}"].tolist(),
                )
            mean_rank, mean_length, *shares = arrays["held_out"].tolist()
        except KeyError as error:
            raise ValueError(f"the tables of chunkwise lack {error}") from error
        return cls(table, by_pass, shares, mean_rank, mean_length)


class ChunkScheduler:
    """Difficulty, chunks and tiers of a few sequences, as they are written: one pass, nothing
    looked at twice."""

    def __init__(
        self,
        ladder: Ladder,
        tables: Tables,
        score: Callable[[Tensor, Tensor], list[dict[str, Values]]],
    ) -> None:
        """score: ids and mask [rows, n] → the features of the logits of a base pass, for each
        row."""
        self.ladder, self.tables, self.score = ladder, tables, score
        self.traces: list[list[Token]] = []
        self.length = 0  # tokens of a row that were seen, padding included
        self.logits: Tensor | None = None  # [rows, vocabulary] that the next token is chosen from

    def prompt(self, ids: Tensor, mask: Tensor) -> Schedule:
        ladder, (rows, n) = self.ladder, ids.shape
        self.length = n
        top = len(ladder.blocks_of) - 1
        own, scored = rows_of(ids, mask), self._scored(ids, mask)
        places = mask.cpu().numpy()
        tiers, weights = (
            np.zeros((rows, n), np.int64),
            np.zeros((rows, n, ladder.blocks), np.float32),
        )
        difficulty, thresholds = self.tables.by_pass[""]
        self.streams, self.features = [], []
        self.difficulties = [difficulty.stream() for _ in range(rows)]
        for row, tokens in enumerate(own):
            stream = ChunkStream(
                ladder.rule,
                thresholds,
                ladder.blocks_of,
                ladder.blocks,
                ladder.fade,
                None if scored else top,
            )
            if not scored:
                values, chunks = (
                    np.full(len(tokens), np.nan),
                    Chunks(np.zeros(1, np.int64), np.asarray([top]), len(tokens)),
                )
            else:
                measure, its_thresholds = self.tables.by_pass.get(BASE, (difficulty, thresholds))
                values = measure(scored[row])
                chunks = chunk(values, ladder.rule, its_thresholds)
                stream.follow(values, chunks)
            tiers[row, places[row]] = chunks.token_tiers
            weights[row, places[row]] = block_weights(
                chunks, ladder.blocks_of, ladder.blocks, ladder.fade
            )
            opened = np.isin(np.arange(len(tokens)), chunks.starts)
            self.traces.append(
                [
                    Token(*token)
                    for token in zip(
                        chunks.token_tiers.tolist(), values.tolist(), opened.tolist(), strict=True
                    )
                ]
            )
            self.streams.append(stream)
            self.features.append(
                TableStream(self.tables.table, tokens.tolist())
                if self.tables.table is not None
                else None
            )
        return Schedule(tiers, TierPlan.of(torch.from_numpy(weights).flatten(0, 1).to(ids.device)))

    def step(self, ids: Tensor, logits: Tensor) -> Schedule:
        self.logits = logits
        return self.follow(ids)

    def follow(self, ids: Tensor, mask: Tensor | None = None) -> Schedule:
        """The next tokens ids [rows, n] of each, but for padding, where the mask is false; the
        source `model` needs `logits` that each was chosen from."""
        rows, n = ids.shape
        self.length += n
        kept = np.ones((rows, n), bool) if mask is None else mask.cpu().numpy()
        tiers = np.zeros((rows, n), np.int64)
        weights = np.zeros((rows, n, self.ladder.blocks), np.float32)
        tokens = ids.tolist()
        for j in range(n):
            by_model = self._predicted(ids[:, j]) if self.tables.table is None else None
            for row in np.flatnonzero(kept[:, j]).tolist():
                stream = self.features[row]
                features = stream.push(tokens[row][j]) if stream is not None else {}
                if by_model is not None:
                    features = by_model[row]
                value = self.difficulties[row](features)
                placed = self.streams[row].push(value)
                tiers[row, j], weights[row, j] = placed.tier, placed.weights
                self.traces[row].append(Token(placed.tier, value, placed.opened))
        return Schedule(tiers, TierPlan.of(torch.from_numpy(weights).flatten(0, 1).to(ids.device)))

    def _scored(self, ids: Tensor, mask: Tensor) -> list[dict[str, Values]]:
        """The features of each row; [] where nothing is known of a prompt."""
        if self.tables.table is not None:
            return [table_features(self.tables.table, tokens) for tokens in rows_of(ids, mask)]
        return self.score(ids, mask) if BASE in self.tables.by_pass else []

    def _predicted(self, ids: Tensor) -> list[dict[str, float]]:
        if self.logits is None:
            raise RunError(
                "the source `model` of chunkwise was given several tokens, and no logits that each"
                " was chosen from",
                "Generate one token at a time, or use difficulty.source: table.",
            )
        surprisal, entropy = predicted(self.logits, ids)
        self.logits = None
        return [
            {"surprisal": s, "entropy": e}
            for s, e in zip(surprisal.tolist(), entropy.tolist(), strict=True)
        ]


class UniformScheduler:
    """Every token at one tier."""

    def __init__(self, tier: int, used: int, blocks: int) -> None:
        """used: of how many of the `blocks`."""
        self.tier, self.used, self.blocks = tier, used, blocks
        self.traces: list[list[Token]] = []

    def prompt(self, ids: Tensor, mask: Tensor) -> Schedule:
        plan = TierPlan.uniform_at(self.used, self.blocks, ids.numel(), ids.device)
        self.traces = self.traces or [[] for _ in ids]
        for trace, count in zip(self.traces, mask.sum(1).tolist(), strict=True):
            trace += [Token(self.tier, float("nan"), False)] * count
        return Schedule(np.full(tuple(ids.shape), self.tier), plan)

    def step(self, ids: Tensor, logits: Tensor) -> Schedule:
        return self.prompt(ids, torch.ones_like(ids))


def predicted(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(surprisal [n], entropy [n]) in nats, float32, of tokens ids [n] under logits [n,
    vocabulary]."""
    surprisals, entropies = [], []
    # In pieces, since float32 logits of a long text are large.
    for part, own in zip(torch.split(logits, 256), torch.split(ids, 256), strict=True):
        log_p = part.float().log_softmax(-1)
        surprisals.append(-log_p.gather(1, own[:, None]).squeeze(1))
        entropies.append(-(log_p.exp() * log_p).sum(1))
    if not surprisals:
        return logits.new_zeros(0).float(), logits.new_zeros(0).float()
    return torch.cat(surprisals), torch.cat(entropies)


def rows_of(ids: Tensor, mask: Tensor) -> list[NDArray[np.int64]]:
    """The token ids of each row without its padding."""
    whole, kept = ids.cpu().numpy(), mask.cpu().numpy()
    return [row[own] for row, own in zip(whole, kept, strict=True)]
