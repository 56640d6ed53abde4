"""`lorakit init`: the recipes that come with lorakit, in a checkout and in a wheel."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import lorakit
from lorakit.cli import main
from lorakit.recipes import shipped
from lorakit.recipes.recipe import load_recipe
from tests.support.processes import Done

REPOSITORY = Path(lorakit.__file__).parents[1]
NAMES = sorted(path.stem for path in (REPOSITORY / "recipes").glob("*.yaml"))


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Done]:
    """`main` in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["lorakit", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capfd.readouterr()
        return Done(int(exit_.value.code or 0), captured.out, captured.err)

    return run


def test_the_wheel_carries_the_recipes_where_they_are_looked_for() -> None:
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    included = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {"recipes": shipped.IN_WHEEL.relative_to(REPOSITORY).as_posix()}
    assert not shipped.IN_WHEEL.exists(), "of a checkout, recipes/ is what is read"
    assert list(shipped.shipped()) == NAMES


def test_it_lists_every_recipe_with_its_method_and_task(call: Callable[..., Done]) -> None:
    done = call("init")
    assert done.code == 0
    for name in NAMES:
        assert f"  {name} " in done.out
    assert "L1RA on GLUE's SST-2: one budget of ranks, moved to" in done.out
    listed = call("init", "--json").json()["recipes"]
    assert [one["name"] for one in listed] == NAMES
    (both,) = (one for one in listed if one["name"] == "l1ra_salor_glue")
    assert (both["method"], both["task"]) == ("l1ra+salor", "sequence-classification")
    for one in listed:
        assert one["description"].endswith(".")
        assert len(one["description"]) < 200


@pytest.mark.parametrize("typed", ["l1ra_glue", "l1ra_glue.yaml", "recipes/l1ra_glue.yaml"])
def test_it_writes_a_copy_and_names_the_next_command(
    typed: str, call: Callable[..., Done], tmp_path: Path
) -> None:
    done = call("init", typed)
    assert done.code == 0, done.err
    assert done.out == "l1ra_glue.yaml written; edit it, then: lorakit train l1ra_glue.yaml\n"
    copy = tmp_path / "l1ra_glue.yaml"
    assert copy.read_bytes() == (REPOSITORY / "recipes/l1ra_glue.yaml").read_bytes()
    assert load_recipe(copy).output_dir == "runs/l1ra_glue"


def test_it_replaces_a_file_only_with_force(call: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("edited\n")
    refused = call("init", "vanilla_glue", "--out", "mine.yaml")
    assert refused.code == 2
    assert "`mine.yaml` exists" in refused.err
    assert "--force" in refused.err
    assert (tmp_path / "mine.yaml").read_text() == "edited\n"
    done = call("init", "vanilla_glue", "--out", "mine.yaml", "--force", "--json")
    assert done.json() == {"written": "mine.yaml", "next": "lorakit train mine.yaml"}
    assert "Plain LoRA" in (tmp_path / "mine.yaml").read_text()
    assert call("init", "vanilla_glue", "--out", "new/my recipe.yaml").out.endswith(
        "lorakit train 'new/my recipe.yaml'\n"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["l1ra-glue"], ["no shipped recipe `l1ra-glue`", "Did you mean `l1ra_glue`?"]),
        (["zzz"], ["They are adalora_glue, "]),
        (["--force"], ["`--force` is for a recipe that is written"]),
        (["--out", "x.yaml"], ["`--out` is for a recipe that is written"]),
        (["vanilla_glue", "--out", "."], ["`.` is a folder", "vanilla_glue.yaml"]),
    ],
)
def test_a_wrong_command_line_exits_2_and_writes_nothing(
    arguments: list[str], words: list[str], call: Callable[..., Done], tmp_path: Path
) -> None:
    done = call("init", *arguments)
    assert done.code == 2
    for word in words:
        assert word in done.err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("typed", ["l1ra_glue", "l1ra_glue.yaml", "recipes/l1ra_glue.yaml"])
def test_a_shipped_recipe_that_is_not_a_file_is_one_to_write(
    typed: str, call: Callable[..., Done]
) -> None:
    done = call("train", typed)
    assert done.code == 2
    assert f"{typed}: there is no such recipe" in done.err
    assert "`lorakit init l1ra_glue` writes it" in done.err
    assert json.loads(call("init", "l1ra_glue", "--json").out)["next"]
    beside = call("train", "l1ra_glue")
    assert "did you mean `l1ra_glue.yaml`?" in beside.err
    assert "lorakit init" not in beside.err
