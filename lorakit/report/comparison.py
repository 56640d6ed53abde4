"""Finished runs side by side: groups of runs that differ only in their seed, means with standard
errors, paired differences, and what may be compared at all."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorakit.report.history import Line
from lorakit.training.spec import LOWER_IS_BETTER

# Costs of a run in result.json: {key: True if lower is better}.
COSTS = {
    "train_seconds": True,
    "tokens_per_second": False,
    "peak_memory_mb": True,
    "trainable_parameters": True,
    "adapter_bytes": True,
}
TIMES = ("train_seconds", "tokens_per_second")
FACTS = ("rank_total", "steps")


@dataclass(frozen=True)
class FinishedRun:
    """A run to compare. result: result.json; recipe: {dotted key: value}, only keys that affect the
    run; base, data, validation, machine: what tells apart base models, all rows, validation rows
    and processors; steps, evaluations: lines of metrics.jsonl."""

    name: str
    result: Mapping[str, Any]
    recipe: Mapping[str, Any]
    base: str = ""
    data: str = ""
    validation: str = ""
    machine: str = ""
    steps: Sequence[Line] = ()
    evaluations: Sequence[Line] = ()

    @property
    def seed(self) -> int:
        return int(self.result.get("seed", 0))

    def value(self, column: str) -> float | None:
        """A metric, or another number of result.json; None where it is missing or undefined, as the
        training time of a run that was only converted."""
        if column in TIMES and not self.result.get("train_seconds"):
            return None
        found = (self.result.get("metrics") or {}).get(column, self.result.get(column))
        return None if isinstance(found, bool) or not isinstance(found, int | float) else found


@dataclass(frozen=True)
class Mean:
    """A mean over `count` seeds; error: its standard error, None for a single seed."""

    mean: float
    error: float | None
    count: int

    def as_json(self) -> dict[str, Any]:
        return {"mean": self.mean, "standard_error": self.error, "seeds": self.count}


def mean_of(values: Sequence[float | None]) -> Mean | None:
    """None if there are no values, or one of them is undefined."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not values or len(known) < len(values):
        return None
    error = statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else None
    return Mean(statistics.fmean(known), error, len(known))


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed."""

    name: str
    runs: list[FinishedRun]

    @property
    def seeds(self) -> list[int]:
        return sorted({run.seed for run in self.runs})

    def mean(self, column: str) -> Mean | None:
        """Over the seeds; runs of the same seed count as one, their mean."""
        by_seed = self.by_seed(column)
        return mean_of([by_seed[seed] for seed in self.seeds])

    def by_seed(self, column: str) -> dict[int, float | None]:
        """{seed: value}, None where a run has none."""
        found = {}
        for seed in self.seeds:
            same = mean_of([run.value(column) for run in self.runs if run.seed == seed])
            found[seed] = None if same is None else same.mean
        return found


@dataclass(frozen=True)
class Comparison:
    """Groups of runs, and what they share. metrics: quality metrics that all runs have, the
    deciding one of the baseline first; one_quality, one_time: qualities, and times, are comparable;
    differing: {recipe key: {value as JSON: names of the groups that have it}}; notes: sentences on
    what is not comparable."""

    groups: list[Group]
    baseline: Group
    metrics: list[str]
    one_quality: bool
    one_time: bool
    differing: dict[str, dict[str, list[str]]]
    notes: list[str] = field(default_factory=list)

    def best(self, column: str) -> list[str]:
        """Names of the groups with the best mean; none where all are alike or not comparable."""
        comparable = self.one_quality if column in self.metrics else column in COSTS
        if column in TIMES and not self.one_time:
            comparable = False
        means = {group.name: group.mean(column) for group in self.groups}
        found = {name: mean.mean for name, mean in means.items() if mean is not None}
        if not comparable or len(set(found.values())) < 2:
            return []
        pick = min if COSTS.get(column, column in LOWER_IS_BETTER) else max
        return [name for name, value in found.items() if value == pick(found.values())]

    def difference(self, group: Group, column: str) -> Mean | None:
        """The paired difference to the baseline, over the same seeds; None where the seeds are not
        the same, or qualities are not comparable."""
        if not self.one_quality or group is self.baseline or group.seeds != self.baseline.seeds:
            return None
        ours, theirs = group.by_seed(column), self.baseline.by_seed(column)
        pairs = [(ours[seed], theirs[seed]) for seed in group.seeds]
        return mean_of([None if a is None or b is None else a - b for a, b in pairs])


def compared(
    runs: Sequence[FinishedRun],
    baseline: FinishedRun,
    defaults: Mapping[str, Mapping[str, Any]],
) -> Comparison:
    """The comparison. defaults: {method: {dotted key: default}}, for keys that not all have."""
    groups = grouped(runs)
    base = next(group for group in groups if baseline in group.runs)
    shared = set.intersection(*(set(run.result.get("metrics") or {}) for run in runs))
    metrics = [name for name in baseline.result.get("metrics") or {} if name in shared]
    tasks = _distinct(str(run.result.get("task")) for run in runs)
    one_quality = len(tasks) == 1 and len({run.validation for run in runs}) == 1
    one_time = len({run.machine for run in runs}) == 1
    return Comparison(
        groups,
        base,
        metrics,
        one_quality,
        one_time,
        differing_keys(groups, defaults),
        _notes(runs, tasks, len(metrics)),
    )


def _notes(runs: Sequence[FinishedRun], tasks: list[str], metrics: int) -> list[str]:
    """Sentences on what is not comparable."""
    notes = []
    if len(tasks) > 1:
        has = f"the {metrics} metrics" if metrics else "no metrics"
        notes.append(
            f"The runs have different tasks ({', '.join(tasks)}): only {has} that all of them have"
            " are shown, without a best one and differences."
        )
    elif len({run.validation for run in runs}) > 1:
        notes.append(
            "The runs were evaluated on different rows: their metrics are shown without a best one"
            " and differences."
        )
    elif len({run.data for run in runs}) > 1:
        notes.append("The runs were trained on different rows and evaluated on the same ones.")
    if len({run.base for run in runs}) > 1:
        notes.append("The runs have different base models.")
    if len({run.machine for run in runs}) > 1:
        notes.append("The runs were trained on different machines: their times have no best one.")
    for what in ("data", "model"):
        stand_ins = [run.name for run in runs if (run.result.get(what) or {}).get("stand_in")]
        if stand_ins:
            notes.append(f"Trained with a stand-in for the {what}: {', '.join(stand_ins)}.")
    return notes


# -- groups ----------------------------------------------------------------------------------------


def grouped(runs: Sequence[FinishedRun]) -> list[Group]:
    """Groups of runs that differ only in their seed, in the order of their first runs."""
    found: dict[str, list[FinishedRun]] = {}
    for run in runs:
        recipe = {key: value for key, value in run.recipe.items() if key != "train.seed"}
        facts = [run.base, run.validation, run.result.get("method"), run.result.get("precision")]
        key = json.dumps([recipe, *facts], sort_keys=True, default=str)
        found.setdefault(key, []).append(run)
    return [Group(group_name([run.name for run in same]), same) for same in found.values()]


def group_name(names: Sequence[str]) -> str:
    """One name for the runs: l1ra_0 and l1ra_1 are l1ra_{0,1}."""
    if len(names) == 1:
        return names[0]
    head = _shared_start(names)
    rest = [name[len(head) :] for name in names]
    tail = _shared_start([name[::-1] for name in rest])[::-1]
    middles = [name[: len(name) - len(tail)] for name in rest]
    if len(middles) > 4:
        middles = [middles[0], "…", middles[-1]]
    return f"{head}{{{','.join(middles)}}}{tail}"


def _shared_start(names: Sequence[str]) -> str:
    columns = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in columns)


def differing_keys(
    groups: Sequence[Group],
    defaults: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, list[str]]]:
    """{key: {value as JSON: names of groups}} of the recipe keys that differ between the groups.

    A key that only some methods have is listed where it is not its default.
    """
    recipes = {group.name: group.runs[0].recipe for group in groups}
    found: dict[str, dict[str, list[str]]] = {}
    for key in _distinct(key for recipe in recipes.values() for key in recipe):
        if key == "train.seed":
            continue
        values: dict[str, list[str]] = {}
        for name, recipe in recipes.items():
            if key in recipe:
                values.setdefault(json.dumps(recipe[key], ensure_ascii=False), []).append(name)
        everyone = all(key in recipe for recipe in recipes.values())
        usual = all(
            recipe[key] == defaults.get(str(recipe.get("method.name")), {}).get(key)
            for recipe in recipes.values()
            if key in recipe
        )
        if len(values) > 1 or not (everyone or usual):
            found[key] = values
    return found


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


# -- JSON ------------------------------------------------------------------------------------------


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as one JSON object."""
    columns = [*comparison.metrics, *COSTS, *FACTS]

    def means(group: Group) -> dict[str, Any]:
        found = {column: group.mean(column) for column in columns}
        return {name: mean.as_json() for name, mean in found.items() if mean is not None}

    def differences(group: Group) -> dict[str, Any]:
        found = {name: comparison.difference(group, name) for name in comparison.metrics}
        return {name: mean.as_json() for name, mean in found.items() if mean is not None}

    return {
        "baseline": comparison.baseline.name,
        "notes": comparison.notes,
        "comparable": {"quality": comparison.one_quality, "time": comparison.one_time},
        "runs": [
            {
                "run": run.name,
                "group": group.name,
                **{
                    key: run.result.get(key)
                    for key in ("method", "task", "seed", "precision", "metrics", *COSTS, *FACTS)
                },
            }
            for group in comparison.groups
            for run in group.runs
        ],
        "groups": [
            {
                "group": group.name,
                "seeds": group.seeds,
                "means": means(group),
                "differences": differences(group),
            }
            for group in comparison.groups
        ],
        "best": {column: best for column in columns if (best := comparison.best(column))},
        "recipes": {
            key: [{"value": json.loads(value), "groups": names} for value, names in values.items()]
            for key, values in comparison.differing.items()
        },
    }
