"""The preview of a recipe's rows: tokens and roles beside those worked out by hand, and beside the
examples that training gets."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorakit.data.preview import Preview, ShownRow
from lorakit.errors import RecipeError, UsageError
from lorakit.recipes.recipe import Recipe, recipe_of
from lorakit.report.logged import logged_progress
from lorakit.runs.preview import preview
from lorakit.runs.session import find_sources, read_inputs
from tests.support.tiny import VOCABULARY, write_jsonl

LETTERS = {"context": "c", "target": "t", "cut": "x"}
Make = Callable[..., Recipe]
SUM = {"prompt": "how many hens ?", "completion": " 2 hens ."}
LONG = {"prompt": "how many hens ?", "completion": " there are 2 hens ."}
TALK = {"prompt": " ".join(["how"] * 9), "completion": " 2"}
PAIR = {"sentence1": "good film and plot", "sentence2": "bad", "label": 1}


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Path, tiny_bert: Path) -> Make:
    """A recipe for these training and validation rows; rows with a label are for a classifier."""

    def made(train: list[Any], validation: list[Any] | None = None, **data: Any) -> Recipe:
        folder = tmp_path / "rows"
        folder.mkdir()
        write_jsonl(folder / "train.jsonl", train)
        write_jsonl(folder / "validation.jsonl", validation or train)
        labelled = "label" in train[0]
        model = {
            "name_or_path": str(tiny_bert if labelled else tiny_llama),
            "task": "sequence-classification" if labelled else "causal-lm",
        }
        section = {"name_or_path": str(folder), **data}
        return recipe_of({"model": model, "data": section, "method": {"name": "vanilla"}})

    return made


def seen(recipe: Recipe, **options: Any) -> Preview:
    return preview(recipe, logged_progress(), **options)


def roles(row: ShownRow) -> list[tuple[str, str]]:
    """[(the token's word, a letter for its role)]."""
    words = {number: word for word, number in VOCABULARY.items()}
    return [(words[token.id], LETTERS[token.role]) for token in row.tokens]


def spelled(text: str, marks: str) -> list[tuple[str, str]]:
    return list(zip(text.split(), marks, strict=True))


# -- tokens and roles, by hand ---------------------------------------------------------------------


def test_the_completion_is_the_target(recipe: Make) -> None:
    found = seen(recipe([SUM, LONG]))
    assert roles(found.rows[0]) == spelled("how many hens ? 2 hens . [EOS]", "cccctttt")
    assert [token.special for token in found.rows[0].tokens] == [False] * 7 + [True]
    assert "".join(token.text for token in found.rows[0].tokens[:4]) == "how many hens ?"
    assert found.rows[0].place.startswith("row 1 (")
    assert found.rows[1].place.endswith("train.jsonl:2)")
    assert (found.tokens, found.targets, found.examples, found.available) == (18, 10, 2, 2)
    assert found.truncation.tokens == 0


def test_all_tokens_but_the_first_are_targets_where_all_are_learned(recipe: Make) -> None:
    found = seen(recipe([SUM], loss_on="all"))
    assert roles(found.rows[0]) == spelled("how many hens ? 2 hens . [EOS]", "cttttttt")
    assert found.targets == 7


def test_the_end_that_is_cut_away(recipe: Make) -> None:
    found = seen(recipe([SUM, LONG], max_seq_length=8))
    assert found.rows[0].marks == ()
    text = "how many hens ? there are 2 hens . [EOS]"
    assert roles(found.rows[1]) == spelled(text, "ccccttttxx")
    assert found.rows[1].marks == ("cut",)
    taken = found.truncation
    assert (taken.cut_rows, taken.left_out_rows, taken.tokens, taken.targets) == (1, 0, 2, 2)
    assert found.lengths.values.tolist() == [8, 10]
    # a cut row lacks an end, which the warning about cut rows says already
    assert [finding.mark for finding in found.findings if finding.mark == "no end"] == []
    assert sum("have more than 8 tokens" in text for text in found.heard) == 2


@pytest.mark.parametrize("truncation", ["cut", "drop"])
def test_rows_that_are_left_out_are_shown_as_cut_away(recipe: Make, truncation: str) -> None:
    found = seen(recipe([SUM, TALK], max_seq_length=8, truncation=truncation), row=2)
    (row,) = found.rows
    assert row.is_left_out
    assert row.marks == ("left out",)
    assert {token.role for token in row.tokens} == {"cut"}
    assert len(row.tokens) == 11
    taken = found.truncation
    assert (taken.cut_rows, taken.left_out_rows, taken.tokens, taken.targets) == (0, 1, 11, 2)


def test_a_row_without_any_token_to_learn(recipe: Make) -> None:
    found = seen(recipe([{"text": "a film"}, {"text": ""}], packing=False), row=2)
    assert found.rows[0].is_left_out
    assert len(found.rows[0].tokens) <= 1
    assert any("are empty" in text for text in found.heard)


def test_a_pair_is_cut_in_its_longer_text(recipe: Make) -> None:
    rows = [PAIR, {"sentence1": "dull", "sentence2": "warm", "label": 0}]
    found = seen(recipe(rows, max_seq_length=6))
    text = "[CLS] good film and plot [SEP] bad [SEP]"
    assert roles(found.rows[0]) == spelled(text, "cccxxccc")
    assert [row.label for row in found.rows] == ["1", "0"]
    assert found.targets is None
    assert found.target_share is None


def test_a_number_is_the_label_of_a_regression(recipe: Make) -> None:
    rows = [{"sentence": "good film", "label": 0.5}, {"sentence": "bad film", "label": 1.25}]
    assert [row.label for row in seen(recipe(rows)).rows] == ["0.5", "1.25"]


def test_joined_rows_are_shown_as_pieces(recipe: Make) -> None:
    rows = [{"text": "a film"}, {"text": "the cast is warm"}, {"text": "it was"}]
    made = recipe(rows, max_seq_length=4)
    found = seen(made)
    assert [roles(row) for row in found.rows] == [
        spelled("a film [EOS] the", "cttt"),
        spelled("cast is warm [EOS]", "cttt"),
        spelled("it was [EOS]", "ctt"),
    ]
    assert [row.place.split(" (")[0] for row in found.rows] == [
        "piece 1 of 3, from row 1",
        "piece 2 of 3, from row 2",
        "piece 3 of 3, from row 3",
    ]
    assert found.is_joined
    assert found.truncation.cut_rows == found.truncation.left_out_rows == 0
    assert found.lengths.values.tolist() == [4, 4, 3]
    assert [finding for finding in found.findings if finding.mark == "no end"] == []
    assert [row.number for row in seen(made, row=2).rows] == [2]


def test_windows_learn_what_the_one_before_has_not(recipe: Make) -> None:
    made = recipe([{"text": "the cast is warm and it was"}], max_seq_length=4, stride=2)
    found = seen(made, split="validation")
    assert "".join(role for row in found.rows[1:] for _, role in roles(row))[:4] == "cctt"


# -- the examples of training ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        {"max_seq_length": 17},
        {"max_seq_length": 17, "truncation": "drop"},
        {"max_seq_length": 17, "max_train_samples": 20, "max_eval_samples": 5},
        {"max_seq_length": 12, "format": "text", "text_columns": "question"},
        {"max_seq_length": 12, "format": "text", "text_columns": "question", "packing": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_what_is_shown_is_what_training_gets(
    recipe: Make, sums: Path, tiny_llama: Path, data: dict[str, Any], split: str
) -> None:
    model = {"name_or_path": str(tiny_llama), "task": "causal-lm"}
    section = {"name_or_path": str(sums), **data}
    if "format" not in data:
        section |= {"prompt": "{question}", "completion": " {answer}"}
    made = recipe_of({"model": model, "data": section, "method": {"name": "vanilla"}})
    found = seen(made, rows=1000, split=split)
    inputs = read_inputs(made, *find_sources(made), logged_progress())
    examples = {"train": inputs.train, "validation": inputs.validation}[split]
    kept = [row for row in found.rows if not row.is_left_out]
    assert len(kept) == len(examples)
    for number, row in enumerate(kept):
        span = slice(*examples.offsets[number : number + 2])
        tokens = [token for token in row.tokens if token.role != "cut"]
        assert [token.id for token in tokens] == examples.tokens[span].tolist()
        assert examples.targets is not None
        marks = [token.role == "target" for token in tokens]
        assert marks[1:] == examples.targets[span].tolist()[1:]
        assert row.number == examples.row_ids[number]
    shown_cut = sum(row.count("cut") for row in found.rows)
    assert shown_cut == found.truncation.tokens
    assert len(found.lengths.values) == len(found.rows)


def test_no_weights_are_loaded(recipe: Make, tmp_path: Path, tiny_llama: Path) -> None:
    made = recipe([SUM, LONG])
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tiny_llama.iterdir():
        if not file.name.endswith(".safetensors"):
            (bare / file.name).write_bytes(file.read_bytes())
    model = made.model.model_copy(update={"name_or_path": str(bare)})
    found = seen(replace(made, model=model))
    assert len(found.rows) == 2
    assert not Path(made.output_dir).exists()


# -- which rows ------------------------------------------------------------------------------------


def test_rows_are_spread_over_the_split(recipe: Make) -> None:
    rows = [SUM | {"completion": f" {i % 9} hens ."} for i in range(50)]
    made = recipe(rows)
    assert [row.number for row in seen(made, rows=3).rows] == [1, 25, 50]
    assert seen(made, rows=0).rows == ()
    assert seen(made).page_rows == ()
    assert len(seen(made, page=True).page_rows) == 50


def test_a_page_has_the_rows_that_are_cut(recipe: Make) -> None:
    rows = [SUM | {"completion": f" {i} hens ."} for i in range(300)]
    for number in (17, 150, 299):
        rows[number] = LONG
    found = seen(recipe(rows, max_seq_length=9), page=True)
    assert len(found.page_rows) == 200
    assert [row.number for row in found.page_rows if row.count("cut")] == [18, 151, 300]
    assert len(found.rows) == 5


def test_one_row_by_its_number(recipe: Make) -> None:
    made = recipe([SUM, LONG, TALK], [LONG])
    assert [row.number for row in seen(made, row=2).rows] == [2]
    with pytest.raises(UsageError, match="row 2 is none of the 1 validation rows") as error:
        seen(made, row=2, split="validation")
    assert "`--split train` has a row 2." in str(error.value)
    with pytest.raises(UsageError, match="no split `test`"):
        seen(made, split="test")


def test_held_out_rows_keep_their_numbers(tmp_path: Path, tiny_llama: Path) -> None:
    write_jsonl(tmp_path / "all.jsonl", [SUM | {"completion": f" {i} hens ."} for i in range(20)])
    model = {"name_or_path": str(tiny_llama), "task": "causal-lm"}
    data = {"name_or_path": str(tmp_path / "all.jsonl")}
    made = recipe_of({"model": model, "data": data, "method": {"name": "vanilla"}})
    numbers = {
        row.number
        for split in ("train", "validation")
        for row in seen(made, rows=20, split=split).rows
    }
    assert numbers == set(range(1, 21))


# -- warnings --------------------------------------------------------------------------------------


def test_duplicates_and_training_rows_in_validation(recipe: Make) -> None:
    other = SUM | {"prompt": "how many eggs ?"}
    found = seen(recipe([SUM, LONG, SUM], [other, SUM]))
    first, second = found.findings
    assert (first.mark, first.count, first.split) == ("duplicate", 1, "training")
    assert first.first.startswith("row 3 (")
    assert (second.mark, second.count, second.split) == ("in training", 1, "validation")
    assert second.first.startswith("row 2 (")
    assert [row.warnings for row in found.rows] == [(), (), ("duplicate",)]


def test_rows_without_a_problem_have_no_warning(recipe: Make) -> None:
    found = seen(recipe([SUM], [SUM | {"prompt": "how many eggs ?"}]))
    assert found.findings == ()
    assert found.heard == ()


def test_logged_warnings_are_heard_once(recipe: Make, caplog: pytest.LogCaptureFixture) -> None:
    made = recipe([SUM, TALK], [LONG], max_seq_length=8)
    with caplog.at_level(logging.WARNING, "lorakit"):
        found = seen(made)
    logged = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert list(found.heard) == logged
    assert len(set(found.heard)) == len(found.heard)
    (nothing,) = [text for text in found.heard if "no target within" in text]
    assert "(the first is row 2 (" in nothing
    texts = {finding.text for finding in found.findings}
    assert not texts & set(found.heard)


def test_wrong_rows_are_the_error_that_training_has(recipe: Make) -> None:
    with pytest.raises(RecipeError, match="max_seq_length is 8"):
        seen(recipe([SUM, LONG], max_seq_length=8, truncation="error"))
