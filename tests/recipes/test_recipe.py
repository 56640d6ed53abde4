"""Recipes: what loads, what each mistake is told, and that what is written loads again."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import yaml

from lorakit.errors import Problem, RecipeError
from lorakit.methods import config_classes
from lorakit.recipes.elsewhere import ANOTHER_VALUE, CALLED_ELSEWHERE
from lorakit.recipes.no_counterpart import NO_COUNTERPART
from lorakit.recipes.recipe import Recipe, dump_yaml, json_schema, load_recipe, locating, resolved
from lorakit.recipes.values_elsewhere import VALUES_ELSEWHERE, value_called

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))

GOOD = """\
model:
  name_or_path: some/model
  task: causal-lm
data:
  name_or_path: rows.jsonl
method:
  name: l1ra
train:
  seed: 1
"""
# Lines that the cases below put their own keys after; a key there is in line 10.
IN_TRAIN = GOOD
IN_METHOD = GOOD.replace("train:\n  seed: 1\n", "").replace("method:", "train:\n  seed: 1\nmethod:")
IN_DATA = (
    GOOD.replace("data:\n  name_or_path: rows.jsonl\n", "") + "data:\n  name_or_path: rows.jsonl\n"
)
IN_MODEL = GOOD[GOOD.index("data:") :] + GOOD[: GOOD.index("data:")]


def write(folder: Path, text: str, name: str = "x.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, text: str, *overrides: str) -> Recipe:
    return load_recipe(write(folder, text), overrides)


def problems(folder: Path, text: str, *overrides: str) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        load(folder, text, *overrides)
    return caught.value.problems


WRONG = [
    # (id, text, position, words in the message, nearest)
    (
        "top unknown",
        GOOD + "metod: 1\n",
        "10:1",
        ["unknown key `metod`", "model, data, method, train, distributed, output_dir"],
        "method",
    ),
    (
        "top of another section",
        GOOD + "learning_rate: 1\n",
        "10:1",
        ["`learning_rate`"],
        "train.learning_rate",
    ),
    ("top alias", GOOD + "base_model: x\n", "10:1", ["`base_model`"], "model.name_or_path"),
    ("top section alias", GOOD + "lora: {r: 8}\n", "10:1", ["`lora`"], "method"),
    ("top half precision", GOOD + "bf16: true\n", "10:1", ["`bf16`"], "train.precision"),
    (
        "top dotted",
        GOOD + "train.seed: 1\n",
        "10:1",
        ["`train.seed` at the top"],
        "train: {seed: …}",
    ),
    ("top no idea", GOOD + "zzz: 1\n", "10:1", ["`zzz`"], None),
    ("output_dir empty", GOOD + "output_dir: ''\n", "10:1", ["`output_dir`", "not empty"], None),
    ("output_dir null", GOOD + "output_dir:\n", "10:1", ["`output_dir` is null"], None),
    (
        "output_dir number",
        GOOD + "output_dir: 3\n",
        "10:1",
        ["a whole number, 3", "a string"],
        None,
    ),
    (
        "model unknown",
        IN_MODEL + "  revison: main\n",
        "10:3",
        ["unknown key `revison` in model"],
        "revision",
    ),
    (
        "model bool",
        IN_MODEL + "  trust_remote_code: yes\n",
        "10:3",
        ["a string, 'yes'", "true or false"],
        "true",
    ),
    (
        "task",
        GOOD.replace("causal-lm", "causal_lm"),
        "3:3",
        ["'causal_lm'", "sequence-classification"],
        "causal-lm",
    ),
    ("task null", GOOD.replace(" causal-lm", ""), "3:3", ["`model.task` is null", "one of"], None),
    (
        "data alias",
        IN_DATA + "  cutoff_len: 512\n",
        "10:3",
        ["`cutoff_len` in data"],
        "max_seq_length",
    ),
    (
        "data alias elsewhere",
        IN_DATA + "  batch_size: 8\n",
        "10:3",
        ["in data"],
        "train.per_device_train_batch_size",
    ),
    (
        "data union",
        IN_DATA + "  text_columns: {a: b}\n",
        "10:3",
        ["a mapping, {", "a string", "a list"],
        None,
    ),
    (
        "data union number",
        IN_DATA + "  validation_split: true\n",
        "10:3",
        ["a boolean, true", "a string", "a number"],
        None,
    ),
    (
        "data item",
        IN_DATA + "  text_columns: [a, 3]\n",
        "10:21",
        ["`data.text_columns.1` is a whole number, 3"],
        None,
    ),
    (
        "data validator",
        IN_DATA + "  validation_split: 1.5\n",
        "8:1",
        ["between 0 and 1", "1.5"],
        None,
    ),
    (
        "data range",
        IN_DATA + "  max_seq_length: 0\n",
        "10:3",
        ["a whole number, 0", "a whole number of at least 1"],
        None,
    ),
    ("data string", IN_DATA + "  prompt: 5\n", "10:3", ["a whole number, 5", "a string"], None),
    (
        "method unknown",
        IN_METHOD + "  lora_r: 8\n",
        "10:3",
        ["unknown key `lora_r` in method", "one of name, r,"],
        "r",
    ),
    (
        "method typo",
        IN_METHOD + "  target_module: x\n",
        "10:3",
        ["`target_module`"],
        "target_modules",
    ),
    ("method name", GOOD.replace("l1ra", "lira"), "7:3", ["'lira'", "one of", "vanilla"], "l1ra"),
    ("method name type", GOOD.replace("l1ra", "8"), "7:3", ["`method.name`", "vanilla"], None),
    (
        "method name missing",
        GOOD.replace("name: l1ra", "r: 8"),
        "6:1",
        ["missing key `name` in method", "vanilla"],
        None,
    ),
    (
        "method a string",
        GOOD.replace("\n  name: l1ra", " l1ra"),
        "6:1",
        ["a string, 'l1ra'", "at least name", "vanilla"],
        "method: {name: l1ra}",
    ),
    (
        "method a list",
        GOOD.replace("\n  name: l1ra", " [l1ra]"),
        "6:1",
        ["a list", "a mapping"],
        None,
    ),
    (
        "rank float",
        IN_METHOD + "  r: 8.0\n",
        "10:3",
        ["a floating-point number, 8.0", "a whole number of at least 1"],
        None,
    ),
    ("rank bool", IN_METHOD + "  r: true\n", "10:3", ["a boolean, true", "a whole number"], None),
    (
        "rank string",
        IN_METHOD + "  r: '8'\n",
        "10:3",
        ["`method.r` is a string, '8'", "a whole number of at least 1"],
        None,
    ),
    (
        "rank negative",
        IN_METHOD + "  r: -8\n",
        "10:3",
        ["-8", "a whole number of at least 1"],
        None,
    ),
    (
        "rank_pattern",
        IN_METHOD + "  rank_pattern: {q.proj: -1}\n",
        "10:3",
        ["`q.proj` is negative"],
        None,
    ),
    (
        "rank_pattern type",
        IN_METHOD + "  rank_pattern:\n    q.k: a\n",
        "11:5",
        ["rank_pattern.q.k", "a whole number"],
        None,
    ),
    (
        "dropout",
        IN_METHOD + "  lora_dropout: 1.0\n",
        "10:3",
        ["a number of at least 0 and below 1"],
        None,
    ),
    (
        "target_modules",
        IN_METHOD + "  target_modules: 3\n",
        "10:3",
        ["a string or a list, each item a string"],
        None,
    ),
    ("alpha inf", IN_METHOD + "  lora_alpha: .inf\n", "10:3", ["inf", "a finite number"], None),
    (
        "alpha nan",
        IN_METHOD + "  lora_alpha: .nan\n",
        "10:3",
        ["`method.lora_alpha`", "a number above 0"],
        None,
    ),
    (
        "l1_step",
        IN_METHOD + "  l1_step: proximl\n",
        "10:3",
        ["'proximl'", "one of proximal, subgradient"],
        "proximal",
    ),
    (
        "two strengths",
        IN_METHOD + "  l1_share: 1.0\n  l1ra_lambda: 1.0\n",
        "8:1",
        ["l1_share and l1ra_lambda"],
        None,
    ),
    (
        "budget unknown",
        IN_METHOD + "  budget: {unit: rank, ends: 1}\n",
        "10:24",
        ["`ends` in method.budget"],
        "end",
    ),
    (
        "budget end",
        IN_METHOD + "  budget:\n    end: -1\n",
        "11:5",
        ["`method.budget.end`", "a number of at least 0"],
        None,
    ),
    (
        "budget unit",
        IN_METHOD + "  budget:\n    unit: parms\n",
        "11:5",
        ["'parms'", "one of rank, params"],
        "params",
    ),
    (
        "budget scalar",
        IN_METHOD + "  budget: 3\n",
        "10:3",
        ["a whole number, 3", "a mapping with keys of unit"],
        None,
    ),
    (
        "budget key one level up",
        IN_METHOD + "  shape: linear\n",
        "10:3",
        ["`shape` in method"],
        "method.budget.shape",
    ),
    (
        "train alias",
        IN_TRAIN + "  lr: 1e-3\n",
        "10:3",
        ["unknown key `lr` in train"],
        "learning_rate",
    ),
    (
        "train tokens",
        IN_TRAIN + "  max_tokens: 512\n",
        "10:3",
        ["`max_tokens` in train"],
        "max_tokens_per_micro_batch",
    ),
    (
        "train no tokens",
        IN_TRAIN + "  max_tokens_per_micro_batch: 0\n",
        "10:3",
        ["a whole number of at least 1"],
        None,
    ),
    (
        "train half a token",
        IN_TRAIN + "  max_tokens_per_micro_batch: 5.5\n",
        "10:3",
        ["a whole number of at least 1"],
        None,
    ),
    (
        "train sampling",
        IN_TRAIN + "  train_sampling_strategy: group-by-length\n",
        "10:3",
        ["one of random, sequential, group_by_length"],
        "group_by_length",
    ),
    (
        "train two orders",
        IN_TRAIN + "  group_by_length: true\n  train_sampling_strategy: sequential\n",
        "8:1",
        ["group_by_length is true and train_sampling_strategy sequential: leave one out"],
        None,
    ),
    (
        "train warm-up of a step and a half",
        IN_TRAIN + "  warmup_steps: 1.5\n",
        "10:3",
        ["a whole number of at least 0 or a number of at least 0 and below 1"],
        None,
    ),
    (
        "train two warm-ups",
        IN_TRAIN + "  warmup_steps: 100\n  warmup_ratio: 0.1\n",
        "8:1",
        ["warmup_steps is 100 and warmup_ratio 0.1", "leave one out"],
        None,
    ),
    (
        "train grouped how",
        IN_TRAIN + "  group_by_length: 50\n",
        "10:3",
        ["`train.group_by_length`", "true or false"],
        None,
    ),
    (
        "train typo",
        IN_TRAIN + "  learning-rate: 1e-3\n",
        "10:3",
        ["`learning-rate`"],
        "learning_rate",
    ),
    (
        "train other section",
        IN_TRAIN + "  lora_alpha: 3\n",
        "10:3",
        ["`lora_alpha` in train"],
        "method.lora_alpha",
    ),
    (
        "train quoted",
        IN_TRAIN + "  learning_rate: '1e-3'\n",
        "10:3",
        ["a string, '1e-3'", "a number above 0"],
        None,
    ),
    ("train nan", IN_TRAIN + "  learning_rate: .nan\n", "10:3", ["learning_rate"], None),
    (
        "train null",
        IN_TRAIN + "  learning_rate: null\n",
        "10:3",
        ["is null", "a number above 0"],
        None,
    ),
    ("train scheduler", IN_TRAIN + "  lr_scheduler_type: cosin\n", "10:3", ["'cosin'"], "cosine"),
    (
        "train validator",
        IN_TRAIN + "  load_best_model_at_end: true\n",
        "8:1",
        ["set eval_steps"],
        None,
    ),
    ("train a list", GOOD.replace("\n  seed: 1", " []"), "8:1", ["`train` is a list"], None),
    (
        "duplicate key",
        IN_METHOD + "  r: 8\n  r: 4\n",
        "11:3",
        ["`r` is there twice, in lines 10 and 11"],
        None,
    ),
    (
        "duplicate section",
        GOOD + "train: {}\n",
        "10:1",
        ["`train` is there twice, in lines 8 and 10"],
        None,
    ),
    (
        "tag",
        GOOD + "output_dir: !!python/name:os.system x\n",
        "10:13",
        ["!!python/name:os.system", "not allowed"],
        None,
    ),
    (
        "tag that does not fit",
        IN_METHOD + "  r: !!int eight\n",
        "10:6",
        ["'eight' is no !!int"],
        None,
    ),
    ("merge key", IN_METHOD + "  <<: {r: 8}\n", "10:3", ["merge keys"], None),
    (
        "number as key",
        IN_METHOD + "  rank_pattern: {8: 4}\n",
        "10:18",
        ["`8` is not a string"],
        None,
    ),
    ("cycle", IN_METHOD + "  target_modules: &a [*a]\n", "10:19", ["contains itself"], None),
    ("colon", GOOD + "output_dir: a: b\n", "10:14", ["not YAML", "quotes"], None),
    ("tab", GOOD + "\toutput_dir: a\n", "10:1", ["not YAML", "tabs"], None),
    ("open quote", GOOD + "output_dir: 'a\n", "11:1", ["not YAML", "quoted scalar"], None),
    ("control character", "model: \x07\n", "1:8", ["U+0007"], None),
    ("two documents", GOOD + "---\na: 1\n", "10:1", ["single document"], None),
    ("a list", "- model\n", "1:1", ["the top of a recipe is a mapping"], None),
    ("no sections", "# nothing\n", "", ["empty"], None),
    ("empty", "", "", ["empty"], None),
]


@pytest.mark.parametrize(
    ("text", "position", "words", "nearest"),
    [case[1:] for case in WRONG],
    ids=[case[0] for case in WRONG],
)
def test_one_mistake_is_one_problem(
    tmp_path: Path, text: str, position: str, words: list[str], nearest: str | None
) -> None:
    found = problems(tmp_path, text)
    assert len(found) == 1, found
    assert found[0].where == f"{tmp_path / 'x.yaml'}" + (f":{position}" if position else "")
    for word in words:
        assert word in str(found[0])
    assert found[0].nearest == nearest


def test_the_message_as_a_whole(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, IN_METHOD + "  budget: {ends: 1}\n")
    assert str(caught.value) == dedent(f"""\
        {tmp_path / "x.yaml"}:10:12: unknown key `ends` in method.budget
          expected: one of unit, start, end, shape
          did you mean `end`?""")
    assert caught.value.exit_code == 2


def test_all_problems_at_once_in_order(tmp_path: Path) -> None:
    text = GOOD.replace("l1ra", "l1r") + "  lr: 1\n  seed: 2\nfoo: {}\n"
    found = problems(
        tmp_path,
        text.replace("  task: causal-lm\n", ""),
        "train.max_steps=0",
        "nonsense",
        "method.r=0",
    )
    places = [
        "model.task",
        "method.name",
        "train.lr",
        "train.seed",
        "foo",
        "train.max_steps",
        "-",
        "method.r",
    ]
    assert [p.key or "-" for p in found] == places
    assert all(p.where for p in found)


def test_missing_sections_say_what_they_need(tmp_path: Path) -> None:
    found = problems(tmp_path, "model:\ntrain:\n")
    assert {p.key: p.where for p in found} == {
        "model": f"{tmp_path / 'x.yaml'}:1:1",
        "data": str(tmp_path / "x.yaml"),
        "method": str(tmp_path / "x.yaml"),
    }
    by_key = {p.key: str(p) for p in found}
    assert "name_or_path (a string that is not empty) and task (one of" in by_key["model"]
    assert all(name in by_key["method"] for name in config_classes())


def test_a_required_key_under_another_name_is_one_problem(tmp_path: Path) -> None:
    found = problems(tmp_path, GOOD.replace("name_or_path: some", "model_name_or_path: some"))
    assert [(p.key, p.nearest) for p in found] == [("model.model_name_or_path", "name_or_path")]


def test_files_that_are_none(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "glue_l1ra.yaml")
    with pytest.raises(RecipeError, match="no such recipe") as caught:
        load_recipe(tmp_path / "glue_lira.yaml")
    assert caught.value.problems[0].where == str(tmp_path / "glue_lira.yaml")
    assert caught.value.problems[0].nearest == str(tmp_path / "glue_l1ra.yaml")
    with pytest.raises(RecipeError, match="folder"):
        load_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("model: caf\xe9".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"latin\.yaml: this is not UTF-8: byte 10"):
        load_recipe(tmp_path / "latin.yaml")


def test_numbers_and_defaults(tmp_path: Path) -> None:
    recipe = load(tmp_path, IN_METHOD + "  lora_alpha: 32\n", "train.learning_rate=1")
    assert recipe.train.learning_rate == 1.0
    assert isinstance(recipe.train.learning_rate, float)
    assert recipe.method.lora_alpha == 32.0
    assert recipe.output_dir == "runs/x"
    assert recipe.path == str(tmp_path / "x.yaml")
    assert type(recipe.method) is config_classes()["l1ra"]


def test_a_byte_order_mark_and_an_empty_section_are_fine(tmp_path: Path) -> None:
    assert load(tmp_path, "\ufeff" + GOOD.replace("  seed: 1", "  # seed: 1")).train.seed == 0


# -- overrides -------------------------------------------------------------------------------------


def test_overrides(tmp_path: Path) -> None:
    overrides = [
        "method.budget.unit=params",
        "method.target_modules=[q_proj, v_proj]",
        "method.target_modules.1=k_proj",
        "method.rank_pattern={a.b: 4}",
        "train.max_grad_norm=null",
        "train.learning_rate=1e-4",
        "data.prompt=Question: {question}",
        r'data.completion="{answer}\n"',
        "output_dir=runs/other=1",
    ]
    recipe = load(tmp_path, GOOD.replace("train:\n  seed: 1\n", ""), *overrides)
    assert resolved(recipe)["method"]["budget"] == {
        "unit": "params",
        "start": 1.0,
        "end": 1.0,
        "shape": "cubic",
    }
    assert recipe.method.target_modules == ["q_proj", "k_proj"]
    assert recipe.train.max_grad_norm is None
    assert recipe.train.learning_rate == 1e-4
    assert (recipe.data.prompt, recipe.data.completion) == ("Question: {question}", "{answer}\n")
    assert recipe.method.rank_pattern == {"a.b": 4}
    assert recipe.output_dir == "runs/other=1"
    assert recipe.places["train.max_grad_norm"] == "command line: train.max_grad_norm=null"


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("Q: {question} A: ", "Q: {question} A: "),
        (" {question}", " {question}"),
        ("{question}", "{question}"),
        ("{question}: {answer}", "{question}: {answer}"),
        ("[INST] {question} [/INST] ", "[INST] {question} [/INST] "),
        ("# {question}", "# {question}"),
        ("@{question} 100% & *done*", "@{question} 100% & *done*"),
        ("- {question} # no comment", "- {question} # no comment"),
        ("2024", "2024"),
        ("1e-3", "1e-3"),
        ("true", "true"),
        ('"Yes" or "no": {question}', '"Yes" or "no": {question}'),
        ("'tis {question}", "'tis {question}"),
        ('"{question} # {answer}" ', "{question} # {answer}"),
        (r'"{question}\nA: "', "{question}\nA: "),
        ("'1e-3'", "1e-3"),
        ("'null'", "null"),
        ("null", None),
        ("Frage:\t{question}\n", "Frage:\t{question}\n"),
    ],
)
def test_text_on_the_command_line_is_taken_as_it_was_typed(
    typed: str, value: str | None, tmp_path: Path
) -> None:
    assert load(tmp_path, GOOD, f"data.prompt={typed}").data.prompt == value


def test_other_values_on_the_command_line_are_read_as_yaml(tmp_path: Path) -> None:
    overrides = [
        "data.text_columns=[a, b]",
        "train.learning_rate= 1e-3 ",
        "data.validation_split=0.2",
    ]
    recipe = load(
        tmp_path,
        GOOD,
        *overrides,
        "data.subset=2024",
        "data.max_seq_length=null",
        "data.label_column= y",
    )
    assert recipe.data.text_columns == ["a", "b"]
    assert (
        recipe.train.learning_rate,
        recipe.data.validation_split,
        recipe.data.max_seq_length,
    ) == (1e-3, 0.2, None)
    assert (recipe.data.subset, recipe.data.label_column) == ("2024", " y")
    joined = load(
        tmp_path,
        GOOD,
        "method.name=vanilla",
        "method.with=[{name: salor}]",
        "method.with.0.factors.structure=2:4",
    )
    assert joined.method.with_[0].factors.structure == "2:4"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "text",
    [
        '"Q: {q} "',
        "'Q: {q} '",
        "|\n    Q: {q}\n    A: ",
        "|-\n    Q: {q}",
        ">-\n    Q:\n    {q}",
        '"\\tQ: {q}\\n\\u00e4"',
    ],
)
def test_a_template_in_a_file_is_yaml_to_the_letter(text: str, tmp_path: Path) -> None:
    assert (
        load(tmp_path, IN_DATA + f"  prompt: {text}\n").data.prompt
        == yaml.safe_load(f"data:\n  prompt: {text}\n")["data"]["prompt"]
    )


def test_an_override_of_the_method_keeps_its_other_keys(tmp_path: Path) -> None:
    assert load(tmp_path, IN_METHOD + "  r: 4\n", "method.name=vanilla").method.r == 4
    (problem,) = problems(tmp_path, IN_METHOD + "  r: 4\n  l1_share: 1.0\n", "method.name=vanilla")
    assert problem.where == f"{tmp_path / 'x.yaml'}:11:3"
    assert "unknown key `l1_share` in method" in problem.what


def test_an_override_mends_a_mistake_of_the_file(tmp_path: Path) -> None:
    assert load(tmp_path, IN_METHOD + "  r: 4\n  r: -4\n", "method.r=2").method.r == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.seed", "no override"),
        ("=1", "no override"),
        ("train..seed=1", "no override"),
        ("train.=1", "no override"),
        ("train.seed.x=1", "`train.seed` is 1: it has no key `x`"),
        ("data.text_columns={a", "not YAML"),
        ("data.text_columns=[!!python/name:os.system x]", "not allowed"),
        ("data.text_columns={a: 1, a: 2}", "twice"),
        ("method.r=8.0", "a floating-point number"),
        ("method.r=eight", "a string, 'eight'"),
        ("method.rank=8", "unknown key `rank` in method"),
        ("train.lr=1", "did you mean `learning_rate`?"),
        ("foo=", "unknown key `foo`"),
        ("method.budget={unit: rank, ends: 1}", "unknown key `ends` in method.budget"),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, words: str) -> None:
    (problem,) = problems(tmp_path, GOOD, override)
    assert problem.where == f"command line: {override}"
    assert words in str(problem)


def test_an_override_of_an_item_that_is_not_there(tmp_path: Path) -> None:
    (problem,) = problems(
        tmp_path, IN_METHOD + "  target_modules: [a]\n", "method.target_modules.1=b"
    )
    assert "is a list of 1, it has no item `1`" in problem.what


# -- writing, locating, schema ---------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(config_classes()))
def test_round_trip(tmp_path: Path, method: str) -> None:
    recipe = load(
        tmp_path,
        GOOD.replace("l1ra", method),
        "train.learning_rate=1e-5",
        "data.prompt='1e-3'",
        "data.text_columns=[yes, n]",
    )
    plain = resolved(recipe)
    assert list(plain) == ["model", "data", "method", "train", "distributed", "output_dir"]
    assert next(iter(plain["method"].items())) == ("name", method)
    assert json.loads(json.dumps(plain)) == plain
    again = load_recipe(write(tmp_path, dump_yaml(recipe), "recipe.yaml"))
    assert again == recipe
    assert again.path != recipe.path


def test_locating(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD, "train.seed=3")
    file = tmp_path / "x.yaml"
    for key, where in [
        ("model.name_or_path", f"{file}:2:3"),
        ("method.target_modules", f"{file}:6:1"),
        ("train.seed", "command line: train.seed=3"),
        ("output_dir", str(file)),
        ("", str(file)),
    ]:
        with pytest.raises(RecipeError) as caught, locating(recipe):
            raise RecipeError.at(key, "wrong")
        there = key in ("model.name_or_path", "train.seed", "")
        assert caught.value.problems == [Problem("wrong", key, where=where, left_out=not there)]
    with pytest.raises(KeyError), locating(recipe):
        raise KeyError


def branches(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    method = schema["properties"]["method"]
    return {
        name: schema["$defs"][ref.rpartition("/")[2]]
        for name, ref in method["discriminator"]["mapping"].items()
    }


def test_json_schema() -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    sections = ["model", "data", "method", "train", "distributed", "output_dir"]
    assert list(schema["properties"]) == sections
    assert schema["required"] == ["model", "data", "method"]
    assert schema["additionalProperties"] is False
    assert len(schema["properties"]["method"]["oneOf"]) == len(config_classes())
    assert set(branches(schema)) == set(config_classes())
    for name, branch in branches(schema).items():
        assert branch["properties"]["name"]["const"] == name
        assert branch["required"] == ["name"]
        assert branch["additionalProperties"] is False
    train = schema["$defs"]["TrainSpec"]["properties"]
    assert train["learning_rate"]["description"].startswith("Peak learning rate")
    assert train["learning_rate"]["exclusiveMinimum"] == 0


def test_json_schema_agrees_with_the_loader(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.check_schema(json_schema())
    for name in config_classes():
        assert not list(
            validator.iter_errors(resolved(load(tmp_path, GOOD, f"method.name={name}")))
        )
    assert list(validator.iter_errors(resolved(load(tmp_path, GOOD)) | {"method": {"r": 8}}))


def valid_keys() -> set[str]:
    schema = json_schema()
    sections = {"model": "ModelSpec", "data": "DataSpec", "train": "TrainSpec"}
    valid = {
        f"{section}.{key}"
        for section, name in sections.items()
        for key in schema["$defs"][name]["properties"]
    }
    valid |= {
        f"method.{key}" for branch in branches(schema).values() for key in branch["properties"]
    }
    inner = schema["$defs"]["Quantization"]["properties"]
    return valid | set(schema["properties"]) | {f"model.quantization.{key}" for key in inner}


def test_what_other_tools_call_a_key_leads_to_a_key_that_exists() -> None:
    valid = valid_keys()
    for key, names in [
        *CALLED_ELSEWHERE.items(),
        *((key, names) for key, names, _ in ANOTHER_VALUE),
    ]:
        assert key in valid
        section = key.rpartition(".")[0]
        for name in names.split():
            assert (f"{section}.{name}" if section else name) not in valid, (
                f"{name} is a key itself"
            )
    for names in NO_COUNTERPART.values():
        for name in names.split():
            assert not any(key.rpartition(".")[2] == name for key in valid), (
                f"{name} is a key itself"
            )


def test_what_other_tools_call_a_value_leads_to_a_value_that_is_valid(tmp_path: Path) -> None:
    for key, values in VALUES_ELSEWHERE.items():
        assert key in valid_keys()
        for value in values:
            found = value_called(key, value.upper())
            assert found is not None
            if found.nearest is not None:
                more = {
                    "data.format": "train.seed=1",
                    "method.init_lora_weights": "model.quantization={bits: 4}",
                }
                load(tmp_path, GOOD, f"{key}={found.nearest}", more.get(key, "data.format=null"))


@pytest.mark.parametrize("name", ["lora", "LoRA", "qlora", "peft"])
def test_lora_is_the_method_that_is_plain_lora(name: str, tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, GOOD.replace("name: l1ra", f"name: {name}"))
    assert problem.nearest == "vanilla"
    assert (problem.hint is not None) == (name == "qlora")
    (problem,) = problems(tmp_path, GOOD.replace("\n  name: l1ra", f" {name}"))
    assert problem.nearest == "method: {name: vanilla}"


@pytest.mark.parametrize("name", ["dora", "full", "prefix-tuning", "galore"])
def test_a_method_that_there_is_not_is_not_another_one(name: str, tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, GOOD.replace("name: l1ra", f"name: {name}"))
    assert problem.nearest is None
    assert problem.hint == f"lorakit has no counterpart of `{name}`."


@pytest.mark.parametrize(
    ("line", "nearest", "hint"),
    [
        ("num_warmup_steps: 100", "warmup_steps", None),
        ("bf16: true", "precision", "`true` is `precision: bf16`"),
        ("fp16: true", "precision", "not in fp16"),
        ("evals_per_epoch: 2", "eval_steps", "divided by evals_per_epoch"),
        ("betas: [0.9, 0.95]", "adam_beta1", "adam_beta2"),
        ("train_on_inputs: false", "data.loss_on", "`false` is the default: completion"),
        ("val_set_size: 100", "data.validation_split", "not a number of rows"),
        ("gradient_accumulation: 4", "gradient_accumulation_steps", None),
        ("template: qwen", "data.chat_template", "chatml, alpaca, or a file in Jinja"),
        ("mask_history: true", "data.loss_on", "`loss_on: last_assistant`"),
        ("max_tokens: 1000", "max_tokens_per_micro_batch", "how long a run is"),
        ("deepspeed: ds.json", None, "no counterpart: a run is one process"),
        ("fsdp_config: {}", None, "no counterpart"),
        ("flash_attention: true", None, "no counterpart: it chooses the attention itself"),
        ("load_in_4bit: true", "model.quantization", "`quantization: {bits: 4}`"),
        ("quantization_bit: 8", "model.quantization", "`quantization: {bits: 4}`, or 8"),
        ("bnb_4bit_quant_type: nf4", "model.quantization.quant_type", None),
        ("bnb_4bit_compute_dtype: bfloat16", "precision", "It is auto, bf16 or fp32."),
        ("gptq_bits: 4", None, "no counterpart: bitsandbytes or torchao"),
        ("wandb_project: x", "report_to", "It lists the trackers, as [wandb]"),
        ("hub_token: x", None, "lorakit export"),
        ("gradient_checkpointing_kwargs: {}", None, "gradient_checkpointing is true or false"),
        ("optim: adamw_8bit", None, "the optimizer is AdamW"),
        ("overwrite_output_dir: true", None, "--overwrite"),
        ("zzzz: 1", None, None),
    ],
)
def test_keys_of_other_tools_say_what_becomes_of_their_values(
    line: str, nearest: str | None, hint: str | None, tmp_path: Path
) -> None:
    (problem,) = problems(tmp_path, GOOD + f"  {line}\n")
    assert problem.nearest == nearest
    assert (hint in (problem.hint or "")) if hint else problem.hint is None
    assert not problem.hint or problem.hint in str(problem)


@pytest.mark.parametrize(
    ("override", "nearest", "hint"),
    [
        ("train.lr_scheduler_type=cosine_with_restarts", "cosine", "without restarts"),
        ("train.lr_scheduler_type=polynomial", None, "no counterpart"),
        ("train.precision=fp16", None, "not in fp16"),
        ("train.precision=bfloat16", "bf16", None),
        ("model.task=CAUSAL_LM", "causal-lm", None),
        ("model.task=seq2seq", None, "no counterpart"),
        ("data.format=chatml", "chat", None),
        ("data.loss_on=last_turn", "last_assistant", None),
        ("data.format=vicuna", "sharegpt", None),
        ("data.packing=no", "false", None),
    ],
)
def test_values_of_other_tools(
    override: str, nearest: str | None, hint: str | None, tmp_path: Path
) -> None:
    (problem,) = problems(tmp_path, GOOD, override)
    assert problem.nearest == nearest
    assert (hint in (problem.hint or "")) if hint else problem.hint is None


def test_the_names_of_a_section_are_listed_once(tmp_path: Path) -> None:
    text = GOOD + "  deepspeed: x\n  bf16: true\n  lr: 1\nlora: {}\nzzz: 1\n"
    error = "\n".join(map(str, problems(tmp_path, text)))
    assert error.count("one of num_train_epochs, max_steps") == 1
    assert error.count("expected: one of model, data") == 1
    assert error.index("expected: one of num_train") < error.index("`bf16`")


def test_shipped_recipes_load() -> None:
    assert RECIPES, "recipes/ has no *.yaml"
    for path in RECIPES:
        recipe = load_recipe(path)
        assert recipe.output_dir == f"runs/{path.stem}", "two recipes must not share a run folder"
