"""The house (DESIGN.md, section 1): who may import whom. Read from the source with ast."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorakit

ROOT = Path(lorakit.__file__).parent

# A folder imports only from those after it, and from the ground.
FLOORS = (
    *("cli", "runs", "report", "recipes", "inference", "export", "training", "cpu"),
    *("methods", "models", "data", "adapters", "kernels", "sources", "numerics"),
)
GROUND = ("errors", "files", "spec", "compat", "process")

# Imports inside functions, outside the commands: (module, function, what) and why.
LATE = {
    (
        "lorakit.compat.versions",
        "tested",
        "packaging.requirements",
    ): "for those who ask, so that `--help` need not wait",
    ("lorakit.compat.versions", "_canonical", "packaging.utils"): "as above",
    (
        "lorakit.__main__",
        "main",
        "lorakit.cli",
    ): "a third of a second, in which signals are heeded already",
    (
        "lorakit.training.answer_metrics",
        "_sacrebleu",
        "sacrebleu",
    ): "of the extra `eval`, which most do without",
    (
        "lorakit.runs.environment",
        "_devices",
        "lorakit.runs.machine",
    ): "imports torch, for machines with a GPU",
    ("lorakit.sources.gguf", "unpack_smollm2", "gguf"): "needed once, when a builtin is unpacked",
    (
        "lorakit.sources.gguf",
        "unpack_smollm2",
        "torch",
    ): "a second, which asking what is in the cache should not cost",
    ("lorakit.sources.gguf", "unpack_smollm2", "safetensors.torch"): "imports torch",
    (
        "lorakit.sources.gguf",
        "_save_tokenizer",
        "tokenizers",
    ): "needed once, when a builtin is unpacked",
    (
        "lorakit.training.metrics",
        "_metric",
        "scipy",
    ): "half a second, which the first step need not wait for",
    ("lorakit.training.metrics", "_metric", "sklearn"): "with scipy, half a second",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(ROOT.rglob("*.py"))
}
METHODS = {
    name.split(".")[2]
    for name in SOURCES
    if name.startswith("lorakit.methods.") and not name.split(".")[2].startswith("_")
}


def floor(module: str) -> int:
    """How far up a module is: 0 is the ground. `lorakit` itself, the face to Python programs, is on
    top."""
    place = module.split(".")[1:2]
    if place in ([], ["__main__"]):
        return len(FLOORS) + 1
    return 0 if place[0] in GROUND else len(FLOORS) - FLOORS.index(place[0])


def imported(node: ast.AST) -> list[str]:
    """The modules that an import statement names: `from lorakit import compat` names
    lorakit.compat."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        return [
            full if (full := f"{node.module}.{alias.name}") in SOURCES else str(node.module)
            for alias in node.names
        ]
    return []


def imports(module: str) -> list[str]:
    return [name for node in ast.walk(SOURCES[module]) for name in imported(node)]


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


def ours(module: str) -> set[str]:
    """The modules of lorakit that a module imports; importing a package is importing its
    `__init__`."""
    return {name for name in imports(module) if name in SOURCES and name != module}


def test_the_house_is_found_and_has_no_other_rooms() -> None:
    assert len(SOURCES) > 100
    assert {"vanilla"} <= METHODS
    rooms = {module.split(".")[1] for module in SOURCES if module.count(".")}
    assert rooms == {*FLOORS, *GROUND, "__main__"}


@pytest.mark.parametrize("module", SOURCES)
def test_a_folder_imports_only_from_folders_below(module: str) -> None:
    # its version is for all
    up = [name for name in ours(module) - {"lorakit"} if floor(name) > floor(module)]
    assert up == []


def circles(graph: dict[str, set[str]]) -> list[str]:
    """What is left once everything that imports nothing, or nothing that is left, is taken away."""
    left = dict(graph)
    while free := [name for name, wanted in left.items() if not wanted & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def test_no_circles() -> None:
    assert circles({"a": {"b"}, "b": {"a"}, "c": {"a"}, "d": set()}) == ["a", "b", "c"]
    assert circles({module: ours(module) for module in SOURCES}) == []


def test_the_ground_and_the_numbers_import_nothing_heavy() -> None:
    light = [
        "lorakit.errors",
        "lorakit.files",
        "lorakit.numerics.schedule",
        "lorakit.numerics.budget",
    ]
    for module in light:
        assert not {name.split(".")[0] for name in imports(module)} & {
            "torch",
            "transformers",
            "numpy",
            "datasets",
        }


def test_the_command_line_imports_nothing_heavy_before_a_command_runs() -> None:
    for module, tree in SOURCES.items():
        if module.startswith("lorakit.cli"):
            inside = {node for function in functions(tree) for node in ast.walk(function)}
            typing_only = {
                node
                for block in ast.walk(tree)
                if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
                for node in ast.walk(block)
            }
            early = {
                name
                for node in ast.walk(tree)
                if node not in inside | typing_only
                for name in imported(node)
            }
            own = {name for name in early if name.startswith("lorakit")}
            light = ("lorakit", "lorakit.errors", "lorakit.compat", "lorakit.process")
            assert all(name in light or name.startswith("lorakit.cli") for name in own), (
                module,
                own,
            )
            assert not {name.split(".")[0] for name in early} & {
                "torch",
                "transformers",
                "rich",
                "datasets",
                "numpy",
            }, module


def test_only_commands_import_late() -> None:
    late = {
        (module, function.name, name)
        for module, tree in SOURCES.items()
        if not module.startswith("lorakit.cli")
        for function in functions(tree)
        for node in ast.walk(function)
        for name in imported(node)
    }
    assert late == set(LATE)


def test_methods_do_not_import_each_other_and_nobody_outside_imports_one() -> None:
    def method(module: str) -> str | None:
        parts = module.split(".")
        return (
            parts[2]
            if parts[1:2] == ["methods"] and len(parts) > 2 and parts[2] in METHODS
            else None
        )

    assert [
        (m, name) for m in SOURCES for name in ours(m) if method(name) not in (None, method(m))
    ] == []


def names_in(room: str) -> set[str]:
    """What the classes of a room say is their `name`."""
    return {
        str(line.value.value)
        for module, tree in SOURCES.items()
        if module.startswith(f"{room}.")
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        for line in node.body
        if isinstance(line, ast.Assign) and isinstance(line.value, ast.Constant)
        if ast.unparse(line.targets[0]) == "name"
    }


# {room: the names of what is in it, which only it decides by}
DECIDED_IN = {
    "lorakit.methods": METHODS,
    "lorakit.data.formats": names_in("lorakit.data.formats"),
    "lorakit.models.tasks": names_in("lorakit.models.tasks"),
}


def test_formats_and_tasks_are_found_by_their_names() -> None:
    assert DECIDED_IN["lorakit.data.formats"] >= {"classification", "prompt-completion", "text"}
    assert DECIDED_IN["lorakit.models.tasks"] == {"sequence-classification", "causal-lm"}


@pytest.mark.parametrize("room", DECIDED_IN)
def test_nothing_outside_a_room_compares_with_a_name_that_is_its_own(room: str) -> None:
    found = []
    for module, tree in SOURCES.items():
        if module == room or module.startswith(f"{room}."):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare | ast.MatchValue):
                words = {inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant)}
                found += [(module, node.lineno, name) for name in DECIDED_IN[room] & words]
    assert found == []


def test_names_of_tasks_and_formats_stand_in_their_files_alone() -> None:
    """Seen through constants, tables and defaults; names that are plain words (`text`) are not told
    from others."""
    rooms = ("lorakit.data.formats.", "lorakit.models.tasks.")
    names = {name for room in rooms for name in DECIDED_IN[room[:-1]] if "-" in name}
    assert len(names) == 3
    # Which task a builtin is of use for is a fact of the builtin.
    places = {
        module
        for module, tree in SOURCES.items()
        if not module.startswith(rooms) and module != "lorakit.sources.catalogue"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in names
    }
    assert places == set()


def test_formats_do_not_import_each_other_and_nobody_outside_imports_one() -> None:
    def own_file(module: str, room: str) -> bool:
        return module.startswith(f"{room}.") and not module.startswith(f"{room}._")

    formats, tasks = "lorakit.data.formats", "lorakit.models.tasks"
    found = [
        (module, name)
        for room in (formats, tasks)
        for module in SOURCES
        for name in ours(module)
        if own_file(name, room) and not (room == tasks and module == tasks)
    ]
    assert found == []


def known_to_one_method(tree: ast.AST, names: set[str], keys: set[str]) -> list[int]:
    """Lines that know a method: by its name in any string of its own, compared at once or kept as a
    constant, or by one of its own keys, as an attribute of a method or a config, in getattr, or in
    the dotted key of a problem."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts = node.value.split(".")
            if node.value in names or (parts[0] == "method" and parts[1:2] and parts[1] in keys):
                found.append(node.lineno)
        if (
            isinstance(node, ast.Attribute)
            and node.attr in keys
            and isinstance(node.value, ast.Attribute | ast.Name)
        ):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else node.value.id
            found += [node.lineno] if owner == "method" else []
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "hasattr")
        ):
            key = node.args[1]
            found += [node.lineno] if isinstance(key, ast.Constant) and key.value in keys else []
    return found


def own_keys() -> set[str]:
    """Keys that some methods have and not all, but for those that are called like a hook."""
    from lorakit.methods import Method, MethodConfig, config_classes

    every = {name for config in config_classes().values() for name in config.model_fields}
    return every - MethodConfig.model_fields.keys() - vars(Method).keys()


def test_nothing_outside_the_methods_knows_a_method() -> None:
    outside = {
        module: tree
        for module, tree in SOURCES.items()
        if not module.startswith("lorakit.methods.")
    }
    keys = own_keys()
    assert {"ladder", "kv", "factors", "target_r"} < keys
    found = [
        (module, line)
        for module, tree in outside.items()
        for line in known_to_one_method(tree, METHODS, keys)
    ]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        'if method.name == "l1ra": pass',
        'L1RA = "l1ra"\nif method.name == L1RA: pass',
        'getattr(config.method, "kv", None)',
        "recipe.method.ladder",
        'RecipeError.at("method.kv.policy", "no")',
        'match name:\n    case "l1ra": pass',
    ],
)
def test_knowing_a_method_is_seen_through_constants_and_getattr(code: str) -> None:
    assert known_to_one_method(ast.parse(code), {"l1ra"}, {"kv", "ladder"})


def test_the_map_names_every_folder_and_only_files_that_are_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+(?:/|\.py))`", text)
    rooms = {f"{room}/" for room in FLOORS} | {f"{room}.py" for room in GROUND if room != "compat"}
    assert rooms | {"compat/"} <= set(named)
    places = [
        (ROOT / name, ROOT / "kernels" / name, ROOT / "methods" / name, ROOT.parent / name)
        for name in named
    ]
    assert [
        name
        for name, found in zip(named, places, strict=True)
        if not any(place.exists() for place in found)
    ] == []


def test_the_steps_for_contributors_name_only_files_that_are_there() -> None:
    text = (ROOT.parent / ".github/CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"((?:lorakit|tests|scripts|recipes)/[\w/]*(?:\.\w+)?)", text)
    assert len(named) > 15
    assert [
        name for name in named if "NAME" not in name and not (ROOT.parent / name).exists()
    ] == []


def test_the_page_of_the_scripts_names_all_of_them() -> None:
    text = (ROOT.parent / "scripts/README.md").read_text(encoding="utf-8")
    there = {path.name for path in (ROOT.parent / "scripts").iterdir() if path.is_file()}
    named = set(re.findall(r"(?<![\w/])(\w+\.(?:py|sh))", text))
    assert len(there) > 15
    assert there - {"README.md"} <= named
    assert {name for name in named - there if not name.startswith("peer_")} == set()


def main() -> None:
    """Print the floors: each folder with the height that its imports give it, and what it
    imports."""
    rooms: dict[str, set[str]] = {}
    for module in SOURCES:
        here = module.split(".")[1] if module.count(".") else "lorakit"
        rooms.setdefault(here, set()).update(
            name.split(".")[1] for name in ours(module) if name.count(".")
        )

    def height(room: str) -> int:
        return 1 + max((height(below) for below in rooms[room] if below != room), default=0)

    for room in sorted(rooms, key=lambda room: (-height(room), room)):
        print(f"{height(room)}  {room:10} imports {', '.join(sorted(rooms[room] - {room}))}")


if __name__ == "__main__":
    main()


# -- private names ---------------------------------------------------------------------------------

TESTS = {
    path.relative_to(ROOT.parent).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(Path(__file__).parent.rglob("*.py"))
}
# Private names that tests read all the same: {(test, name): why no public one tells as much}.
READ = {
    ("tests/methods/test_registry.py", "_registry"): "the folder where methods are is replaced",
}


def is_private(name: str) -> bool:
    return name.startswith("_") and name[1:2].isalpha()


def bound(tree: ast.AST) -> set[str]:
    """The private names that a module makes: of functions, classes, variables and attributes of
    `self`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found |= {node.attr} if ast.unparse(node.value) == "self" else set()
    return {name for name in found if is_private(name)}


def read_of_lorakit(tree: ast.AST, private: set[str]) -> set[str]:
    """The private names of lorakit that a test imports, reads as attributes, or names as text, as
    for getattr and monkeypatch."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "lorakit":
            parts = [*str(node.module).split("."), *(alias.name for alias in node.names)]
            found |= {part for part in parts if is_private(part)}
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {part for parts in names if parts[0] == "lorakit" for part in parts[1:]}
        elif isinstance(node, ast.Attribute):
            found |= {node.attr} & private
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value.rpartition(".")[2]} & private
    return {name for name in found if is_private(name)} - bound(tree)


def test_tests_read_no_private_name_of_lorakit() -> None:
    modules = {part for name in SOURCES for part in name.split(".") if is_private(part)}
    private = modules.union(*map(bound, SOURCES.values()))
    assert {"_base", "_C", "_frozen", "_load"} <= private
    own = TESTS.keys() - {"tests/test_imports.py"}
    read = {(test, name) for test in own for name in read_of_lorakit(TESTS[test], private)}
    assert read == set(READ)


@pytest.mark.parametrize(
    "code",
    [
        "from lorakit.kernels import _x",
        "from lorakit._x import y",
        "import lorakit._x",
        "native._x.cache_clear()",
        'monkeypatch.setattr(native, "_x", None)',
        'monkeypatch.setattr("lorakit.native._x", None)',
    ],
)
def test_reading_a_private_name_is_seen(code: str) -> None:
    assert read_of_lorakit(ast.parse(code), {"_x"}) == {"_x"}
    assert read_of_lorakit(ast.parse(f"{code}\ndef _x(): pass"), {"_x"}) == set()


# -- sizes -----------------------------------------------------------------------------------------

MOST_LINES, MOST_LINES_OF_A_FUNCTION, MOST_LINES_OF_C = 400, 60, 500


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_files_have_one_subject_and_fit_a_few_screens() -> None:
    python, c = list(ROOT.rglob("*.py")), [*ROOT.rglob("*.c"), *ROOT.rglob("*.h")]
    assert len(python) > 150
    python += (ROOT.parent / "scripts").glob("*.py")
    assert len(c) > 10
    assert [path.name for path in python if lines_of(path) > MOST_LINES] == []
    assert [path.name for path in c if lines_of(path) > MOST_LINES_OF_C] == []


@pytest.mark.parametrize("module", SOURCES)
def test_functions_fit_a_screen(module: str) -> None:
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in functions(SOURCES[module])
        if node.end_lineno and node.end_lineno - node.lineno >= MOST_LINES_OF_A_FUNCTION
    }
    assert long == {}


def test_no_test_imports_another() -> None:
    tests = list(Path(__file__).parent.rglob("*.py"))
    assert len(tests) > 60
    for path in tests:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                assert not [name for name in names if re.match(r"tests(\.\w+)*\.test_", name)], path


# -- words -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", SOURCES)
def test_docstrings_name_the_thing_first(module: str) -> None:
    texts = (
        node.value.value
        for node in ast.walk(SOURCES[module])
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    )
    assert [text for text in texts if str(text).startswith(("What ", "Whether "))] == []
