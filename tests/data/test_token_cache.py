"""The cache of tokenised rows: the very same examples without tokenising, and never those of
anything else."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from lorakit.data import token_cache
from lorakit.data.choice import choose
from lorakit.data.examples import Examples
from lorakit.data.formats import formats
from lorakit.data.labels import count_labels
from lorakit.data.load import Rows, load_rows
from lorakit.data.reading import Reader
from lorakit.data.spec import DataSpec
from lorakit.data.table import Table
from lorakit.errors import RecipeError
from lorakit.sources.resolve import Source
from tests.support.processes import end, start
from tests.support.tiny import write_jsonl

QUESTIONS = [
    {"question": f"how many hens {'and eggs ' * (i % 5)}", "answer": f"there are {i % 10}"}
    for i in range(12)
]
PAIRS = [
    {"text1": f"a film {i}", "text2": "the good plot" * (i % 3), "label": i % 2} for i in range(12)
]
SCORES = [{"text": f"a film {i}", "label": i / 7} for i in range(12)]
LINES = [{"text": "a good film and the plot is bad . " * (i % 4 + 1)} for i in range(12)]

WORTHWHILE = token_cache.WORTHWHILE


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's folder; few rows are kept too."""
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "WORTHWHILE", 0)
    return tmp_path / "cache" / "tokenised"


@pytest.fixture
def no_tokenising(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and from then on only the cache has examples."""

    def broken(*_: Any) -> Any:
        raise AssertionError("tokenised again")

    def start() -> None:
        for form in formats():
            monkeypatch.setattr(type(form), "read", broken)

    return start


def loaded(model: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.cls_token is not None:
        # as BERT's own
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


def read(
    rows: list[dict[str, Any]] | Table,
    tokenizer: Any,
    length: int = 16,
    lines: bool = False,
    validate: bool = False,
    **keys: Any,
) -> Examples:
    """The examples of these rows, as a fresh command reads them; `validate`: as validation rows."""
    data = Table.from_list(rows) if isinstance(rows, list) else rows
    spec = DataSpec.model_validate({"name_or_path": "./data", **keys})
    labels = count_labels(data, spec) if "label" in data.column_names else None
    task = "causal-lm" if labels is None else "sequence-classification"
    chosen = choose(spec, task, data.column_names)
    reader = Reader(labels, chosen, tokenizer, length, lambda *_: None)
    return (reader.validation if validate else reader.train)(Rows(data, data, lines))


def assert_same(a: Examples, b: Examples) -> None:
    for field in dataclasses.fields(Examples):
        one, other = getattr(a, field.name), getattr(b, field.name)
        assert (one is None) == (other is None), field.name
        if one is not None:
            assert (one.dtype, one.shape) == (other.dtype, other.shape), field.name
            assert one.tobytes() == other.tobytes(), field.name


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


CASES: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "pairs with token types and classes": ("tiny_bert", PAIRS, {}),
    "values": ("tiny_bert", SCORES, {}),
    "prompts, some cut": ("tiny_llama", QUESTIONS, {"length": 10}),
    "text in windows": ("tiny_llama", LINES, {"stride": 5, "validate": True}),
    "lines": ("tiny_llama", LINES, {"lines": True, "packing": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_hit_gives_the_same_bits(
    case: str, folder: Path, no_tokenising: Callable[[], None], request: pytest.FixtureRequest
) -> None:
    model, rows, options = CASES[case]
    path = request.getfixturevalue(model)
    plain = read(rows, loaded(path), cache=False, **options)
    assert files(folder) == []
    first = read(rows, loaded(path), **options)
    (file,) = files(folder)
    no_tokenising()
    again = read(rows, loaded(path), **options)
    assert_same(plain, first)
    assert_same(plain, again)
    assert files(folder) == [file]


def test_a_hit_does_not_depend_on_what_the_tokenizer_did_before(
    folder: Path, tiny_llama: Path, no_tokenising: Callable[[], None]
) -> None:
    read(QUESTIONS, loaded(tiny_llama))
    no_tokenising()
    used = loaded(tiny_llama)
    used(["a film", "a"], truncation=True, max_length=1)
    read(QUESTIONS, used)


def test_progress_ends_with_all_rows(tiny_llama: Path) -> None:
    data = Table.from_list(QUESTIONS)
    for _ in range(2):
        seen: list[tuple[int, int]] = []
        chosen = choose(DataSpec(name_or_path="./data"), "causal-lm", data.column_names)
        reader = Reader(None, chosen, loaded(tiny_llama), 16, lambda *now, to=seen: to.append(now))
        reader.train(Rows(data, data))
        assert seen[-1] == (12, 12)


# -- what is another result ------------------------------------------------------------------------


def changed(rows: list[dict[str, Any]], row: int, **values: Any) -> list[dict[str, Any]]:
    return [{**content, **values} if i == row else content for i, content in enumerate(rows)]


OTHERS: dict[str, dict[str, Any]] = {
    "one character": {"rows": changed(QUESTIONS, 11, answer="there are 2")},
    "order": {"rows": QUESTIONS[::-1]},
    "a row less": {"rows": QUESTIONS[:-1]},
    "the first rows": {"max_train_samples": 5},
    "a prompt template": {"prompt": "Question: {question}", "completion": "{answer}"},
    "loss_on": {"loss_on": "all"},
    "another format": {"format": "text", "text_columns": "question"},
    "length": {"length": 15},
}


@pytest.mark.parametrize("change", OTHERS)
def test_another_result_is_not_taken(change: str, folder: Path, tiny_llama: Path) -> None:
    other = dict(OTHERS[change])
    rows = other.pop("rows", QUESTIONS)
    first = read(QUESTIONS, loaded(tiny_llama))
    plain = read(rows, loaded(tiny_llama), cache=False, **other)
    # what is there would be wrong; 15 tokens are enough
    assert change == "length" or first.digest() != plain.digest()
    assert_same(read(rows, loaded(tiny_llama), **other), plain)
    assert len(files(folder)) == 2


@pytest.mark.parametrize(
    "change", [{"stride": 4}, {"stride": None}, {"lines": True}, {"packing": False, "stride": None}]
)
def test_other_windows_are_not_taken(
    change: dict[str, Any], folder: Path, tiny_llama: Path
) -> None:
    options = {"stride": 5, "validate": True}
    read(LINES, loaded(tiny_llama), **options)
    plain = read(LINES, loaded(tiny_llama), **{**options, **change}, cache=False)
    assert_same(read(LINES, loaded(tiny_llama), **{**options, **change}), plain)
    assert len(files(folder)) == 2


def test_another_tokenizer_is_not_taken(folder: Path, tiny_bert: Path) -> None:
    def right(tokenizer: Any) -> Any:
        return tokenizer

    def added(tokenizer: Any) -> Any:
        tokenizer.add_tokens(["film plot"])
        return tokenizer

    def cut_on_the_left(tokenizer: Any) -> Any:
        tokenizer.truncation_side = "left"
        return tokenizer

    def without_types(tokenizer: Any) -> Any:
        tokenizer.model_input_names = ["input_ids"]
        return tokenizer

    rows = [{"sentence": "a good film plot and the cast", "label": i % 2} for i in range(4)]
    found = []
    for i, change in enumerate((right, added, cut_on_the_left, without_types), 1):
        examples = read(rows, change(loaded(tiny_bert)), length=5)
        assert_same(examples, read(rows, change(loaded(tiny_bert)), length=5, cache=False))
        assert len(files(folder)) == i
        found.append(examples.digest())
    assert len(set(found)) == 4


def test_other_names_of_classes_are_not_taken(folder: Path, tiny_bert: Path) -> None:
    tokenizer = loaded(tiny_bert)
    arrow = pa.Table.from_pylist(PAIRS)
    digests = set()
    for names in (["no", "yes"], ["yes", "no"]):
        named = Table.from_arrow(arrow, class_names={"label": names})
        spec = DataSpec(name_or_path="./data")
        labels = count_labels(Table.from_arrow(arrow, class_names={"label": ["no", "yes"]}), spec)
        chosen = choose(spec, "sequence-classification", named.column_names)
        reader = Reader(labels, chosen, tokenizer, 16, lambda *_: None)
        digests.add(reader.train(Rows(named, named)).digest())
    assert len(digests) == len(files(folder)) == 2  # the same numbers, which mean other classes
    swapped = dataclasses.replace(reader, labels=dataclasses.replace(labels, names=["yes", "no"]))
    assert swapped.train(Rows(named, named)).digest() in digests
    assert len(files(folder)) == 3


def test_rows_are_told_by_their_content(folder: Path, tiny_llama: Path) -> None:
    tokenizer, data = loaded(tiny_llama), Table.from_list(QUESTIONS)
    expected = read(QUESTIONS[4:8], tokenizer)
    parts = [Table.from_list(QUESTIONS[4:6]), Table.from_list(QUESTIONS[6:8])]
    for same in (
        data.select(range(4, 8)),
        data.select([4, 6, 5, 7]).select([0, 2, 1, 3]),
        Table.joined(parts),
    ):
        found = read(same, tokenizer)
        assert found.row_ids.tolist() == same.row_numbers.tolist()  # which are not kept
        assert_same(dataclasses.replace(found, row_ids=expected.row_ids), expected)
        assert len(files(folder)) == 1
    shuffled = data.select([5, 4, 6, 7])
    assert_same(read(shuffled, tokenizer), read(shuffled, tokenizer, cache=False))
    assert len(files(folder)) == 2


def test_a_file_that_changes_under_its_name(folder: Path, tmp_path: Path, tiny_llama: Path) -> None:
    path = tmp_path / "rows.jsonl"
    spec = DataSpec.model_validate({"name_or_path": str(path)})
    found = []
    for digit in (1, 2):
        write_jsonl(path, changed(QUESTIONS, 0, answer=f"there are {digit}"))
        os.utime(path, (digit, digit))
        rows = load_rows(Source(str(path), str(path), "local", str(path)), spec, "causal-lm")
        found.append(read(rows.train, loaded(tiny_llama)))
    assert (found[0].tokens != found[1].tokens).sum() == 1
    assert len(files(folder)) == 2


# -- the folder ------------------------------------------------------------------------------------


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda good, other: b"",
        lambda good, other: good[: len(good) // 2],
        lambda good, other: good[:-1],
        lambda good, other: flipped(good, len(good) - 1),
        lambda good, other: flipped(good, len(good) // 2),
        lambda good, other: b"\xff" * len(good),
        lambda good, other: other,
    ],
    ids=["empty", "half", "a byte less", "last bit", "a bit", "noise", "another's"],
)
def test_a_damaged_file_is_made_anew(
    damage: Callable[[bytes, bytes], bytes],
    folder: Path,
    tiny_llama: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = read(QUESTIONS, loaded(tiny_llama))
    (file,) = files(folder)
    good = file.read_bytes()
    read(QUESTIONS[:5], loaded(tiny_llama))
    (other,) = set(files(folder)) - {file}
    file.write_bytes(damage(good, other.read_bytes()))
    caplog.clear()
    assert_same(read(QUESTIONS, loaded(tiny_llama)), expected)
    assert token_cache.load(file, file.stem) is not None
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_every_bit_of_a_file_counts(
    folder: Path, tiny_llama: Path, no_tokenising: Callable[[], None]
) -> None:
    expected = read(QUESTIONS[:3], loaded(tiny_llama))
    (file,) = files(folder)
    good = file.read_bytes()
    key = file.stem
    no_tokenising()
    for place in range(len(good)):
        file.write_bytes(flipped(good, place))
        found = token_cache.load(file, key)
        if found is not None:  # a bit that says nothing, as a blank in the header
            assert_same(found[0], expected)
            assert found[1] == 0


def test_a_folder_that_can_not_be_written_is_no_error(folder: Path, tiny_llama: Path) -> None:
    folder.parent.write_text("a file where the folder should be")
    assert_same(
        read(QUESTIONS, loaded(tiny_llama)), read(QUESTIONS, loaded(tiny_llama), cache=False)
    )


def test_the_least_recently_used_files_go(
    folder: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = loaded(tiny_llama)
    made: list[Path] = []

    def make(first: int) -> None:
        read(QUESTIONS[first : first + 6], tokenizer)
        new = set(files(folder)) - set(made)
        for file in new:
            made.append(file)
            os.utime(file, (1000 + first, 1000 + first))

    for first in range(3):
        make(first)
    read(QUESTIONS[:6], tokenizer)  # the oldest, used again: now the newest
    # less than a file
    monkeypatch.setattr(token_cache, "LIMIT", sum(file.stat().st_size for file in made) + 200)
    make(3)
    assert set(files(folder)) == {made[0], made[2], made[3]}
    monkeypatch.setattr(token_cache, "LIMIT", 10)
    make(4)
    assert files(folder) == [made[4]]  # larger than the limit, and still there


def test_few_rows_are_not_kept(
    folder: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Table.from_list(QUESTIONS)
    monkeypatch.setattr(token_cache, "WORTHWHILE", data.nbytes)
    for few in (data.select(range(11)), data.select([0, 3, 5])):
        read(few, loaded(tiny_llama))
        assert files(folder) == []
    read(data, loaded(tiny_llama))
    assert len(files(folder)) == 1


def test_tokenizers_that_draw_by_chance_or_can_not_be_known_are_not_kept(
    folder: Path, tiny_llama: Path
) -> None:
    class Own(type(loaded(tiny_llama))):  # type: ignore[misc]
        """A tokenizer with code of its own, which nobody has hashed."""

    read(QUESTIONS, Own.from_pretrained(tiny_llama))
    vocabulary = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz0123456789 ")}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], dropout=0.5))
    plain = loaded(tiny_llama)
    read(QUESTIONS, type(plain)(tokenizer_object=backend, eos_token="a"), length=64)
    assert files(folder) == []
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    read(QUESTIONS, type(plain)(tokenizer_object=backend, eos_token="a"), length=64)
    assert len(files(folder)) == 1


# -- what is said ----------------------------------------------------------------------------------


def test_rows_left_out_are_told_on_a_hit_too(
    tiny_llama: Path, caplog: pytest.LogCaptureFixture, no_tokenising: Callable[[], None]
) -> None:
    with caplog.at_level(logging.INFO, "lorakit"):
        read(QUESTIONS, loaded(tiny_llama), length=7)
        # whoever ran before may have left handlers, each of which is told
        first = set(caplog.messages)
        caplog.clear()
        no_tokenising()
        read(QUESTIONS, loaded(tiny_llama), length=7)
    assert sorted(message[:40] for message in first) == [
        "3 of 12 training rows have more than 7 t",
        "6 of 12 training rows have no target wit",
    ]
    assert set(caplog.messages) == first


def test_errors_are_the_same_the_second_time(
    folder: Path, tiny_llama: Path, tiny_bert: Path
) -> None:
    cases: list[Callable[[], Examples]] = [
        lambda: read(QUESTIONS, loaded(tiny_llama), length=1),  # no examples left
        lambda: read(changed(QUESTIONS, 3, answer=None), loaded(tiny_llama)),
        lambda: read(QUESTIONS, loaded(tiny_llama), prompt="{nothing}", completion="{answer}"),
        lambda: read(changed(PAIRS, 3, label=None), loaded(tiny_bert)),
    ]
    for case in cases:
        said = []
        for _ in range(2):
            with pytest.raises(RecipeError) as caught:
                case()
            said.append(str(caught.value))
        assert said[0] == said[1]
    # at most that there are none
    assert np.sum([file.stat().st_size for file in files(folder)]) < 1000


# -- a whole run -----------------------------------------------------------------------------------


def test_runs_end_in_the_same_bytes(
    call: Callable[..., str],
    tiny_llama: Path,
    tmp_path: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(token_cache, "WORTHWHILE", WORTHWHILE)  # as in the process
    monkeypatch.setenv("LORAKIT_KERNELS", "torch")  # nothing is compiled for a cache of one test
    data = tmp_path / "data"
    data.mkdir()
    for split, count in (("train", 1500), ("validation", 10)):
        rows = [
            {"question": f"how many hens {'and eggs ' * (i % 40 + 40)} ?", "answer": f"{i % 10}"}
            for i in range(count)
        ]
        write_jsonl(data / f"{split}.jsonl", rows)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{name_or_path: {tiny_llama}, task: causal-lm}}\ndata: {{name_or_path:"
        f" {data}}}\nmethod: {{name: vanilla, r: 4}}\ntrain: {{max_steps: 3,"
        " per_device_train_batch_size: 4, learning_rate: 1e-2}\noutput_dir: cold\n"
    )
    monkeypatch.chdir(tmp_path)
    call("train", recipe)
    (file,) = files(folder)
    os.utime(file, (1000, 1000))
    done = end(start(tmp_path, "train", recipe, "output_dir=warm"))
    assert done.code == 0, done.err
    assert files(folder) == [file]
    assert file.stat().st_mtime > 1000, "the second run did not use it"
    names = sorted(path.name for path in (tmp_path / "cold" / "adapter").iterdir())
    assert "adapter_model.safetensors" in names
    for name in names:
        assert (tmp_path / "cold/adapter" / name).read_bytes() == (
            tmp_path / "warm/adapter" / name
        ).read_bytes(), name
    call("train", recipe, "--resume", "auto", "data.cache=false")  # a key that may differ
