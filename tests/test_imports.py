"""The house (DESIGN.md, section 1): who may import whom. Read from the source with ast; nothing is imported here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorakit

ROOT = Path(lorakit.__file__).parent

# From the ground up: a module imports only from lines above its own. A line that begins with `lorakit.methods.*` or
# `lorakit.cli.*` stands for every module there that is not named, so that a new method or command needs no entry.
LAYERS = """
    L0  lorakit  lorakit.errors  lorakit.spec  lorakit.elsewhere
    L0  lorakit.compat  lorakit.trial
    L0  lorakit.schedule  lorakit.budget  lorakit.storage  lorakit.interrupt  lorakit.explain  lorakit.yaml_source
    L0  lorakit.sparsity  lorakit.lowrank  lorakit.chunking
    L0  lorakit.difficulty  lorakit.builtin
    L1  lorakit.kernels  lorakit.kernels.levels
    L1  lorakit.kernels.native  lorakit.kernels.huge_pages  lorakit.kernels.packing
    L1  lorakit.kernels.dropout  lorakit.kernels.lora_linear  lorakit.kernels.inference  lorakit.kernels.quantise
    L1  lorakit.kernels.tiered_linear  lorakit.kernels.elementwise  lorakit.kernels.masks
    L1  lorakit.scheduler  lorakit.shared_input
    L1  lorakit.kernels.packed_attention  lorakit.kernels.cross_entropy  lorakit.kernels.rotary
    L1  lorakit.kernels.attention  lorakit.kernels.decoder_block  lorakit.kernels.encoder_block  lorakit.adapter  lorakit.optim
    L1  lorakit.whole_block
    L1  lorakit.llama  lorakit.bert
    L2  lorakit.methods._base
    L2  lorakit.methods._composed
    L2  lorakit.methods.*
    L2  lorakit.methods
    L3  lorakit.sources
    L3  lorakit.data  lorakit.data.spec  lorakit.data.examples  lorakit.data.typed  lorakit.data.tokenise
    L3  lorakit.data.lost
    L3  lorakit.data.table
    L3  lorakit.data.columns  lorakit.data.readers
    L3  lorakit.data.labels
    L3  lorakit.data.inputs
    L3  lorakit.data.draw
    L3  lorakit.model  lorakit.inject  lorakit.data.load  lorakit.data.token_cache
    L3  lorakit.data.formats  lorakit.engine
    L4  lorakit.kv_store
    L4  lorakit.kv_cache  lorakit.linear_groups
    L4  lorakit.decode_step
    L4  lorakit.decoder
    L4  lorakit.generate
    L4  lorakit.loop  lorakit.evaluate  lorakit.answers  lorakit.checkpoint
    L4  lorakit.export  lorakit.export.merged  lorakit.export.peft
    L4  lorakit.export.native
    L4  lorakit.export.sparse
    L5  lorakit.recipe  lorakit.report  lorakit.report.history  lorakit.report.progress
    L5  lorakit.report.layout  lorakit.report.factors
    L5  lorakit.report.ranks
    L5  lorakit.report.estimate
    L5  lorakit.report.tiers
    L5  lorakit.report.sparsity
    L5  lorakit.report.plots
    L5  lorakit.report.chunks
    L5  lorakit.report.chunk_plot
    L5  lorakit.assemble
    L5  lorakit.run  lorakit.evaluation  lorakit.generation  lorakit.export.run  lorakit.dry_run
    L5  lorakit.answering  lorakit.estimate
    L5  lorakit.report.environment
    L6  lorakit.cli._streams
    L6  lorakit.cli._common
    L6  lorakit.cli.*
    L6  lorakit.cli
    L6  lorakit.__main__
"""
LINES = [line.split() for line in LAYERS.strip().splitlines()]
LEVELS = {module: number for number, (_, *modules) in enumerate(LINES) for module in modules}

# Imports inside functions, outside the commands: (module, function, what) and why.
LATE = {
    ("lorakit.compat", "tested", "packaging.requirements"): "for those who ask, so that `--help` need not wait",
    ("lorakit.compat", "_canonical", "packaging.utils"): "as above",
    ("lorakit.__main__", "main", "lorakit.cli"): "a third of a second, in which signals are heeded already",
    ("lorakit.answers", "_sacrebleu", "sacrebleu"): "of the extra `eval`, which most do without",
    ("lorakit.builtin", "_unpack_smollm2", "gguf"): "needed once, when a builtin is unpacked",
    ("lorakit.builtin", "_unpack_smollm2", "torch"): "a second, which asking what is in the cache should not cost",
    ("lorakit.builtin", "_unpack_smollm2", "safetensors.torch"): "imports torch",
    ("lorakit.builtin", "_save_tokenizer", "tokenizers"): "needed once, when a builtin is unpacked",
    ("lorakit.evaluate", "_metric", "scipy"): "half a second, which the first step need not wait for",
    ("lorakit.evaluate", "_metric", "sklearn"): "with scipy, half a second",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.rglob("*.py"))}
METHODS = {
    name.rpartition(".")[2] for name in SOURCES if name.startswith("lorakit.methods.") and not name.split(".")[2].startswith("_")
}


def level(module: str) -> int | None:
    """The line of LAYERS a module stands on, or None."""
    return LEVELS.get(module, LEVELS.get(f"{module.rpartition('.')[0]}.*"))


def imported(node: ast.AST) -> list[str]:
    """The modules that an import statement names: `from lorakit import builtin` names lorakit.builtin."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        return [full if (full := f"{node.module}.{alias.name}") in SOURCES else str(node.module) for alias in node.names]
    return []


def imports(module: str) -> list[str]:
    return [name for node in ast.walk(SOURCES[module]) for name in imported(node)]


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_the_modules_and_the_map_are_found() -> None:
    assert len(SOURCES) > 30
    assert {"vanilla"} <= METHODS
    assert [line[0] for line in LINES] == sorted(line[0] for line in LINES)
    assert len(LEVELS) == sum(len(line) - 1 for line in LINES), "a module stands twice in the map"


def test_every_module_is_in_the_map_and_the_map_names_no_other() -> None:
    assert [module for module in SOURCES if level(module) is None] == []
    assert [module for module in LEVELS if module not in SOURCES and not module.endswith(".*")] == []


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_imports_only_from_below(module: str) -> None:
    own = level(module)
    assert own is not None
    for name in imports(module):
        if name.split(".")[0] == "lorakit":
            theirs = level(name)
            assert theirs is not None, f"{module} imports {name}, which is not in the map"
            assert theirs < own, f"{module} ({LINES[own][0]}) imports {name} ({LINES[theirs][0]})"


def test_layer_0_imports_nothing_heavy() -> None:
    for module in ("lorakit.errors", "lorakit.schedule", "lorakit.budget"):
        assert not {name.split(".")[0] for name in imports(module)} & {"torch", "transformers", "numpy", "datasets"}


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
            early = {name for node in ast.walk(tree) if node not in inside | typing_only for name in imported(node)}
            ours = {name for name in early if name.startswith("lorakit")}
            light = ("lorakit", "lorakit.errors", "lorakit.compat")
            assert all(name in light or name.startswith("lorakit.cli") for name in ours), (module, ours)
            assert not {name.split(".")[0] for name in early} & {"torch", "transformers", "rich", "datasets", "numpy"}, module


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
    one = {f"lorakit.methods.{name}" for name in METHODS}
    assert [(module, name) for module in SOURCES for name in imports(module) if name in one] == []


def test_nothing_outside_the_methods_compares_with_a_methods_name() -> None:
    found = []
    for module, tree in SOURCES.items():
        if module.startswith("lorakit.methods."):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare | ast.MatchValue):
                words = {inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant)}
                found += [(module, node.lineno, name) for name in METHODS & words]
    assert found == []
