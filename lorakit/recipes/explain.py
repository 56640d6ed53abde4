"""Explanations of pydantic's errors about a recipe, in plain words.

Each says what is wrong, what the section's own JSON schema expects, and the nearest valid name.
Nothing here knows a section or a method; the names that other tools use are in
`lorakit.recipes.elsewhere` and `lorakit.recipes.values_elsewhere`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from lorakit.errors import Problem
from lorakit.recipes.elsewhere import keys_called, several_sets
from lorakit.recipes.in_words import ALIKE_ELSEWHERE, bounds, close, shown
from lorakit.recipes.no_counterpart import without_counterpart
from lorakit.recipes.values_elsewhere import BOOLEANS, value_called
from lorakit.spec import Meant

Key = tuple[str, ...]


def explain(
    error: ValidationError,
    whole: type[BaseModel],
    data: dict[str, Any],
    values: Mapping[str, Mapping[str, Meant]] | None = None,
    keys: Mapping[str, Sequence[Meant]] | None = None,
) -> list[Problem]:
    """Problems of `data`, which is not a valid `whole`: one per key, without places yet.

    `values` {dotted key: {other tools' name of a value, in lower case: its meaning}} and `keys`
    {other tools' name of a key: its dotted keys} add to `lorakit.recipes.elsewhere`.
    """
    return _Explanation(whole, data, values or {}, keys or {}).problems(error)


def takes_text(whole: type[BaseModel], key: str) -> bool:
    """True if the dotted `key` of a `whole` accepts any text and, except for null, nothing else."""
    return _Schema(whole).takes_text(tuple(key.split(".")))


def not_finite(data: Any, problems: Sequence[Problem]) -> list[Problem]:
    """A problem for each nan or infinity in `data` that `problems` do not report already: bounds
    let inf pass, and some fields have none."""
    keys = [p.key for p in problems]
    return [
        Problem(f"`{key}` is {value}", key, "a finite number")
        for key, value in _leaves(data, "")
        if isinstance(value, float)
        and not math.isfinite(value)
        and not any(f"{key}.".startswith(f"{k}.") for k in keys if k)
    ]


def _leaves(data: Any, key: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(data, (dict, list)):
        yield key, data
        return
    for part, child in data.items() if isinstance(data, dict) else enumerate(data):
        yield from _leaves(child, f"{key}.{part}" if key else str(part))


class _Schema:
    """JSON schema of a class, looked up by key.

    A key is a tuple here, since a name may itself contain dots (those of rank_pattern do).
    """

    def __init__(self, whole: type[BaseModel]) -> None:
        self.schema = whole.model_json_schema()

    def takes_text(self, key: Key) -> bool:
        """True if `key` accepts any text and, except for null, nothing else."""
        branches = self._branches(self._schema_of(key))
        texts = [branch for branch in branches if branch.get("type") != "null"]
        return bool(texts) and all(
            b.get("type") == "string" and not self._choices(b) for b in texts
        )

    def _resolve(self, schema: Any) -> dict[str, Any]:
        """`schema` with its reference followed; entries beside the reference (a description) take
        precedence.

        Before pydantic 2.9 a reference with other entries beside it is the only item of `allOf`.
        """
        beside = dict(schema)
        if len(beside.get("allOf", ())) == 1:
            beside = {**beside["allOf"][0], **beside}
            del beside["allOf"]
        reference = beside.pop("$ref", None)
        return (
            beside
            if reference is None
            else {**self.schema["$defs"][reference.rpartition("/")[2]], **beside}
        )

    def _branches(self, schema: Any) -> list[dict[str, Any]]:
        schema = self._resolve(schema)
        several = schema.get("anyOf") or schema.get("oneOf")
        return (
            [leaf for branch in several for leaf in self._branches(branch)] if several else [schema]
        )

    def _schema_of(self, key: Key) -> dict[str, Any]:
        """The schema at `key`; {} (accepts anything) where the schema does not reach."""
        schema: Any = self.schema
        for part in key:
            branches = self._branches(schema)
            below = [
                b.get("properties", {}).get(part) or b.get("additionalProperties") or b.get("items")
                for b in branches
            ]
            schema = next((found for found in below if isinstance(found, dict)), {})
        return dict(schema)

    def _valid_keys(self, above: Key, schema: Any) -> Iterator[Key]:
        for branch in self._branches(schema):
            for name, child in branch.get("properties", {}).items():
                yield (*above, name)
                yield from self._valid_keys((*above, name), child)

    def _names(self, key: Key) -> list[str]:
        """The valid names directly under `key`."""
        branches = self._branches(self._schema_of(key))
        return list(
            dict.fromkeys(name for branch in branches for name in branch.get("properties", {}))
        )

    def _choices(self, schema: Any) -> list[Any]:
        branches = self._branches(schema)
        return [
            choice
            for branch in branches
            for choice in branch.get("enum", [branch["const"]] if "const" in branch else [])
        ]

    def _describe(self, schema: Any) -> str:
        """Description in words of what `schema` accepts; "" for anything."""
        words = dict.fromkeys(filter(None, map(self._describe_branch, self._branches(schema))))
        # A list goes last: words after it would read as one of its items.
        return " or ".join(sorted(words, key=lambda word: word.startswith("a list")))

    def _describe_branch(self, branch: dict[str, Any]) -> str:
        choices = self._choices(branch)
        if choices:
            return f"one of {', '.join(map(str, choices))}" if len(choices) > 1 else str(choices[0])
        kind = branch.get("type")
        if kind in ("integer", "number"):
            return ("a whole number" if kind == "integer" else "a number") + bounds(branch)
        if kind == "string":
            return "a string that is not empty" if branch.get("minLength") else "a string"
        if kind == "array":
            item = self._describe(branch.get("items", {}))
            return f"a list, each item {item}" if item else "a list"
        if kind == "object":
            names, value = (
                list(branch.get("properties", {})),
                self._describe(branch.get("additionalProperties") or {}),
            )
            if branch.get("required"):
                needed = [
                    f"{name} ({self._describe(branch['properties'][name])})"
                    for name in branch["required"]
                ]
                return f"a mapping with at least {' and '.join(needed)}"
            if names:
                return f"a mapping with keys of {', '.join(names)}"
            return f"a mapping, each value {value}" if value else "a mapping"
        return {"boolean": "true or false", "null": "null"}.get(str(kind), "")


class _Explanation(_Schema):
    """Pydantic's errors about `data` in plain words."""

    def __init__(
        self,
        whole: type[BaseModel],
        data: dict[str, Any],
        values: Mapping[str, Mapping[str, Meant]],
        keys: Mapping[str, Sequence[Meant]],
    ) -> None:
        super().__init__(whole)
        self.data = data
        self.values = values
        self.keys = keys
        self.valid = list(self._valid_keys((), self.schema))
        self.listed: set[Key] = set()  # sections whose names were listed already: once is enough

    def problems(self, error: ValidationError) -> list[Problem]:
        plain: dict[Key, Any] = {}
        unions: dict[Key, dict[Any, list[tuple[Key, Any]]]] = {}
        for detail in error.errors(include_url=False):
            key, union, branch = self._key(detail)
            if union is None:
                plain.setdefault(key, detail)
            else:
                unions.setdefault(union, {}).setdefault(branch, []).append((key, detail))
        for union, branches in unions.items():
            # Of a union, the branch that matched deepest is meant; if none matched, the key itself
            # is wrong.
            deep = [found for found in branches.values() if any(key != union for key, _ in found)]
            every = [one for found in branches.values() for one in found]
            # A branch of the right type but out of range says more than one of another type.
            shallow = sorted(every, key=lambda one: one[1]["type"].endswith("_type"))[:1]
            for key, detail in min(deep, key=len) if deep else shallow:
                plain.setdefault(key, detail)
        meant = {
            key: self._meant(key, detail["input"])
            for key, detail in plain.items()
            if detail["type"] == "extra_forbidden"
        }
        # A required key under another tool's name is one mistake, not two.
        told = {where for where, _ in meant.values()}
        found = [
            self._unknown(key, *meant[key]) if key in meant else self._problem(key, detail)
            for key, detail in plain.items()
            if detail["type"] != "missing" or key not in told
        ]
        return found + [
            problem
            for key, (where, _) in meant.items()
            # Of the key that is meant, else the section around this one, if any.
            for section in [next(iter(where or key[:-1]), None)]
            for problem in self._inside(key, plain[key]["input"], section, where or ())
        ]

    def _inside(
        self, key: Key, value: Any, section: str | None, within: Key = ()
    ) -> Iterator[Problem]:
        """Problems of the keys inside of an unknown key's `value`: those that are called otherwise
        in `section`, where the unknown key belongs, or that belong elsewhere. within: the valid key
        that the unknown one means."""
        if isinstance(value, list):
            for index, item in enumerate(value):
                inside = (*within, str(index))
                yield from self._inside((*key, str(index)), item, section, inside)
        elif isinstance(value, dict):
            for name, inner in value.items():
                below = (*key, str(name))
                meant, hint = self._meant_inside(below, inner, section)
                meant = self._beside(meant, within)
                if meant in ((section, name), (*within, name)):
                    continue
                # Where a whole section has no counterpart, it need not be said of its keys.
                if meant or (hint and section):
                    yield self._unknown(below, meant, hint, alone=True)
                yield from self._inside(below, inner, meant[0] if meant else section, within)

    def _key(self, detail: Any) -> tuple[Key, Key | None, Any]:
        """(key, key of the union that it is in, that union's branch): pydantic mixes branch names
        into the path."""
        node: Any = self.data
        key: Key = ()
        union, branch = None, None
        for index, part in enumerate(detail["loc"]):
            there = (isinstance(node, dict) and part in node) or (
                isinstance(node, list) and isinstance(part, int)
            )
            if there or (detail["type"] == "missing" and index == len(detail["loc"]) - 1):
                node = node[part] if there else None
                key = (*key, str(part))
            elif union is None:
                union, branch = key, part
        return key, union, branch

    def _problem(self, key: Key, detail: Any) -> Problem:
        dotted, value = ".".join(key), detail["input"]
        if detail["type"] in ("value_error", "assertion_error"):
            return Problem(str(detail["ctx"]["error"]), dotted)
        schema = self._resolve(self._schema_of(key))
        expected = self._describe(schema) or detail["msg"]
        if detail["type"] == "missing":
            above = ".".join(key[:-1])
            described = " ".join(schema.get("description", "").split())
            about = re.split(r"(?<=\.) ", described)[0]  # the first sentence
            what = (
                f"missing key `{key[-1]}` in {above}" if above else f"missing section `{key[-1]}`"
            )
            return Problem(what, dotted, f"{expected}. {about}" if about else expected)
        meant = self._meant_value(dotted, value, schema) if isinstance(value, str) else Meant(None)
        return Problem(
            f"`{dotted}` is {shown(value)}", dotted, expected, meant.nearest, hint=meant.hint
        )

    def _meant_value(self, key: str, value: str, schema: Any) -> Meant:
        """The valid value of `key` that a wrong text most likely means."""
        choices = self._choices(schema)
        # A key of an item of a list, as data.mix.0.format, may be one of the section too.
        for name in (key, re.sub(r"\.\w+\.\d+(?=\.)", "", key)):
            found = self.values.get(name, {}).get(value.lower()) or value_called(name, value)
            if found and (name == key or found.nearest in (None, *choices)):
                return found
        branches = self._branches(schema)
        if value.lower() in BOOLEANS and any(
            branch.get("type") == "boolean" for branch in branches
        ):
            return Meant(BOOLEANS[value.lower()])
        for branch in branches:
            # A section written as one line with the value of its first key: `method: l1ra`.
            for name in branch.get("required", [])[:1]:
                inner = self._meant_value(f"{key}.{name}", value, branch["properties"][name])
                allowed = self._choices(branch["properties"][name])
                right = value if not allowed or value in allowed else inner.nearest
                return Meant(right and f"{key}: {{{name}: {right}}}", inner.hint)
        return Meant(close(value, [choice for choice in choices if isinstance(choice, str)]))

    def _unknown(
        self, key: Key, meant: Key | None, hint: str | None, alone: bool = False
    ) -> Problem:
        """alone: the valid names beside it are not listed."""
        above, name = key[:-1], key[-1]
        what = f"unknown key `{name}` " + (
            f"in {'.'.join(above)}" if above else "at the top of the recipe"
        )
        if meant is None:
            nearest = None
        elif len(meant) > 1 and ".".join(meant) == name:
            nearest = f"{meant[0]}: {{{'.'.join(meant[1:])}: …}}"
        else:
            nearest = meant[-1] if meant[:-1] == above else ".".join(meant)
        listed = alone or above in self.listed
        expected = None if listed else f"one of {', '.join(self._names(above))}"
        self.listed.add(above)
        return Problem(what, ".".join(key), expected, nearest, hint=hint)

    def _meant(self, key: Key, value: Any) -> tuple[Key | None, str | None]:
        """(the valid key that an unknown one most likely means, or None; a hint, or None)."""
        above, name = key[:-1], _plain_name(key)
        if likely := self._called(key, value, key[0]):
            return self._beside(likely[0][0], above), likely[0][1]
        if (hint := _hint(key)) is not None:
            return None, hint
        near = close(name, self._names(above))
        if near:
            return (*above, near), None
        far = close(name, [valid[-1] for valid in self.valid], ALIKE_ELSEWHERE)
        return next((valid for valid in self.valid if valid[-1] == far), None), None

    def _beside(self, meant: Key | None, within: Key) -> Key | None:
        """The key that is meant as one of an item of a list in its section (`within`), if items
        have it."""
        if meant is None or len(meant) != 2 or len(within) < 3 or within[0] != meant[0]:
            return meant
        return (*within, meant[-1]) if meant[-1] in self._names(within) else meant

    def _meant_inside(
        self, key: Key, value: Any, section: str | None
    ) -> tuple[Key | None, str | None]:
        """As `_meant`, of a key inside of an unknown one, which belongs to `section`. Keys that are
        merely spelled alike do not count, nor, in no section, one of several keys."""
        likely = self._called(key, value, section)
        return likely[0] if likely and (section or len(likely) == 1) else (None, _hint(key))

    def _called(self, key: Key, value: Any, section: str | None) -> list[tuple[Key, str | None]]:
        """(valid key, hint) of all that `key` is the name of, here or in other tools, the likeliest
        first."""
        name = _plain_name(key)
        if several := several_sets(name, value):
            return [(tuple(str(several.nearest).split(".")), several.hint)]
        names = [*keys_called(_qualified(key))] or [*self.keys.get(name, ()), *keys_called(name)]
        called = {tuple(found.nearest.split(".")): found.hint for found in names if found.nearest}
        same = {valid: None for valid in self.valid if name in (valid[-1], ".".join(valid))}
        found = {valid: hint for valid, hint in called.items() if valid in self.valid} or same
        # A mapping, or a list of them, probably means a section, a value a key; the section at
        # hand comes first.
        is_section = isinstance(value[0] if isinstance(value, list) and value else value, dict)
        return sorted(
            found.items(),
            key=lambda one: (bool(self._names(one[0])) != is_section, one[0][0] != section),
        )


def _plain_name(key: Key) -> str:
    return key[-1].lower().replace("-", "_")


def _qualified(key: Key) -> str:
    """The name with that of the mapping around it, as `lr_schedule.name`."""
    around = next((part for part in reversed(key[:-1]) if not part.isdigit()), "")
    return f"{around.lower()}.{_plain_name(key)}"


def _hint(key: Key) -> str | None:
    """The hint about a key of another tool that has no counterpart."""
    known = without_counterpart(_qualified(key)) or without_counterpart(_plain_name(key))
    return None if known is None else known.hint
