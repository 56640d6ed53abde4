"""From files to batches: which rows, which columns, which tokens are targets, and that none is lost
or seen twice."""

from __future__ import annotations

import csv
import itertools
import json
import logging
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from lorakit.data.batches import (
    IGNORED,
    StepOrder,
    batch_tokens,
    collate,
    micro_batches,
    steps_per_epoch,
)
from lorakit.data.choice import choose, recorded
from lorakit.data.columns import field_text_lists, render, text_columns
from lorakit.data.examples import Examples
from lorakit.data.formats import Question, detect_format, format_of
from lorakit.data.formats.prompt_completion import completions, prompts
from lorakit.data.labels import Labels, count_labels, label_ids
from lorakit.data.load import Loaded, Rows, load_rows
from lorakit.data.readers import read_file
from lorakit.data.reading import Reader
from lorakit.data.spec import DataSpec
from lorakit.data.table import Table
from lorakit.data.tokenise import prompt_tokens
from lorakit.errors import RecipeError
from lorakit.models.load import load_model
from lorakit.models.spec import ModelSpec
from lorakit.models.tokenizer import load_tokenizer
from lorakit.sources.resolve import Source
from lorakit.training.metrics import evaluate
from tests.support.tiny import GOOD, VOCABULARY, write_jsonl

EOS = VOCABULARY["[EOS]"]


def spec(**keys: Any) -> DataSpec:
    return DataSpec.model_validate({"name_or_path": "./data", **keys})


def local(path: Path) -> Source:
    return Source(str(path), str(path), "local", str(path))


def load(path: Path, task: str = "sequence-classification", **keys: Any) -> Loaded:
    return load_rows(local(path), spec(**keys), task)


def rows_of(data: Table) -> list[dict[str, Any]]:
    return data.to_list()


def column(values: list[Any]) -> Table:
    return Table.from_list([{"text": "good", "label": value} for value in values])


def labels_of(values: list[Any], **keys: Any) -> Labels:
    return count_labels(column(values), spec(**keys))


@pytest.fixture
def bert_tokenizer(tiny_bert: Path) -> Any:
    return load_tokenizer(
        local(tiny_bert),
        ModelSpec.model_validate({"name_or_path": "x", "task": "sequence-classification"}),
    )


@pytest.fixture
def llama_tokenizer(tiny_llama: Path) -> Any:
    return load_tokenizer(
        local(tiny_llama), ModelSpec.model_validate({"name_or_path": "x", "task": "causal-lm"})
    )


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, "lorakit"):
        yield caplog


def build(
    data: list[dict[str, Any]],
    tokenizer: Any,
    length: int = 64,
    *,
    task: str = "causal-lm",
    lines: bool = False,
    **keys: Any,
) -> Examples:
    """The training examples of these rows."""
    rows = Rows(Table.from_list(data), Table.from_list(data), lines)
    labels = count_labels(rows.train, spec(**keys)) if task == "sequence-classification" else None
    chosen = choose(spec(**keys), task, rows.train.column_names)
    return Reader(labels, chosen, tokenizer, length, lambda *_: None).train(rows)


def tokens(examples: Examples) -> list[list[int]]:
    return [examples.tokens[a:b].tolist() for a, b in pairwise(examples.offsets)]


def prompted(data: Table, **keys: Any) -> list[str]:
    """The prompts of rows whose columns are chosen by `keys`."""
    return prompts(data, choose(spec(**keys), "causal-lm", data.column_names))


def asked(data: Table, **keys: Any) -> list[Question]:
    chosen = choose(spec(**keys), "causal-lm", data.column_names)
    return format_of(chosen).questions(data, chosen, None)


def targets(examples: Examples) -> list[list[bool]]:
    assert examples.targets is not None
    return [examples.targets[a:b].tolist() for a, b in pairwise(examples.offsets)]


def ids(text: str) -> list[int]:
    return [VOCABULARY[word] for word in text.split()]


# -- files -----------------------------------------------------------------------------------------

PLAIN = [
    {"text": "good film", "label": 1},
    {"text": 'bad, "dull" film', "label": 0},
    {"text": "a fine, cast é", "label": 1},
    {"text": "flat", "label": 0},
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows in the form that the file's name says."""
    if path.suffix == ".jsonl":
        write_jsonl(path, rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".tsv":  # as GLUE's: nothing is quoted
        path.write_text(
            "".join(
                "\t".join(map(str, row)) + "\n"
                for row in [rows[0], *(row.values() for row in rows)]
            )
        )
    else:
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("folder", [True, False])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, suffix: str, folder: bool) -> None:
    if folder:
        write_rows(tmp_path / f"train.{suffix}", PLAIN)
        write_rows(tmp_path / f"validation.{suffix}", PLAIN[:2])
        found = load(tmp_path)
        expected: list[dict[str, Any]] = (
            [{**row, "label": str(row["label"])} for row in PLAIN]
            if suffix in ("csv", "tsv")
            else PLAIN
        )
        assert rows_of(found.train) == expected
        assert rows_of(found.validation) == expected[:2]
    else:
        found = load(write_rows(tmp_path / f"all.{suffix}", PLAIN))
        parts = {
            part.place(row): cells
            for part in (found.train, found.validation)
            for row, cells in enumerate(rows_of(part))
        }
        assert [parts[place]["text"] for place in sorted(parts)] == [row["text"] for row in PLAIN]
    assert not found.lines


def test_lines_of_a_text_file_are_rows_with_their_line_breaks(tmp_path: Path) -> None:
    text = "good film\n\n  bad film\nthe end of it"
    (tmp_path / "train.txt").write_text(text)
    (tmp_path / "dev.txt").write_text("flat\n")
    found = load(tmp_path, "causal-lm")
    assert found.lines
    assert "".join(found.train.cells("text").texts).rstrip("\n") == text
    assert rows_of(found.validation) == [{"text": "flat\n"}]


@pytest.mark.parametrize("alone", [True, False])
def test_validation_split_is_a_fraction_or_a_name(tmp_path: Path, alone: bool) -> None:
    rows = [{"text": f"good {i}", "label": i % 2} for i in range(20)]
    path = write_rows(tmp_path / "train.jsonl", rows)
    if not alone:
        write_rows(tmp_path / "validation.jsonl", rows[:3])
        write_rows(tmp_path / "test.jsonl", rows[:7])
    found = load(path if alone else tmp_path, validation_split=0.25)
    assert (len(found.train), len(found.validation)) == (15, 5)
    held = rows_of(found.validation)
    assert [row for row in rows if row not in held] == rows_of(found.train)
    if alone:
        with pytest.raises(RecipeError, match="no splits"):
            load(path, validation_split="test")
    else:
        assert len(load(tmp_path, validation_split="test").validation) == 7
        assert len(load(tmp_path).validation) == 3
        assert len(load(tmp_path, train_split="test").train) == 7


@pytest.mark.parametrize("name", ["validation", "dev", "valid", "val", "validation_matched"])
def test_validation_files_are_found_by_their_usual_names(tmp_path: Path, name: str) -> None:
    write_rows(tmp_path / "train.jsonl", PLAIN)
    write_rows(tmp_path / f"{name}.csv", PLAIN[:1])
    assert [row["text"] for row in rows_of(load(tmp_path).validation)] == [PLAIN[0]["text"]]


def test_a_test_split_is_never_taken_for_validation_unasked(tmp_path: Path) -> None:
    rows = [{"text": f"good {i}", "label": i % 2} for i in range(10)]
    write_rows(tmp_path / "train.jsonl", rows)
    write_rows(tmp_path / "test.jsonl", [{"text": "bad", "label": 0}])
    (held,) = rows_of(load(tmp_path).validation)
    assert held in rows


# -- columns and formats ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "keys", "expected"),
    [
        (["idx", "sentence", "label"], {}, ["sentence"]),
        (["text", "label"], {}, ["text"]),
        (["sentence1", "sentence2", "label"], {}, ["sentence1", "sentence2"]),
        (["premise", "hypothesis", "label"], {}, ["premise", "hypothesis"]),
        (["question1", "question2", "label"], {}, ["question1", "question2"]),
        (["question", "sentence", "label"], {}, ["question", "sentence"]),
        (["text", "note", "label"], {"text_columns": "note"}, ["note"]),
        (["a", "b", "label"], {"text_columns": ["b", "a"]}, ["b", "a"]),
    ],
)
def test_text_columns_are_found_by_their_usual_names_or_named(
    columns: list[str], keys: dict[str, Any], expected: list[str]
) -> None:
    assert text_columns(spec(**keys), columns) == expected


@pytest.mark.parametrize(
    ("columns", "keys", "expected"),
    [
        (["question", "answer"], {}, "prompt-completion"),
        (["prompt", "completion"], {}, "prompt-completion"),
        (["instruction", "output"], {}, "prompt-completion"),
        (["instruction", "input", "output"], {}, "alpaca"),
        (["instruction", "input", "output"], {"prompt": "{input}"}, "prompt-completion"),
        (["messages", "prompt"], {}, "chat"),
        (["conversations", "id"], {}, "sharegpt"),
        (["text"], {}, "text"),
        (["text", "label"], {"prompt": "{text}", "completion": "{label}"}, "prompt-completion"),
        (["question", "answer", "text"], {"format": "text"}, "text"),
        (["body"], {"text_columns": "body"}, "text"),
    ],
)
def test_the_format_is_told_by_the_columns(
    columns: list[str], keys: dict[str, Any], expected: str
) -> None:
    assert detect_format("causal-lm", spec(**keys), columns).name == expected
    assert detect_format("sequence-classification", spec(), columns).name == "classification"


def test_a_pair_is_read_as_a_pair(bert_tokenizer: Any) -> None:
    # as BERT's own has them
    bert_tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    rows = [{"sentence1": "good film", "sentence2": "bad song", "label": i} for i in (0, 1)]
    found = build(rows, bert_tokenizer, task="sequence-classification")
    expected = bert_tokenizer("good film", "bad song")
    assert tokens(found)[0] == expected["input_ids"]
    assert found.token_types is not None
    assert (
        found.token_types[: found.offsets[1]].tolist()
        == expected["token_type_ids"]
        == [0, 0, 0, 0, 1, 1, 1]
    )


# -- labels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "names", "classes"),
    [
        ([1, 0, 1], ["0", "1"], [1, 0, 1]),
        ([10, 2, 5, 2], ["2", "5", "10"], [2, 0, 1, 0]),
        ([-1, 1, -1], ["-1", "1"], [0, 1, 0]),
        (["no", "yes", "maybe"], ["maybe", "no", "yes"], [1, 2, 0]),
        (["10", "9", "10"], ["9", "10"], [1, 0, 1]),
        ([True, False, True], ["false", "true"], [1, 0, 1]),
        ([1.0, 0.0, 2.0], ["0", "1", "2"], [1, 0, 2]),
    ],
    ids=["ints", "gaps", "negative", "strings", "numbers in strings", "bools", "whole floats"],
)
def test_labels_become_classes(values: list[Any], names: list[str], classes: list[int]) -> None:
    found = labels_of(values)
    assert found == Labels(names)
    data = column(values)
    assert label_ids(data, found, spec(), "training").tolist() == classes


def test_labels_of_a_hub_data_set_keep_their_names_and_order() -> None:
    def hub(labels: list[int]) -> Table:
        arrow = pa.table({"text": ["good"] * len(labels), "label": labels})
        return Table.from_arrow(arrow, class_names={"label": ["worse", "better"]})

    data = hub([1, 0])
    found = count_labels(data, spec())
    assert found == Labels(["worse", "better"])
    assert label_ids(data, found, spec(), "training").tolist() == [1, 0]
    # The run's labels, but from a plain file of names.
    plain = column(["better"])
    assert label_ids(plain, found, spec(), "validation").tolist() == [1]
    with pytest.raises(RecipeError, match="not labelled"):
        count_labels(hub([-1]), spec())


@pytest.mark.parametrize(
    ("values", "keys"), [([0.5, 3.0], {}), ([1, 5], {"problem_type": "regression"})]
)
def test_fractions_or_a_word_in_the_recipe_make_a_regression(
    values: list[float], keys: dict[str, Any]
) -> None:
    found = labels_of(values, **keys)
    assert found.regression
    assert found.count == 1
    targets = label_ids(column(values), found, spec(**keys), "training")
    assert targets.dtype == np.float32
    assert targets.tolist() == values


def test_labels_are_counted_from_all_training_rows(bert_tokenizer: Any) -> None:
    rows = [{"text": "good", "label": i} for i in range(6)]
    data = Table.from_list(rows)
    keys = {"max_train_samples": 2, "max_eval_samples": 6}
    labels = count_labels(data, spec(**keys))
    assert labels.count == 6
    chosen = choose(spec(**keys), "sequence-classification", data.column_names)
    reader, rows_of = Reader(labels, chosen, bert_tokenizer, 64, lambda *_: None), Rows(data, data)
    both = reader.train(rows_of), reader.validation(rows_of)
    assert [len(part) for part in both] == [2, 6]
    assert both[1].labels is not None
    assert both[1].labels.tolist() == list(range(6))


# -- templates and targets -------------------------------------------------------------------------


def test_templates_fill_columns_and_keep_doubled_braces() -> None:
    data = Table.from_list([{"question": "how {many}", "n": 3}, {"question": "q", "n": 4}])
    assert render("Q: {question} {{n}} {n}{n}", "data.prompt", data) == [
        "Q: how {many} {n} 33",
        "Q: q {n} 44",
    ]
    assert render("nothing", "data.prompt", data) == ["nothing", "nothing"]
    for wrong, words in (
        ("{qestion}", "no column `qestion`"),
        ("{", "not a template"),
        ("{}", "no column ``"),
    ):
        with pytest.raises(RecipeError, match=words) as caught:
            render(wrong, "data.prompt", data)
        assert caught.value.problems[0].key == "data.prompt"


@pytest.mark.parametrize("wrong", ["{question.upper}", "{question[0]}", "{question!r}", "{n:>8}"])
def test_templates_take_plain_columns_only(wrong: str) -> None:
    """What str.format could do beside is refused, never silently left out."""
    data = Table.from_list([{"question": "how", "n": 3}])
    with pytest.raises(RecipeError):
        render(wrong, "data.prompt", data)


SQUAD = [
    {
        "context": "c",
        "question": "q",
        "answers": {"text": ["one", "the one"], "answer_start": [3, 5]},
        "tags": ["x", "y"],
    },
    {
        "context": "d",
        "question": "r",
        "answers": {"text": ["two"], "answer_start": [4]},
        "tags": ["z", "w"],
    },
]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{answers[text][0]}", ["one", "two"]),
        ("{tags[1]} {{tags[1]}} {question}", ["y {tags[1]} q", "w {tags[1]} r"]),
        ("at {answers[answer_start][0]}:{answers[answer_start][0]}", ["at 3:3", "at 4:4"]),
    ],
)
def test_templates_reach_into_lists_and_mappings_as_str_format_does(
    template: str, expected: list[str]
) -> None:
    assert render(template, "data.completion", Table.from_list(SQUAD)) == expected
    assert [template.format(**row) for row in SQUAD] == expected


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{answers[txt][0]}", ["row 1 has no `txt` in `answers`", "text, answer_start", "`text`"]),
        ("{answers[text][1]}", ["row 2 has no `1` in `answers[text]`, a list of 1"]),
        ("{answers[text][-1]}", ["no `-1` in `answers[text]`"]),
        ("{answers[text]}", ["row 1 has a list in `answers[text]`", "text in every row"]),
        ("{question[0]}", ["row 1 has a string in `question`"]),
        ("{answer[text][0]}", ["no column `answer`", "`answers`"]),
        ("{answers.text}", ["neither a column nor an item", "answers[text][0]"]),
        ("{answers[text][0].upper}", ["neither a column nor an item"]),
        ("{answers[text", ["not a template"]),
    ],
)
def test_a_wrong_path_into_a_column_is_told_with_its_place(template: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        render(template, "data.completion", Table.from_list(SQUAD))
    assert caught.value.problems[0].key == "data.completion"
    for word in words:
        assert word in str(caught.value)


def test_a_column_may_be_named_like_a_path() -> None:
    data = Table.from_list([{"a.b": "x", "c[0]": "y"}])
    assert render("{a.b}{c[0]}", "data.prompt", data) == ["xy"]


def test_questions_have_the_references_of_all_rows_with_their_prompt() -> None:
    rows = [("p", "one"), ("q", "two"), ("p", "three"), ("p", "one")]
    data = Table.from_list([{"prompt": p, "completion": c} for p, c in rows])
    assert asked(data) == [Question("p", ["one", "three"]), Question("q", ["two"])]


def test_references_are_read_from_the_field_that_the_recipe_names() -> None:
    data = Table.from_list(SQUAD)
    squad = {"prompt": "{context} {question}", "references": "answers[text]"}
    assert asked(data, **squad) == [Question("c q", ["one", "the one"]), Question("d r", ["two"])]
    assert field_text_lists(data, "question", "data.references") == [["q"], ["r"]]
    empty = Table.from_list([SQUAD[0], SQUAD[1] | {"answers": {"text": [], "answer_start": []}}])
    for wrong, rows, words in (
        ("answers[text]", empty, "row 2 has an empty list in"),
        ("{answers[text]}", data, "neither a column nor an item"),
        ("answer", data, "no column `answer`"),
        ("answers", data, "row 1 has a mapping in `answers`"),
    ):
        with pytest.raises(RecipeError, match=words) as caught:
            asked(rows, prompt="{question}", references=wrong)
        assert caught.value.problems[0].key == "data.references"
    with pytest.raises(RecipeError, match="the prompt of row 1 is empty"):
        asked(Table.from_list([{"prompt": "", "completion": "x"}]))


@pytest.mark.parametrize("ends", [False, True])
def test_prompts_are_tokenised_for_generation_as_for_training(
    llama_tokenizer: Any, ends: bool
) -> None:
    if ends:  # as T5's tokenizer, which closes every text
        closing = TemplateProcessing("$A [EOS]", special_tokens=[("[EOS]", EOS)])
        llama_tokenizer.backend_tokenizer.post_processor = closing
    rows = [{"question": "how many eggs ?", "answer": "3 eggs ."}, {"question": "?", "answer": "9"}]
    found = build(rows, llama_tokenizer)
    prompts = prompt_tokens(llama_tokenizer, [row["question"] for row in rows])
    assert prompts == [ids("how many eggs ?"), ids("?")]
    for prompt, row, marks in zip(prompts, tokens(found), targets(found), strict=True):
        assert row[: marks.index(True)] == prompt


def test_exactly_the_completion_and_its_end_are_targets(llama_tokenizer: Any) -> None:
    rows = [{"question": "how many eggs ?", "answer": "3 eggs ."}, {"question": "?", "answer": "9"}]
    found = build(rows, llama_tokenizer)
    assert tokens(found) == [[*ids("how many eggs ? 3 eggs ."), EOS], [*ids("? 9"), EOS]]
    batch = collate(found, np.arange(2), pad_id=EOS)
    assert batch.labels.tolist() == [
        [IGNORED] * 4 + [*ids("3 eggs ."), EOS],
        [IGNORED, *ids("9"), EOS] + [IGNORED] * 5,
    ]
    assert batch.targets == 6
    assert batch.tokens == 11


def test_templates_are_what_is_tokenised(llama_tokenizer: Any) -> None:
    keys = {"prompt": "Question: {question} Answer: ", "completion": "there are {n} ."}
    found = build([{"question": "how many ?", "n": 3}], llama_tokenizer, **keys)
    assert tokens(found) == [[*ids("Question: how many ? Answer: there are 3 ."), EOS]]
    assert targets(found) == [[False] * 5 + [True] * 5]


def test_loss_on_all_makes_every_token_but_the_first_a_target(llama_tokenizer: Any) -> None:
    found = build(
        [{"question": "how many eggs ?", "answer": "3 eggs ."}], llama_tokenizer, loss_on="all"
    )
    assert collate(found, np.arange(1), 0).targets == 7


def test_rows_without_a_target_are_dropped_and_counted(
    llama_tokenizer: Any, warnings: pytest.LogCaptureFixture
) -> None:
    rows = [{"question": "how " * n, "answer": "3"} for n in (2, 8, 9, 20, 7)]
    found = build(rows, llama_tokenizer, length=8)
    assert found.row_ids.tolist() == [1, 5]
    assert "3 of 5 training rows have no target within 8 tokens (the first is row " in warnings.text
    assert tokens(found) == [[*ids("how how 3"), EOS], ids("how " * 7 + "3")]
    with pytest.raises(RecipeError, match="no training row has a target left"):
        build(rows[1:4], llama_tokenizer, length=8)


@pytest.mark.parametrize("lines", [False, True])
def test_packing_neither_loses_nor_repeats_a_token(llama_tokenizer: Any, lines: bool) -> None:
    rng = np.random.default_rng(0)
    words = list(VOCABULARY)[5:]
    rows = [
        {"text": " ".join(rng.choice(words, int(rng.integers(0, 40)))) + "\n"} for _ in range(2500)
    ]
    ending = [] if lines else [EOS]
    stream = [token for row in rows for token in ids(row["text"]) + ending]
    found = build(rows, llama_tokenizer, 16, lines=lines)
    pieces = tokens(found)
    assert all(len(piece) == 16 for piece in pieces[:-1])
    joined = [token for piece in pieces for token in piece]
    # A last piece of one token has nothing that it could predict.
    assert joined == (stream[:-1] if len(stream) % 16 == 1 else stream)
    assert found.targets is not None
    assert found.targets.all()


@pytest.mark.parametrize("count", [1, 7, 8, 9, 12, 13, 100])
@pytest.mark.parametrize("stride", [1, 3, 7])
def test_a_sliding_window_scores_every_token_once_with_its_context(
    llama_tokenizer: Any, stride: int, count: int
) -> None:
    length = 8
    stream = np.random.default_rng(0).integers(5, len(VOCABULARY), count).tolist()
    text = " ".join(list(VOCABULARY)[i] for i in stream)
    data = Table.from_list([{"text": text}])
    reader = Reader(
        None,
        choose(spec(stride=stride), "causal-lm", ["text"]),
        llama_tokenizer,
        length,
        lambda *_: None,
    )
    if count == 1:
        with pytest.raises(
            RecipeError, match="no validation row has a target: row 1 has a single token"
        ):
            reader.validation(Rows(data, data, lines=True))
        return
    found = reader.validation(Rows(data, data, lines=True))
    scored = []
    for number, (window, marks) in enumerate(zip(tokens(found), targets(found), strict=True)):
        begin, first = number * stride, marks.index(True)
        assert marks == [False] * first + [True] * (len(window) - first)
        assert window == stream[begin : begin + length]
        assert first == (length - stride if number else 0)
        scored += range(begin + max(first, 1), begin + len(window))
    assert scored == list(range(1, count))
    batch = collate(found, np.arange(len(found)), pad_id=EOS)
    assert batch.targets == count - 1
    # Training is as without.
    plain = Reader(
        None, choose(spec(), "causal-lm", ["text"]), llama_tokenizer, length, lambda *_: None
    )
    assert (
        reader.train(Rows(data, data, lines=True)).digest()
        == plain.train(Rows(data, data, lines=True)).digest()
    )


def test_a_sliding_window_sums_the_losses_of_the_documentations_loop(
    tiny_llama: Path, llama_tokenizer: Any
) -> None:
    """Transformers' documentation, "Perplexity of fixed-length models", with its `-100` labels."""
    task = ModelSpec.model_validate({"name_or_path": "x", "task": "causal-lm"})
    task_model, _ = load_model(local(tiny_llama), task, llama_tokenizer, None, torch.float32)
    length, stride = 16, 5
    stream = torch.from_numpy(np.random.default_rng(1).integers(5, len(VOCABULARY), (1, 61)))
    losses, end_before = 0.0, 0
    with torch.inference_mode():
        for begin in range(0, stream.shape[1], stride):
            end = min(begin + length, stream.shape[1])
            labels = stream[:, begin:end].clone()
            labels[:, : -(end - end_before)] = IGNORED
            count = int((labels[:, 1:] != IGNORED).sum())
            losses += float(task_model.model(stream[:, begin:end], labels=labels).loss) * count
            end_before = end
            if end == stream.shape[1]:
                break
    words = list(VOCABULARY)
    data = Table.from_list([{"text": " ".join(words[i] for i in stream[0].tolist())}])
    reader = Reader(
        None,
        choose(spec(stride=stride), "causal-lm", ["text"]),
        llama_tokenizer,
        length,
        lambda *_: None,
    )
    found = evaluate(task_model, reader.validation(Rows(data, data, lines=True)), ("loss",), 3)
    assert found.metrics["loss"] == pytest.approx(losses / 60, rel=1e-5)


def test_a_stride_that_does_not_fit_the_length_is_refused(llama_tokenizer: Any) -> None:
    with pytest.raises(RecipeError, match="windows of 64 tokens") as caught:
        build([{"text": "good film"}], llama_tokenizer, stride=64)
    assert caught.value.problems[0].key == "data.stride"


@pytest.mark.parametrize(
    "keys",
    [
        {"stride": 8, "max_seq_length": 8},
        {"stride": 4, "packing": False},
        {"stride": 4, "format": "classification"},
        {"references": "answers", "format": "text"},
    ],
)
def test_keys_that_contradict_each_other_are_refused_by_the_recipe(keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"stride|references"):
        spec(**keys)


def test_a_packed_piece_says_which_row_it_begins_in(llama_tokenizer: Any) -> None:
    rows = [{"text": "good"}, {"text": "bad " * 6}, {"text": "film"}, {"text": "cast " * 3}]
    found = build(rows, llama_tokenizer, 4)  # with their ends, 2 + 7 + 2 + 4 tokens
    assert found.row_ids.tolist() == [1, 2, 2, 4]


def test_text_without_packing_is_a_row_an_example_cut_to_length(llama_tokenizer: Any) -> None:
    rows = [{"text": "good film"}, {"text": "bad " * 9}, {"text": "flat"}]
    found = build(rows, llama_tokenizer, 4, packing=False)
    assert tokens(found) == [[*ids("good film"), EOS], ids("bad " * 4), [*ids("flat"), EOS]]


def test_long_texts_are_cut_with_their_closing_token(bert_tokenizer: Any) -> None:
    rows = [{"text": "good " * 100, "label": 0}, {"text": "bad", "label": 1}]
    found = build(rows, bert_tokenizer, 8, task="sequence-classification")
    assert [len(row) for row in tokens(found)] == [8, 3]
    assert tokens(found)[0][-1] == VOCABULARY["[SEP]"]


# -- padding ---------------------------------------------------------------------------------------


def test_padding_is_told_by_length_even_where_the_pad_token_is_text(llama_tokenizer: Any) -> None:
    found = build([{"text": "good [EOS] film"}, {"text": "bad"}], llama_tokenizer, packing=False)
    batch = collate(found, np.array([0, 1]), pad_id=EOS)
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.labels.tolist() == [
        [*ids("good [EOS] film"), EOS],
        [*ids("bad"), EOS, IGNORED, IGNORED],
    ]


# -- order -----------------------------------------------------------------------------------------


def order(rows: int, size: int, seed: int, grouped: bool) -> StepOrder:
    return StepOrder(
        rows, size, seed, np.random.default_rng(0).integers(1, 50, rows) if grouped else None
    )


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("rows", "size"), [(24, 8), (25, 8), (3, 8), (1, 1), (1000, 3)])
def test_every_row_comes_exactly_once_an_epoch(rows: int, size: int, grouped: bool) -> None:
    steps, seeded = steps_per_epoch(rows, size), order(rows, size, 5, grouped)
    epochs = []
    for epoch in range(3):
        parts = [seeded.of_step(epoch * steps + i) for i in range(1, steps + 1)]
        assert all(len(part) == size for part in parts[:-1])
        epochs.append(np.concatenate(parts).tolist())
        assert sorted(epochs[-1]) == list(range(rows))
    if rows > 8:
        assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("grouped", [False, True])
def test_the_order_depends_on_seed_and_step_alone(grouped: bool) -> None:
    """Not on what was asked for before: a run may be resumed anywhere."""
    forward = order(100, 8, 0, grouped)
    expected = {step: forward.of_step(step).tolist() for step in range(1, 40)}
    other = order(100, 8, 0, grouped)
    for step in np.random.default_rng(1).permutation(sorted(expected)):
        assert other.of_step(step).tolist() == expected[step]
        assert order(100, 8, 0, grouped).of_step(step).tolist() == expected[step]
    seeds = {
        tuple(
            np.concatenate([found.of_step(step) for step in range(epoch * 13 + 1, epoch * 13 + 14)])
        )
        for seed in (0, 1, 2, 2**31 - 1)
        for found in [order(100, 8, seed, grouped)]
        for epoch in range(5)
    }
    assert len(seeds) == 20


def test_an_order_that_is_not_shuffled_is_that_of_the_data_in_every_epoch() -> None:
    in_turn = StepOrder(7, 3, 5, shuffled=False)
    assert [in_turn.of_step(step).tolist() for step in (1, 2, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert in_turn.of_step(5).tolist() == [3, 4, 5]


def test_an_epoch_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[int, int]] = []  # (seed, epoch)
    seeded, draw = order(100, 8, 0, True), np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: drawn.append(seed) or draw(seed))
    for step in range(1, 27):
        seeded.of_step(step)
    assert drawn == [(0, 0), (0, 1)]


def test_grouped_steps_hold_rows_of_like_length_in_no_order_of_lengths() -> None:
    rows, size = 16_007, 8
    lengths = np.random.default_rng(0).integers(1, 500, rows)
    grouped, plain = StepOrder(rows, size, 0, lengths), StepOrder(rows, size, 0)
    steps = [lengths[grouped.of_step(step)] for step in range(1, rows // size + 1)]
    # 50 steps share 500 lengths: ten each, and more or less where chance has it so.
    assert np.mean([np.ptp(step) for step in steps]) < 12
    means = np.array([step.mean() for step in steps])
    # Neither from step to step nor along the epoch, where in each mega-batch alone the correlation
    # would be 1 or -1.
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.06
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.06
    # What is left for the last step is what it would be without grouping: not the shortest rows,
    # nor the longest.
    last = rows // size + 1
    assert len(grouped.of_step(last)) == 7
    assert grouped.of_step(last).tolist() == plain.of_step(last).tolist()


def test_a_short_epoch_is_grouped_in_four_parts() -> None:
    """Were all of it sorted at once, steps would hold the same rows in every epoch."""
    lengths = np.arange(80)
    partners = [
        {tuple(sorted(StepOrder(80, 4, seed, lengths).of_step(step))) for step in range(1, 21)}
        for seed in range(2)
    ]
    assert len(partners[0] & partners[1]) < 3
    assert np.mean([max(step) - min(step) for step in partners[0]]) < 80 / 3


def test_micro_batches_partition_the_rows_of_a_step() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 40)
    rows = StepOrder(40, 23, 0).of_step(1)
    parts = micro_batches(lengths, rows, 5)
    assert sorted(np.concatenate(parts).tolist()) == sorted(rows.tolist())
    assert [len(part) for part in parts] == [5, 5, 5, 5, 3]
    # Of like length: no part reaches into the lengths of the next.
    for longer, shorter in pairwise(parts):
        assert lengths[longer].min() >= lengths[shorter].max()


def fewest_and_least(falling: list[int], size: int, limit: int, packed: float) -> tuple[int, int]:
    """(the smallest number of micro-batches within the limits, the least that their largest can
    take), of all ways to cut."""
    found = []
    for cuts in itertools.product((False, True), repeat=len(falling) - 1):
        places = [0, *(i for i, cut in enumerate(cuts, 1) if cut), len(falling)]
        parts = [np.array(falling[start:end]) for start, end in pairwise(places)]
        sizes = [batch_tokens(part, packed) for part in parts]
        if all(
            len(p) == 1 or (len(p) <= size and tokens <= limit)
            for p, tokens in zip(parts, sizes, strict=True)
        ):
            found.append(
                (
                    len(parts),
                    max([t for p, t in zip(parts, sizes, strict=True) if t <= limit], default=0),
                )
            )
    return min(found)


@pytest.mark.parametrize("packed", [0, 12, math.inf])
@pytest.mark.parametrize("seed", range(12))
def test_a_limit_of_tokens_makes_few_micro_batches_and_those_small(
    seed: int, packed: float
) -> None:
    """Against every way to cut; rows of up to 20 tokens, and limits from less than a row to more
    than all."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 20, 9)
    rows, size, limit = (
        rng.permutation(9),
        int(rng.integers(2, 7)),
        int(rng.choice([5, 21, 40, 60, 1000])),
    )
    parts = micro_batches(lengths, rows, size, limit, packed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(9))
    falling = lengths[np.concatenate(parts)]
    assert (np.diff(falling) <= 0).all()
    taken = [batch_tokens(lengths[part], packed) for part in parts]
    assert all(
        len(part) == 1 or (len(part) <= size and tokens <= limit)
        for part, tokens in zip(parts, taken, strict=True)
    )
    largest = max([tokens for tokens in taken if tokens <= limit], default=0)
    assert (len(parts), largest) == fewest_and_least(falling.tolist(), size, limit, packed)


def test_a_limit_of_tokens_by_hand() -> None:
    lengths, rows = np.array([3, 10, 4, 4, 3, 30, 3]), np.arange(7)

    def cut(size: int, limit: int | None, packed: float) -> list[list[int]]:
        return [
            lengths[part].tolist() for part in micro_batches(lengths, rows, size, limit, packed)
        ]

    assert cut(7, None, 0) == [[30, 10, 4, 4, 3, 3, 3]]
    # The row of 30 goes alone; the others could be cut into 18 and 9 tokens, but 14 are enough.
    assert cut(7, 20, math.inf) == [[30], [10, 4], [4, 3, 3, 3]]
    assert cut(3, 20, 0) == [[30], [10], [4, 4], [3, 3, 3]]
    assert cut(7, 20, 0) == [[30], [10, 4], [4, 3, 3, 3]]
    # 17 real tokens of rows that are packed, as those of up to 5 tokens are, would be 20 padded
    # ones.
    assert cut(7, 17, 5) == [[30], [10], [4, 4, 3, 3, 3]]
    assert cut(7, 17, 0) == [[30], [10], [4, 4], [3, 3, 3]]
    assert cut(7, 1, math.inf) == [[30], [10], [4], [4], [3], [3], [3]]


def test_the_digest_tells_data_apart(bert_tokenizer: Any) -> None:
    rows = [{"text": word, "label": i % 2} for i, word in enumerate(GOOD)]
    one, same = (build(rows, bert_tokenizer, task="sequence-classification") for _ in range(2))
    assert one.digest() == same.digest()
    for changed in (
        rows[:-1],
        [*rows[:-1], rows[-1] | {"label": 1}],
        [*rows[:-1], rows[-1] | {"text": "bad"}],
    ):
        assert (
            build(changed, bert_tokenizer, task="sequence-classification").digest() != one.digest()
        )


def test_tab_separated_files_have_no_quotes(tmp_path: Path) -> None:
    cells = ['"good film', "bad plot", 'so "warm"', "NA", "null"]
    text = "sentence\tlabel\n" + "".join(f"{cell}\t{i % 2}\n" for i, cell in enumerate(cells))
    (tmp_path / "train.tsv").write_text(text)
    (tmp_path / "validation.tsv").write_text(text)
    assert load(tmp_path).train.cells("sentence").texts == cells


def test_files_that_no_split_needs_are_not_read(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write_jsonl(
            tmp_path / f"{split}.jsonl",
            [{"sentence": "good film", "label": 1}, {"sentence": "bad film", "label": 0}],
        )
    (tmp_path / "notes.txt").touch()
    (tmp_path / "test.jsonl").write_text("{not json")
    assert len(load(tmp_path).train) == 2
    (tmp_path / "train.csv").write_text("sentence,label\ngood,1\n")
    with pytest.raises(RecipeError, match=r"train\.csv and train\.jsonl"):
        load(tmp_path)


# -- what a prompt is made of ----------------------------------------------------------------------


def alpaca(instruction: str, given: str | None) -> str:
    """Written out by hand from Stanford Alpaca's train.py."""
    if given is None:
        return (
            "Below is an instruction that describes a task. Write a response that appropriately"
            f" completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
        )
    return (
        "Below is an instruction that describes a task, paired with an input that provides further"
        " context. Write a response that appropriately completes the request.\n\n###"
        f" Instruction:\n{instruction}\n\n### Input:\n{given}\n\n### Response:"
    )


def test_an_input_beside_an_instruction_goes_into_the_prompt() -> None:
    rows: list[dict[str, Any]] = [
        {"instruction": "Translate {it}.", "input": "cat", "output": "Katze"},
        {"instruction": "Sing.", "input": "", "output": "La"},
        {"instruction": "Hum.", "input": None, "output": "Mm"},
        {"instruction": "Rest.", "output": "."},
    ]
    expected = [
        alpaca("Translate {it}.", "cat"),
        alpaca("Sing.", None),
        alpaca("Hum.", None),
        alpaca("Rest.", None),
    ]
    assert prompted(Table.from_list(rows), format="prompt-completion") == expected
    assert prompted(Table.from_list(rows), prompt="{instruction}") == [
        row["instruction"] for row in rows
    ]
    dolly = [{"instruction": "Count.", "context": "one two", "response": "2"}]
    assert prompted(Table.from_list(dolly)) == [alpaca("Count.", "one two")]


@pytest.mark.parametrize("beside", ["context", "passage"])
def test_a_context_beside_a_question_goes_before_it(beside: str) -> None:
    rows = [
        {"question": "is it even", "answer": True, beside: "It is 2."},
        {"question": "why", "answer": "so", beside: ""},
    ]
    data = Table.from_list(rows)
    assert prompted(data) == ["It is 2.\n\nis it even", "why"]
    assert completions(data, spec()) == ["true", "so"]
    answered = prompted(data, completion=f"{{{beside}}}")
    assert answered == ["is it even", "why"], "what is answered is not given away"


def test_an_empty_cell_of_a_csv_file_is_nothing_where_it_stands_alone(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,note,completion\np,,c\nq,n,\n")
    data = read_file(tmp_path / "a.csv")
    assert render("{prompt} ({note})", "data.prompt", data) == ["p ()", "q (n)"]
    with pytest.raises(
        RecipeError, match=r"row 2 \(.*a\.csv:3\) has an empty cell in `completion`"
    ):
        completions(data, spec())


def test_columns_with_text_that_nothing_reads_are_named_once(
    tmp_path: Path, warnings: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"id": i, "prompt": f"p{i}", "completion": "c", "title": "t", "tags": ["x"], "score": 0.5}
        for i in range(10)
    ]
    load(write_rows(tmp_path / "a.jsonl", rows), "causal-lm")
    said = [record.message for record in warnings.records if "nothing reads" in record.message]
    assert len(said) == 1
    assert said[0].startswith("columns with text that nothing reads: title, tags (")


def test_the_label_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="`label` is the label column") as caught:
        load(write_rows(tmp_path / "a.jsonl", PLAIN), text_columns=["text", "label"])
    assert caught.value.problems[0].key == "data.text_columns"


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"packing": False}, "data.packing"),
        ({"stride": 4}, "data.stride"),
        ({"text_columns": "prompt"}, "data.text_columns"),
        ({"label_column": "prompt"}, "data.label_column"),
        ({"problem_type": "regression"}, "data.problem_type"),
    ],
)
def test_keys_of_another_format_are_refused_where_the_columns_tell_it(
    tmp_path: Path, keys: dict[str, Any], key: str
) -> None:
    path = write_rows(
        tmp_path / "a.jsonl", [{"prompt": f"p{i}", "completion": "c"} for i in range(4)]
    )
    with pytest.raises(
        RecipeError, match="has no effect: rows are read as prompt-completion"
    ) as caught:
        load(path, "causal-lm", **keys)
    assert caught.value.problems[0].key == key


@pytest.mark.parametrize("names", [["train", "validation"], ["train"], ["validation"]])
def test_all_rows_of_other_data_are_evaluated(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        write_rows(
            tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}", "label": i % 2} for i in range(20)]
        )
    found = load_rows(local(tmp_path), spec(), "sequence-classification", only_validation=True)
    assert found.validation.cells("text").texts == [f"{names[-1]} {i}" for i in range(20)]
    file = tmp_path / f"{names[-1]}.jsonl"
    assert (
        len(
            load_rows(
                local(file), spec(), "sequence-classification", only_validation=True
            ).validation
        )
        == 20
    )
    half = load_rows(
        local(file), spec(validation_split=0.5), "sequence-classification", only_validation=True
    )
    assert len(half.validation) == 10


# -- columns are chosen once -----------------------------------------------------------------------


def two_sets(folder: Path, train: list[dict[str, Any]], validation: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    write_rows(folder / "train.jsonl", train)
    write_rows(folder / "validation.jsonl", validation)
    return folder


LABELLED = ({"label": 0}, {"label": 1})
CHOICES: dict[str, tuple[str, dict[str, str], dict[str, str], list[str], list[str]]] = {
    # name: task, columns of training, further ones of validation, what is read, what is named as
    # not read
    "a text": ("sequence-classification", {"text": "t"}, {"sentence": "s"}, ["text"], ["sentence"]),
    "no pair": (
        "sequence-classification",
        {"sentence": "s"},
        {"question": "q"},
        ["sentence"],
        ["question"],
    ),
    "labels": ("sequence-classification", {"text": "t"}, {"labels": "x"}, ["text"], ["labels"]),
    "answer": (
        "causal-lm",
        {"question": "q", "answer": "a"},
        {"response": "r"},
        ["question", "answer"],
        ["response"],
    ),
    "plain": (
        "causal-lm",
        {"instruction": "i", "output": "o"},
        {"input": "x"},
        ["instruction", "output"],
        ["input"],
    ),
    "text": (
        "causal-lm",
        {"text": "t"},
        {"prompt": "p", "completion": "c"},
        ["text"],
        ["prompt", "completion"],
    ),
}


@pytest.mark.parametrize("name", CHOICES)
def test_validation_rows_are_read_as_the_training_rows(
    name: str, tmp_path: Path, warnings: pytest.LogCaptureFixture
) -> None:
    task, columns, more, used, unused = CHOICES[name]
    labels = LABELLED if task == "sequence-classification" else ({}, {})
    train = [
        {key: f"{value}{i}" for key, value in columns.items()} | labels[i % 2] for i in range(4)
    ]
    validation = [{key: f"other {value}" for key, value in more.items()} | row for row in train]
    found = load(two_sets(tmp_path / "data", train, validation), task)
    spec = found.spec
    label = ["label"] if task == "sequence-classification" else []
    assert found.format.used_columns(spec, found.validation.column_names) == [*used, *label]
    (said,) = [
        record.getMessage() for record in warnings.records if "nothing reads" in record.getMessage()
    ]
    named = ", ".join(f"{column} (in the validation rows alone)" for column in unused)
    assert said.startswith(
        f"columns with text that nothing reads: {named} (read: {', '.join([*used, *label])};"
    )
    if spec.format == "prompt-completion":
        assert prompts(found.validation, spec) == [row[used[0]] for row in train]
        assert completions(found.validation, spec) == [row[used[1]] for row in train]


def test_both_sets_have_the_tokens_of_the_same_column(tmp_path: Path, bert_tokenizer: Any) -> None:
    train = [{"text": word, "label": i % 2} for i, word in enumerate(GOOD)]
    validation = [{"sentence": "flat", "label": 0, "labels": 1} | row for row in train]
    found = load(two_sets(tmp_path / "data", train, validation))
    labels = count_labels(found.train, found.spec)
    reader = Reader(labels, found.spec, bert_tokenizer, 16, lambda *_: None)
    trained, validated = reader.train(found), reader.validation(found)
    assert tokens(trained) == tokens(validated)
    assert trained.labels is not None
    assert validated.labels is not None
    assert trained.labels.tolist() == validated.labels.tolist()


@pytest.mark.parametrize(
    ("train", "validation", "task", "missing", "key"),
    [
        (
            {"text": "t", "label": 1},
            {"sentence": "s", "label": 1},
            "sequence-classification",
            "`text`",
            "data.text_columns",
        ),
        (
            {"text": "t", "label": 1},
            {"text": "t", "labels": 1},
            "sequence-classification",
            "`label`",
            "data.label_column",
        ),
        (
            {"text": "t", "label": 1},
            {"body": "t"},
            "sequence-classification",
            "`text`, `label`",
            "data.text_columns",
        ),
        (
            {"prompt": "p", "completion": "c"},
            {"question": "p", "completion": "c"},
            "causal-lm",
            "`prompt`",
            "data.prompt",
        ),
        (
            {"prompt": "p", "completion": "c"},
            {"prompt": "p", "answer": "c"},
            "causal-lm",
            "`completion`",
            "data.completion",
        ),
        (
            {"instruction": "p", "input": "i", "output": "c"},
            {"instruction": "p", "output": "c"},
            "causal-lm",
            "`input`",
            "data.column_map",
        ),
    ],
)
def test_a_column_that_the_validation_rows_lack_is_told(
    tmp_path: Path,
    train: dict[str, Any],
    validation: dict[str, Any],
    task: str,
    missing: str,
    key: str,
) -> None:
    other = train | {name: 0 for name in train if name == "label"}
    with pytest.raises(RecipeError) as caught:
        load(two_sets(tmp_path / "data", [train, other], [validation]), task)
    (problem,) = caught.value.problems
    assert problem.key == key
    assert f"the validation rows have no column {missing}, which" in problem.what
    assert f"they have {', '.join(validation)}" in problem.what


def test_a_choice_names_everything_and_stays_the_same() -> None:
    columns = ["instruction", "input", "output"]
    chosen = choose(spec(format="prompt-completion"), "causal-lm", columns)
    assert recorded(chosen) == {
        "format": "prompt-completion",
        "columns": None,
        "label_column": None,
        "prompt": "{instruction}",
        "beside": "input",
        "completion": "{output}",
        "column_map": None,
    }
    assert recorded(
        choose(spec(), "sequence-classification", ["question", "sentence", "label", "labels"])
    ) == {
        "format": "classification",
        "columns": ["question", "sentence"],
        "label_column": "label",
        "prompt": None,
        "beside": None,
        "completion": None,
        "column_map": None,
    }
    assert recorded(choose(spec(), "causal-lm", ["text"]))["columns"] == ["text"]


def test_a_record_comes_before_the_usual_names_and_the_recipe_before_both(
    warnings: pytest.LogCaptureFixture,
) -> None:
    record = recorded(choose(spec(), "sequence-classification", ["text", "labels"]))
    more = ["sentence", "text", "label", "labels"]
    task: str = "sequence-classification"
    assert recorded(choose(spec(), task, more, record)) == record
    assert recorded(choose(spec(text_columns="sentence"), task, more, record)) == record | {
        "columns": ["sentence"]
    }
    assert warnings.text == ""
    assert recorded(choose(spec(), task, ["review", "label"], record)) == record | {
        "columns": ["review"],
        "label_column": "label",
    }
    assert (
        "trained on `text`, which this data does not have: `review` stands in; data.text_columns"
        " names another" in warnings.text
    )
    assert "trained on `labels`, which this data does not have: `label` stands in" in warnings.text


def test_a_records_template_is_used_as_it_was(warnings: pytest.LogCaptureFixture) -> None:
    plain = recorded(choose(spec(), "causal-lm", ["instruction", "output"]))
    pairs = spec(format="prompt-completion")
    alpaca_record = recorded(choose(pairs, "causal-lm", ["instruction", "input", "output"]))
    both = Table.from_list([{"instruction": "Sing.", "input": "cat", "output": "La"}])
    alone = Table.from_list([{"instruction": "Sing.", "output": "La"}])
    assert prompts(both, choose(spec(), "causal-lm", both.column_names, plain)) == ["Sing."]
    assert prompts(both, choose(spec(), "causal-lm", both.column_names, alpaca_record)) == [
        alpaca("Sing.", "cat")
    ]
    assert warnings.text == ""
    assert prompts(alone, choose(spec(), "causal-lm", alone.column_names, alpaca_record)) == [
        alpaca("Sing.", None)
    ]
    assert "prompts have the column `input`, which this data does not have" in warnings.text


# -- splits that are not there ---------------------------------------------------------------------


@pytest.mark.parametrize(("name", "near"), [("test", None), ("my_data_train", "my_data_train")])
def test_a_folder_without_a_usual_split_names_the_key_and_what_is_there(
    tmp_path: Path, name: str, near: str | None
) -> None:
    (tmp_path / f"{name}.csv").write_text("text,label\ngood,1\nbad,0\n")
    with pytest.raises(RecipeError) as caught:
        load(tmp_path)
    (problem,) = caught.value.problems
    assert problem.what == "there is no split `train` (data.train_split)"
    assert problem.expected == f"data.train_split: one of {name}"
    assert problem.nearest == near
    with pytest.raises(RecipeError) as caught:
        load_rows(local(tmp_path), spec(), "sequence-classification", only_validation=True)
    (problem,) = caught.value.problems
    assert problem.key == "data.validation_split"
    assert problem.expected == f"data.validation_split: one of {name}"
    found = load_rows(
        local(tmp_path),
        spec(validation_split=name),
        "sequence-classification",
        only_validation=True,
    )
    assert len(found.validation) == 2


# -- labels before the draw ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "key", "what", "expected"),
    [
        (
            list(range(20)),
            "data.problem_type",
            "each of the 20 rows has a label of its own",
            "data.problem_type: regression",
        ),
        (
            [f" {i}.5 " for i in range(20)],
            "data.problem_type",
            "each of the 20 rows has a label of its own",
            "regression, if",
        ),
        (
            [f"{i},5" for i in range(20)],
            "data.problem_type",
            "a decimal comma (0,5 in row 1",
            "a decimal point",
        ),
        (
            [f"n{i}" for i in range(20)],
            "data.label_column",
            "each of the 20 rows has a label of its own",
            "several rows have",
        ),
        ([[i] for i in range(20)], "data.label_column", "row 1", "one label in every row"),
        (
            [*range(10), *"abcdefghij"],
            "data.problem_type",
            "10 numbers and 10 strings",
            "or regression",
        ),
        ([*range(19), None], "data.label_column", "row 20", "a label in every row"),
    ],
)
def test_what_is_wrong_with_labels_is_told_before_rows_are_drawn(
    tmp_path: Path, labels: list[Any], key: str, what: str, expected: str
) -> None:
    path = write_rows(
        tmp_path / "a.jsonl",
        [{"text": f"film {i}", "label": label} for i, label in enumerate(labels)],
    )
    with pytest.raises(RecipeError) as caught:
        load(path)
    (problem,) = caught.value.problems
    assert problem.key == key
    assert what in problem.what
    assert expected in (problem.expected or "")


def test_numbers_that_are_all_different_are_drawn_where_they_are_to_be_predicted(
    tmp_path: Path,
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": f"film {i}", "label": i} for i in range(20)])
    assert len(load(path, problem_type="regression").validation) == 2


# -- rows without a target -------------------------------------------------------------------------


def test_an_empty_row_is_named_and_not_the_length(llama_tokenizer: Any) -> None:
    with pytest.raises(
        RecipeError, match=r"no training row has a target: row 1 has an empty prompt and completion"
    ) as caught:
        build([{"question": "", "answer": ""}], llama_tokenizer)
    assert caught.value.problems[0].key == "data.completion"
    for packing in (None, False):
        with pytest.raises(
            RecipeError, match=r"no training row has a target: row 1 has an empty text"
        ) as caught:
            build([{"text": ""}], llama_tokenizer, packing=packing)
        assert caught.value.problems[0].key == "data.text_columns"


def test_empty_rows_and_empty_prompts_are_counted(
    llama_tokenizer: Any, warnings: pytest.LogCaptureFixture
) -> None:
    rows = [("how ?", "3"), ("", ""), ("", "3 eggs"), ("", "9")]
    found = build(
        [{"question": prompt, "answer": answer} for prompt, answer in rows], llama_tokenizer
    )
    assert found.row_ids.tolist() == [1, 3, 4]
    assert collate(found, np.arange(3), EOS).targets == 2 + 2 + 1
    said = [record.getMessage() for record in warnings.records]
    assert (
        sum("1 of 4 training rows (the first is row 2) are empty" in message for message in said)
        == 1
    )
    assert (
        sum(
            "2 of 4 training rows (the first is row 3) have an empty prompt" in message
            for message in said
        )
        == 1
    )
