"""Chunks against a plain loop and the streaming twin, bit for bit; thresholds against what they are
fitted to."""

from __future__ import annotations

import math
from itertools import combinations_with_replacement, pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from lorakit.methods.chunkwise.chunking import (
    GRID,
    ChunkRule,
    Chunks,
    ChunkStream,
    Floats,
    block_weights,
    chunk,
    chunk_starts,
    fit_thresholds,
    on_grid,
    opening_means,
    tier_shares,
)

THRESHOLDS = (0.4, 0.6)
RULES = [
    ChunkRule(min_len=3, max_len=9, tau=0.1, trailing=4),
    ChunkRule(min_len=1, max_len=4, tau=0.0, trailing=1),
    ChunkRule(min_len=5, max_len=5, tau=0.3, trailing=20),
    ChunkRule(min_len=8, max_len=64, tau=0.2, trailing=4),
    ChunkRule(min_len=1, max_len=1, tau=0.5, trailing=2),
]
LENGTHS = [0, 1, 2, 8, 9, 10, 64, 65, 200]


def difficulties(kind: str, n: int, seed: int = 0) -> Floats:
    rng = np.random.default_rng((seed, n))
    if kind == "constant":
        values = np.full(n, 0.37)
    elif kind == "steps":
        values = rng.choice([0.1, 0.45, 0.9], n // 7 + 1).repeat(7)[:n]
    elif kind == "walk":
        values = np.clip(0.5 + np.cumsum(rng.normal(0, 0.05, n)), 0, 1)
    elif kind == "two":
        values = rng.integers(0, 2, n).astype(float)
    else:
        values = rng.random(n)
    return on_grid(values)


KINDS = ["random", "constant", "steps", "walk", "two"]


def by_hand(difficulty: Floats, rule: ChunkRule) -> list[int]:
    """Where chunks open, in so many words; in exact integers."""
    values, starts = [round(float(d) * GRID) for d in difficulty], [0]
    for t in range(1, len(values)):
        running = values[starts[-1] : t]
        far = abs(values[t] - sum(running) / len(running)) / GRID > rule.tau
        if len(running) >= rule.max_len or (len(running) >= rule.min_len and far):
            starts.append(t)
    return starts if len(values) else []


# -- chunks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_open_where_a_plain_loop_opens_them(kind: str, rule: ChunkRule) -> None:
    for n in LENGTHS:
        values = difficulties(kind, n)
        assert chunk_starts(values, rule).tolist() == by_hand(values, rule)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_lengths_keep_to_the_rule(kind: str, rule: ChunkRule) -> None:
    values = difficulties(kind, 200)
    chunks = chunk(values, rule, THRESHOLDS)
    assert chunks.starts[0] == 0
    assert chunks.lengths.sum() == chunks.length == len(chunks.token_tiers) == 200
    assert (chunks.lengths <= rule.max_len).all()
    assert (chunks.lengths[:-1] >= rule.min_len).all()
    for start, end in pairwise([*chunks.starts.tolist(), 200]):
        means = np.cumsum(values[start:end])[:-1] / np.arange(1, end - start)
        close = np.abs(values[start + 1 : end] - means) <= rule.tau + 1e-12
        assert close[rule.min_len - 1 :].all()  # else it would have ended there
        if end < 200 and end - start < rule.max_len:
            assert abs(values[end] - values[start:end].mean()) > rule.tau - 1e-12


def test_a_step_opens_a_chunk_and_what_is_alike_stays_together() -> None:
    rule = ChunkRule(min_len=4, max_len=16, tau=0.25, trailing=2)
    values = on_grid(np.array([0.125] * 20 + [0.75] * 10 + [0.5] * 5))
    # 0.5 is not further than 0.25 from 0.75
    assert chunk_starts(values, rule).tolist() == [0, 16, 20]
    # The means of the last two tokens at 0, 16, 20: 0.125 (one token), 0.125, (0.125 + 0.75) / 2.
    assert opening_means(values, np.array([0, 16, 20]), rule).tolist() == [0.125, 0.125, 0.4375]
    # a threshold belongs to the tier above
    assert chunk(values, rule, [0.4375]).tiers.tolist() == [0, 0, 1]
    assert chunk(values, rule, [np.nextafter(0.4375, 1)]).tiers.tolist() == [0, 0, 0]


def test_a_distance_of_exactly_tau_does_not_open_one() -> None:
    values = np.array([0.25, 0.25, 0.5, 0.25])
    assert chunk_starts(values, ChunkRule(1, 9, 0.25, 1)).tolist() == [0]
    assert chunk_starts(values, ChunkRule(1, 9, np.nextafter(0.25, 0), 1)).tolist() == [0, 2, 3]


def test_infinite_thresholds_shut_tiers_out() -> None:
    values = difficulties("random", 50)
    assert set(chunk(values, RULES[0], [-math.inf, math.inf]).tiers) == {1}
    assert set(chunk(values, RULES[0], []).tiers) == {0}


def test_on_grid_rounds_to_exact_sums() -> None:
    values = on_grid(np.random.default_rng(0).random(10_000))
    assert (values * GRID == np.rint(values * GRID)).all()
    assert math.fsum(values) == float(np.cumsum(values)[-1]) == float(values[::-1].sum())
    # half to even
    assert on_grid(np.array([0.0, 1.0, 0.5 / GRID, 1.5 / GRID])).tolist() == [
        0.0,
        1.0,
        0.0,
        2 / GRID,
    ]


# -- weights of blocks -----------------------------------------------------------------------------


def test_the_weights_of_a_fade_are_these() -> None:
    chunks = Chunks(np.array([0, 4, 8]), np.array([2, 0, 1]), 10)
    weights = block_weights(chunks, [1, 2, 3], 3, 3)
    assert weights.dtype == np.float32
    assert weights[:, 0].tolist() == [1.0] * 10
    assert weights[:, 1].tolist() == [1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0.25, 0.5]
    assert weights[:, 2].tolist() == [1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0, 0]


def test_without_a_fade_weights_are_the_tiers() -> None:
    chunks = chunk(difficulties("random", 90), RULES[0], THRESHOLDS)
    weights = block_weights(chunks, [0, 1, 2], 2, 0)  # a ladder that begins with rank 0
    assert (weights == (chunks.token_tiers[:, None] > np.arange(2))).all()


@pytest.mark.parametrize("fade", [0, 1, 3])
def test_weights_never_grow_from_block_to_block_and_reach_their_tier(fade: int) -> None:
    chunks = chunk(difficulties("random", 300), RULES[0], THRESHOLDS)
    weights = block_weights(chunks, [1, 2, 3], 3, fade)
    assert (np.diff(weights, axis=1) <= 0).all()
    assert ((weights >= 0) & (weights <= 1)).all()
    for start, end, tier in zip(
        chunks.starts, [*chunks.starts[1:], 300], chunks.tiers, strict=True
    ):
        settled = weights[start + (fade if start else 0) : end]
        assert (settled == (np.arange(3) <= tier)).all()


# -- the streaming twin ----------------------------------------------------------------------------


def streamed(
    stream: ChunkStream, values: Floats
) -> tuple[list[int], NDArray[np.float32], list[bool]]:
    placed = [stream.push(value) for value in values.tolist()]
    weights = np.array([p.weights for p in placed], np.float32).reshape(len(placed), -1)
    return [p.tier for p in placed], weights, [p.opened for p in placed]


@pytest.mark.parametrize("blocks_of", [[1, 2, 3], [0, 1, 2]], ids=["ladder", "ladder from 0"])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_token_by_token_gives_the_same_bits(
    kind: str, rule: ChunkRule, blocks_of: list[int]
) -> None:
    for n in (1, 10, 200):
        values = difficulties(kind, n)
        fade = min(3, rule.min_len)
        chunks = chunk(values, rule, THRESHOLDS)
        tiers, weights, opened = streamed(
            ChunkStream(rule, THRESHOLDS, blocks_of, blocks_of[-1], fade), values
        )
        assert tiers == chunks.token_tiers.tolist()
        assert np.flatnonzero(opened).tolist() == chunks.starts.tolist()
        whole = block_weights(chunks, blocks_of, blocks_of[-1], fade)
        assert weights.tobytes() == whole.tobytes()


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("kind", ["random", "steps", "constant"])
def test_following_a_prompt_goes_on_as_if_there_were_no_cut_at_every_point(
    kind: str, rule: ChunkRule
) -> None:
    values, fade = difficulties(kind, 70), min(3, rule.min_len)
    whole = chunk(values, rule, THRESHOLDS)
    weights = block_weights(whole, [1, 2, 3], 3, fade)
    for cut in range(len(values)):
        stream = ChunkStream(rule, THRESHOLDS, [1, 2, 3], 3, fade)
        stream.follow(values[:cut], chunk(values[:cut], rule, THRESHOLDS))
        tiers, later, opened = streamed(stream, values[cut:])
        assert tiers == whole.token_tiers[cut:].tolist()
        assert later.tobytes() == weights[cut:].tobytes()
        assert (np.flatnonzero(opened) + cut).tolist() == [
            s for s in whole.starts.tolist() if s >= cut
        ]


def test_after_an_unseen_stretch_the_first_chunk_fades_from_its_tier() -> None:
    stream = ChunkStream(RULES[0], THRESHOLDS, [1, 2, 3], 3, 3, before=2)
    tiers, weights, opened = streamed(stream, on_grid(np.full(4, 0.1)))
    assert (tiers, opened) == ([0] * 4, [True, False, False, False])
    assert weights.tolist() == [[1, 0.75, 0.75], [1, 0.5, 0.5], [1, 0.25, 0.25], [1, 0, 0]]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_nothing_depends_on_later_difficulties(rule: ChunkRule) -> None:
    fade = min(3, rule.min_len)
    for seed in range(5):
        values, other = difficulties("steps", 120, seed), difficulties("random", 120, seed + 10)
        for cut in (1, 7, 40, 119):
            changed = np.concatenate([values[:cut], other[cut:]])
            first, second = (chunk(v, rule, THRESHOLDS) for v in (values, changed))
            assert first.token_tiers[:cut].tolist() == second.token_tiers[:cut].tolist()
            weights = [
                block_weights(c, [1, 2, 3], 3, fade)[:cut].tobytes() for c in (first, second)
            ]
            assert weights[0] == weights[1]


# -- tiers that meet a mean rank -------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [[4, 8, 16], [0, 4, 8], [8], [2, 3], [1, 2, 4, 8, 64]], ids=str)
def test_shares_have_the_mean_and_no_others_are_more_even(ranks: list[int]) -> None:
    rng = np.random.default_rng(0)
    for target in np.linspace(ranks[0], ranks[-1], 9):
        shares = tier_shares(ranks, float(target))
        assert shares.sum() == pytest.approx(1.0)
        assert (shares >= 0).all()
        assert shares @ ranks == pytest.approx(target, abs=1e-9)

        def entropy(p: Floats) -> float:
            return float(-(p[p > 0] * np.log(p[p > 0])).sum())

        # Any other way of the same mean: a step in the null space of (1, ranks), as far as it stays
        # a distribution.
        if len(ranks) > 2:
            space = np.linalg.svd(np.array([np.ones(len(ranks)), ranks]))[2][2:]
            for _ in range(20):
                step = rng.normal(size=len(space)) @ space * 0.02
                if (other := shares + step).min() >= 0:
                    assert entropy(other) < entropy(shares) + 1e-9


def test_shares_by_name() -> None:
    assert tier_shares([4, 8, 12], 8).tolist() == pytest.approx([1 / 3] * 3)
    assert tier_shares([4, 16], 7).tolist() == pytest.approx([0.75, 0.25])
    assert tier_shares([4, 8, 16], 4).tolist() == [1, 0, 0]
    assert tier_shares([4, 8, 16], 16).tolist() == [0, 0, 1]


def test_shares_of_ranks_that_lie_close_beside_one_far_away_have_the_mean_too() -> None:
    assert tier_shares([1, 2, 256], 1.01) @ [1, 2, 256] == pytest.approx(1.01, abs=1e-9)


@pytest.mark.parametrize("target", [3.9, 16.1, -1.0, math.nan])
def test_a_mean_outside_of_the_ranks_is_refused(target: float) -> None:
    with pytest.raises(ValueError, match="no mixture of the ranks"):
        tier_shares([4, 8, 16], target)
    with pytest.raises(ValueError, match="no mixture"):
        fit_thresholds(np.array([0.1, 0.2]), np.array([5, 5]), [4, 8, 16], target)


def fitted_mean(
    means: Floats, lengths: NDArray[np.int64], ranks: list[int], thresholds: list[float]
) -> float:
    tiers = np.searchsorted(thresholds, means, side="right")
    return float(np.asarray(ranks)[tiers] @ lengths / lengths.sum())


@pytest.mark.parametrize("ranks", [[4, 8, 16], [0, 4, 8], [2, 16], [4, 8, 12, 64]], ids=str)
def test_thresholds_meet_the_target_on_what_they_are_fitted_to(ranks: list[int]) -> None:
    rng = np.random.default_rng(1)
    means, lengths = on_grid(rng.random(4000)), rng.integers(8, 65, 4000)
    for target in np.linspace(ranks[0], ranks[-1], 7):
        thresholds = fit_thresholds(means, lengths, ranks, float(target))
        assert len(thresholds) == len(ranks) - 1
        assert thresholds == sorted(thresholds)
        # To within the tokens that one threshold's chunk holds.
        near = 2 * 64 / lengths.sum() * max(np.diff(ranks))
        assert fitted_mean(means, lengths, ranks, thresholds) == pytest.approx(target, abs=near)


def test_thresholds_at_both_ends_hold_for_any_text() -> None:
    means, lengths = on_grid(np.random.default_rng(2).random(50)), np.full(50, 8)
    for target, tier in ((4, 0), (16, 2)):
        thresholds = fit_thresholds(means, lengths, [4, 8, 16], target)
        assert set(np.searchsorted(thresholds, [-1.0, 0.0, 0.5, 1.0, 2.0], side="right")) == {tier}


def test_one_rank_has_no_thresholds() -> None:
    assert fit_thresholds(np.array([0.5, 0.6]), np.array([8, 8]), [8], 8) == []


def test_chunks_that_are_all_alike_go_to_the_tier_nearest_to_the_target() -> None:
    means, lengths = np.full(20, 0.5), np.full(20, 8)
    for target, nearest in ((4.5, 4), (7.5, 8), (9, 8), (15.5, 16)):
        thresholds = fit_thresholds(means, lengths, [4, 8, 16], target)
        assert fitted_mean(means, lengths, [4, 8, 16], thresholds) == nearest


@pytest.mark.parametrize(("target", "nearest"), [(6.8, 8), (7.08, 8), (5.9, 4)])
def test_the_tier_nearest_to_the_target_is_found_between_two_as_well(
    target: float, nearest: int
) -> None:
    """One threshold after the other would end at 4."""
    means, lengths = np.full(20, 0.5), np.full(20, 8)
    assert (
        fitted_mean(means, lengths, [4, 8, 16], fit_thresholds(means, lengths, [4, 8, 16], target))
        == nearest
    )


def test_with_ties_no_other_thresholds_near_the_wanted_shares_come_nearer() -> None:
    """Two tiers: the best of all. More: within the weight of the ties about it, and never worse
    than one tier for all."""
    rng = np.random.default_rng(3)
    for _ in range(200):
        values = np.sort(rng.choice(np.arange(1, 64) / 64, rng.integers(1, 6), replace=False))
        means, lengths = rng.choice(values, 30), rng.integers(8, 33, 30)
        places = [-np.inf, *np.unique(means)[1:], np.inf]
        for ranks in ([4, 16], [4, 8, 16]):
            target = float(rng.uniform(ranks[0], ranks[-1]))
            found = abs(
                fitted_mean(means, lengths, ranks, fit_thresholds(means, lengths, ranks, target))
                - target
            )
            choices = combinations_with_replacement(places, len(ranks) - 1)
            best = min(
                abs(fitted_mean(means, lengths, ranks, list(choice)) - target) for choice in choices
            )
            if len(ranks) == 2:
                assert found == pytest.approx(best, abs=1e-12)
            else:
                heaviest = max(lengths[means == value].sum() for value in values) / lengths.sum()
                assert found <= heaviest * max(np.diff(ranks)) / 2 + best + 1e-12


def test_a_target_is_met_on_chunks_of_a_text_and_then_by_its_tokens() -> None:
    rule = ChunkRule(4, 32, 0.2, 4)
    texts = [difficulties("walk", 400, seed) for seed in range(20)]
    starts = [chunk_starts(text, rule) for text in texts]
    means = np.concatenate([opening_means(t, s, rule) for t, s in zip(texts, starts, strict=True)])
    lengths = np.concatenate(
        [np.diff(s, append=len(t)) for t, s in zip(texts, starts, strict=True)]
    )
    thresholds = fit_thresholds(means, lengths, [4, 8, 16], 9.0)
    tiers = np.concatenate([chunk(text, rule, thresholds).token_tiers for text in texts])
    assert np.array([4, 8, 16])[tiers].mean() == pytest.approx(9.0, abs=0.3)
