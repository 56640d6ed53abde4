"""Difficulty against slow counts by hand, and its streaming twins, bit for bit."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from lorakit.methods.chunkwise.chunking import GRID
from lorakit.methods.chunkwise.difficulty import (
    QUANTILES,
    BigramTable,
    Difficulty,
    Percentiles,
    TableStream,
    Values,
    novelty,
    position,
    table_features,
)

VOCABULARY = 11
Ids = NDArray[np.int64]


def texts(
    count: int, longest: int = 40, seed: int = 0, vocabulary: int = VOCABULARY - 1
) -> list[Ids]:
    """Sequences in which some bigrams are frequent and the last token of the vocabulary never
    occurs."""
    rng = np.random.default_rng(seed)
    shares = 1.0 / np.arange(1, vocabulary + 1)
    return [
        rng.choice(vocabulary, rng.integers(1, longest), p=shares / shares.sum())
        for _ in range(count)
    ]


def witten_bell(sequences: list[Ids], vocabulary: int) -> NDArray[np.float64]:
    """p [previous, token], counted one by one: λ p_ML(w | v) + (1 - λ) p(w), 1 - λ = T(v) / (T(v) +
    c(v))."""
    unigrams = Counter(int(token) for ids in sequences for token in ids)
    bigrams = Counter((int(v), int(w)) for ids in sequences for v, w in pairwise(ids))
    total = sum(unigrams.values())
    p = np.zeros((vocabulary, vocabulary))
    for v in range(vocabulary):
        followers = {w: n for (first, w), n in bigrams.items() if first == v}
        seen, kinds = sum(followers.values()), len(followers)
        for w in range(vocabulary):
            lower = (unigrams[w] + 1) / (total + vocabulary)
            share = kinds / (kinds + seen) if seen else 1.0
            p[v, w] = share * lower + ((1 - share) * followers.get(w, 0) / seen if seen else 0.0)
    return p


@pytest.fixture
def counted() -> tuple[list[Ids], BigramTable]:
    sequences = texts(12)
    return sequences, BigramTable.count(sequences, VOCABULARY)


# -- bigrams ---------------------------------------------------------------------------------------


def test_surprisals_are_those_of_a_count_by_hand(counted: tuple[list[Ids], BigramTable]) -> None:
    sequences, table = counted
    p = witten_bell(sequences, VOCABULARY)
    for v in range(VOCABULARY):
        for w in range(VOCABULARY):
            found = table.look_up(np.array([v, w]))
            assert found.dtype == np.float32
            assert found[1] == pytest.approx(-math.log(p[v, w]), rel=1e-5)


def test_the_probabilities_after_every_token_sum_to_1(
    counted: tuple[list[Ids], BigramTable],
) -> None:
    _, table = counted
    for v in range(VOCABULARY):  # the last one was never seen
        after = [float(table.look_up(np.array([v, w]))[1]) for w in range(VOCABULARY)]
        assert sum(math.exp(-s) for s in after) == pytest.approx(1.0, abs=1e-5)
    assert np.exp(-table.unigrams.astype(np.float64)).sum() == pytest.approx(1.0, abs=1e-6)


def test_the_first_token_has_its_unigrams_surprisal(counted: tuple[list[Ids], BigramTable]) -> None:
    sequences, table = counted
    counts, total = Counter(np.concatenate(sequences).tolist()), sum(map(len, sequences))
    for token in range(VOCABULARY):
        expected = -math.log((counts[token] + 1) / (total + VOCABULARY))
        assert table.look_up(np.array([token]))[0] == pytest.approx(expected, rel=1e-6)
        assert table.look_up(np.array([token, 0]))[0] == table.unigrams[token]
        assert TableStream(table).push(token)["bigram"] == float(table.unigrams[token])


def test_bigrams_do_not_reach_from_one_sequence_to_the_next() -> None:
    apart = BigramTable.count([np.array([1, 2]), np.array([3, 4])], 6)
    assert apart.keys.tolist() == [1 * 6 + 2, 3 * 6 + 4]


def test_what_was_counted_may_come_in_any_pieces_or_be_nothing() -> None:
    nothing = BigramTable.count([], 4)
    assert np.exp(-nothing.look_up(np.array([0, 1, 1]))).tolist() == pytest.approx([0.25] * 3)
    with_holes = [np.array([2]), np.array([], np.int64), np.array([1, 2, 1])]
    table = BigramTable.count(with_holes, 4)
    p = witten_bell(with_holes, 4)
    assert table.look_up(np.array([1, 2, 1, 3]))[1:] == pytest.approx(
        [-math.log(p[v, w]) for v, w in ((1, 2), (2, 1), (1, 3))]
    )
    assert len(table.look_up(np.array([], np.int64))) == 0


def test_a_large_vocabulary_does_not_overflow() -> None:
    vocabulary = 2**18
    top = vocabulary - 1
    ids = np.array([top, top, top - 1, top])
    table = BigramTable.count([ids], vocabulary)
    assert (table.keys > 0).all()
    known = table.look_up(ids)
    stream = TableStream(table)
    assert [stream.push(int(token))["bigram"] for token in ids] == known.tolist()
    assert known[1] < table.unigrams[top]


# -- novelty and position --------------------------------------------------------------------------


def test_novelty_by_hand() -> None:
    #      first, then the bigrams 1-2, 2-1, 1-2 (known), 2-1 (known), 1-1, 1-2 (known), 2-2 …
    ids = np.array([1, 2, 1, 2, 1, 1, 2, 2])
    assert novelty(ids).tolist() == [1, 2, 3, 3, 3, 4, 4, 5]
    # only the last 8 count
    assert novelty(np.zeros(12, np.int64)).tolist() == [1, 2, 2, 2, 2, 2, 2, 2, 1, 0, 0, 0]
    assert novelty(np.arange(20)).tolist() == [1, 2, 3, 4, 5, 6, 7, *[8] * 13]
    assert novelty(np.array([], np.int64)).tolist() == []


def test_novelty_against_a_slow_count() -> None:
    for ids in texts(20, seed=3, vocabulary=4):
        pairs = [(None, ids[0]), *pairwise(ids)]
        new = [pair not in pairs[:i] for i, pair in enumerate(pairs)]
        assert novelty(ids).tolist() == [sum(new[max(0, t - 7) : t + 1]) for t in range(len(ids))]


def test_position_falls_by_one_a_token() -> None:
    assert position(4).tolist() == [0, -1, -2, -3]


# -- percentiles -----------------------------------------------------------------------------------


def test_percentiles_are_the_share_of_text_below() -> None:
    values = np.random.default_rng(0).permutation(np.linspace(-3, 5, 4001)).astype(np.float32)
    percentiles = Percentiles.of(values)
    assert len(percentiles.quantiles) == QUANTILES
    assert np.isin(percentiles.quantiles, values).all()
    probes = np.array([-9, -3, -1, 1, 3, 5, 9], np.float32)
    assert percentiles(probes) == pytest.approx([0, 0, 0.25, 0.5, 0.75, 1, 1], abs=1 / QUANTILES)
    assert percentiles(probes)[0] == 0.0
    assert percentiles(probes)[-1] == 1.0
    assert (np.diff(percentiles(np.sort(values))) >= 0).all()


def test_values_that_are_all_alike_are_in_the_middle() -> None:
    percentiles = Percentiles.of(np.full(100, 2.0, np.float32))
    assert percentiles(np.array([1, 2, 3], np.float32)).tolist() == [0.0, 0.5, 1.0]
    half = Percentiles.of(np.array([0] * 50 + [1] * 50, np.float32))
    assert half(np.array([0, 1], np.float32)) == pytest.approx([0.25, 0.75], abs=1 / QUANTILES)


def test_one_value_is_enough() -> None:
    assert Percentiles.of(np.array([7.0], np.float32))(np.array([7.0], np.float32)).tolist() == [
        0.5
    ]


# -- difficulty ------------------------------------------------------------------------------------

WEIGHTS = {"bigram": 0.5, "novelty": 0.2, "position": 0.3}


def difficulty(table: BigramTable, weights: dict[str, float] = WEIGHTS) -> Difficulty:
    held_out = [table_features(table, ids) for ids in texts(30, seed=1)]
    return Difficulty(
        {name: Percentiles.of(np.concatenate([row[name] for row in held_out])) for name in weights},
        weights,
    )


def test_it_is_the_weighted_mean_of_percentiles_on_the_grid(
    counted: tuple[list[Ids], BigramTable],
) -> None:
    _, table = counted
    measure = difficulty(table)
    for ids in texts(10, seed=2, vocabulary=VOCABULARY):
        features = table_features(table, ids)
        found = measure(features)
        expected = sum(
            weight * measure.percentiles[name](features[name]) for name, weight in WEIGHTS.items()
        )
        assert found == pytest.approx(expected, abs=0.5 / GRID + 1e-12)
        assert (found * GRID == np.rint(found * GRID)).all()
        assert ((found >= 0) & (found <= 1)).all()


@pytest.mark.parametrize(
    "weights", [WEIGHTS, {"bigram": 1.0}, {"position": 0.7, "novelty": 0.3}], ids=str
)
def test_token_by_token_gives_the_same_bits(
    counted: tuple[list[Ids], BigramTable], weights: dict[str, float]
) -> None:
    _, table = counted
    measure = difficulty(table, weights)
    for ids in texts(20, longest=120, seed=4, vocabulary=VOCABULARY):
        features = table_features(table, ids)
        whole = measure(features)
        for begun in (0, 1, len(ids) // 2):
            stream, one = TableStream(table, ids[:begun].tolist()), measure.stream()
            for t in range(begun, len(ids)):
                found = stream.push(int(ids[t]))
                assert found == {name: float(values[t]) for name, values in features.items()}
                assert one(found) == whole[t]


def test_features_of_a_model_have_the_same_twins() -> None:
    rng = np.random.default_rng(5)

    def features(n: int) -> dict[str, Values]:
        return {
            name: rng.gamma(2.0, 1.5, n).astype(np.float32) for name in ("surprisal", "entropy")
        }

    held_out, weights = features(3000), {"surprisal": 1 / 3, "entropy": 2 / 3}
    measure = Difficulty(
        {name: Percentiles.of(values) for name, values in held_out.items()}, weights
    )
    # Values between the quantiles, and quantiles themselves, which ties are made of.
    seen = {
        name: np.concatenate([features(500)[name], measure.percentiles[name].quantiles])
        for name in weights
    }
    whole, one = measure(seen), measure.stream()
    for t in range(len(whole)):
        assert one({name: float(values[t]) for name, values in seen.items()}) == whole[t]


def test_nothing_depends_on_later_tokens(counted: tuple[list[Ids], BigramTable]) -> None:
    _, table = counted
    measure = difficulty(table)
    ids = np.random.default_rng(6).integers(0, VOCABULARY, 60)
    other = np.random.default_rng(7).integers(0, VOCABULARY, 60)
    whole = measure(table_features(table, ids))
    for cut in (1, 2, 17, 59):
        changed = np.concatenate([ids[:cut], other[cut:]])
        assert (measure(table_features(table, changed))[:cut] == whole[:cut]).all()
        assert (measure(table_features(table, ids[:cut])) == whole[:cut]).all()
