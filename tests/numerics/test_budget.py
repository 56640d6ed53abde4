"""Rank plans: what must hold for any scores, costs, caps and budget, and small cases by hand."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

import pytest

from lorakit.numerics.budget import RankPlan, plan_ranks


@dataclass(frozen=True)
class Case:
    scores: dict[str, list[float]]
    unit_costs: dict[str, int]
    caps: dict[str, int]
    budget: int
    threshold: float

    @property
    def cost(self) -> int:
        return sum(len(s) * self.unit_costs[name] for name, s in self.scores.items())

    def plan(self, **options: bool) -> RankPlan:
        return plan_ranks(
            self.scores,
            self.unit_costs,
            self.caps,
            self.budget,
            prune_threshold=self.threshold,
            **options,
        )

    def above(self, name: str) -> list[int]:
        return [i for i, score in enumerate(self.scores[name]) if score >= self.threshold]


def random_case(seed: int) -> Case:
    rng = random.Random(seed)
    names = [f"layers.{i}" for i in range(rng.randint(1, 7))]
    scores, caps = {}, {}
    for name in names:
        caps[name] = rng.randint(1, 10)
        # Few distinct values, so that ties happen, and many zeros.
        scores[name] = [
            rng.choice((0.0, 0.0, 0.05, 0.3, 0.5, rng.random()))
            for _ in range(rng.randint(0, caps[name]))
        ]
    unit = rng.choice(("rank", "params"))
    unit_costs = {name: 1 if unit == "rank" else rng.choice((20, 32, 77)) for name in names}
    cost = sum(len(s) * unit_costs[name] for name, s in scores.items())
    budget = rng.choice((cost, cost, int(cost * rng.random()), cost + rng.randint(0, 300), 0))
    return Case(scores, unit_costs, caps, budget, rng.choice((0.0, 1e-6, 0.1, 0.6)))


CASES = [random_case(seed) for seed in range(400)]
OPTIONS = [{"reassign": r, "exclude_pruned": e} for r in (True, False) for e in (True, False)]


def test_the_cases_cover_what_matters() -> None:
    plans = [case.plan() for case in CASES]
    assert sum(bool(plan.add) for plan in plans) > 50
    assert sum(plan.pool > 0 for plan in plans) > 50
    assert (
        sum(
            case.budget < sum(len(case.above(n)) * case.unit_costs[n] for n in case.scores)
            for case in CASES
        )
        > 50
    )
    assert sum(any(not s for s in case.scores.values()) for case in CASES) > 50


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_cost_and_pool_are_the_budget_and_the_pool_is_never_negative(
    options: dict[str, bool],
) -> None:
    for case in CASES:
        plan = case.plan(**options)
        ranks = {name: len(kept) + plan.add.get(name, 0) for name, kept in plan.keep.items()}
        assert plan.keep.keys() == case.scores.keys()
        assert plan.pool >= 0
        assert (
            sum(rank * case.unit_costs[name] for name, rank in ranks.items()) + plan.pool
            == case.budget
        )
        assert all(ranks[name] <= case.caps[name] for name in ranks)
        assert all(count > 0 for count in plan.add.values())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_kept_components_are_ascending_and_none_is_below_the_threshold(
    options: dict[str, bool],
) -> None:
    for case in CASES:
        for name, kept in case.plan(**options).keep.items():
            assert kept == sorted(set(kept))
            assert set(kept) <= set(case.above(name))


def test_nothing_above_the_threshold_is_pruned_while_the_budget_allows() -> None:
    for case in CASES:
        if case.budget >= case.cost:
            assert case.plan().keep == {name: case.above(name) for name in case.scores}


def test_without_reassign_nothing_is_added() -> None:
    for case in CASES:
        plan = case.plan(reassign=False)
        assert plan.add == {}
        assert plan.keep == case.plan().keep


def test_exclude_pruned_gives_nothing_to_a_module_that_lost_something() -> None:
    otherwise = 0
    for case in CASES:
        for name in case.plan().add:
            assert len(case.plan().keep[name]) == len(case.scores[name])
        free = case.plan(exclude_pruned=False)
        otherwise += any(len(free.keep[name]) < len(case.scores[name]) for name in free.add)
    assert otherwise > 50


def test_nothing_affordable_is_left_in_the_pool() -> None:
    for case in CASES:
        plan = case.plan()
        for name, kept in plan.keep.items():
            eligible = (
                len(kept) == len(case.scores[name])
                and len(kept) + plan.add.get(name, 0) < case.caps[name]
            )
            assert not (eligible and case.unit_costs[name] <= plan.pool), (case, plan)


def test_a_falling_budget_prunes_the_smallest_scores_first_and_no_more_than_needed() -> None:
    falls = 0
    for case in CASES:
        plan = case.plan(reassign=False)
        cut = [
            (case.scores[n][i], n)
            for n, kept in plan.keep.items()
            for i in case.above(n)
            if i not in kept
        ]
        if not cut:
            continue
        falls += 1
        kept_scores = [case.scores[n][i] for n, kept in plan.keep.items() for i in kept]
        assert max(score for score, _ in cut) <= min(kept_scores, default=float("inf"))
        # Without its last victim the plan would still have been too expensive.
        spent = case.budget - plan.pool
        assert spent + max(case.unit_costs[n] for s, n in cut if s == max(cut)[0]) > case.budget
    assert falls > 50


def test_equal_costs_are_handed_out_evenly_in_the_order_of_the_smallest_score() -> None:
    for case in CASES:
        if len(set(case.unit_costs.values())) > 1:
            continue
        plan = case.plan()

        def smallest(name: str, case: Case = case, plan: RankPlan = plan) -> float:
            return min((case.scores[name][i] for i in plan.keep[name]), default=float("-inf"))

        takers = [name for name in plan.keep if len(plan.keep[name]) == len(case.scores[name])]
        roomy = [n for n in takers if len(plan.keep[n]) + plan.add.get(n, 0) < case.caps[n]]
        ordered = sorted(roomy, key=smallest, reverse=True)  # stable: ties in the model's order
        counts = [plan.add.get(name, 0) for name in ordered]
        assert max(counts, default=0) - min(counts, default=0) <= 1
        assert all(a >= b for a, b in pairwise(counts)), (case, plan)


def test_a_plan_depends_on_its_arguments_alone() -> None:
    for case in CASES[:50]:
        assert case.plan() == case.plan()


# -- by hand ---------------------------------------------------------------------------------------


def plan(
    scores: dict[str, list[float]],
    budget: int,
    costs: dict[str, int] | None = None,
    cap: int = 9,
    **options: bool,
) -> RankPlan:
    unit_costs = costs or dict.fromkeys(scores, 1)
    return plan_ranks(
        scores, unit_costs, dict.fromkeys(scores, cap), budget, prune_threshold=0.1, **options
    )


def test_the_freed_ranks_go_round_by_descending_smallest_score() -> None:
    found = plan({"a": [0.0, 0.0, 0.0], "b": [0.5, 0.9], "c": [0.7, 0.8]}, 7)
    assert found == RankPlan(keep={"a": [], "b": [0, 1], "c": [0, 1]}, add={"c": 2, "b": 1}, pool=0)


def test_a_pruned_module_takes_part_when_that_is_not_excluded() -> None:
    found = plan({"a": [0.0, 0.9], "b": [0.5, 0.5]}, 4, exclude_pruned=False)
    assert found == RankPlan(keep={"a": [1], "b": [0, 1]}, add={"a": 1}, pool=0)


def test_modules_of_rank_0_come_last() -> None:
    assert plan({"empty": [], "low": [0.1]}, 2).add == {"low": 1}
    assert plan({"empty": [], "low": [0.1]}, 3).add == {"low": 1, "empty": 1}


def test_what_nobody_may_take_stays_in_the_pool() -> None:
    assert plan({"a": [0.0, 0.9], "b": [0.0, 0.9]}, 4) == RankPlan(
        keep={"a": [1], "b": [1]}, add={}, pool=2
    )
    assert plan({"a": [0.9], "b": [0.9]}, 7, cap=2) == RankPlan(
        keep={"a": [0], "b": [0]}, add={"a": 1, "b": 1}, pool=3
    )


def test_a_module_whose_component_costs_more_than_the_pool_is_passed_over() -> None:
    found = plan(
        {"wide": [0.9], "narrow": [0.5], "freed": [0.0]},
        160,
        {"wide": 80, "narrow": 30, "freed": 50},
    )
    assert found == RankPlan(
        keep={"wide": [0], "narrow": [0], "freed": []}, add={"narrow": 1}, pool=20
    )


def test_a_falling_budget_drops_the_smallest_and_keeps_the_order() -> None:
    found = plan({"a": [0.9, 0.2, 0.8], "b": [0.3, 0.7]}, 3, reassign=False)
    assert found == RankPlan(keep={"a": [0, 2], "b": [1]}, add={}, pool=0)


def test_a_falling_budget_in_large_units_leaves_the_rest_in_the_pool() -> None:
    found = plan(
        {"wide": [0.3, 0.4], "narrow": [0.9]}, 180, {"wide": 80, "narrow": 30}, reassign=False
    )
    assert found == RankPlan(keep={"wide": [1], "narrow": [0]}, add={}, pool=70)


def test_a_budget_of_0_empties_every_module() -> None:
    assert plan({"a": [1.0, 1.0], "b": []}, 0) == RankPlan(keep={"a": [], "b": []}, add={}, pool=0)


def test_a_score_at_the_threshold_stays() -> None:
    assert plan({"a": [0.1, 0.0999]}, 2, reassign=False).keep == {"a": [0]}


def test_a_negative_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        plan({"a": [1.0]}, -1)


def test_a_plan_says_whether_it_changes_anything() -> None:
    assert not plan({"a": [1.0, 1.0]}, 2).changes({"a": 2})
    assert plan({"a": [1.0, 0.0]}, 2).changes({"a": 2})
    assert plan({"a": [1.0, 1.0]}, 3).changes({"a": 2})
