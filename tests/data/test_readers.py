"""Files become tables whose cells are the file's own characters; what does not fit is one message
with its place."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from lorakit.data.cells import Kind
from lorakit.data.load import Rows, load_rows
from lorakit.data.readers import data_stem, data_suffix, read_file
from lorakit.data.spec import DataSpec
from lorakit.data.table import Table
from lorakit.errors import RecipeError, RunError
from lorakit.sources.resolve import Source

CELLS = [
    "0049",
    "+49 30",
    "1.50",
    "1e3",
    "007",
    "true",
    "False",
    "NA",
    "null",
    "2021-03-01",
    "12345678901234567890123",
    "é 🎬",
    " x ",
]


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(path: Path, column: str) -> list[str]:
    return read_file(path).cells(column).texts


def load(path: Path, task: Any = "causal-lm", stand_in: bool = False, **keys: Any) -> Rows:
    spec = DataSpec.model_validate({"name_or_path": str(path), **keys})
    return load_rows(Source(str(path), str(path), "local", str(path), stand_in), spec, task)


# -- what is read ----------------------------------------------------------------------------------


def test_cells_of_separated_files_are_their_characters(tmp_path: Path) -> None:
    csv = "a,b\n" + "".join(f'"{cell}",{i}\n' for i, cell in enumerate(CELLS))
    tsv = "a\tb\n" + "".join(f"{cell}\t{i}\n" for i, cell in enumerate(CELLS))
    for name, content in {
        "x.csv": csv,
        "x.tsv": tsv,
        "bom.csv": "\ufeff" + csv,
        "crlf.tsv": tsv.replace("\n", "\r\n"),
    }.items():
        found = read_file(written(tmp_path, name, content))
        assert found.column_names == ["a", "b"]
        assert found.cells("a").texts == CELLS
        assert found.cells("b").texts == [str(i) for i in range(len(CELLS))]


def test_late_cells_do_not_change_early_ones(tmp_path: Path) -> None:
    """Readers that guess types do so for some thousand rows at a time."""
    cells = ["0049"] * 25_000 + ["49", "word", "1.5"]
    assert texts(written(tmp_path, "a.csv", "a\n" + "\n".join(cells) + "\n"), "a") == cells
    rows = "".join(json.dumps({"a": cell}) + "\n" for cell in cells)
    assert texts(written(tmp_path, "a.jsonl", rows), "a") == cells


def test_quoted_cells_hold_commas_quotes_and_line_breaks(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", 'a,b\r\n"x, ""y""\r\n z",1\r\n\r\nlast,\r\n')
    assert read_file(path).to_list() == [{"a": 'x, "y"\r\n z', "b": "1"}, {"a": "last", "b": ""}]
    assert [read_file(path).place(row) for row in range(2)] == [
        f"row 1 ({path}:2)",
        f"row 2 ({path}:5)",
    ]
    long = "x" * 300_000
    assert texts(written(tmp_path, "long.csv", f"a\n{long}\n"), "a") == [long]


JSON_VALUES = {
    '"2021-03-01"': "2021-03-01",
    '"2021-03-04T11:30:00Z"': "2021-03-04T11:30:00Z",
    '"007"': "007",
    '"4.50"': "4.50",
    "4.50": "4.50",
    "1e3": "1e3",
    "-0.0": "-0.0",
    "123456789012345678901234567890": "123456789012345678901234567890",
    "true": "true",
    '"\\ud83d\\ude00\\n"': "😀\n",
    '"\u2028x\u0085"': "\u2028x\u0085",
}


@pytest.mark.parametrize("form", ["jsonl", "json list", "json lines", "wrapped"])
def test_json_values_keep_the_text_that_they_have(tmp_path: Path, form: str) -> None:
    rows = [f'{{"a": {value}}}' for value in JSON_VALUES]
    content = {
        "jsonl": ("a.jsonl", "\n\n".join(rows)),
        "json list": ("a.json", "[\n" + ",\n".join(rows) + "\n]\n"),
        "json lines": ("a.json", "\n".join(rows)),
        "wrapped": ("a.json", '{"version": "1.0", "inner": {"data": [' + ",".join(rows) + "]}}"),
    }[form]
    assert texts(written(tmp_path, *content), "a") == list(JSON_VALUES.values())


def test_nested_values_keep_their_numbers_and_columns_may_be_missing(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", '{"a": {"b": [1.50, 1e3, "x", null, true]}}\n{"c": null}\n')
    found = read_file(path)
    assert found.cells("a").texts[0] == '{"b": [1.50, 1e3, "x", null, true]}'
    assert found.cells("a").kinds.tolist() == [Kind.MAPPING, Kind.MISSING]
    assert found.cells("c").kinds.tolist() == [Kind.MISSING, Kind.NULL]


def test_columns_as_lists_are_columns(tmp_path: Path) -> None:
    path = written(tmp_path, "a.json", '{"text": ["x", "y"], "label": [1, 0]}')
    assert read_file(path).to_list() == [{"text": "x", "label": 1}, {"text": "y", "label": 0}]


def test_parquet_values_have_exact_texts(tmp_path: Path) -> None:
    columns = {
        "binary": pa.array([b"n\xc3\xa9", None]),
        "dictionary": pa.array(["u", "v"]).dictionary_encode(),
        "large": pa.array(["u", "v"], pa.large_string()),
        "small": pa.array([0.1, 3], pa.float32()),
        "double": pa.array([0.1, 1e22]),
        "whole": pa.array([2**62, -1]),
        "decimal": pa.array([Decimal("4.50"), Decimal("0.00")]),
        "day": pa.array([date(2021, 3, 1), None]),
        "time": pa.array([datetime(2021, 3, 4, 11, 30), datetime(2021, 3, 4, 11, 30, 0, 500_000)]),
        "zone": pa.array([datetime(2021, 3, 4, 11, tzinfo=UTC)] * 2, pa.timestamp("us", "UTC")),
        "nano": pa.array([1, 10**9], pa.timestamp("ns")),
        "yes": pa.array([True, False]),
        "nested": pa.array([{"a": [1.5], "b": b"x"}, None]),
    }
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path)
    found = read_file(path)
    expected = {
        "binary": ["né", ""],
        "dictionary": ["u", "v"],
        "large": ["u", "v"],
        "small": ["0.1", "3.0"],
        "double": ["0.1", "1e+22"],
        "whole": ["4611686018427387904", "-1"],
        "decimal": ["4.50", "0.00"],
        "day": ["2021-03-01", ""],
        "time": ["2021-03-04T11:30:00", "2021-03-04T11:30:00.5"],
        "zone": ["2021-03-04T11:00:00+00:00"] * 2,
        "nano": ["1970-01-01T00:00:00.000000001", "1970-01-01T00:00:01"],
        "yes": ["true", "false"],
        "nested": ['{"a": [1.5], "b": "x"}', ""],
    }
    assert {name: found.cells(name).texts for name in columns} == expected


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (pa.array([b"ok", b"\xff\xfe"]), "utf-8"),
        (pa.array([1, 2], pa.duration("s")), "duration"),
        (pa.array([3], pa.time32("s")), "time32"),
    ],
    ids=["bytes", "durations", "times"],
)
def test_parquet_values_without_a_text_are_refused_with_their_row(
    tmp_path: Path, array: pa.Array, words: str
) -> None:
    pq.write_table(pa.table({"a": array, "fine": ["x"] * len(array)}), tmp_path / "a.parquet")
    found = read_file(tmp_path / "a.parquet")
    assert found.cells("fine").texts == ["x"] * len(array)
    with pytest.raises(RecipeError, match=r"row \d \(.*a\.parquet\) has no text in `a`") as caught:
        found.cells("a")
    assert words in str(caught.value)


def test_text_keeps_its_line_breaks_and_loses_a_byte_order_mark(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", "\ufeffone\r\n\n  two\u2028\x0c\rthree")
    assert texts(path, "text") == ["one\r\n", "\n", "  two\u2028\x0c\rthree"]


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}


@pytest.mark.parametrize("packed", PACKERS)
def test_compressed_files_are_read_as_plain_ones(tmp_path: Path, packed: str) -> None:
    path = written(tmp_path, f"Train.JSONL.{packed}", PACKERS[packed](b'{"a": "007"}\n' * 3))
    assert (data_suffix(path), data_stem(path)) == (".jsonl", "Train")
    assert texts(path, "a") == ["007"] * 3
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(RecipeError, match="not a whole compressed file") as caught:
        read_file(path)
    assert "fetch or copy it again" in str(caught.value)


@pytest.mark.parametrize("packed", PACKERS)
def test_a_name_that_does_not_say_how_a_file_is_compressed_is_told(
    tmp_path: Path, packed: str
) -> None:
    rows = b'{"a": "x"}\n' * 3
    others = [other for other in PACKERS if other != packed]
    cases = [
        (
            "a.jsonl",
            PACKERS[packed](rows),
            f"a.jsonl` is compressed ({packed})",
            f"the same file named a.jsonl.{packed}",
        ),
        (
            f"a.jsonl.{packed}",
            rows,
            f"a.jsonl.{packed}` is not compressed",
            "the same file named a.jsonl",
        ),
        (
            f"a.jsonl.{packed}",
            PACKERS[others[0]](rows),
            f"is compressed as {others[0]}, though its name ends in .{packed}",
            f"the same file named a.jsonl.{others[0]}",
        ),
        (
            "a.parquet",
            PACKERS[packed](rows),
            f"a.parquet` is compressed ({packed})",
            "the file that is inside",
        ),
        ("a.csv", b"PK\x03\x04 and more", "a.csv` is compressed (zip)", "the file that is inside"),
    ]
    for name, content, what, expected in cases:
        with pytest.raises(RecipeError) as caught:
            read_file(written(tmp_path, name, content))
        (problem,) = caught.value.problems
        assert what in problem.what
        assert problem.expected == expected
    assert texts(written(tmp_path, "a.txt", "BZh is no mark\n"), "text") == ["BZh is no mark\n"]


@pytest.mark.parametrize(
    ("name", "content", "task"),
    [
        ("a.csv", "good film,1\nbad film,0\nnice,1\n", "sequence-classification"),
        ("a.csv", "a film,pos\nbad film,neg\nnice,pos\n", "sequence-classification"),
        ("a.tsv", "a film\t0.5\nbad film\t0\nx\t1\n", "causal-lm"),
        ("a.csv", "this is a fine film,warm\nthat was a dull one,cold\nx,y\n", "causal-lm"),
        ("data/train.csv", "good film,1\nbad film,0\nnice,1\n", "sequence-classification"),
    ],
)
def test_a_first_line_that_looks_like_data_is_asked_about(
    tmp_path: Path, name: str, content: str, task: Any
) -> None:
    (tmp_path / "data").mkdir()
    path = written(tmp_path, name, content)
    with pytest.raises(RecipeError) as caught:
        load(path.parent if "/" in name else path, task)
    assert f"is the first line of `{path}` the columns' names? It looks like data" in str(
        caught.value
    )


@pytest.mark.parametrize(
    "content", ["Review Text,Score\ngood film,1\nbad,0\n", "sentence,Score\ngood film,1\nbad,0\n"]
)
def test_a_first_line_of_names_is_not_asked_about(tmp_path: Path, content: str) -> None:
    with pytest.raises(RecipeError, match="column among") as caught:
        load(written(tmp_path, "a.csv", content), "sequence-classification")
    assert "first line" not in str(caught.value)


def test_a_file_that_is_replaced_with_its_time_gives_the_new_rows(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", '{"text": "old"}\n' * 4)
    os.utime(path, (1000, 1000))
    assert set(load(path).train.cells("text").texts) == {"old"}
    path.write_text('{"text": "new"}\n' * 4)
    os.utime(path, (1000, 1000))
    assert set(load(path).train.cells("text").texts) == {"new"}


def test_rows_that_look_like_traces_of_agents_are_rows(tmp_path: Path) -> None:
    rows = [
        {"type": "session", "id": f"x{i}", "version": 1, "cwd": "/", "p": f"q{i}", "c": "a"}
        for i in range(4)
    ]
    path = written(tmp_path, "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert read_file(path).to_list() == rows


# -- what is refused -------------------------------------------------------------------------------

BROKEN: dict[str, tuple[str, str | bytes, str]] = {
    "ragged": ("a.csv", "a,b\n1,2\n1,2,3\n", "a.csv:3: 3 cells"),
    "short": ("a.tsv", "a\tb\n1\n", "a.tsv:2: 1 cells"),
    "no name": ("a.csv", ",a\n0,x\n", "a.csv:1: column 1 has no name"),
    "twice": ("a.csv", "a,a\n0,x\n", "a.csv:1: the column `a` is there twice"),
    "semicolons": (
        "a.csv",
        "a;b\n0;x\n",
        "a.csv:1: one column, named `a;b`: separated by semicolons",
    ),
    "how to convert": (
        "a.csv",
        "a;b\n0;x\n",
        "pandas.read_csv(FILE, sep=';', dtype=str, keep_default_na=False)",
    ),
    "semicolons and a comma": (
        "a.csv",
        "a;b, c\n0;x\n",
        "do semicolons separate the columns? Then, in Python, pandas.read_csv(",
    ),
    "tabs": ("a.csv", "a\tb\n0\tx\n", "of tabs, name it .tsv"),
    "commas": ("a.tsv", "a,b\n0,x\n", "of commas, name it .csv"),
    "Excel's line": (
        "a.csv",
        "sep=,\na,b\n0,x\n",
        "a.csv:1: `sep=,` is for Excel, and not the columns' names",
    ),
    "Excel's other line": (
        "a.csv",
        "sep=;\na;b\n0;x\n",
        "a.csv:1: `sep=;` is for Excel, and not the columns' names",
    ),
    "commas at the ends": (
        "a.csv",
        "a,b,\n0,x,\n",
        "a.csv:1: the line ends in a comma: column 3 has no name",
    ),
    "commas at the ends of rows": ("a.csv", "a,b\n0,x,\n", "no comma at the end of a line"),
    "a comment": (
        "a.csv",
        "# of today\na,b\n0,x\n",
        "the columns' names in the first line, which is `# of today`",
    ),
    "open quote": ("a.csv", 'a,b\n1,"x\n2,y\n', "a.csv:2 to 3: not CSV"),
    "text after a quote": ("a.csv", 'a,b\n1,"x"y\n', "a.csv:2: not CSV"),
    "names alone": ("a.csv", "a,b\n", "no rows"),
    "latin 1": ("a.csv", b"a\nok\n\xe9t\xe9\n", "a.csv:3: not UTF-8: the byte 0xe9"),
    "utf-16": ("a.txt", "text".encode("utf-16"), "a.txt:1: not UTF-8: it is UTF-16"),
    "broken line": ("a.jsonl", '{"a": 1}\n\n{"a": }\n', "a.jsonl:3:7: not JSON"),
    "two on a line": ("a.jsonl", '{"a": 1} {"a": 2}\n', "a.jsonl:1:10: not JSON"),
    "list as lines": ("a.jsonl", '[\n{"a": 1}]\n', "a list of rows is named .json"),
    "key twice": (
        "a.jsonl",
        '{"a": 1}\n{"a": 1, "a": 2}\n',
        'a.jsonl:2: the key "a" is there twice',
    ),
    "half a pair": (
        "a.jsonl",
        '{"a": 1}\n{"a": ["\\ud83d"]}\n',
        "a.jsonl:2: a text has half of a surrogate pair",
    ),
    "comma at the end": ("a.json", '[{"a": 1},\n {"a": 2,}]', "a.json:2:10: not JSON"),
    "open list": ("a.json", '[{"a": 1}\n', "a.json:2:1: not JSON"),
    "no object": ("a.json", '[{"a": 1},\n 2]', "a.json:2: a row must be"),
    "two lists": (
        "a.json",
        '{"train": [{"a": 1}], "validation": [{"a": 2}]}',
        "2 lists of rows: `train`, `validation`",
    ),
    "no list": ("a.json", '{"a": 1}', "no list of rows is in it"),
    "deep": ("a.json", '{"a": ' * 100_000, "nested too deeply"),
    "no parquet": ("a.parquet", b"PAR1 and more", "a.parquet: "),
    "another kind": ("a.yaml", "a: 1", "not a data file"),
    "empty": ("a.jsonl", "", "is empty"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_a_file_should_not_hold_is_told_with_its_place(tmp_path: Path, case: str) -> None:
    name, content, words = BROKEN[case]
    with pytest.raises(RecipeError) as caught:
        read_file(written(tmp_path, name, content))
    assert words in str(caught.value)
    assert caught.value.problems[0].key == "data.name_or_path"
    assert caught.value.problems[0].expected or case in ("no parquet",)


def test_a_file_that_the_disk_does_not_give_is_no_mistake_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(RunError, match="can not be read"):
        read_file(tmp_path / "a.jsonl")


# -- folders ---------------------------------------------------------------------------------------

LINE = '{{"text": "{} film"}}\n'


def layout(folder: Path, files: dict[str, str]) -> None:
    for name, word in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(LINE.format(word) * 2)


@pytest.mark.parametrize(
    "files",
    [
        {
            "data/train-00000-of-00002.jsonl": "a",
            "data/train-00001-of-00002.jsonl": "b",
            "data/validation-00000-of-00001.jsonl": "c",
        },
        {"train_0.jsonl": "a", "train_1.jsonl": "b", "dev.jsonl": "c"},
        {"train/x.jsonl": "a", "train/y.jsonl": "b", "validation/z.jsonl": "c"},
    ],
    ids=["hub", "numbered", "folders"],
)
def test_a_split_may_lie_in_several_files(tmp_path: Path, files: dict[str, str]) -> None:
    layout(tmp_path, files)
    found = load(tmp_path)
    assert found.train.cells("text").texts == ["a film", "a film", "b film", "b film"]
    assert found.validation.cells("text").texts == ["c film", "c film"]
    assert found.train.place(2).startswith("row 1 (")
    assert ":1)" in found.train.place(2)


def test_names_of_splits_may_be_capitalised(tmp_path: Path) -> None:
    layout(tmp_path, {"Train.jsonl": "a", "Validation.jsonl": "b"})
    found = load(tmp_path)
    assert (found.train.cells("text").texts[0], found.validation.cells("text").texts[0]) == (
        "a film",
        "b film",
    )


def test_a_missing_shard_is_told(tmp_path: Path) -> None:
    layout(tmp_path, {"train-00000-of-00003.jsonl": "a", "train-00002-of-00003.jsonl": "b"})
    with pytest.raises(RecipeError, match=r"of the 3 shards .* these are missing: 1"):
        load(tmp_path)


def test_what_datasets_saved_to_disk_keeps_its_types_and_names(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["worse", "better"])})
    data = Dataset.from_dict(
        {"text": [f"film {i}" for i in range(6)], "label": [0, 1] * 3}, features=features
    )
    DatasetDict({"train": data, "validation": data.select([3, 1])}).save_to_disk(tmp_path / "two")
    data.save_to_disk(tmp_path / "one")
    found = load(tmp_path / "two", "sequence-classification")
    assert found.train.class_names("label") == ("worse", "better")
    assert found.validation.cells("text").texts == ["film 3", "film 1"]
    alone = load(tmp_path / "one", "sequence-classification", validation_split=0.5)
    assert (len(alone.train), len(alone.validation)) == (3, 3)


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"subset": "sst2"}, "data.subset"),
        ({"revision": "main"}, "data.revision"),
        ({"train_split": "training"}, "data.train_split"),
        ({"validation_split": "dev"}, "data.validation_split"),
        ({"loss_on": "all"}, "data.loss_on"),
        ({"label_column": "text"}, "data.label_column"),
        ({"references": "text"}, "data.references"),
    ],
)
def test_a_key_without_effect_is_refused(tmp_path: Path, keys: dict[str, Any], key: str) -> None:
    path = written(tmp_path, "a.jsonl", '{"text": "a film"}\n' * 4)
    with pytest.raises(RecipeError) as caught:
        load(path, **keys)
    assert caught.value.problems[0].key == key
    if key in ("data.subset", "data.revision"):  # they belong to what a stand-in stands for
        assert len(load(path, stand_in=True, **keys).train) == 3


# -- tables ----------------------------------------------------------------------------------------


def test_tables_of_read_and_typed_columns_are_joined_by_their_cells() -> None:
    read = Table.from_list([{"a": "007", "b": 1}])
    typed = Table.from_arrow(pa.table({"a": ["x"], "c": [0.5]}), "x.parquet")
    found = Table.joined([read, typed])
    assert found.to_list() == [{"a": "007", "b": 1}, {"a": "x", "c": 0.5}]
    assert found.place(1) == "row 1 (x.parquet)"
    assert found.select([1, 0]).to_list() == found.to_list()[::-1]


def test_names_of_classes_that_the_library_datasets_writes_beside_parquet_are_kept(
    tmp_path: Path,
) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    rows = datasets.Dataset.from_dict(
        {"text": ["a", "b", "c"], "label": [1, 0, 1]}, features=features
    )
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    assert read_file(tmp_path / "rows.parquet").class_names("label") == ("neg", "pos")
