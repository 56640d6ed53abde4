"""YAML text as plain data with the place of each key, and overrides from the command line.

PyYAML reads YAML 1.1, where `1e-3` is a string and `no` is false. A recipe follows YAML 1.2's core
schema, so only PyYAML's parser is used; scalars are resolved here, by one table for reading and
writing.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from lorakit.errors import Problem, RecipeError
from lorakit.recipes.shipped import name_of, shipped

COMMAND_LINE = "command line: "

_YAML = "tag:yaml.org,2002:"
# Aliases let a short text expand without bound; no recipe comes near this many values.
_MOST_VALUES = 100_000


def _integer(text: str) -> int:
    return int(text, {"0x": 16, "0o": 8}.get(text[:2], 10))


def _float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


# {tag: (pattern of its plain scalars, function that gives their value)}; the first match wins, and
# everything else is a string.
_SCALARS: dict[str, tuple[re.Pattern[str], Callable[[str], Any]]] = {
    _YAML + "null": (re.compile(r"^(?:null|Null|NULL|~|)$"), lambda text: None),
    _YAML + "bool": (
        re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"),
        lambda text: text.lower() == "true",
    ),
    _YAML + "int": (re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), _integer),
    _YAML + "float": (
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        _float,
    ),
    # A special key in YAML 1.1: listed so that a string `<<` is written in quotes, and the bare key
    # can be refused.
    _YAML + "merge": (re.compile(r"^<<$"), str),
    _YAML + "str": (re.compile(r""), str),
}
_RESOLVERS: dict[Any, Any] = {None: [(tag, pattern) for tag, (pattern, _) in _SCALARS.items()]}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _RESOLVERS


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _RESOLVERS


@dataclass
class YamlData:
    """A YAML file as plain data.

    `places` is {dotted key: "file:line:col"}, with the file itself at ""; `problems` are those
    after which reading could continue, so that they are reported together with later ones.
    """

    data: dict[str, Any]
    places: dict[str, str]
    problems: list[Problem] = field(default_factory=list)


def read_yaml(path: Path | str) -> YamlData:
    """The YAML file at `path`.

    Raises RecipeError if there is no such file, or it is not UTF-8, or as `parse_yaml` does.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        there = sorted(str(other) for other in path.parent.glob("*.yaml"))
        nearest = next(iter(get_close_matches(str(path), there, n=1, cutoff=0.5)), None)
        expected = f"one of {', '.join(there)}" if there else "the path of a YAML file"
        hint, name = None, name_of(str(path))
        if name in shipped() and name not in map(name_of, there):
            nearest = None
            hint = f"`lorakit init {name}` writes it: a recipe of this name comes with lorakit."
        raise _one("there is no such recipe", str(path), expected, nearest, hint) from None
    except IsADirectoryError:
        raise _one("this is a folder", str(path), "the path of a YAML file") from None
    except UnicodeDecodeError as error:
        raise _one(
            f"this is not UTF-8: byte {error.start} can not be read",
            str(path),
            "a text file in UTF-8",
        ) from None
    except OSError as error:
        raise _one(f"this can not be read: {error.strerror}", str(path)) from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, file: str) -> YamlData:
    """The data of YAML `text`, which stands in `file`.

    Raises RecipeError if it is not YAML, is empty, or is not a mapping at the top.
    """
    node = _compose(text, file)
    if node is None:
        raise _one("the recipe is empty", file, "a mapping of sections")
    if not isinstance(node, yaml.MappingNode):
        raise _one(
            "the top of a recipe is a mapping of sections, not a list or a single value",
            _place(file, node.start_mark),
        )
    builder = _Builder(file)
    builder.places[""] = file
    return YamlData(builder.build(node, ""), builder.places, builder.problems)


def apply_overrides(
    written: YamlData, overrides: Sequence[str], is_text: Callable[[str], bool] = lambda key: False
) -> None:
    """Set each `dotted.key=VALUE` in `written`; mappings on the way are made, list items are named
    by their index.

    A VALUE that is no number, true, false or null is text as it was typed, blanks at its ends
    included; one that begins with a bracket, a brace or a quote is read as YAML. `is_text` tells of
    a key whether it takes text alone: its VALUE is text whatever it looks like ({question}, [INST],
    2024), but for null and for text that is in quotes as a whole. A malformed override becomes one
    of its problems.
    """
    for text in overrides:
        try:
            _override(written, text, is_text)
        except RecipeError as error:
            written.problems += error.problems


def dump(data: Any) -> str:
    """`data` as YAML text that `parse_yaml` reads back unchanged."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


def _override(written: YamlData, text: str, is_text: Callable[[str], bool]) -> None:
    place = COMMAND_LINE + text
    key, equals, value = text.partition("=")
    key = key.strip()
    parts = key.split(".")
    if not equals or not all(parts):
        raise _one(f"`{text}` is no override", place, "KEY=VALUE, as train.learning_rate=1e-4")
    parent: Any = written.data
    for depth, part in enumerate(parts):
        above = ".".join(parts[:depth])
        if isinstance(parent, list):
            if not part.isdecimal() or int(part) >= len(parent):
                raise _one(
                    f"`{above}` is a list of {len(parent)}, it has no item `{part}`",
                    place,
                    "the index of an item",
                )
        elif not isinstance(parent, dict):
            raise _one(
                f"`{above}` is {parent!r}: it has no key `{part}`", place, "the path of a key"
            )
        at = int(part) if isinstance(parent, list) else part
        if depth == len(parts) - 1:
            parent[at] = _text(value) if is_text(key) else _value(value, key, place)
        else:
            written.places.setdefault(".".join(parts[: depth + 1]), place)
            # A section that is there but empty is null.
            if isinstance(parent, dict) and parent.get(at) is None:
                parent[at] = {}
            parent = parent[at]
    for known in [known for known in written.places if known == key or known.startswith(key + ".")]:
        del written.places[known]
    # What was wrong with the value that the override replaces is wrong no longer.
    written.problems[:] = [
        p for p in written.problems if not (p.key == key or p.key.startswith(key + "."))
    ]
    written.places[key] = place


def _text(typed: str) -> str | None:
    """The value of an override of a key that accepts text: as it was typed, except for null and for
    YAML's quotes."""
    plain = typed.strip()
    if _SCALARS[_YAML + "null"][0].match(plain):
        return None
    if plain[:1] in ('"', "'"):
        # A text may begin with a quote that closes in its middle: it is not YAML then, and is taken
        # literally.
        with contextlib.suppress(RecipeError):
            node, builder = _compose(plain, ""), _Builder("")
            if isinstance(node, yaml.ScalarNode) and node.end_mark.index == len(plain):
                quoted = builder.build(node, "")
                if isinstance(quoted, str) and not builder.problems:
                    return quoted
    return typed


def _value(typed: str, key: str, place: str) -> Any:
    """The value of any other override. Raises RecipeError if it is not YAML."""
    text = typed.strip()
    if text[:1] not in ("[", "{", '"', "'"):
        found = next(value(text) for pattern, value in _SCALARS.values() if pattern.match(text))
        return typed if isinstance(found, str) else found
    try:
        node = _compose(text, "")
        builder = _Builder("")
        value = builder.build(node, key)
        problems = builder.problems
    except RecipeError as error:
        problems = error.problems
    if problems:
        quotes = (
            "a value in YAML; in quotes if it is a string that begins with a bracket, a brace or a"
            " quote"
        )
        raise RecipeError(
            [
                Problem(problem.what, key, problem.expected or quotes, where=place)
                for problem in problems
            ]
        )
    return value


def _compose(text: str, file: str) -> yaml.Node | None:
    """The node tree of `text`. Raises RecipeError at the place of a syntax error."""
    try:
        node: yaml.Node | None = yaml.compose(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = ", ".join(filter(None, (error.context, error.problem)))
        expected = None
        if "'\\t'" in what:
            expected = "spaces: YAML forbids tabs here"
        elif "mapping values are not allowed" in what:
            expected = (
                "one `key: value` a line, deeper keys indented, and quotes around a value that"
                " contains a colon"
            )
        raise _one(
            f"this is not YAML: {what}", _place(file, mark) if mark else file, expected
        ) from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        where = f"{file}:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"
        raise _one(
            f"this is not YAML: character U+{error.character:04X} is not allowed", where
        ) from None
    except RecursionError:
        raise _one("this is nested too deeply", file) from None
    return node


class _Builder:
    """Constructs plain data from nodes; records places and problems on the way."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.places: dict[str, str] = {}
        self.problems: list[Problem] = []
        self.open: set[int] = set()
        self.built = 0

    def build(self, node: Any, key: str) -> Any:
        """The data of `node` at the dotted `key`; None where there is a problem."""
        self.built += 1
        if self.built > _MOST_VALUES:
            raise _one(f"the aliases expand to more than {_MOST_VALUES} values", self.file)
        if id(node) in self.open:
            return self.refuse(node, key, f"`{key}` contains itself, by way of an alias")
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode) and node.tag == _YAML + "map":
                return self.mapping(node, key)
            if isinstance(node, yaml.SequenceNode) and node.tag == _YAML + "seq":
                return self.sequence(node, key)
            if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
                return self.scalar(node, key)
        finally:
            self.open.discard(id(node))
        return self.refuse(
            node,
            key,
            f"tag `{_short(node.tag)}` is not allowed here",
            "a plain value: recipes run no code",
        )

    def mapping(self, node: yaml.MappingNode, key: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for name_node, value_node in node.value:
            name, line = name_node.value, name_node.start_mark.line + 1
            if name_node.tag == _YAML + "merge":
                self.refuse(
                    name_node, f"{key}.<<", "merge keys (`<<`) are not read", "the keys themselves"
                )
                continue
            if name_node.tag != _YAML + "str":
                shown = name if isinstance(name_node, yaml.ScalarNode) else "[…]"
                expected = "a name; in quotes if it looks like a number, true, false or null"
                self.refuse(
                    name_node, f"{key}.{shown}", f"the key `{shown}` is not a string", expected
                )
                continue
            child = f"{key}.{name}" if key else name
            if name in lines:
                what = f"key `{name}` is there twice, in lines {lines[name]} and {line}"
                self.refuse(name_node, child, what, "each key once")
                continue
            lines[name] = line
            self.places[child] = _place(self.file, name_node.start_mark)
            found[name] = self.build(value_node, child)
        return found

    def sequence(self, node: yaml.SequenceNode, key: str) -> list[Any]:
        found = []
        for index, item in enumerate(node.value):
            self.places[f"{key}.{index}"] = _place(self.file, item.start_mark)
            found.append(self.build(item, f"{key}.{index}"))
        return found

    def scalar(self, node: yaml.ScalarNode, key: str) -> Any:
        pattern, value = _SCALARS[node.tag]
        if not pattern.match(node.value):
            return self.refuse(node, key, f"'{node.value}' is no {_short(node.tag)}")
        if re.search("[\ud800-\udfff]", node.value):
            return self.refuse(
                node, key, f"`{key}` has half a surrogate pair, which is no character"
            )
        return value(node.value)

    def refuse(self, node: yaml.Node, key: str, what: str, expected: str | None = None) -> None:
        self.problems.append(Problem(what, key, expected, where=_place(self.file, node.start_mark)))


def _place(file: str, mark: Any) -> str:
    return f"{file}:{mark.line + 1}:{mark.column + 1}"


def _short(tag: str) -> str:
    return tag.replace(_YAML, "!!")


def _one(
    what: str,
    where: str,
    expected: str | None = None,
    nearest: str | None = None,
    hint: str | None = None,
) -> RecipeError:
    return RecipeError([Problem(what, "", expected, nearest, where, hint)])
