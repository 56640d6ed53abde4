"""Names that a recipe's keys have in other tools: PEFT, Trainer, TRL, axolotl, LLaMA-Factory,
torchtune, litgpt, mlx-lm, Unsloth.

Where another tool's value means something else, the table says how to convert it. Names of values
are in `lorakit.recipes.values_elsewhere`, keys that have no counterpart in
`lorakit.recipes.no_counterpart`.
"""

from __future__ import annotations

from collections.abc import Iterator

from lorakit.data.formats import what_a_format_is
from lorakit.spec import Meant

# {key: its names in PEFT, TRL, axolotl, LLaMA-Factory, torchtune, litgpt and mlx-lm}; the value is
# the same. A name in several rows means the row of the section in which it was found, else the
# first. `lr_schedule.name` is a `name` inside of `lr_schedule`.
CALLED_ELSEWHERE = {
    "method": "lora lora_config lora_parameters lora_args peft peft_config adapter",
    "data": "dataset datasets data_args dataset_args hf_dataset",
    "train": "training trainer training_args training_arguments train_args eval",
    "model": "model_args model_config",
    "output_dir": (
        "out_dir output output_path adapter_path run_dir save_dir save_path run_name"
        " experiment_name"
    ),
    "data.name_or_path": (
        "dataset dataset_name dataset_path dataset_id dataset_dir datasets hf_dataset data_path"
        " data_files train_file train_data training_file name path file"
        " json_path"
    ),
    "data.subset": (
        "subset_name dataset_config dataset_config_name config config_name task_name datasets.name"
        " dataset.name"
    ),
    "data.train_split": "split dataset_train_split train_split_name",
    "data.validation_split": "val_split eval_split test_split dataset_test_split valid_split",
    "data.text_columns": "text_column text_field text_column_name dataset_text_field column",
    "data.label_column": "label labels label_field label_column_name",
    "data.completion": "response",
    "data.max_seq_length": (
        "cutoff_len max_length sequence_len sequence_length max_seq_len seq_len seq_length"
        " max_sequence_length context_length model_max_length block_size"
    ),
    "data.streaming": "dataset_streaming",
    "data.packing": "packed pack sample_packing neat_packing",
    "data.max_train_samples": "max_samples train_samples num_train_samples max_examples",
    "data.max_eval_samples": "eval_samples max_val_samples num_eval_samples",
    "model.name_or_path": (
        "model_name_or_path base_model model_name model_id model_path pretrained_model_name_or_path"
        " hf_model repo_id name path checkpoint checkpoint_dir base_model_name_or_path"
    ),
    "model.task": "task_type lora_task_type",
    "model.revision": "model_revision revision_of_model",
    "model.quantization.quant_type": "bnb_4bit_quant_type",
    "model.quantization.double_quant": (
        "bnb_4bit_use_double_quant use_bnb_nested_quant use_nested_quant double_quantization"
    ),
    "model.quantization.backend": "quantization_method quant_method",
    "method.name": "method type adapter finetuning_type fine_tune_type peft_type tuner algorithm",
    "method.r": "rank lora_r lora_rank lora_dim",
    "method.lora_alpha": "alpha",
    "method.use_rslora": "rslora rs_lora peft_use_rslora",
    "method.lora_dropout": "dropout",
    "method.target_modules": (
        "lora_target_modules target_layers lora_target lora_modules lora_attn_modules targets keys"
        " modules"
    ),
    "method.exclude_modules": "lora_exclude_modules ignore_modules",
    "method.rank_pattern": "ranks lora_rank_pattern",
    "method.alpha_pattern": "lora_alpha_pattern",
    "method.init_lora_weights": "init_weights peft_init_lora_weights lora_init",
    "method.init_from": (
        "adapter_name_or_path lora_model_dir lora_path peft_lora_path init_adapter adapter_init"
    ),
    "train.num_train_epochs": "epochs num_epochs max_epochs n_epochs epoch",
    "train.max_steps": "iters max_iters num_iters steps num_steps total_steps num_train_steps",
    "train.per_device_train_batch_size": (
        "batch_size micro_batch_size train_batch_size per_device_batch_size"
        " train_micro_batch_size_per_gpu per_gpu_train_batch_size"
    ),
    "train.per_device_eval_batch_size": "eval_batch_size val_batch_size per_gpu_eval_batch_size",
    "train.gradient_accumulation_steps": (
        "grad_accum gradient_accumulation grad_accumulation grad_accum_steps"
        " grad_accumulation_steps accumulation_steps gradient_accumulation_iters"
        " accumulate_grad_batches"
    ),
    "train.max_tokens_per_micro_batch": (
        "max_tokens_per_batch max_tokens_per_micro_batch_size max_batch_tokens"
        " batch_tokens tokens_per_batch"
    ),
    "train.group_by_length": "length_grouping sort_by_length bucket_by_length",
    "train.gradient_checkpointing": (
        "activation_checkpointing use_gradient_checkpointing enable_activation_checkpointing"
        " grad_checkpoint"
    ),
    "train.torch_compile": "compile use_compile",
    "train.learning_rate": "lr max_lr peak_lr",
    "train.lora_plus_ratio": "loraplus_lr_ratio loraplus_ratio lora_plus_lr_ratio",
    "train.lr_scheduler_type": (
        "lr_scheduler scheduler scheduler_type lr_schedule schedule lr_scheduler_name"
    ),
    "train.warmup_ratio": "warmup_fraction",
    "train.warmup_steps": "warmup num_warmup_steps lr_warmup_steps warmup_iters",
    "train.weight_decay": "wd decay",
    "train.adam_beta1": "beta1",
    "train.adam_beta2": "beta2",
    "train.adam_epsilon": "eps epsilon adam_eps",
    "train.max_grad_norm": (
        "clip clip_grad clip_grad_norm grad_clip grad_norm gradient_clipping gradient_clip_val"
        " max_norm clipping"
    ),
    "train.seed": "random_seed random_state data_seed",
    "train.logging_steps": (
        "log_every log_every_n_steps log_interval logging_interval steps_per_report"
    ),
    "train.eval_steps": "eval_every eval_interval val_interval steps_per_eval eval.interval",
    "train.eval_on_start": "initial_validation",
    "train.save_steps": "save_every save_interval checkpoint_every",
    "train.save_total_limit": "max_checkpoints keep_checkpoints",
    "train.load_best_model_at_end": "load_best save_best",
    "train.metric_for_best_model": "metric best_metric monitor",
    "train.early_stopping_patience": "patience",
    "train.resume_from_checkpoint": (
        "resume resume_from resume_adapter_file auto_resume_from_checkpoints"
    ),
}
_HELD_OUT = (
    "It is a split's name, or the fraction of the rows to hold out, as 0.1; not a number of rows."
)
_SETS = "It is a list of the data sets, as [{name_or_path: a.jsonl, weight: 2}, {…}]."
_WEIGHTS = (
    "Each of its sets has a weight, its share of an epoch's rows; without weights every row comes"
    " once an epoch."
)
# Names of a key that has one data set, or several of them, in other tools.
_ONE_OR_SEVERAL = (
    "dataset datasets dataset_name dataset_path data_path data_files train_file train_data"
)
_TEMPLATE = 'It is a template over the columns, as "{question}".'
_FORMATS = what_a_format_is()
# (nearest key, its names in other tools, how its value differs): the value cannot simply be taken
# over.
ANOTHER_VALUE = (
    (
        "data.validation_split",
        "validation_size val_size val_set_size val_split_fraction test_size",
        _HELD_OUT,
    ),
    (
        "data.validation_split",
        "validation_file",
        "Files `train` and `validation` go into one folder: name that in name_or_path.",
    ),
    (
        "data.validation_split",
        "test_datasets eval_dataset eval_dataset_name",
        "Files `train` and `validation` go into one folder: name that in name_or_path.",
    ),
    ("data.format", "dataset_type type formatting conversation_style", _FORMATS),
    ("data.prompt", "prompt_template prompt_feature prompt_style datasets.type.format", _TEMPLATE),
    ("data.prompt", "type.format", _TEMPLATE),
    (
        "data.chat_template",
        "template chat_template_path chat_template_jinja conversation_template",
        "The tokenizer's own is the default; else it is chatml, alpaca, or a file in Jinja.",
    ),
    (
        "data.column_map",
        "field_messages field_instruction field_input field_output field_system chat_feature"
        " columns",
        "It names columns that are called otherwise, as {messages: dialogue}.",
    ),
    (
        "data.message_keys",
        "message_property_mappings message_field_role message_field_content mapping",
        "It names the parts of a message, as {role: from, content: value}.",
    ),
    ("data.roles", "role_mapping datasets.roles", "It is {customer: user, agent: assistant}."),
    ("data.train_split", "dataset_splits", "Of training; the other is data.validation_split."),
    ("data.mix", "dataset_mixer dataset_mixture", _SETS),
    ("data.mix", "interleave_probs mix_strategy", _WEIGHTS),
    (
        "data.name_or_path",
        "data.class_path dataset._component_",
        "It is a file, a folder or a data set on the hub, not a class.",
    ),
    (
        "data.max_eval_samples",
        "val_batches eval.max_iters",
        "It is a number of rows: batches times rows of a batch.",
    ),
    (
        "model.name_or_path",
        "model._component_",
        "It is a folder or a model on the hub, as transformers loads it, not a function.",
    ),
    (
        "model.quantization",
        "load_in_4bit load_in_8bit quantization_bit quantization_config bnb_config quantize"
        " quantize_base bits quant_bits",
        "The base in few bits is `quantization: {bits: 4}`, or 8; without it, in train.precision.",
    ),
    ("data.completion", "completion_feature", _TEMPLATE),
    (
        "data.loss_on",
        "train_on_inputs train_on_input train_on_prompt",
        (
            "`true` is `loss_on: all`; `false` is the default: completion or, of conversations,"
            " assistant."
        ),
    ),
    (
        "data.loss_on",
        "mask_prompt completion_only_loss",
        "`true` is `loss_on: completion` (assistant, of conversations), `false` `loss_on: all`.",
    ),
    (
        "data.loss_on",
        "assistant_only_loss",
        "`true` is `loss_on: assistant`, the default of conversations; `false` is `loss_on: all`.",
    ),
    ("data.loss_on", "mask_history", "`true` is `loss_on: last_assistant`."),
    (
        "data.loss_on",
        "masking_strategy roles_to_train instruction_part response_part",
        "It says which tokens are targets: completion or assistant, last_assistant, or all.",
    ),
    (
        "method.lora_alpha",
        "scale scaling lora_scale",
        "The update is scaled by lora_alpha / r: for 2 at r of 8, it is 16.",
    ),
    ("method.target_modules", "lora_target_linear", "`true` is `target_modules: all-linear`."),
    (
        "method.target_modules",
        (
            "layers_to_transform layers_pattern lora_layers num_layers freeze_layers"
            " peft_layers_to_transform peft_layers_pattern"
        ),
        "It takes a regular expression over the modules' names, which chooses layers too.",
    ),
    (
        "method.target_modules",
        "apply_lora_to_mlp apply_lora_to_output lora_query lora_key lora_value lora_projection"
        " lora_mlp lora_head finetune_language_layers finetune_attention_modules"
        " finetune_mlp_modules",
        "It is all-linear, or a list of the modules' names, as [q_proj, v_proj].",
    ),
    (
        "train.per_device_train_batch_size",
        "global_batch_size",
        "Times gradient_accumulation_steps it is the global batch size.",
    ),
    (
        "train.max_steps",
        "max_steps_per_epoch",
        "It is the number of steps in all, over all epochs.",
    ),
    (
        "train.max_tokens_per_micro_batch",
        "max_tokens",
        "It limits a micro-batch; how long a run is, is in train.max_steps.",
    ),
    (
        "train.lr_scheduler_type",
        "lr_schedule.name lr_scheduler._component_",
        "It is cosine, linear or constant.",
    ),
    ("train.learning_rate", "lr_schedule.arguments", "It is the first of them."),
    (
        "train.logging_steps",
        "logging_strategy",
        "A line every so many steps; metrics.jsonl has every step.",
    ),
    (
        "train.adam_beta1",
        "betas adam_betas",
        "The two are keys of their own: adam_beta1 and adam_beta2.",
    ),
    (
        "train.precision",
        "bf16 bfloat16 pure_bf16",
        "`true` is `precision: bf16`, `false` is `precision: fp32`.",
    ),
    (
        "train.precision",
        "fp16 float16 half",
        (
            "lorakit computes in bf16 or fp32, not in fp16: `precision: auto` takes what the"
            " machine is good at."
        ),
    ),
    ("train.precision", "fp32 float32", "`true` is `precision: fp32`."),
    (
        "train.precision",
        "dtype torch_dtype mixed_precision train_dtype bnb_4bit_compute_dtype",
        "It is auto, bf16 or fp32.",
    ),
    (
        "train.eval_steps",
        "evals_per_epoch",
        (
            "It is the number of steps between evaluations: the steps of an epoch divided by"
            " evals_per_epoch."
        ),
    ),
    (
        "train.eval_steps",
        "eval_strategy evaluation_strategy do_eval",
        (
            "A number evaluates every so many steps; without it there is one evaluation, after the"
            " last step."
        ),
    ),
    (
        "train.save_steps",
        "saves_per_epoch",
        (
            "It is the number of steps between checkpoints: the steps of an epoch divided by"
            " saves_per_epoch."
        ),
    ),
    (
        "train.save_steps",
        "save_strategy",
        (
            "A number saves every so many steps; without it a checkpoint is saved only when the run"
            " is interrupted."
        ),
    ),
    (
        "train.report_to",
        "wandb wandb_project wandb_entity wandb_name wandb_run_id wandb_watch wandb_mode"
        " wandb_log_model use_wandb mlflow use_mlflow mlflow_tracking_uri mlflow_experiment_name"
        " mlflow_run_name tensorboard use_tensorboard tracker trackers use_trackio trackio_project"
        " trackio_space_id logger metric_logger logger_name log_to log_with",
        "It lists the trackers, as [wandb]; each takes its project from its own variable of the"
        " environment.",
    ),
    (
        "train.early_stopping_patience",
        "early_stopping",
        "It is the number of evaluations without a better one.",
    ),
)


def keys_called(name: str) -> Iterator[Meant]:
    """The dotted keys that other tools call `name`, which is in lower case with underscores."""
    for key, names in CALLED_ELSEWHERE.items():
        if name in names.split():
            yield Meant(key)
    for key, names, difference in ANOTHER_VALUE:
        if name in names.split():
            yield Meant(key, difference)


def several_sets(name: str, value: object) -> Meant | None:
    """Meaning of a key that names several data sets in another tool; None for any other."""
    several = len(value) > 1 if isinstance(value, list) else "," in str(value)
    if name not in _ONE_OR_SEVERAL.split() or isinstance(value, dict) or not several:
        return None
    return Meant("data.mix", _SETS)
