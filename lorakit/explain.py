"""Pydantic's errors about a recipe in plain words.

Each says what is wrong, what the section's own JSON schema says was expected, and the nearest name that is valid.
Nothing here knows a section or a method but the table of names that other tools use.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError

from lorakit.errors import Problem

Key = tuple[str, ...]

# {key: what users of PEFT, TRL, axolotl, LLaMA-Factory, torchtune, litgpt and mlx-lm call it}. Where a name is in
# several rows, the row of the section that it was found in is meant, else the first.
CALLED_ELSEWHERE = {
    "method": "lora lora_config lora_parameters peft peft_config adapter",
    "data": "dataset datasets data_args dataset_args",
    "train": "training trainer training_args training_arguments train_args",
    "model": "model_args model_config",
    "output_dir": "out_dir output output_path adapter_path run_dir save_dir save_path",
    "data.name_or_path": (
        "dataset dataset_name dataset_path dataset_id dataset_dir datasets hf_dataset data_path data_files train_file "
        "train_data training_file name path file"
    ),
    "data.subset": "subset_name dataset_config dataset_config_name config config_name task_name",
    "data.train_split": "split dataset_train_split train_split_name",
    "data.validation_split": (
        "validation_file validation_size val_split val_size val_set_size val_split_fraction eval_split test_split test_size "
        "dataset_test_split"
    ),
    "data.format": "dataset_type type",
    "data.text_columns": "text_column text_field text_column_name dataset_text_field column",
    "data.label_column": "label labels label_field label_column_name",
    "data.prompt": "prompt_template template prompt_feature",
    "data.completion": "response completion_feature",
    "data.loss_on": (
        "train_on_inputs train_on_input train_on_prompt mask_prompt completion_only_loss assistant_only_loss masking_strategy"
    ),
    "data.max_seq_length": (
        "cutoff_len max_length sequence_len sequence_length max_seq_len seq_len seq_length max_sequence_length context_length "
        "model_max_length block_size"
    ),
    "data.packing": "packed pack sample_packing neat_packing",
    "data.max_train_samples": "max_samples train_samples num_train_samples max_examples",
    "data.max_eval_samples": "eval_samples max_val_samples num_eval_samples",
    "model.name_or_path": (
        "model_name_or_path base_model model_name model_id model_path pretrained_model_name_or_path hf_model repo_id name path "
        "checkpoint checkpoint_dir"
    ),
    "model.task": "task_type",
    "model.revision": "model_revision revision_of_model",
    "method.name": "method type adapter finetuning_type fine_tune_type peft_type tuner algorithm",
    "method.r": "rank lora_r lora_rank lora_dim",
    "method.lora_alpha": "alpha",
    "method.lora_dropout": "dropout",
    "method.target_modules": (
        "lora_target_modules target_layers lora_target lora_modules lora_attn_modules lora_target_linear targets keys modules"
    ),
    "method.exclude_modules": "lora_exclude_modules ignore_modules",
    "method.rank_pattern": "ranks lora_rank_pattern",
    "train.num_train_epochs": "epochs num_epochs max_epochs n_epochs epoch",
    "train.max_steps": "iters max_iters num_iters steps num_steps total_steps num_train_steps",
    "train.per_device_train_batch_size": (
        "batch_size micro_batch_size train_batch_size per_device_batch_size global_batch_size train_micro_batch_size_per_gpu"
    ),
    "train.per_device_eval_batch_size": "eval_batch_size val_batch_size",
    "train.gradient_accumulation_steps": (
        "grad_accum gradient_accumulation grad_accumulation grad_accum_steps grad_accumulation_steps accumulation_steps "
        "gradient_accumulation_iters accumulate_grad_batches"
    ),
    "train.max_tokens_per_micro_batch": (
        "max_tokens max_tokens_per_batch max_tokens_per_micro_batch_size max_batch_tokens batch_tokens tokens_per_batch"
    ),
    "train.group_by_length": "train_sampling_strategy length_grouping sort_by_length bucket_by_length",
    "train.learning_rate": "lr max_lr peak_lr",
    "train.lr_scheduler_type": "lr_scheduler scheduler scheduler_type lr_schedule schedule lr_scheduler_name",
    "train.warmup_ratio": "warmup warmup_steps num_warmup_steps lr_warmup_steps warmup_fraction",
    "train.weight_decay": "wd decay",
    "train.adam_beta1": "beta1 betas",
    "train.adam_beta2": "beta2",
    "train.adam_epsilon": "eps epsilon adam_eps",
    "train.max_grad_norm": (
        "clip clip_grad clip_grad_norm grad_clip grad_norm gradient_clipping gradient_clip_val max_norm clipping"
    ),
    "train.precision": "bf16 fp16 fp32 float16 bfloat16 dtype torch_dtype mixed_precision train_dtype",
    "train.seed": "random_seed random_state data_seed",
    "train.logging_steps": "log_every log_every_n_steps log_interval logging_interval steps_per_report",
    "train.eval_steps": "eval_every eval_interval val_interval steps_per_eval evals_per_epoch eval_strategy evaluation_strategy",
    "train.save_steps": "save_every save_interval saves_per_epoch save_strategy checkpoint_every",
    "train.save_total_limit": "max_checkpoints keep_checkpoints",
    "train.load_best_model_at_end": "load_best save_best",
    "train.metric_for_best_model": "metric best_metric monitor",
    "train.early_stopping_patience": "patience early_stopping",
    "train.resume_from_checkpoint": "resume resume_from resume_adapter_file auto_resume_from_checkpoints",
}


def explain(error: ValidationError, whole: type[BaseModel], data: dict[str, Any]) -> list[Problem]:
    """What is wrong with `data`, which is no valid `whole`: one problem a key, none of them located yet."""
    return _Explanation(whole, data).problems(error)


def not_finite(data: Any, problems: Sequence[Problem]) -> list[Problem]:
    """A problem for each nan or infinity in `data` that `problems` leave unsaid: bounds let inf pass, some fields have none."""
    keys = [p.key for p in problems]
    return [
        Problem(f"`{key}` is {value}", key, "a finite number")
        for key, value in _leaves(data, "")
        if isinstance(value, float) and not math.isfinite(value) and not any(f"{key}.".startswith(f"{k}.") for k in keys if k)
    ]


def _leaves(data: Any, key: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(data, (dict, list)):
        yield key, data
        return
    for part, child in data.items() if isinstance(data, dict) else enumerate(data):
        yield from _leaves(child, f"{key}.{part}" if key else str(part))


class _Explanation:
    """Pydantic's errors about `data` in plain words.

    A key is a tuple here, since a name may hold dots itself (rank_pattern's do).
    """

    def __init__(self, whole: type[BaseModel], data: dict[str, Any]) -> None:
        self.data = data
        self.schema = whole.model_json_schema()
        self.valid = list(self._valid_keys((), self.schema))

    def problems(self, error: ValidationError) -> list[Problem]:
        plain: dict[Key, Any] = {}
        unions: dict[Key, dict[Any, list[tuple[Key, Any]]]] = {}
        for detail in error.errors(include_url=False):
            key, union, branch = self._key(detail)
            if union is None:
                plain.setdefault(key, detail)
            else:
                unions.setdefault(union, {}).setdefault(branch, []).append((key, detail))
        for union, branches in unions.items():
            # Of a union, the branch that got furthest is what was meant; if none got anywhere, the key itself is wrong.
            deep = [found for found in branches.values() if any(key != union for key, _ in found)]
            every = [one for found in branches.values() for one in found]
            # A branch of the right type but out of range says more than one of another type.
            shallow = sorted(every, key=lambda one: one[1]["type"].endswith("_type"))[:1]
            for key, detail in min(deep, key=len) if deep else shallow:
                plain.setdefault(key, detail)
        meant = {key: self._meant(key, detail["input"]) for key, detail in plain.items() if detail["type"] == "extra_forbidden"}
        # A required key under another tool's name is one mistake, not two.
        told = set(meant.values())
        return [
            self._unknown(key, meant[key]) if key in meant else self._problem(key, detail)
            for key, detail in plain.items()
            if detail["type"] != "missing" or key not in told
        ]

    def _key(self, detail: Any) -> tuple[Key, Key | None, Any]:
        """(key, the key of the union it is in, that union's branch): pydantic mixes branch names into the path."""
        node: Any = self.data
        key: Key = ()
        union, branch = None, None
        for index, part in enumerate(detail["loc"]):
            there = (isinstance(node, dict) and part in node) or (isinstance(node, list) and isinstance(part, int))
            if there or (detail["type"] == "missing" and index == len(detail["loc"]) - 1):
                node = node[part] if there else None
                key = (*key, str(part))
            elif union is None:
                union, branch = key, part
        return key, union, branch

    def _problem(self, key: Key, detail: Any) -> Problem:
        dotted, value = ".".join(key), detail["input"]
        if detail["type"] in ("value_error", "assertion_error"):
            return Problem(str(detail["ctx"]["error"]), dotted)
        schema = self._resolve(self._schema_of(key))
        expected = self._describe(schema) or detail["msg"]
        if detail["type"] == "missing":
            above = ".".join(key[:-1])
            about = schema.get("description", "").partition("\n")[0]
            what = f"missing key `{key[-1]}` in {above}" if above else f"missing section `{key[-1]}`"
            return Problem(what, dotted, f"{expected}. {about}" if about else expected)
        choices = [choice for choice in self._choices(schema) if isinstance(choice, str)]
        nearest = _close(value, choices) if isinstance(value, str) else None
        return Problem(f"`{dotted}` is {_shown(value)}", dotted, expected, nearest)

    def _unknown(self, key: Key, meant: Key | None) -> Problem:
        above, name = key[:-1], key[-1]
        what = f"unknown key `{name}` " + (f"in {'.'.join(above)}" if above else "at the top of the recipe")
        if meant is None:
            nearest = None
        elif ".".join(meant) == name:
            nearest = f"{meant[0]}: {{{'.'.join(meant[1:])}: …}}"
        else:
            nearest = meant[-1] if meant[:-1] == above else ".".join(meant)
        return Problem(what, ".".join(key), f"one of {', '.join(self._names(above))}", nearest)

    def _meant(self, key: Key, value: Any) -> Key | None:
        """The valid key that an unknown one most likely means."""
        above, name = key[:-1], key[-1].lower().replace("-", "_")
        called = [tuple(valid.split(".")) for valid, names in CALLED_ELSEWHERE.items() if name in names.split()]
        same = [valid for valid in self.valid if name in (valid[-1], ".".join(valid))]
        # A mapping is meant for a section, a value for a key; and the section at hand goes first.
        likely = sorted(
            [valid for valid in called if valid in self.valid] or same,
            key=lambda valid: (bool(self._names(valid)) != isinstance(value, dict), valid[0] != key[0]),
        )
        if likely:
            return likely[0]
        near = _close(name, self._names(above))
        if near:
            return (*above, near)
        far = _close(name, [valid[-1] for valid in self.valid], cutoff=0.8)
        return next((valid for valid in self.valid if valid[-1] == far), None)

    # -- what the schema says ------------------------------------------------------------------------------------------

    def _resolve(self, schema: Any) -> dict[str, Any]:
        """`schema` with its reference followed; what stands beside the reference (a description) goes first."""
        if "$ref" not in schema:
            return dict(schema)
        target = self.schema["$defs"][schema["$ref"].rpartition("/")[2]]
        return {**target, **{key: value for key, value in schema.items() if key != "$ref"}}

    def _branches(self, schema: Any) -> list[dict[str, Any]]:
        schema = self._resolve(schema)
        several = schema.get("anyOf") or schema.get("oneOf")
        return [leaf for branch in several for leaf in self._branches(branch)] if several else [schema]

    def _schema_of(self, key: Key) -> dict[str, Any]:
        """The schema at `key`; {} (anything goes) where the schema does not reach."""
        schema: Any = self.schema
        for part in key:
            branches = self._branches(schema)
            below = [b.get("properties", {}).get(part) or b.get("additionalProperties") or b.get("items") for b in branches]
            schema = next((found for found in below if isinstance(found, dict)), {})
        return dict(schema)

    def _valid_keys(self, above: Key, schema: Any) -> Iterator[Key]:
        for branch in self._branches(schema):
            for name, child in branch.get("properties", {}).items():
                yield (*above, name)
                yield from self._valid_keys((*above, name), child)

    def _names(self, key: Key) -> list[str]:
        """The valid names right under `key`."""
        branches = self._branches(self._schema_of(key))
        return list(dict.fromkeys(name for branch in branches for name in branch.get("properties", {})))

    def _choices(self, schema: Any) -> list[Any]:
        branches = self._branches(schema)
        return [choice for branch in branches for choice in branch.get("enum", [branch["const"]] if "const" in branch else [])]

    def _describe(self, schema: Any) -> str:
        """What `schema` accepts, in words; "" for anything."""
        words = dict.fromkeys(filter(None, map(self._describe_branch, self._branches(schema))))
        # A list goes last, or what follows would read as one of its items.
        return " or ".join(sorted(words, key=lambda word: word.startswith("a list")))

    def _describe_branch(self, branch: dict[str, Any]) -> str:
        choices = self._choices(branch)
        if choices:
            return f"one of {', '.join(map(str, choices))}" if len(choices) > 1 else str(choices[0])
        kind = branch.get("type")
        if kind in ("integer", "number"):
            return ("a whole number" if kind == "integer" else "a number") + _range(branch)
        if kind == "string":
            return "a string that is not empty" if branch.get("minLength") else "a string"
        if kind == "array":
            item = self._describe(branch.get("items", {}))
            return f"a list, each item {item}" if item else "a list"
        if kind == "object":
            names, value = list(branch.get("properties", {})), self._describe(branch.get("additionalProperties") or {})
            if branch.get("required"):
                needed = [f"{name} ({self._describe(branch['properties'][name])})" for name in branch["required"]]
                return f"a mapping with at least {' and '.join(needed)}"
            if names:
                return f"a mapping with keys of {', '.join(names)}"
            return f"a mapping, each value {value}" if value else "a mapping"
        return {"boolean": "true or false", "null": "null"}.get(str(kind), "")


_BOUNDS = {"minimum": "of at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}

_KINDS = {
    bool: "a boolean",
    str: "a string",
    int: "a whole number",
    float: "a floating-point number",
    list: "a list",
    dict: "a mapping",
}


def _range(branch: dict[str, Any]) -> str:
    """The bounds of a number, as " of at least 0 and below 1"."""
    bounds = [f"{words} {_plain(branch[name])}" for name, words in _BOUNDS.items() if name in branch]
    return " " + " and ".join(bounds) if bounds else ""


def _plain(bound: float) -> str:
    return str(int(bound)) if float(bound).is_integer() else str(bound)


def _shown(value: Any) -> str:
    """`value` with its kind: a quoted number, or 8.0 for 8, is wrong in its kind only."""
    if value is None:
        return "null"
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"{_KINDS[type(value)]}, {text if len(text) <= 60 else text[:59] + '…'}"


def _close(word: str, names: list[str], cutoff: float = 0.6) -> str | None:
    return next(iter(get_close_matches(word.lower(), names, n=1, cutoff=cutoff)), None)
