"""Where a run is written is tried before anything is loaded, and nothing is left behind by that."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit.errors import RecipeError, UsageError
from lorakit.files import try_folder
from lorakit.recipes.recipe import load_recipe
from lorakit.runs import train as runs

RECIPE = """\
model: {name_or_path: ./model, task: causal-lm}
data: {name_or_path: rows.jsonl}
method: {name: l1ra}
"""


def refused(output_dir: Path | str, folder: Path) -> str:
    (folder / "a.yaml").write_text(RECIPE)
    recipe = load_recipe(folder / "a.yaml", [f"output_dir={output_dir}"])
    with pytest.raises(UsageError) as caught:
        runs.run_training(recipe, None)  # type: ignore[arg-type]  # nothing is shown: it ends before the first stage
    return str(caught.value)


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert f"`{tmp_path / 'file'}` is a file" in refused(tmp_path / "file/runs/x", tmp_path)
    assert f"output_dir `{tmp_path / 'file'}` is a file" in refused(tmp_path / "file", tmp_path)


@pytest.mark.parametrize("where", ["/proc/lorakit/run", "/sys/lorakit", "x" * 300])
def test_a_folder_that_can_not_be_made_is_refused_with_the_reason(
    where: str, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    folder = Path(where) if where.startswith("/") else tmp_path / "deep" / where
    message = refused(folder, tmp_path)
    assert f"output_dir `{folder}` can not be written: " in message
    assert sorted(tmp_path.rglob("*")) == [*before, tmp_path / "a.yaml"]


def test_a_link_to_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere/at/all")
    assert "can not be written" in refused(tmp_path / "link", tmp_path)


def test_trying_leaves_nothing_behind(tmp_path: Path) -> None:
    try_folder(tmp_path / "a/b/c")
    assert not list(tmp_path.iterdir())
    (tmp_path / "here").mkdir()
    try_folder(tmp_path / "here")
    assert not list((tmp_path / "here").iterdir())


def test_the_home_folder_is_not_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text(RECIPE + "output_dir: ~/runs/x\n")
    assert load_recipe(tmp_path / "a.yaml").output_dir == str(tmp_path / "runs/x")
    assert load_recipe(tmp_path / "a.yaml", ["output_dir=~/runs/y"]).output_dir == str(
        tmp_path / "runs/y"
    )
    with pytest.raises(RecipeError, match="home folder of nobody"):
        load_recipe(tmp_path / "a.yaml", ["output_dir=~nobody-at-all/x"])
