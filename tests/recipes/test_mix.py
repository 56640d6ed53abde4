"""Recipes with several data sets: their keys, overrides, errors with places."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lorakit.errors import RecipeError
from lorakit.recipes.recipe import dump_yaml, json_schema, load_recipe, resolved
from lorakit.runs.sets import data_sets

MIX = """\
model: {name_or_path: some/model, task: causal-lm}
data:
  max_seq_length: 64
  prompt: "{question}"
  mix:
    - name_or_path: sums.jsonl
      weight: 2
    - name_or_path: talks/train.jsonl
      prompt: null
      roles: {customer: user}
      weight: 0.5
    - {name_or_path: org/set, subset: main, name: books, weight: 1, validation_split: 0}
method: {name: vanilla}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(folder: Path, text: str, *overrides: str) -> list[tuple[str, str]]:
    """[(place, all that is said)] of a recipe that is wrong."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text), overrides)
    return [(str(one.where).removeprefix(f"{folder}/"), str(one)) for one in caught.value.problems]


def test_keys_of_the_section_hold_for_sets_that_lack_them(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MIX))
    sums, talks, books = data_sets(recipe)
    assert [one.name for one in (sums, talks, books)] == ["sums", "train", "books"]
    assert [one.spec.prompt for one in (sums, talks, books)] == ["{question}", None, "{question}"]
    assert {one.spec.max_seq_length for one in (sums, talks, books)} == {64}
    assert (talks.spec.roles, sums.spec.roles) == ({"customer": "user"}, None)
    assert (books.spec.subset, books.spec.validation_split) == ("main", 0)
    assert "prompt" in sums.inherited
    assert "prompt" not in talks.inherited


def test_the_resolved_recipe_is_read_as_it_was(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MIX))
    again = load_recipe(write(tmp_path, dump_yaml(recipe)))
    assert again == recipe
    assert resolved(again) == resolved(recipe)
    assert [one.inherited for one in data_sets(again)] == [
        one.inherited for one in data_sets(recipe)
    ]
    assert "name_or_path" not in resolved(recipe)["data"]


def test_sets_of_one_name_are_told_apart(tmp_path: Path) -> None:
    names = ["a/train.jsonl", "b/train.jsonl", "x.csv", "x.csv", "org/glue"]
    mix = "".join(f"    - name_or_path: {name}\n" for name in names)
    text = MIX[: MIX.index("    -")] + mix + "method: {name: vanilla}\n"
    found = [one.name for one in data_sets(load_recipe(write(tmp_path, text)))]
    assert found == ["a-train", "b-train", "x-1", "x-2", "glue"]


def test_an_override_reaches_into_the_list(tmp_path: Path) -> None:
    path = write(tmp_path, MIX)
    given = ("data.mix.0.weight=3", "data.mix.1.prompt={a}: {b}", "data.mix.1.roles.bot=assistant")
    mix = load_recipe(path, given).data.mix or ()
    assert (mix[0].weight, mix[1].prompt) == (3, "{a}: {b}")
    assert mix[1].roles == {"customer": "user", "bot": "assistant"}
    ((place, said),) = problems(tmp_path, MIX, "data.mix.3.weight=1")
    assert place == "command line: data.mix.3.weight=1"
    assert "`data.mix` is a list of 3, it has no item `3`" in said


def test_every_mistake_has_its_place(tmp_path: Path) -> None:
    text = MIX.replace("      weight: 2\n", "      max_seq_length: 8\n      wieght: 2\n")
    text = text.replace("weight: 0.5", "weight: 0").replace(
        "- name_or_path: talks", "- path: talks"
    )
    found = dict(problems(tmp_path, text))
    assert list(found) == ["r.yaml:7:7", "r.yaml:8:7", "r.yaml:9:7", "r.yaml:12:7"]
    assert "did you mean `data.max_seq_length`?" in found["r.yaml:7:7"]
    assert "did you mean `weight`?" in found["r.yaml:8:7"]
    assert "did you mean `name_or_path`?" in found["r.yaml:9:7"]
    assert "a number above 0" in found["r.yaml:12:7"]


@pytest.mark.parametrize(
    ("before", "after", "place", "said"),
    [
        ("max_seq_length: 64", "name_or_path: a", "2:1", "leave name_or_path out"),
        ("      weight: 2\n", "", "5:3", "set 0 of data.mix has no weight and others have one"),
        ("      prompt: null\n", "      format: text\n      prompt: x\n", "8:7", "not for text"),
        ("weight: 0.5", "validation_split: 1.5", "8:7", "a fraction between 0 and 1"),
        ("roles: {customer: user}", "roles: {customer: boss}", "8:7", "a role is one of"),
        ("name: books", "name: 'my books'", "12:45", "data.mix.2.name"),
        ("main, name: books", "main, format: sharegpt_chat", "12:45", "sharegpt"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, before: str, after: str, place: str, said: str
) -> None:
    assert before in MIX
    found = problems(tmp_path, MIX.replace(before, after, 1))
    assert (f"r.yaml:{place}", True) in [(where, said in text) for where, text in found]


def test_a_section_without_data_says_so(tmp_path: Path) -> None:
    for mix in ("{max_seq_length: 8}", "{mix: null}"):
        text = (
            f"model: {{name_or_path: m, task: causal-lm}}\ndata: {mix}\nmethod: {{name: vanilla}}"
        )
        assert "missing key `name_or_path` in data" in problems(tmp_path, text)[0][1]
    text = "model: {name_or_path: m, task: causal-lm}\ndata: {mix: []}\nmethod: {name: vanilla}"
    assert "data.mix is an empty list" in problems(tmp_path, text)[0][1]


def test_the_schema_has_the_list(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json_schema())
    assert not list(validator.iter_errors(yaml.safe_load(MIX)))
    wrong = yaml.safe_load(MIX.replace("weight: 2", "max_seq_length: 2"))
    assert list(validator.iter_errors(wrong))


@pytest.mark.parametrize(
    ("key", "inside"),
    [
        ("datasets: [{path: a, split: train}, {path: b}]", ["data.mix.0.name_or_path"]),
        ("dataset: alpaca_en,identity", []),
        ("interleave_probs: 0.7,0.3", []),
        ("mix_strategy: interleave_over", []),
        ("dataset_mixer: {a/b: 0.5}", []),
        ("datasets: {path: a}", None),
        ("datasets: [{path: a}]", None),
        ("dataset: alpaca_en", None),
    ],
)
def test_other_tools_lists_of_data_sets_lead_to_the_mix(
    tmp_path: Path, key: str, inside: list[str] | None
) -> None:
    text = MIX[: MIX.index("data:")] + f"{key}\n" + MIX[MIX.index("data:") :]
    said = "\n".join(text for _, text in problems(tmp_path, text))
    assert ("did you mean `data.mix`?" in said) == (inside is not None)
    for other in inside or ():
        assert f"did you mean `{other}`?" in said
