"""Files and rows that are not what they seem: each is read as it is, or refused in one message that
names the remedy."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorakit.data.formats.prompt_completion import completions, prompts
from lorakit.data.load import Loaded, load_rows
from lorakit.data.readers import read_file
from lorakit.data.spec import DataSpec
from lorakit.data.table import Table
from lorakit.errors import RecipeError
from lorakit.files import expanded
from lorakit.recipes.recipe import load_recipe
from lorakit.sources.resolve import Source
from tests.support.tiny import write_jsonl


def load(path: Path, only_validation: bool = False, **keys: Any) -> Loaded:
    spec = DataSpec.model_validate({"name_or_path": str(path), **keys})
    source = Source(str(path), str(path), "local", str(path))
    return load_rows(source, spec, "causal-lm", only_validation)


def test_a_list_of_rows_in_a_file_of_lines_is_named_in_one_line_or_in_many(tmp_path: Path) -> None:
    rows = [{"text": "good"}, {"text": "bad"}]
    for indent in (None, 1):
        (tmp_path / "x.jsonl").write_text(json.dumps(rows, indent=indent), encoding="utf-8")
        with pytest.raises(RecipeError, match=r"x.jsonl:1: a list, and not a row") as caught:
            read_file(tmp_path / "x.jsonl")
        assert "named .json" in str(caught.value)


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.txt"])
def test_a_parquet_file_of_another_name_is_named(name: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["good", "bad"]}), tmp_path / name)
    with pytest.raises(RecipeError, match="is a Parquet file"):
        read_file(tmp_path / name)
    (tmp_path / "text.txt").write_text("PAR1 is a word\nlike others\n", encoding="utf-8")
    assert len(read_file(tmp_path / "text.txt")) == 2


@pytest.mark.skipif(not hasattr(pa, "string_view"), reason="Arrow without views of strings")
def test_rows_are_drawn_from_columns_of_string_views() -> None:
    views = pa.array(["0", "1", "2", "3"], pa.string_view())
    lists = pa.array([["0"], ["1"], None, ["3"]], pa.list_(pa.string_view()))
    data = pa.chunked_array([views.slice(0, 2), views.slice(2)])
    found = Table.from_arrow(pa.table({"a": data, "b": lists})).select([3, 0, 2])
    assert found.cells("a").texts == ["3", "0", "2"]
    assert found.cells("b").texts == ['["3"]', '["0"]', ""]
    assert len(found.digest()) == 64


@pytest.mark.parametrize("only_validation", [False, True])
def test_a_template_over_a_column_that_is_not_there_is_refused_and_nothing_else_is_said(
    only_validation: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"question": f"how many {i}", "answer": "one"} for i in range(20)]
    write_jsonl(tmp_path / "x.jsonl", rows)  # type: ignore[arg-type]
    keys = {"prompt": "{question}", "completion": "{answer}"}
    logging.getLogger("lorakit").addHandler(caplog.handler)
    try:
        for key in keys:
            with pytest.raises(RecipeError, match="there is no column `prompt`") as caught:
                load(tmp_path / "x.jsonl", only_validation, **keys | {key: "{prompt[0]}"})
            assert caught.value.problems[0].key == f"data.{key}"
    finally:
        logging.getLogger("lorakit").removeHandler(caplog.handler)
    assert not caplog.records


def test_a_row_that_lacks_a_column_is_told_from_one_with_null(tmp_path: Path) -> None:
    for last, said in (({}, "no value"), ({"completion": None}, "null")):
        rows = [{"prompt": str(i), "completion": "x"} for i in range(8)] + [{"prompt": "8"} | last]
        write_jsonl(tmp_path / "x.jsonl", rows)  # type: ignore[arg-type]
        found = load(tmp_path / "x.jsonl", only_validation=True)
        with pytest.raises(RecipeError, match=rf"x.jsonl:9\) has {said} in `completion`"):
            completions(found.train, found.spec)


def test_blanks_around_names_of_columns_are_shown(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("prompt, completion\na,b\nc,d\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="prompt, ' completion'"):
        load(tmp_path / "x.csv")


def checked(folder: Path, data: str) -> None:
    path = folder / "x.yaml"
    model = "model: {name_or_path: ./m, task: causal-lm}"
    path.write_text(f"{model}\ndata: {{{data}}}\nmethod: {{name: vanilla}}\n", encoding="utf-8")
    load_recipe(path, [])


def test_a_name_is_not_empty(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="a string that is not empty"):
        checked(tmp_path, "name_or_path: ''")


def test_the_home_folder_of_nobody_is_no_path() -> None:
    nobody = "~nobody-of-this-name/x"
    assert str(expanded(nobody)) == nobody
    assert expanded("~/x") == Path.home() / "x"


def test_an_empty_template_is_an_empty_text(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(20)]
    write_jsonl(tmp_path / "x.jsonl", rows)  # type: ignore[arg-type]
    found = load(tmp_path / "x.jsonl", prompt="")
    assert set(prompts(found.train, found.spec)) == {""}
    assert completions(found.train, found.spec)[0] == "c0"
    found = load(tmp_path / "x.jsonl", completion="")
    assert prompts(found.train, found.spec)[0] == "p0"
    assert set(completions(found.train, found.spec)) == {""}
