"""Streaming: rows that are read in blocks and tokenised to files give what rows in memory give, in
bounded memory."""

from __future__ import annotations

import errno
import gzip
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

from lorakit.data import choice, shards, streaming, table, token_cache
from lorakit.data.chat_template import use_template
from lorakit.data.examples import ARRAYS, Examples
from lorakit.data.formats import formats
from lorakit.data.labels import count_labels
from lorakit.data.load import Loaded, load_rows
from lorakit.data.reading import Reader
from lorakit.data.spec import DataSpec
from lorakit.data.stored import ReadColumn
from lorakit.errors import RecipeError, RunError
from lorakit.files import cache_root
from lorakit.sources.resolve import Source
from tests.support.processes import in_this_process
from tests.support.tiny import VOCABULARY

WORDS = [*VOCABULARY][5:30]


def words(number: int, count: int) -> str:
    return " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(count))


TEXTS = [{"text": words(i, 1 + i * 5 % 23)} for i in range(90)]
CLASSES = [
    {"text": words(i, 2 + i % 9), "label": ["no", "yes", "so"][i * i % 3]} for i in range(90)
]
SCORES = [{"text1": words(i, 3), "text2": words(i + 1, 4), "label": i / 7} for i in range(90)]
QUESTIONS = [
    {"question": words(i % 40, 2 + i % 9), "answer": f"there are {i % 10}", "note": None}
    for i in range(90)
]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": words(i, 3)},
            {"role": "assistant", "content": words(i + 1, 1 + i % 5)},
        ]
    }
    for i in range(90)
]
# {case: (model, rows, keys)}
CASES: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "classes": ("tiny_bert", CLASSES, {}),
    "values of pairs": ("tiny_bert", SCORES, {}),
    "prompts": ("tiny_llama", QUESTIONS, {"validation_split": 0.3}),
    "chat": ("tiny_llama", CHATS, {"chat_template": "chatml"}),
    "documents, apart": ("tiny_llama", TEXTS, {"packing": False}),
    "documents, joined": ("tiny_llama", TEXTS, {}),
    "documents, in packs": ("tiny_llama", TEXTS, {"packing": "documents"}),
    "windows": ("tiny_llama", TEXTS, {"stride": 5}),
    "some of the rows": ("tiny_bert", CLASSES, {"max_train_samples": 31, "max_eval_samples": 4}),
}


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Blocks of a few rows, and the folder of the sets in the cache, to which small ones go too."""
    compiled, cache = cache_root() / "native", tmp_path / "cache"
    cache.mkdir()
    if compiled.is_dir():
        (cache / "native").symlink_to(compiled)
    monkeypatch.setenv("LORAKIT_CACHE", str(cache))
    monkeypatch.setattr(table, "CHUNK", 8)
    monkeypatch.setattr(table, "BLOCK_BYTES", 400)
    monkeypatch.setattr(token_cache, "WORTHWHILE", 0)
    monkeypatch.setattr(table, "BLOCK_ROWS", 5)
    return cache / "shards"


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows as a file of the kind that its name says."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=40)
    elif path.suffix == ".csv":
        lines = [",".join(map(str, row.values())) for row in rows]
        path.write_text("\n".join([",".join(rows[0]), *lines]) + "\n", encoding="utf-8")
    elif path.suffix == ".txt":
        path.write_text("".join(row["text"] + "\n" for row in rows), encoding="utf-8")
    else:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def loaded(path: Path, labelled: bool = False, **keys: Any) -> Loaded:
    spec = DataSpec.model_validate({"name_or_path": str(path), **keys})
    task = "sequence-classification" if labelled else "causal-lm"
    return load_rows(Source("data", str(path), "local", str(path)), spec, task)


def read(path: Path, model: Path, labelled: bool = False, **keys: Any) -> tuple[Examples, Examples]:
    """(training, validation) examples of a file, of which some rows are held out."""
    rows = loaded(path, labelled, **keys)
    labels = count_labels(rows.train, rows.spec) if labelled else None
    tokenizer = AutoTokenizer.from_pretrained(model)
    use_template(tokenizer, rows.spec.chat_template)
    reader = Reader(labels, rows.spec, tokenizer, 12, lambda *_: None)
    return reader.train(rows), reader.validation(rows)


def assert_same(a: Examples, b: Examples) -> None:
    for name in ARRAYS:
        one, other = getattr(a, name), getattr(b, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert (one.dtype, one.tobytes()) == (other.dtype, other.tobytes()), name
    assert a.digest() == b.digest()


def is_mapped(array: Any) -> bool:
    while isinstance(array, np.ndarray) and not isinstance(array, np.memmap):
        array = array.base
    return isinstance(array, np.memmap)


# -- the same examples -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_examples_are_those_of_rows_in_memory(
    case: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    name, rows, keys = CASES[case]
    model, labelled = request.getfixturevalue(name), "label" in rows[0]
    path = written(tmp_path / "rows.jsonl", rows)
    whole = read(path, model, labelled, streaming=False, cache=False, **keys)
    for cache in (True, True, False):  # made, from the cache, and without one
        found = read(path, model, labelled, streaming=True, cache=cache, **keys)
        for one, other in zip(whole, found, strict=True):
            assert_same(one, other)
            assert is_mapped(other.tokens)
            assert not is_mapped(one.tokens)


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows.jsonl.gz", "rows.txt"])
def test_every_kind_of_file_is_streamed(name: str, tmp_path: Path, tiny_llama: Path) -> None:
    path = written(tmp_path / name, TEXTS)
    whole = read(path, tiny_llama, streaming=False)
    found = read(path, tiny_llama, streaming=True)
    for one, other in zip(whole, found, strict=True):
        assert_same(one, other)
    rows = loaded(path, streaming=True)
    assert rows.train.is_spilled
    assert rows.train.place(70) == loaded(path, streaming=False).train.place(70)
    assert rows.lines == name.endswith(".txt")


def test_shards_and_data_sets_of_datasets_are_streamed(tmp_path: Path) -> None:
    for number in range(3):
        # the last shard has a column more, and another type of label
        more = {"note": "x", "label": 1} if number == 2 else {}
        part = [row | more for row in CLASSES[number * 20 : number * 20 + 20]]
        written(tmp_path / f"train-{number}.jsonl", part)
    written(tmp_path / "validation.jsonl", CLASSES[:9])
    whole, found = (loaded(tmp_path, streaming=way, labelled=True) for way in (False, True))
    assert found.train.is_spilled
    assert found.train.column_names == whole.train.column_names
    for row in (0, 25, 45, 59):
        assert found.train.place(row) == whole.train.place(row)
    assert found.train.to_list() == whole.train.to_list()
    saved = tmp_path / "saved"
    DatasetDict({"train": Dataset.from_list(TEXTS), "test": Dataset.from_list(TEXTS)}).save_to_disk(
        saved
    )
    whole, found = (loaded(saved, streaming=way) for way in (False, True))
    assert found.train.is_spilled
    assert found.train.to_list() == whole.train.to_list()


def test_a_run_gives_the_same_bytes(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    path = written(tmp_path / "rows.jsonl", TEXTS)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {{name_or_path: {tiny_llama}, task: causal-lm}}\n"
        f"data: {{name_or_path: {path}, packing: documents, max_seq_length: 24}}\n"
        "method: {name: vanilla, r: 2}\n"
        "train: {max_steps: 6, per_device_train_batch_size: 4, eval_steps: 3, save_steps: 3}\n",
        encoding="utf-8",
    )
    run = in_this_process(monkeypatch, capfd)
    found = []
    for way in ("false", "true"):
        out = tmp_path / way
        done = run("train", recipe, f"data.streaming={way}", f"output_dir={out}")
        assert done.code == 0, done.err
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        kept = [{k: v for k, v in line.items() if "seconds" not in k} for line in lines]
        weights = (out / "adapter" / "adapter_model.safetensors").read_bytes()
        manifest = json.loads((out / "manifest.json").read_text())["data"]
        found.append((kept, weights, manifest["train_sha256"], manifest["validation_sha256"]))
    assert found[0] == found[1]
    # A run goes on with the tokens that are there, even where it began with rows in memory.
    shutil.rmtree(tmp_path / "false" / "adapter")
    (tmp_path / "false" / "result.json").unlink()
    shutil.rmtree(tmp_path / "false" / "checkpoints" / "step-00000006")
    for form in formats():
        monkeypatch.setattr(type(form), "read", None)
    options = ("data.streaming=true", f"output_dir={tmp_path / 'false'}", "--resume", "auto")
    done = run("train", recipe, *options)
    assert done.code == 0, done.err
    assert "resuming" in done.err
    weights = (tmp_path / "false" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert weights == found[0][1]


# -- bounded memory --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["prompts", "chat", "documents, joined", "documents, in packs"])
def test_rows_at_once_are_those_of_a_block(
    case: str, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The most cells of a column that become Python's objects at a time, of 270 rows."""
    held, cells = list[int](), ReadColumn.cells

    def counted(self: ReadColumn, rows: Any) -> Any:
        held.append(len(rows))
        return cells(self, rows)

    monkeypatch.setattr(ReadColumn, "cells", counted)
    # the choice of columns looks at the first 1000 rows
    monkeypatch.setattr(choice, "LOOKED_AT", 5)
    _, rows, keys = CASES[case]
    read(written(tmp_path / "rows.jsonl", rows * 3), tiny_llama, streaming=True, **keys)
    assert sum(held) > len(rows * 3)
    assert max(held) <= 5


def test_arrow_holds_a_block_at_a_time(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", [{"text": "x" * 2000}] * 2000)
    before = pa.total_allocated_bytes()
    rows = loaded(path, streaming=True)
    assert pa.total_allocated_bytes() - before < 100_000
    assert rows.train.nbytes > 3_000_000
    sizes = [
        (len(block), pa.total_allocated_bytes() - before)
        for _, block in rows.train.blocks(1000)
        if block.cells("text")
    ]
    assert max(size for _, size in sizes) < 200_000
    assert sum(count for count, _ in sizes) == len(rows.train)


def test_pages_of_mapped_files_are_let_go(tmp_path: Path) -> None:
    """The process's resident pages of files, before and after all tokens are looked at."""
    count = 8_000_000
    np.arange(count, dtype=np.int32).tofile(tmp_path / "tokens.bin")
    tokens = shards.mapped(tmp_path / "tokens.bin", np.int32, count)
    found = Examples(tokens, np.arange(0, count + 1, 1000), np.arange(count // 1000))

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[2]) * os.sysconf("SC_PAGE_SIZE")

    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc")
    before = resident()
    found.digest()
    total = sum(int(block.tokens.sum()) for _, block in found.blocks())
    assert total == count * (count - 1) // 2
    assert resident() - before < 4 * count / 4


# -- the choice ------------------------------------------------------------------------------------


def test_large_files_are_streamed_and_the_log_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    written(tmp_path / "train.txt", TEXTS)
    written(tmp_path / "validation.txt", TEXTS[:4])
    assert not loaded(tmp_path).train.is_spilled
    monkeypatch.setattr(streaming, "LARGE", 1000)
    rows = loaded(tmp_path)
    assert (rows.train.is_spilled, rows.validation.is_spilled) == (True, False)
    assert "`train.txt` holds" in caplog.text
    assert not loaded(tmp_path, streaming=False).train.is_spilled


def test_json_that_is_read_whole_is_refused_or_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(TEXTS), encoding="utf-8")
    with pytest.raises(RecipeError, match="one JSON value") as caught:
        loaded(path, streaming=True)
    assert caught.value.problems[0].key == "data.streaming"
    monkeypatch.setattr(streaming, "LARGE", 1000)
    assert not loaded(path).train.is_spilled
    assert "read whole, into memory" in caplog.text


# -- errors, and what is left of them --------------------------------------------------------------


def test_a_wrong_row_has_its_place(tmp_path: Path, tiny_llama: Path) -> None:
    rows: list[dict[str, Any]] = [dict(row) for row in QUESTIONS]
    del rows[57]["answer"]
    path = tmp_path / "rows.jsonl"
    content = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text("\n" + content, encoding="utf-8")  # an empty line before the rows
    for way in (False, True):
        with pytest.raises(RecipeError, match=r"row 58 \(.*rows.jsonl:59\)"):
            read(path, tiny_llama, streaming=way)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    return written(tmp_path / "rows.jsonl", TEXTS)


def test_a_damaged_set_is_made_anew(
    large: Path, small: Path, tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    whole = read(large, tiny_llama, streaming=True)
    for name in ("tokens.bin", "row_ids.bin", "targets.bin", "manifest.json"):
        for place in small.iterdir():
            content = bytearray((place / name).read_bytes())
            content[len(content) // 2] ^= 1
            (place / name).unlink()  # `whole` goes on with its own
            (place / name).write_bytes(content)
        caplog.clear()
        for one, other in zip(whole, read(large, tiny_llama, streaming=True), strict=True):
            assert_same(one, other)
        assert caplog.text.count("are not used, rows are tokenised anew") == 2, name
    place = next(small.iterdir())
    (place / "tokens.bin").write_bytes(b"")  # shorter than its manifest says
    assert shards.load(place, place.name) is None


def test_an_error_or_a_full_disk_leaves_nothing(
    large: Path, small: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for owner, name in ((tempfile, "TemporaryFile"), (np, "ascontiguousarray"), (os, "fsync")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(RunError, match=r"cache folder .* can not be written: No space"):
                read(large, tiny_llama, streaming=True)
        assert not small.exists() or not list(small.iterdir()), name
    with pytest.raises(RecipeError, match="no training row has a target"):
        read(written(large, [{"text": ""}] * 20), tiny_llama, streaming=True, packing=False)
    assert len(list(small.iterdir())) <= 1


KILLED = """
import os, signal, sys
from pathlib import Path
from lorakit.data import shards

def make(store):
    store.growing("tokens", "int32").append(__import__("numpy").arange(1000, dtype="int32"))
    os.kill(os.getpid(), signal.SIGKILL)

shards.kept("0" * 64, make)
"""


def test_what_a_killed_process_leaves_is_removed(
    large: Path, small: Path, tiny_llama: Path
) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED], check=False)
    assert done.returncode < 0
    (left,) = small.iterdir()
    assert left.name.startswith(".")
    assert shards.load(small / ("0" * 64), "0" * 64) is None
    read(large, tiny_llama, streaming=True)
    assert not left.exists()
    assert len(list(small.iterdir())) == 2


def test_least_recently_used_sets_go(
    large: Path, small: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read(large, tiny_llama, streaming=True)
    old = list(small.iterdir())
    monkeypatch.setattr(shards, "LIMIT", 10)
    read(large, tiny_llama, streaming=True, packing=False)
    assert all(place.exists() for place in old), "they were used today"
    for place in old:
        os.utime(place, (1, 1))
    read(large, tiny_llama, streaming=True, packing="documents")
    assert not any(place.exists() for place in old)


# -- commands --------------------------------------------------------------------------------------


def test_preview_looks_at_a_part(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = written(tmp_path / "rows.jsonl", TEXTS)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {{name_or_path: {tiny_llama}, task: causal-lm}}\n"
        f"data: {{name_or_path: {path}, packing: false, streaming: true}}\n"
        "method: {name: vanilla}\n",
        encoding="utf-8",
    )
    run = in_this_process(monkeypatch, capfd)
    done = run("preview", recipe)
    assert done.code == 0, done.err
    assert "of 81 training rows are looked at, from row 1 on" in done.err
    done = run("preview", recipe, "--row", "70")
    assert done.code == 0, done.err
    assert "rows.jsonl:70" in "".join(done.out.split())
