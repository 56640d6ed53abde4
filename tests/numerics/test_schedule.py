"""Schedules are numbers: literal values at start, corner and end."""

from __future__ import annotations

import pytest

from lorakit.numerics.schedule import learning_rate_factor, ramp


@pytest.mark.parametrize(
    ("shape", "progress", "value"),
    [
        ("cubic", 0.0, 1.0),
        ("cubic", 0.5, 0.5625),  # 0.5 + 0.5 · 0.5³
        ("cubic", 0.75, 0.5078125),  # 0.5 + 0.5 · 0.25³
        ("cubic", 1.0, 0.5),
        ("linear", 0.0, 1.0),
        ("linear", 0.25, 0.875),
        ("linear", 0.5, 0.75),
        ("linear", 1.0, 0.5),
        ("constant", 0.0, 1.0),
        ("constant", 0.5, 1.0),
        ("constant", 1.0, 1.0),
    ],
)
def test_ramp_from_1_to_a_half(shape: str, progress: float, value: float) -> None:
    assert ramp(progress, 1.0, 0.5, shape) == value


@pytest.mark.parametrize(
    ("shape", "progress", "value"),
    [
        ("cubic", 0.0, 1.0),
        ("cubic", 0.25, 0.5375),  # 0.2 + 0.8 · 0.75³
        ("cubic", 0.5, 0.3),  # 0.2 + 0.8 · 0.5³
        ("cubic", 0.75, 0.2125),  # 0.2 + 0.8 · 0.25³
        ("cubic", 1.0, 0.2),
        ("linear", 0.0, 1.0),
        ("linear", 0.25, 0.8),
        ("linear", 0.5, 0.6),
        ("linear", 0.75, 0.4),
        ("linear", 1.0, 0.2),
        ("one-shot", 0.0, 1.0),
        ("one-shot", 0.5, 1.0),
        ("one-shot", 0.999999, 1.0),
        ("one-shot", 1.0, 0.2),
        ("one-shot", 1.5, 0.2),
    ],
)
def test_ramp_of_a_density_from_1_to_a_fifth(shape: str, progress: float, value: float) -> None:
    assert ramp(progress, 1.0, 0.2, shape) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("shape", ["cubic", "linear", "one-shot"])
def test_ramp_ends_exactly_at_its_end_and_never_rises(shape: str) -> None:
    values = [ramp(i / 97, 1.0, 0.3, shape) for i in range(98)]
    assert (values[0], values[-1]) == (1.0, 0.3)
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("shape", ["cubic", "linear", "constant", "one-shot"])
def test_ramp_clamps_progress(shape: str) -> None:
    assert ramp(-3.0, 1.0, 0.5, shape) == ramp(0.0, 1.0, 0.5, shape)
    assert ramp(7.0, 1.0, 0.5, shape) == ramp(1.0, 1.0, 0.5, shape)


def test_ramp_rises_as_well_as_it_falls() -> None:
    assert [ramp(p, 0.0, 0.8) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.0, 0.7, 0.8])


def test_ramp_is_cubic_unless_told() -> None:
    assert ramp(0.5, 1.0, 0.0) == 0.125


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_learning_rate_rises_linearly_to_1_at_the_end_of_warm_up(shape: str) -> None:
    assert [learning_rate_factor(step, 100, 4, shape) for step in (1, 2, 3, 4)] == [
        0.25,
        0.5,
        0.75,
        1.0,
    ]


@pytest.mark.parametrize(
    ("shape", "step", "value"),
    [
        ("cosine", 11, 1.0),  # the first step after warm-up is still at the peak
        ("cosine", 36, 0.8535533905932737),  # (1 + cos(π/4)) / 2
        ("cosine", 61, 0.5),
        ("cosine", 110, 0.0002467198171342),  # (1 + cos(0.99 π)) / 2
        ("linear", 11, 1.0),
        ("linear", 36, 0.75),
        ("linear", 61, 0.5),
        ("linear", 110, 0.01),
        ("constant", 11, 1.0),
        ("constant", 110, 1.0),
    ],
)
def test_learning_rate_after_10_of_110_steps_of_warm_up(
    shape: str, step: int, value: float
) -> None:
    assert learning_rate_factor(step, 110, 10, shape) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_learning_rate_starts_at_the_peak_without_warm_up(shape: str) -> None:
    assert learning_rate_factor(1, 10, 0, shape) == 1.0


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (2, 1), (7, 0), (7, 3), (7, 7)])
def test_no_step_is_spent_at_a_learning_rate_of_0(shape: str, total: int, warmup: int) -> None:
    factors = [learning_rate_factor(step, total, warmup, shape) for step in range(1, total + 1)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
