"""Rank budgets: from scores and a total, a plan of which components to keep and where to add new
ones.

Works on integers and floats only, without tensors. L1RA (arXiv 2509.04884, section 3) prunes the
components whose gate the L1 penalty has closed, and hands the freed ranks, from one pool, to the
adapters that use theirs most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RankPlan:
    """Changes to each adapter at a rank update.

    keep: {module: ascending indices of the components that stay}; add: {module: number of new
    components}, only for modules that get some; pool: the unspent cost, so that the cost of kept
    and added components plus the pool equals the budget.
    """

    keep: dict[str, list[int]]
    add: dict[str, int]
    pool: int

    def changes(self, ranks: Mapping[str, int]) -> bool:
        """True if the plan changes adapters of these ranks."""
        return bool(self.add) or any(len(kept) != ranks[name] for name, kept in self.keep.items())


def plan_ranks(
    scores: Mapping[str, Sequence[float]],
    unit_costs: Mapping[str, int],
    caps: Mapping[str, int],
    budget: int,
    *,
    prune_threshold: float,
    reassign: bool = True,
    exclude_pruned: bool = True,
) -> RankPlan:
    """Prune the components that score below `prune_threshold`, meet `budget`, hand out what is
    left.

    scores: {module: one score (gate) per component}; unit_costs: {module: cost of one of its
    components}; caps: {module: its largest rank, min(in, out)}. If the remaining components cost
    more than the budget, those with the smallest scores over all modules are pruned first. The
    remaining cost is handed out round-robin, one component at a time, to modules by descending
    smallest surviving score. Skipped are modules that were pruned in this call (with
    `exclude_pruned`), that are full, or whose unit cost exceeds the rest; modules of rank 0 come
    last. `reassign=False` only prunes.

    Raises ValueError for a negative budget.
    """
    if budget < 0:
        raise ValueError(f"the budget is negative: {budget}")
    keep = {
        name: [i for i, score in enumerate(s) if score >= prune_threshold]
        for name, s in scores.items()
    }
    spent = sum(len(kept) * unit_costs[name] for name, kept in keep.items())

    if spent > budget:
        # Of equal scores (gates that never moved), the newest components of all modules are pruned
        # first, rather than one module after the other.
        places = [
            (scores[name][i], -i, place, name)
            for place, (name, kept) in enumerate(keep.items())
            for i in kept
        ]
        for _, minus_i, _, name in sorted(places):
            if spent <= budget:
                break
            keep[name].remove(-minus_i)
            spent -= unit_costs[name]

    pool = budget - spent
    if not reassign:
        return RankPlan(keep, {}, pool)
    pruned = {name for name, kept in keep.items() if len(kept) < len(scores[name])}
    takers = [name for name in keep if not (exclude_pruned and name in pruned)]
    # Python's sort is stable: equal scores keep the order of the model's modules.
    takers.sort(key=lambda name: -min((scores[name][i] for i in keep[name]), default=float("-inf")))
    room = {name: caps[name] - len(keep[name]) for name in takers}
    add, pool = _hand_out(takers, room, unit_costs, pool)
    return RankPlan(keep, add, pool)


def _hand_out(
    takers: list[str], room: Mapping[str, int], unit_costs: Mapping[str, int], pool: int
) -> tuple[dict[str, int], int]:
    """({module: number of components it gets}, the rest of the pool), handed out one component at
    a time in the order of the takers until none can take more."""
    add: dict[str, int] = {}
    while takers:
        served = []
        for name in takers:
            if unit_costs[name] <= pool and add.get(name, 0) < room[name]:
                add[name] = add.get(name, 0) + 1
                pool -= unit_costs[name]
                served.append(name)
        takers = served
    return add, pool
