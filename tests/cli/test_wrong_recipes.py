"""Wrong recipes through the command line: each is one message with its place, exit 2, and nothing
on disk."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from lorakit.cli import main
from tests.support.tiny import write_jsonl

RECIPE = """\
model:
  name_or_path: ./model
  task: sequence-classification
data:
  name_or_path: ./data
method:
  name: l1ra
  r: 4
train:
  max_steps: 2
  precision: fp32
"""
LM = (
    RECIPE.replace("sequence-classification", "causal-lm")
    .replace("./model", "./lm")
    .replace("./data", "./sums")
)


# What a user should never see: error kinds of pydantic and names of our classes.
PYDANTIC = (
    r"pydantic|_error\b|_parsing\b|(int|float|string|list|dict)_type|input_value|Value error|Extra"
    r" inputs|\b(Factors|Part)\b"
)


@dataclass
class Wrong:
    """A recipe and what its message must say. place: line and column, or None where the recipe has
    no place for it."""

    text: str
    place: str | None
    words: tuple[str, ...]
    overrides: tuple[str, ...] = ()


def section(name: str, *keys: str, recipe: str = RECIPE) -> str:
    """The recipe with `keys` as the first lines of a section (line 2, 5, 7 or 10), in place of
    those of the same names."""
    lines = recipe.splitlines()
    start = lines.index(f"{name}:")
    names = tuple(f"  {key.split(':')[0]}:" for key in keys)
    stop = next(
        (i for i in range(start + 1, len(lines)) if not lines[i].startswith(" ")), len(lines)
    )
    kept = [line for line in lines[start + 1 : stop] if not line.startswith(names)]
    return (
        "\n".join([*lines[: start + 1], *(f"  {key}" for key in keys), *kept, *lines[stop:]]) + "\n"
    )


def factors(keys: str, *more: str) -> str:
    """salor with these keys in its factors: line 8, from column 13 on (each of `more` moves it down
    by one)."""
    return section("method", "name: salor", *more, f"factors: {{{keys}}}")


def base(keys: str) -> str:
    """salor with these keys in its base: line 8, from column 10 on."""
    return section("method", "name: salor", f"base: {{{keys}}}")


def joined(keys: str) -> str:
    """l1ra with a salor of these keys: line 7, from column 24 on."""
    return section("method", f"with: [{{name: salor, {keys}}}]")


def chunks(*keys: str, recipe: str = LM) -> str:
    """chunkwise with these keys: from line 8 on."""
    return section("method", "name: chunkwise", *keys, recipe=recipe)


WRONG = {
    # what no other file has to be read for
    "top: unknown key": Wrong(RECIPE + "modle: {}\n", "12:1", ("unknown key `modle`", "`model`")),
    "model: unknown key": Wrong(
        section("model", "base: x"), "2:3", ("unknown key `base` in model",)
    ),
    "data: unknown key": Wrong(
        section("data", "cutoff_len: 8"), "5:3", ("`cutoff_len`", "`max_seq_length`")
    ),
    "method: unknown key": Wrong(section("method", "lora_r: 8"), "7:3", ("`lora_r`", "`r`")),
    "budget: unknown key": Wrong(
        section("method", "budget: {finish: 1}"),
        "7:12",
        ("`finish` in method.budget", "start, end"),
    ),
    "train: unknown key": Wrong(
        section("train", "batch_size: 8"), "10:3", ("`batch_size`", "`per_device_train_batch_size`")
    ),
    "unknown key of another method": Wrong(
        section("method", "name: vanilla", "l1_share: 1.0"), "8:3", ("`l1_share`",)
    ),
    "override of an unknown key": Wrong(
        RECIPE, None, ("train.batch=8", "`batch`"), ("train.batch=8",)
    ),
    "override of a wrong type": Wrong(
        RECIPE, None, ("method.r=many", "a whole number"), ("method.r=many",)
    ),
    "wrong type": Wrong(
        section("train", "learning_rate: fast"), "10:3", ("'fast'", "a number above 0")
    ),
    "wrong type of a section": Wrong(
        RECIPE.replace("method:\n  name: l1ra\n  r: 4", "method: l1ra"), "6:1", ("a mapping",)
    ),
    "negative rank": Wrong(
        section("method", "r: -4"), "7:3", ("-4", "a whole number of at least 1")
    ),
    "rank 0": Wrong(section("method", "r: 0"), "7:3", ("at least 1",)),
    "negative rank in rank_pattern": Wrong(
        section("method", "rank_pattern: {query: -1}"), "7:3", ("`query`", "negative")
    ),
    "unknown method": Wrong(
        section("method", "name: l1rs"), "7:3", ("'l1rs'", "`l1ra`", "vanilla")
    ),
    "unknown task": Wrong(
        section("model", "task: classification"), "2:3", ("'classification'", "causal-lm")
    ),
    "unknown precision": Wrong(section("train", "precision: fp16"), "10:3", ("'fp16'", "bf16")),
    "budget.end of -1": Wrong(
        section("method", "budget:", "  end: -1"), "8:5", ("-1", "at least 0")
    ),
    "budget.start below 1": Wrong(
        section("method", "budget: {start: 0.5}"), "7:12", ("0.5", "at least 1")
    ),
    "both strengths": Wrong(
        section("method", "l1_share: 1", "l1ra_lambda: 1e-3"), "6:1", ("l1_share and l1ra_lambda",)
    ),
    "best model without evaluations": Wrong(
        section("train", "load_best_model_at_end: true"), "9:1", ("eval_steps",)
    ),
    "YAML syntax": Wrong(RECIPE + "output_dir: [a\n", "13:1", ("not YAML",)),
    "YAML indentation": Wrong(RECIPE.replace("  r: 4", "   r: 4"), "8:5", ("not YAML",)),
    "duplicate key": Wrong(
        section("method", "r: 8").replace("  name: l1ra\n", "  name: l1ra\n  r: 4\n"),
        "9:3",
        ("twice",),
    ),
    "duplicate section": Wrong(RECIPE + "train: {}\n", "12:1", ("`train` is there twice",)),
    "missing section": Wrong(
        RECIPE.replace("data:\n  name_or_path: ./data\n", ""), None, ("missing section `data`",)
    ),
    "missing key": Wrong(
        RECIPE.replace("  task: sequence-classification\n", ""), "1:1", ("missing key `task`",)
    ),
    "empty recipe": Wrong("", None, ("empty",)),
    "not a number": Wrong(section("method", "lora_alpha: .nan"), "7:3", ("lora_alpha",)),
    # what only model and data can tell
    "model folder is not there": Wrong(
        section("model", "name_or_path: ./modle"), "2:3", ("no `./modle` on disk", "`model`")
    ),
    "model folder is no model": Wrong(
        section("model", "name_or_path: ./data"), "2:3", ("no config.json",)
    ),
    "model name is no name": Wrong(
        section("model", "name_or_path: what is this"), "2:3", ("`what is this`",)
    ),
    "builtin is not there": Wrong(
        section("model", "name_or_path: builtin/minilm"), "2:3", ("`builtin/minilm-l6`",)
    ),
    "builtin of another kind": Wrong(
        section("data", "name_or_path: builtin/minilm-l6"), "5:3", ("a model, not a data set",)
    ),
    "data file is not there": Wrong(
        section("data", "name_or_path: rows.jsonl"), "5:3", ("no `rows.jsonl` on disk",)
    ),
    "data folder is empty": Wrong(
        section("data", "name_or_path: ./nothing"), "5:3", ("no file train.*",)
    ),
    "data file of another kind": Wrong(
        section("data", "name_or_path: ./a.yaml"), "5:3", ("not a data file", ".jsonl")
    ),
    "mistyped local data with offline": Wrong(
        section("data", "name_or_path: ./dat", "offline: ./data"),
        "5:3",
        ("no `./dat` on disk", "`data`"),
    ),
    "mistyped local model with offline": Wrong(
        section("model", "name_or_path: ./modle", "offline: ./model"),
        "2:3",
        ("no `./modle` on disk", "`model`"),
    ),
    "mistyped deep path with offline": Wrong(
        section("data", "name_or_path: deep/in/data", "offline: ./data"),
        "5:3",
        ("no `deep/in/data` on disk",),
    ),
    "offline is not there": Wrong(
        section("data", "name_or_path: x/y", "offline: ./dat"), "6:3", ("no `./dat` on disk",)
    ),
    "offline would be from the hub": Wrong(
        section("data", "offline: x/y"), "5:3", ("`x/y`", "local path")
    ),
    "model and data at once": Wrong(
        RECIPE.replace("./model", "./modle").replace("./data", "./dat"),
        "2:3",
        ("a.yaml:5:3", "`./modle`", "`./dat`"),
    ),
    "empty file": Wrong(
        section("data", "name_or_path: empty.jsonl"), "5:3", ("`empty.jsonl` is empty",)
    ),
    "header without rows": Wrong(section("data", "name_or_path: header.csv"), "5:3", ("rows",)),
    "one row": Wrong(section("data", "name_or_path: one.jsonl"), "5:3", ("too few",)),
    "broken JSON line": Wrong(
        section("data", "name_or_path: broken.jsonl"), "5:3", ("broken.jsonl:3:", "not JSON")
    ),
    "a row that is no object": Wrong(
        section("data", "name_or_path: list.jsonl"), "5:3", ("list.jsonl:2",)
    ),
    "broken parquet": Wrong(
        section("data", "name_or_path: broken.parquet"), "5:3", ("broken.parquet",)
    ),
    "validation label not in training": Wrong(
        section("data", "name_or_path: ./foreign"),
        "5:3",
        (
            (
                "the validation label '7' of row 3 (foreign/validation.jsonl:3), column `label`,"
                " is not"
            ),
            "0, 1",
            "data.label_column",
        ),
    ),
    "one label": Wrong(
        section("data", "name_or_path: same.jsonl"), None, ("have the label 1", "two different")
    ),
    "row without a label": Wrong(
        section("data", "name_or_path: hole.jsonl", "label_column: label"),
        "6:3",
        ("row 2 (hole.jsonl:2) has nothing in the column `label`", "data.label_column"),
    ),
    "row without a text": Wrong(
        section("data", "name_or_path: notext.jsonl", "text_columns: text"),
        "6:3",
        ("row 2 (notext.jsonl:2) has null",),
    ),
    "text column is not there": Wrong(
        section("data", "text_columns: sentense"),
        "5:3",
        ("no column `sentense`", "`sentence`", "label"),
    ),
    "no usual text column": Wrong(
        section("data", "name_or_path: odd.jsonl", "label_column: stars"),
        "4:1",
        ("no text column among", "words"),
    ),
    "label column is not there": Wrong(
        section("data", "label_column: lable"), "5:3", ("no column `lable`", "`label`")
    ),
    "no usual label column": Wrong(
        section("data", "name_or_path: unlabelled.jsonl"), "4:1", ("no label column among",)
    ),
    "three text columns": Wrong(
        section("data", "text_columns: [a, b, c]"), "4:1", ("one column, or the two",)
    ),
    "regression over words": Wrong(
        section("data", "name_or_path: words.jsonl", "problem_type: regression"),
        "4:1",
        ("regression needs numbers",),
    ),
    "subset is not there": Wrong(
        section("data", "name_or_path: ./many", "subset: sst3"),
        "6:3",
        ("`sst3`", "cola, sst2", "`sst2`"),
    ),
    "subset where there is none": Wrong(
        section("data", "subset: sst2"), "5:3", ("no subfolder `sst2`",)
    ),
    "subset not named": Wrong(
        section("data", "name_or_path: ./many"), "4:1", ("a subset must be named", "cola, sst2")
    ),
    "split is not there": Wrong(
        section("data", "train_split: trian"), "5:3", ("trian", "`train`", "validation")
    ),
    "validation split is not there": Wrong(
        section("data", "validation_split: validatoin"),
        "5:3",
        ("no split `validatoin`", "`validation`"),
    ),
    "too long for the model": Wrong(section("data", "max_seq_length: 65"), "5:3", ("at most 64",)),
    "metric that is not reported": Wrong(
        section("train", "metric_for_best_model: bleu"),
        "10:3",
        ("`bleu`", "accuracy", "matthews_correlation"),
    ),
    "metric without evaluations to compare": Wrong(
        section("train", "metric_for_best_model: accuracy"),
        "10:3",
        ("metric_for_best_model has no effect", "eval_steps"),
    ),
    "key of another format": Wrong(
        section("data", "name_or_path: ./sums", "packing: true", recipe=LM),
        "6:3",
        ("`packing` has no effect",),
    ),
    "strings with fractions": Wrong(
        section("data", "name_or_path: scores.jsonl"),
        None,
        ("strings that are numbers", "data.label_column", "regression"),
    ),
    "label that is a list": Wrong(
        section("data", "name_or_path: lists.jsonl"),
        None,
        ("lists.jsonl:", "has a list in the column `label`"),
    ),
    "format of another task": Wrong(
        section("data", "format: text"), "5:3", ("`text`", "classification")
    ),
    "classification for a causal LM": Wrong(
        section("data", "format: classification", recipe=LM), "5:3", ("causal-lm",)
    ),
    "columns that say nothing": Wrong(
        section("data", "name_or_path: odd.jsonl", recipe=LM), "4:1", ("words",)
    ),
    "template with a wrong field": Wrong(
        section("data", 'prompt: "{qestion}: "', "completion: '{answer}'", recipe=LM),
        "5:3",
        ("`qestion`", "`question`"),
    ),
    "template with an open brace": Wrong(
        section("data", 'prompt: "{question: "', "completion: '{answer}'", recipe=LM),
        "5:3",
        ("not a template",),
    ),
    "template with a place by number": Wrong(
        section("data", 'prompt: "{0}"', "completion: '{answer}'", recipe=LM),
        "5:3",
        ("no column `0`",),
    ),
    "all targets cut off": Wrong(
        section("data", "max_seq_length: 3", recipe=LM),
        "5:3",
        ("no training row has a target left",),
    ),
    "packing of prompts": Wrong(
        section("data", "format: prompt-completion", "packing: true", recipe=LM),
        "4:1",
        ("packing is for format: text",),
    ),
    "rank larger than the layer": Wrong(
        section("method", "r: 33"),
        "7:3",
        ("rank 33 is larger than a layer", "32 → 32", "at most 32"),
    ),
    "rank_pattern larger than the layer": Wrong(
        section("method", "rank_pattern:", "  intermediate.dense: 33"),
        "8:5",
        ("rank 33", "32 → 48"),
    ),
    "targets that match nothing": Wrong(
        section("method", "target_modules: [qurey]"),
        "7:3",
        ("`qurey` matches no linear layer", "`query`", "intermediate.dense"),
    ),
    "one of two targets matches nothing": Wrong(
        section("method", "target_modules: [query, q_proj]"),
        "7:3",
        ("`q_proj` matches no linear layer",),
    ),
    "targets that are no expression": Wrong(
        section("method", "target_modules: 'a('"), "7:3", ("not a regular expression",)
    ),
    "rank_pattern that matches nothing": Wrong(
        section("method", "rank_pattern: {q_proj: 2}"), "7:18", ("`q_proj`",)
    ),
    "exclusion that matches nothing": Wrong(
        section("method", "exclude_modules: [q_proj]"), "7:3", ("`q_proj`",)
    ),
    "everything excluded": Wrong(
        section("method", "exclude_modules: ['.*']"), "7:3", ("no layer is left",)
    ),
    "target that is a head": Wrong(
        section("method", "target_modules: [classifier]"), "7:3", ("trained in full",)
    ),
    "tokenizer that can not end a text": Wrong(
        LM.replace("./lm", "./model"), "2:3", ("no end-of-sequence token",)
    ),
    # salor, by itself and joined: first what needs no model
    "factors: density 0": Wrong(
        factors("density: 0"), "8:13", ("method.factors.density", "above 0 and at most 1")
    ),
    "factors: density above 1": Wrong(
        factors("density: 1.5"), "8:13", ("1.5", "above 0 and at most 1")
    ),
    "base: density above 1": Wrong(
        base("density: 1.5"), "8:10", ("method.base.density", "1.5", "above 0 and at most 1")
    ),
    "factors: density of a word": Wrong(
        factors("density: half"), "8:13", ("'half'", "a number above 0")
    ),
    "factors: ramp that ends before it begins": Wrong(
        section("method", "name: salor", "factors:", "  begin: 0.5", "  end: 0.2"),
        "10:5",
        ("ends at 0.2", "begins at 0.5"),
    ),
    "factors: ramp beyond the run": Wrong(
        factors("end: 1.5"), "8:13", ("1.5", "above 0 and at most 1")
    ),
    "factors: interval 0": Wrong(factors("interval: 0"), "8:13", ("above 0 and at most 1",)),
    "factors: 3:2": Wrong(
        section("method", "name: salor", "factors:", "  structure: 3:2"),
        "9:5",
        ("3:2 keeps nothing or drops",),
    ),
    "factors: unknown structure": Wrong(
        section("method", "name: salor", "factors:", "  density: 0.5", "  structure: sparse"),
        "10:5",
        ("no structure `sparse`", "unstructured, group, rank or n:m, as 2:4"),
    ),
    "factors: density against n:m": Wrong(
        section("method", "name: salor", "factors:", "  density: 0.4", "  structure: 2:4"),
        "10:5",
        ("2:4", "0.5", "0.4"),
    ),
    "base: density against n:m": Wrong(
        section("method", "name: salor", "base:", "  density: 0.4", "  structure: 2:4"),
        "10:5",
        ("2:4", "0.5", "0.4"),
    ),
    "base: density against its criterion": Wrong(
        section("method", "name: salor", "base:", "  density: 0.4", "  criterion: 2:4"),
        "(8:3|9:5|10:5)",
        ("2:4", "0.5", "0.4"),
    ),
    "base: two structures": Wrong(
        base("criterion: 2:4, structure: 1:4"), "8:(3|10|26)", ("criterion 2:4 and structure 1:4",)
    ),
    "base: groups": Wrong(
        section("method", "name: salor", "base:", "  structure: group"),
        "9:5",
        ("unstructured or n:m, not by group",),
    ),
    "base: ranks": Wrong(
        section("method", "name: salor", "base:", "  structure: rank"),
        "9:5",
        ("unstructured or n:m, not by rank",),
    ),
    "base: no calibration rows": Wrong(
        base("calibration_rows: 0"), "8:10", ("calibration_rows", "at least 1")
    ),
    "base: negative r_res": Wrong(base("r_res: -1"), "8:10", ("r_res", "at least 0")),
    "base: unknown criterion": Wrong(
        base("criterion: wand"), "8:10", ("'wand'", "magnitude, wanda, 2:4", "`wanda`")
    ),
    "factors: criterion of a base": Wrong(
        factors("criterion: wanda"), "8:13", ("'wanda'", "magnitude, sensitivity")
    ),
    "neither factors nor base": Wrong(
        section("method", "name: salor", "factors: null"), "6:1", ("neither factors nor base",)
    ),
    "factors: unknown key": Wrong(
        factors("densty: 0.5"), "8:13", ("unknown key `densty` in method.factors", "`density`")
    ),
    "base: unknown key": Wrong(
        base("r_ress: 4"), "8:10", ("unknown key `r_ress` in method.base", "`r_res`")
    ),
    "factors: key of a base": Wrong(
        factors("r_res: 4"),
        "8:13",
        ("unknown key `r_res` in method.factors", "`method.base.r_res`"),
    ),
    "density at the top": Wrong(
        section("method", "name: salor", "density: 0.5"),
        "8:3",
        ("unknown key `density` in method", "`method.factors.density`"),
    ),
    "factors of another method": Wrong(
        section("method", "factors: {density: 0.5}"), "7:3", ("unknown key `factors` in method",)
    ),
    "with: not a list": Wrong(
        section("method", "with: {name: salor}"),
        "7:3",
        ("`method.with`", "a list, each item a mapping"),
    ),
    "with: names alone": Wrong(
        section("method", "with: [salor]"), "7:10", ("'salor'", "a mapping")
    ),
    "with: no name": Wrong(
        section("method", "with: [{factors: {}}]"),
        "7:10",
        ("missing key `name` in method.with.0", "salor"),
    ),
    "with: unknown method": Wrong(
        section("method", "with: [{name: salr}]"), "7:11", ("'salr'", "`salor`")
    ),
    "with: a method that joins none": Wrong(
        section("method", "with: [{name: vanilla}]"), "7:11", ("'vanilla'", "expected: salor")
    ),
    "with: itself": Wrong(
        section("method", "name: salor", "with: [{name: salor}]"),
        "8:10",
        ("`salor` is there twice",),
    ),
    "with: one twice": Wrong(
        section("method", "with:", "  - name: salor", "  - name: salor"),
        "9:7",
        ("`salor` is there twice",),
    ),
    "with: unknown key": Wrong(
        joined("factor: {}"), "7:24", ("unknown key `factor` in method.with.0", "`factors`")
    ),
    "with: unknown key in factors": Wrong(
        section("method", "with:", "  - name: salor", "    factors:", "      densty: 0.3"),
        "10:9",
        ("unknown key `densty` in method.with.0.factors", "`density`"),
    ),
    "with: unknown key in base": Wrong(
        joined("base: {calibration: 4}"), "7:31", ("`calibration`", "`calibration_rows`")
    ),
    "with: key of the main method": Wrong(
        joined("r: 3"), "7:24", ("unknown key `r` in method.with.0", "`method.r`")
    ),
    "with: neither factors nor base": Wrong(
        joined("factors: null"), "7:10", ("neither factors nor base",)
    ),
    "with: components to l1ra": Wrong(
        section("method", "with:", "  - name: salor", "    factors:", "      structure: rank"),
        "10:9",
        ("structure rank can not join l1ra", "components already", "expected: unstructured"),
    ),
    "with: 2:4 to l1ra": Wrong(
        joined("factors: {structure: 2:4}"),
        "7:34",
        ("structure 2:4 can not join l1ra", "moves ranks"),
    ),
    "with: groups to l1ra": Wrong(
        joined("factors: {structure: group}"), "7:34", ("structure group can not join l1ra",)
    ),
    # then what the model tells
    "factors: pieces that the inputs are no multiple of": Wrong(
        factors("structure: 2:5", "r: 5"),
        "9:13",
        ("is 32 wide: no multiple of 5", "11 more do not fit"),
    ),
    "factors: pieces that the rank is no multiple of": Wrong(
        factors("structure: 2:4", "r: 6"),
        "9:13",
        ("the rank of the adapter of `bert.", "is 6 wide: no multiple of 4"),
    ),
    "factors: groups of odd width": Wrong(
        factors("structure: group, group_size: 3", "r: 3"), "9:13", ("no multiple of 3",)
    ),
    "base: pieces that the inputs are no multiple of": Wrong(
        section("method", "name: salor", "base:", "  r_res: 4", "  structure: 1:5"),
        "10:5",
        ("is 32 wide: no multiple of 5",),
    ),
    "base: r_res larger than a layer": Wrong(
        base("r_res: 33"), "8:10", ("r_res 33 is larger than a layer", "32 → 32", "at most 32")
    ),
    "base: nothing to prune": Wrong(
        section(
            "method", "name: salor", "target_modules: [lm_head]", "base: {r_res: 2}", recipe=LM
        ),
        "9:3",
        ("only those are pruned",),
    ),
    "with: r_res larger than a layer": Wrong(
        section("method", "with:", "  - name: salor", "    base:", "      r_res: 40"),
        "10:9",
        ("r_res 40 is larger", "at most 32"),
    ),
    # chunkwise
    "ladder: not ascending": Wrong(chunks("ladder: [2, 1, 4]"), "8:3", ("go up", "[2, 1, 4]")),
    "ladder: a rank twice": Wrong(chunks("ladder: [2, 2, 4]"), "8:3", ("go up", "[2, 2, 4]")),
    "ladder: a negative rank": Wrong(chunks("ladder: [-1, 4]"), "8:3", ("from 0",)),
    "ladder: empty": Wrong(chunks("ladder: []"), "8:3", ("no rung",)),
    "ladder: 0 alone": Wrong(chunks("ladder: [0]"), "8:3", ("the base model",)),
    "ladder: not up to r": Wrong(
        chunks("ladder: [1, 2]"), "8:3", ("ends at 2", "r = 4", "4 as its last rank")
    ),
    "ladder: beyond r": Wrong(chunks("ladder: [2, 8]"), "8:3", ("ends at 8", "r = 4")),
    "ladder: half a rank": Wrong(chunks("ladder: [1.5, 4]"), "8:12", ("1.5", "whole number")),
    "ladder: a number": Wrong(chunks("ladder: 4"), "8:3", ("method.ladder", "list")),
    "rank_target: below the ladder": Wrong(
        chunks("ladder: [2, 4]", "rank_target: 1"),
        "9:3",
        ("no mixture of the ranks [2, 4] has the mean 1", "between 2 and 4"),
    ),
    "rank_target: above the ladder": Wrong(
        chunks("rank_target: 4.5"), "8:3", ("[1, 2, 4]", "4.5", "between 1 and 4")
    ),
    "rank_target: negative": Wrong(chunks("rank_target: -1"), "8:3", ("rank_target", "at least 0")),
    "rank_target: not a number": Wrong(chunks("rank_target: .nan"), "8:3", ("rank_target",)),
    "min_len above max_len": Wrong(
        chunks("min_len: 9", "max_len: 8"), "8:3", ("min_len 9", "max_len 8", "at most 8")
    ),
    "min_len above the usual max_len": Wrong(
        chunks("min_len: 65"), "8:3", ("min_len 65", "max_len 64")
    ),
    "min_len 0": Wrong(chunks("min_len: 0"), "8:3", ("min_len", "at least 1")),
    "fade longer than a chunk": Wrong(
        chunks("min_len: 3", "fade: 4"), "9:3", ("a fade of 4", "min_len 3", "at most 3")
    ),
    "negative tau": Wrong(chunks("tau: -0.1"), "8:3", ("tau", "at least 0")),
    "trailing 0": Wrong(chunks("trailing: 0"), "8:3", ("trailing", "at least 1")),
    "kv: window smaller than what is exempt": Wrong(
        chunks("kv: {policy: window, window: 67}"),
        "8:24",
        ("a window of 67", "the 4 first and 64 last", "at least 68"),
    ),
    "kv: such a window for one tier": Wrong(
        chunks("kv: {policy: [window, int8, full], window: 8}"),
        "8:38",
        ("a window of 8", "at least 68"),
    ),
    "kv: window 0": Wrong(chunks("kv: {window: 0}"), "8:8", ("window", "at least 1")),
    "kv: of a classifier": Wrong(
        chunks("kv: {policy: int8}", recipe=RECIPE), "8:3", ("has no key-value cache",)
    ),
    "kv: too few policies": Wrong(
        chunks("kv: {policy: [int8, full]}"),
        "8:8",
        ("2 policies for the 3 tiers", "[1, 2, 4]", "one for all, or one for each"),
    ),
    "kv: unknown policy": Wrong(chunks("kv: {policy: int3}"), "8:8", ("int3", "int8", "window")),
    "kv: an unknown policy in a list": Wrong(
        chunks("kv: {policy: [int8, int5, full]}"), "8:(8|23)", ("int5", "int4")
    ),
    "kv: unknown key": Wrong(
        chunks("kv: {policies: int8}"), "8:8", ("unknown key `policies` in method.kv", "`policy`")
    ),
    "difficulty: of the model for a classifier": Wrong(
        chunks("difficulty: {source: model}", recipe=RECIPE),
        "8:16",
        ("predicts no tokens", "table"),
    ),
    "difficulty: unknown source": Wrong(
        chunks("difficulty: {source: tables}"), "8:16", ("'tables'", "`table`")
    ),
    "difficulty: a weight of the other source": Wrong(
        chunks("difficulty: {weights: {entropy: 1}}"),
        "8:(3|16|26)",
        ("no feature `entropy`", "bigram, novelty, position"),
    ),
    "difficulty: a weight of the table for the model": Wrong(
        chunks("difficulty: {source: model, weights: {bigram: 1}}"),
        "8:(3|16|31|41)",
        ("no feature `bigram`", "surprisal, entropy"),
    ),
    "difficulty: a negative weight": Wrong(
        chunks("difficulty: {weights: {bigram: -1}}"),
        "8:(3|16|26)",
        ("weight of `bigram` is negative: -1",),
    ),
    "difficulty: no weight at all": Wrong(
        chunks("difficulty: {weights: {bigram: 0, novelty: 0}}"), "8:(3|16)", ("all weights are 0",)
    ),
    "difficulty: a weight that is no number": Wrong(
        chunks("difficulty: {weights: {bigram: .inf}}"), "8:(3|16|26)", ("bigram", "finite")
    ),
    "difficulty: a weight of a word": Wrong(
        chunks("difficulty: {weights: {bigram: much}}"), "8:26", ("'much'", "number")
    ),
    "difficulty: score_prompt of the table": Wrong(
        chunks("difficulty: {score_prompt: true}"),
        "8:(3|16)",
        ("score_prompt is for the source model",),
    ),
    "nested_by without nested": Wrong(
        chunks("nested_by: chunk"), "8:3", ("does nothing without training: nested",)
    ),
    "nested_by: chunk with the source model": Wrong(
        chunks("nested_by: chunk", "training: nested", "difficulty: {source: model}"),
        "8:3",
        ("a pass of the base model",),
    ),
    "training: unknown": Wrong(chunks("training: post-hoc"), "8:3", ("'post-hoc'", "`posthoc`")),
    "with: sparse factors to a ladder": Wrong(
        chunks("with: [{name: salor, factors: {density: 0.5}, base: null}]"),
        "8:(24|34)",
        ("sparse factors would not stay so",),
    ),
    "chunkwise: key of another method": Wrong(
        chunks("l1_share: 1"), "8:3", ("unknown key `l1_share`",)
    ),
    "chunkwise: many problems at once": Wrong(
        chunks("ladder: [1, 2]", "min_len: 9", "max_len: 8", "nested_by: chunk"),
        "8:3",
        ("a.yaml:9:3", "a.yaml:11:3", "ends at 2"),
    ),
    "output_dir is a file": Wrong(RECIPE + "output_dir: a.yaml\n", None, ("`a.yaml` is a file",)),
}


@pytest.fixture
def place(
    tmp_path: Path,
    tiny_bert: Path,
    tiny_llama: Path,
    sentiment: Path,
    sums: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A working folder with models and data, good and bad."""
    for name, target in {
        "model": tiny_bert,
        "lm": tiny_llama,
        "data": sentiment,
        "sums": sums,
    }.items():
        (tmp_path / name).symlink_to(target)
    row: dict[str, object] = {"text": "good film", "label": 1}
    good: list[dict[str, object]] = [{"text": f"good film {i}", "label": i % 2} for i in range(8)]
    (tmp_path / "nothing").mkdir()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "header.csv").write_text("text,label\n")
    write_jsonl(tmp_path / "one.jsonl", [row])
    (tmp_path / "broken.jsonl").write_text(
        f'{json.dumps(row)}\n\n{{"text": "good", label: 0}}\n{json.dumps(row)}\n'
    )
    (tmp_path / "list.jsonl").write_text(f"{json.dumps(row)}\n[1, 2]\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing more")
    for name, rows in {"train": good, "validation": [*good[:2], row | {"label": 7}]}.items():
        (tmp_path / "foreign").mkdir(exist_ok=True)
        write_jsonl(tmp_path / f"foreign/{name}.jsonl", rows)
    write_jsonl(tmp_path / "same.jsonl", [row] * 8)
    write_jsonl(tmp_path / "hole.jsonl", [*good[:1], {"text": "bad film", "label": None}, *good])
    write_jsonl(tmp_path / "notext.jsonl", [*good[:1], {"text": None, "label": 1}, *good])
    write_jsonl(tmp_path / "odd.jsonl", [{"words": "good", "stars": i % 2} for i in range(8)])
    write_jsonl(tmp_path / "unlabelled.jsonl", [{"text": "good", "stars": i % 2} for i in range(8)])
    write_jsonl(
        tmp_path / "scores.jsonl", [{"text": f"good {i}", "label": f"{i}.5"} for i in range(8)]
    )
    write_jsonl(
        tmp_path / "lists.jsonl", [{"text": f"good {i}", "label": [i % 2]} for i in range(8)]
    )
    write_jsonl(
        tmp_path / "words.jsonl", [{"text": "good", "label": word} for word in ("yes", "no") * 4]
    )
    for subset in ("cola", "sst2"):
        (tmp_path / "many" / subset).mkdir(parents=True)
        write_jsonl(tmp_path / f"many/{subset}/train.jsonl", good)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_recipe_is_one_message_and_nothing_on_disk(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong = WRONG[name]
    (place / "a.yaml").write_text(wrong.text)
    before = tree(place)
    monkeypatch.setattr(sys, "argv", ["lorakit", "train", "a.yaml", *wrong.overrides])
    with pytest.raises(SystemExit) as exit_:
        main()
    out, err = capfd.readouterr()
    assert exit_.value.code == 2, err
    assert out == ""
    assert err.count("error:") == 1, err
    assert "Traceback" not in err
    assert "STAND-IN" not in err
    if wrong.place:
        assert re.search(rf"a\.yaml:{wrong.place}: ", err), err
    for word in wrong.words:
        assert word in err, err
    assert not re.search(PYDANTIC, err), err
    assert tree(place) == before


def test_the_recipe_that_all_others_spoil_is_right(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {"good": RECIPE, "lm": LM}.items():
        (place / f"{name}.yaml").write_text(text)
        monkeypatch.setattr(sys, "argv", ["lorakit", "train", f"{name}.yaml"])
        with pytest.raises(SystemExit) as exit_:
            main()
        assert exit_.value.code == 0
        assert (place / f"runs/{name}/result.json").is_file()


def test_a_process_of_its_own_says_the_same(place: Path) -> None:
    (place / "a.yaml").write_text(WRONG["targets that match nothing"].text)
    before = tree(place)
    entry = [sys.executable, "-c", "from lorakit.cli import main; main()", "train", "a.yaml"]
    done = subprocess.run(entry, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "error: a.yaml:7:3: `qurey` matches no linear layer of the model" in done.stderr
    assert "Traceback" not in done.stderr
    assert tree(place) == before
