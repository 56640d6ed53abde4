"""The data sets of a recipe, one or those of a mix: their names, sources and rows.

All that reads or reports on data goes through them one by one, within `about`, so that errors have
the place of a set's own key and log lines begin with its name.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorakit.data.choice import recorded, without_effect
from lorakit.data.examples import Examples
from lorakit.data.formats import Record, formats_of_keys
from lorakit.data.joined import AnyExamples, joined
from lorakit.data.keys import NO_DATA, DataKeys, SetKeys
from lorakit.data.labels import Labels, listed_classes
from lorakit.data.load import Loaded, load_rows
from lorakit.data.reading import Reader
from lorakit.data.spec import DataSpec, SetSpec
from lorakit.data.streaming import Advance
from lorakit.errors import Problem, RecipeError, RunError, collecting
from lorakit.recipes.recipe import Recipe
from lorakit.sources.resolve import DATA_FILE, Source, Wanted, resolve

log = logging.getLogger("lorakit")

UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class DataSet:
    """A data set of a recipe. name: unique, for messages, tables and metrics; spec: the section as
    it is for this set alone; number: its place in data.mix, or None for a recipe's only set;
    inherited: the keys that it has from the section."""

    name: str
    spec: DataSpec
    number: int | None = None
    inherited: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ReadSet:
    """A data set as a run reads it: its source, the record of its columns
    (`lorakit.data.choice.recorded`) and its examples; validation: None for a set without
    validation rows."""

    name: str
    source: Source
    shape: Mapping[str, Any]
    train: Examples
    validation: Examples | None


def data_sets(recipe: Recipe) -> list[DataSet]:
    """The data sets of a recipe, in its order."""
    data = recipe.data
    if data.mix is None:
        return [DataSet(data.name_or_path, data)]
    return [
        DataSet(name, spec, number, frozenset(data.inherited(number)))
        for number, (name, spec) in enumerate(zip(_names(data.mix), data.sets(), strict=True))
    ]


def _names(mix: Sequence[SetSpec]) -> list[str]:
    """A name for each set: its own, or the last part of its name or path without the suffix of a
    file, and its subset; with the part before, then with a number, where several would be alike."""
    names = [one.name or _short_name(one, 1) for one in mix]
    alike = Counter(names)
    names = [
        name if one.name or alike[name] == 1 else _short_name(one, 2)
        for one, name in zip(mix, names, strict=True)
    ]
    alike, seen = Counter(names), Counter[str]()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if alike[name] == 1 else f"{name}-{seen[name]}")
    return found


def _short_name(one: SetSpec, parts: int) -> str:
    *folders, last = Path(one.name_or_path).parts
    last = DATA_FILE.sub("", last) or last
    words = [*folders[1 - parts or len(folders) :], last, *filter(None, [one.subset])]
    return UNSAFE.sub("-", "-".join(words)).strip("-.") or "set"


# -- messages --------------------------------------------------------------------------------------


@contextlib.contextmanager
def about(one: DataSet) -> Iterator[None]:
    """Context of all work on one set: of a mix, log lines and errors begin with its name, and keys
    are those of its entry."""
    if one.number is None:
        yield
        return
    named = _Named(one.name)
    log.addFilter(named)
    try:
        yield
    except RecipeError as error:
        raise RecipeError([_in_the_mix(problem, one) for problem in error.problems]) from error
    except RunError as error:
        raise RunError(f"{one.name}: {error.what}", _renamed(error.remedy, one)) from error
    finally:
        log.removeFilter(named)


class _Named(logging.Filter):
    """Puts the name of a set before each message."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = f"{self.prefix}: {record.getMessage()}", ()
        return True


def _in_the_mix(problem: Problem, one: DataSet) -> Problem:
    """The problem as one of a set's entry in data.mix."""
    return replace(
        problem,
        what=f"{one.name}: {_renamed(problem.what, one)}",
        key=_renamed(problem.key, one) or "",
        expected=_renamed(problem.expected, one),
        hint=_renamed(problem.hint, one),
    )


def _renamed(text: str | None, one: DataSet) -> str | None:
    """The text with keys of the section as those of the entry, apart from those that the set has
    from the section."""
    spec, fields = one.spec, DataKeys.model_fields
    kept = {key for key in one.inherited if getattr(spec, key) != fields[key].default}
    keys = "|".join(key for key in SetKeys.model_fields if key not in kept)
    return text and re.sub(rf"\bdata\.({keys})\b", rf"data.mix.{one.number}.\1", text)


# -- sources ---------------------------------------------------------------------------------------


def data_wanted(recipe: Recipe, one: DataSet) -> Wanted:
    """The source that a set of the recipe names. Raises RecipeError for an imported adapter, which
    has none."""
    spec = one.spec
    if spec.name_or_path == NO_DATA:
        expected = "data.name_or_path=…, and the columns or templates that fit it"
        what = "the adapter was imported, so its data is not known"
        raise RecipeError.at("data.name_or_path", what, expected)
    return Wanted("data", spec.name_or_path, spec.offline, None, spec.subset, recipe.model.task)


def find_data(recipe: Recipe, find: Callable[[Wanted], Source] = resolve) -> tuple[Source, ...]:
    """The sources of the recipe's data sets. All are tried before an error is raised."""
    problems: list[Problem] = []
    found = []
    for one in data_sets(recipe):
        with collecting(problems), about(one):
            found.append(find(data_wanted(recipe, one)))
    if problems:
        raise RecipeError(problems)
    return tuple(found)


def source_facts(recipe: Recipe, sources: Sequence[Source]) -> dict[str, Any]:
    """{"name", "stand_in"} of the data, as results record it; `sets` has those of each of a mix."""
    if len(sources) == 1:
        return {"name": sources[0].requested, "stand_in": sources[0].stand_in}
    sets = [
        {"name": one.name, "requested": source.requested, "stand_in": source.stand_in}
        for one, source in zip(data_sets(recipe), sources, strict=True)
    ]
    names = " + ".join(one.name for one in data_sets(recipe))
    return {"name": names, "stand_in": any(s.stand_in for s in sources), "sets": sets}


# -- rows ------------------------------------------------------------------------------------------


def read_sets(
    recipe: Recipe,
    sources: Sequence[Source],
    records: Sequence[Record | None] | None = None,
    only_validation: bool = False,
    progress: Advance = lambda done, total: None,
) -> list[Loaded]:
    """The rows of each data set of a recipe; further arguments as of `load_rows`."""
    sets = data_sets(recipe)
    found = []
    for one, source, record in zip(sets, sources, records or [None] * len(sets), strict=True):
        how = (recipe.model.task, only_validation, record, one.inherited, progress)
        with about(one):
            found.append(load_rows(source, one.spec, *how))
    if recipe.data.mix is not None:
        # A run that is evaluated may have sets that are not evaluated now.
        if records is None:
            _check_common_keys(recipe.data, found)
        _check_templates(sets, found)
    return found


def _check_common_keys(data: DataSpec, rows: Sequence[Loaded]) -> None:
    """Raise RecipeError for a key of the section that no set's format has."""
    keys = [*formats_of_keys(), "loss_on"]
    useless = [set(without_effect(data, one.format, keys)) for one in rows]
    forms = ", ".join(dict.fromkeys(one.format.name for one in rows))
    problems = [
        Problem(f"`{key}` has no effect: the sets are read as {forms}", f"data.{key}", "null")
        for key in sorted(set.intersection(*useless))
    ]
    if problems:
        raise RecipeError(problems)


def common_template(rows: Sequence[Loaded]) -> str | None:
    """`data.chat_template` as the sets of conversations have it."""
    found = [one.spec.chat_template for one in rows if _has_template(one)]
    return found[0] if found else None


def _has_template(rows: Loaded) -> bool:
    return "chat_template" in rows.format.keys


def _check_templates(sets: Sequence[DataSet], rows: Sequence[Loaded]) -> None:
    """Raise RecipeError where sets of conversations are written by different chat templates: an
    adapter carries one."""
    names: dict[str | None, list[str]] = {}
    for one, loaded in zip(sets, rows, strict=True):
        if _has_template(loaded):
            names.setdefault(loaded.spec.chat_template, []).append(one.name)
    if len(names) < 2:
        return
    by = [
        f"{', '.join(of)} by {template or 'the tokenizer’s own'}" for template, of in names.items()
    ]
    what = f"the sets are written by different chat templates ({'; '.join(by)})"
    expected = "data.chat_template: one for all of them; or a prompt and a completion for some"
    raise RecipeError.at("data.chat_template", what, expected)


def count_labels(sets: Sequence[DataSet], rows: Sequence[Loaded]) -> Labels | None:
    """The label space of all sets, as the first has it; None where targets are tokens. Raises
    RecipeError where they disagree."""
    found = []
    for one, loaded in zip(sets, rows, strict=True):
        with about(one):
            found.append(loaded.format.count_labels(loaded.train, loaded.spec))
    first = found[0]
    for one, labels in zip(sets, found, strict=True):
        if first is None or labels is None or _same(first, labels):
            continue
        what = (
            f"the labels of {sets[0].name} are {_listed(first)}, those of {one.name}"
            f" {_listed(labels)}"
        )
        expected = "the same names in all sets; a model has one list of labels"
        key = f"data.mix.{one.number}.label_column"
        raise RecipeError.at(key, what, expected)
    return first


def _same(one: Labels, other: Labels) -> bool:
    """True if both are numbers, or classes with the same names; their order may differ."""
    return one.regression == other.regression and set(one.names) == set(other.names)


def _listed(labels: Labels) -> str:
    return "numbers" if labels.regression else f"the classes {listed_classes(labels.names)}"


# -- examples --------------------------------------------------------------------------------------


def read_examples(
    recipe: Recipe,
    sources: Sequence[Source],
    rows: Sequence[Loaded],
    reading: Callable[[Loaded], contextlib.AbstractContextManager[Reader]],
) -> list[ReadSet]:
    """The examples of each data set. reading: a context with the reader of its rows."""
    found = []
    for one, source, loaded in zip(data_sets(recipe), sources, rows, strict=True):
        with about(one), reading(loaded) as reader:
            train = reader.train(loaded)
            validation = reader.validation(loaded) if len(loaded.validation) else None
        found.append(ReadSet(one.name, source, recorded(loaded.spec), train, validation))
    check_some_validation([one.validation for one in found if one.validation is not None])
    return found


def check_some_validation(parts: Sequence[Any]) -> None:
    """Raise RecipeError where no data set has validation rows."""
    if not parts:
        what = "no set has validation rows, and a run needs some"
        expected = "validation_split: null, the name of a split or a fraction, in at least one set"
        raise RecipeError.at("data.validation_split", what, expected)


def training_examples(recipe: Recipe, sets: Sequence[ReadSet]) -> AnyExamples:
    """The training examples of all sets, with their weights. Raises RecipeError for a weight that
    leaves a set no row of an epoch."""
    weights = [one.weight for one in recipe.data.mix or () if one.weight is not None]
    found = joined([one.train for one in sets], [one.name for one in sets], weights or None)
    if not isinstance(found, Examples):
        for number, share in enumerate(found.mixture.shares):
            if share == 0:
                total = sum(found.mixture.sizes)
                what = (
                    f"the weight {weights[number]:g} of {sum(weights):g} is none of the {total:,}"
                    f" rows of an epoch: nothing of {found.names[number]} would be trained on"
                )
                key, least = f"data.mix.{number}.weight", sum(weights) / total
                raise RecipeError.at(key, what, f"about {least:.2g} or more; or no such set")
    return found


def validation_examples(sets: Sequence[ReadSet]) -> AnyExamples:
    """The validation examples of all sets that have some."""
    pairs = [(one.validation, one.name) for one in sets if one.validation is not None]
    return joined([part for part, _ in pairs], [name for _, name in pairs])
