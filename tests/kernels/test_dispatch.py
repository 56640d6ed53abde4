"""Which implementation of each operation runs, and that it is said."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from typer.testing import CliRunner

from lorakit.cli import app
from lorakit.kernels import dispatch, levels, native
from lorakit.kernels.dispatch import OPERATIONS, implementation, table
from lorakit.kernels.levels import Level

HERE = [level for level in Level if level <= levels.used()]


@pytest.fixture
def anew() -> Iterator[None]:
    dispatch.forget()
    yield
    dispatch.forget()


def expected(operation: str, level: Level) -> Level:
    return max([Level.torch, *(each for each in OPERATIONS[operation] if each <= level)])


def test_every_library_belongs_to_an_operation_and_is_there() -> None:
    named = {name for forms in OPERATIONS.values() for names in forms.values() for name in names}
    assert named == {path.stem for path in native.SOURCES.glob("*.c")}


@pytest.mark.parametrize("level", HERE, ids=str)
def test_the_highest_implementation_that_the_level_allows_runs(
    level: Level, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKIT_KERNELS", str(level))
    reached = native.level_and_reason()[0]
    assert table() == {name: expected(name, reached) for name in OPERATIONS}
    for name in OPERATIONS:
        assert implementation(name) is expected(name, reached)
        for most in Level:
            assert implementation(name, most) is expected(name, min(most, reached))


def test_without_a_compiler_torch_does_all(anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert {implementation(name) for name in OPERATIONS} == {Level.torch}
    assert set(table().values()) == {Level.torch}


def test_a_library_that_does_not_compile_leaves_the_next_lower_implementation(
    anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the other operations as they are."""
    load, lost = native.load, {"attention_tiles", "norms"}
    monkeypatch.setattr(native, "load", lambda name: None if name in lost else load(name))
    reached = native.level_and_reason()[0]
    assert implementation("norms") is implementation("block") is Level.torch
    assert implementation("attention") is expected("attention", min(reached, Level.avx512))
    assert implementation("softmax") is expected("softmax", reached)


def test_the_log_names_each_operation_once(anew: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lorakit"):
        for _ in range(2):
            dispatch.announce(torch.device("cpu"))
    said = [record.getMessage() for record in caplog.records if "operations" in record.message]
    if native.level_and_reason()[0] is Level.torch:
        assert said == []
        return
    (line,) = said
    parts = line.removeprefix("operations: ").split("; ")
    found = {
        name: Level[level]
        for level, names in (part.split(": ") for part in parts)
        for name in names.split(", ")
    }
    assert found == table()


@pytest.mark.parametrize("as_json", [False, True])
def test_env_shows_it(as_json: bool) -> None:
    shown = CliRunner().invoke(app, ["env", *["--json"][:as_json]]).stdout
    for name, level in table().items():
        if as_json:
            assert f'"{name}": "{level}"' in shown
        else:
            assert any(name in line and str(level) in line for line in shown.splitlines())
