"""Mixtures: shares of an epoch and the units that it draws, against the rule written down a second
time."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from lorakit.data.batches import StepOrder
from lorakit.data.mixture import Mixture, largest_remainder

SIZES, WEIGHTS = (7, 30, 12), (3.0, 1.0, 2.0)


def expected_shares(weights: Any, total: int) -> list[int]:
    """Hamilton's method in exact fractions."""
    exact = [Fraction(w) * total / sum(map(Fraction, weights)) for w in weights]
    shares = [int(one) for one in exact]
    by_loss = sorted(range(len(shares)), key=lambda i: (shares[i] - exact[i], i))
    for number in by_loss[: total - sum(shares)]:
        shares[number] += 1
    return shares


@pytest.mark.parametrize(
    ("weights", "total"),
    [((3, 1, 2), 49), ((1, 1, 1), 100), ((0.5, 0.25), 3), ((7.3, 0.01), 1000), ((2,), 5)],
)
def test_shares_are_those_of_the_largest_remainders(weights: Any, total: int) -> None:
    shares = largest_remainder(weights, total)
    assert list(shares) == expected_shares(weights, total)
    assert sum(shares) == total


def expected_epoch(seed: int, epoch: int) -> list[int]:
    """The units of an epoch, by the rule: each set is a sequence of passes, every one in an order
    of its own, and an epoch takes the next of them."""
    found = []
    for number, (size, share) in enumerate(
        zip(SIZES, expected_shares(WEIGHTS, sum(SIZES)), strict=True)
    ):
        passes = 1 + (epoch + 1) * share // size
        sequence = [
            unit
            for one in range(passes)
            for unit in np.random.default_rng((seed, number, one, 1)).permutation(size).tolist()
        ]
        first = sum(SIZES[:number])
        found += [first + unit for unit in sequence[epoch * share : (epoch + 1) * share]]
    return found


@pytest.mark.parametrize("epoch", [0, 1, 2, 9])
def test_an_epoch_goes_on_where_the_one_before_ended(epoch: int) -> None:
    drawn = Mixture(SIZES, WEIGHTS).drawn(5, epoch)
    assert drawn.tolist() == expected_epoch(5, epoch)
    order = np.random.default_rng((5, epoch)).permutation(sum(SIZES))
    steps = StepOrder(sum(SIZES), 8, 5, draw=Mixture(SIZES, WEIGHTS).drawn)
    per_epoch = -(-sum(SIZES) // 8)
    rows = [steps.of_step(epoch * per_epoch + step + 1) for step in range(per_epoch)]
    assert np.concatenate(rows).tolist() == drawn[order].tolist()
    assert [len(step) for step in rows] == [8] * 6 + [1]


def test_no_unit_is_drawn_twice_more_often_than_another_of_its_set() -> None:
    mixture, counts = Mixture(SIZES, WEIGHTS), Counter[int]()
    for epoch in range(11):
        counts.update(mixture.drawn(0, epoch).tolist())
        start = 0
        for size, share in zip(SIZES, mixture.shares, strict=True):
            seen = [counts[unit] for unit in range(start, start + size)]
            assert max(seen) - min(seen) <= 1
            assert sum(seen) == share * (epoch + 1)
            start += size


def test_without_weights_an_epoch_is_every_unit_once_in_the_order_of_a_single_set() -> None:
    mixture = Mixture(SIZES)
    assert mixture.shares == SIZES
    mixed, single = StepOrder(49, 10, 3, draw=mixture.drawn), StepOrder(49, 10, 3)
    for step in (1, 5, 6, 23):
        assert mixed.of_step(step).tolist() == single.of_step(step).tolist()


def test_in_the_order_of_the_data_sets_come_one_after_another_and_go_on() -> None:
    order = StepOrder(6, 6, 0, shuffled=False, draw=Mixture((2, 4), (1, 1)).drawn)
    epochs = [order.of_step(step).tolist() for step in (1, 2, 3)]
    assert epochs == [[0, 1, 0, 2, 3, 4], [1, 0, 1, 5, 2, 3], [0, 1, 0, 4, 5, 2]]


def test_steps_do_not_depend_on_what_was_asked_for_before_and_differ_by_seed() -> None:
    mixture = Mixture(SIZES, WEIGHTS)
    one, other = (StepOrder(49, 8, 1, draw=mixture.drawn) for _ in range(2))
    forward = [one.of_step(step).tolist() for step in range(1, 30)]
    backward = [other.of_step(step).tolist() for step in range(29, 0, -1)]
    assert forward == backward[::-1]
    different = StepOrder(49, 8, 2, draw=mixture.drawn)
    assert forward != [different.of_step(step).tolist() for step in range(1, 30)]


def test_steps_grouped_by_length_hold_the_drawn_units() -> None:
    mixture = Mixture((40, 40), (3, 1))
    lengths = np.random.default_rng(0).integers(1, 200, 80)
    grouped = StepOrder(80, 4, 0, lengths, draw=mixture.drawn)
    plain = StepOrder(80, 4, 0, draw=mixture.drawn)
    steps, others = ([order.of_step(i) for i in range(1, 21)] for order in (grouped, plain))
    assert Counter(np.concatenate(steps)) == Counter(np.concatenate(others))
    spread, far = (np.mean([np.ptp(lengths[rows]) for rows in of]) for of in (steps, others))
    assert spread < far / 3
