"""Rank budgets: scores and a total go in, a plan of which components to keep and where to add new
ones comes out.

Pure integers and floats, no tensors. L1RA (arXiv 2509.04884, section 3) prunes the components whose
gate the L1 penalty has closed and hands the freed ranks, from one pool, to the adapters that use
theirs most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Changes to each adapter at a rank update.

    keep: {module: indices of the components that stay, ascending}; add: {module: number of new
      components}, only
    modules that get some; pool: cost left over, so that cost of kept and added components + pool =
    budget.
    """

    keep: dict[str, list[int]]
    add: dict[str, int]
    pool: int

    def changes(self, ranks: Mapping[str, int]) -> bool:
        """True if the plan does anything to adapters of these ranks."""
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
) -> Plan:
    """Prune the components that score below `prune_threshold`, meet `budget`, hand out what is
    left.

    scores: {module: one score (gate) a component}; unit_costs: {module: cost of one of its
      components}; caps:
    {module: largest rank it may have, min(in, out)}. A budget below the cost of what survives
    prunes the smallest scores first, over all modules. What is left is handed out round-robin, one
    component at a time, by descending smallest surviving score; modules that were pruned in this
    very call (with `exclude_pruned`), that are full, or whose cost exceeds what is left are passed
    over, and modules of rank 0 come last. `reassign=False` only prunes.

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
        # Equal scores (gates that never moved) go newest component first and over all modules
        # alike, not module by module.
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
        return Plan(keep, {}, pool)
    pruned = {name for name, kept in keep.items() if len(kept) < len(scores[name])}
    takers = [name for name in keep if not (exclude_pruned and name in pruned)]
    # Python's sort is stable: equal scores keep the order of the model's modules.
    takers.sort(key=lambda name: -min((scores[name][i] for i in keep[name]), default=float("-inf")))
    room = {name: caps[name] - len(keep[name]) for name in takers}
    add, pool = _hand_out(takers, room, unit_costs, pool)
    return Plan(keep, add, pool)


def _hand_out(
    takers: list[str], room: Mapping[str, int], unit_costs: Mapping[str, int], pool: int
) -> tuple[dict[str, int], int]:
    """({module: components that it gets}, what is left of the pool), one component at a time in
    the order of the takers, until none can take more."""
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
