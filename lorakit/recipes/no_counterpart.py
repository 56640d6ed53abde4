"""Keys of other tools that have no counterpart in lorakit, and what to do instead."""

from __future__ import annotations

from fnmatch import fnmatchcase

from lorakit.spec import Meant

# {message: keys of other tools that it explains, since lorakit has no counterpart}; a star matches
# any ending.
NO_COUNTERPART = {
    "a run is one process, on the GPU if there is one.": (
        "deepspeed* fsdp* ddp_* accelerate* accelerator* zero_* tensor_parallel* device* "
        "num_gpus n_gpu gpus num_nodes local_rank no_cuda ray_* parallelism_config"
    ),
    "it chooses the attention itself.": (
        "flash_attention* flash_attn* use_flash* attn_implementation sdp_attention xformers* "
        "eager_attention"
    ),
    "bitsandbytes or torchao quantise the base (`model.quantization`), nothing else is set.": (
        "bnb_* quantization_* quantize_* quant_* gptq* awq* hqq*"
    ),
    "only adapters and heads are trained.": "full_finetuning",
    "metrics.jsonl in the run folder has every step; trackers are named in train.report_to.": (
        "wandb_* mlflow_* trackio_* comet* swanlab* use_swanlab logging_dir project* log_level* "
        "log_peak* plot_loss logging_first_step logging_nan* eval_table_size"
    ),
    "`lorakit export --push-to-hub OWNER/NAME` sends a finished run to the hub.": (
        "hub_* push_to_hub* push_model hf_hub* hf_token"
    ),
    "gradient_checkpointing is true or false.": "gradient_checkpointing_kwargs use_reentrant",
    "torch_compile is true or false.": "torch_compile_*",
    "the optimizer is AdamW.": (
        "optim optim_* optimizer optimizer_* adam_mini adafactor fused embedding_learning_rate"
    ),
    "the methods are those that `lorakit schema` lists.": (
        "use_dora dora peft_use_dora loraplus_lr_embedding qalora* use_qalora "
        "megatron* corda* arrow_config layer_replication target_parameters "
        "trainable_token_indices ensure_weight_tying auto_mapping inference_mode peft_version "
        "use_peft stage"
    ),
    "PiSSA would leave an adapter for a changed base: method.init_lora_weights has eva and qera.": (
        "pissa_*"
    ),
    "adapters have two factors and no bias.": "bias lora_bias fan_in_fan_out lora_fan_in_fan_out",
    "a classification head is trained in full, and nothing else is.": (
        "modules_to_save lora_modules_to_save unfrozen_parameters additional_target num_labels "
        "id2label label2id"
    ),
    "rows are tokenised before the first step, and kept for the next run.": (
        "dataloader_* preprocessing_num_workers dataset_num_proc num_proc num_workers "
        "dataset_prepared_path dataset_processes buffer_size streaming_multipack_buffer_size "
        "overwrite_cache ds_type dataset_kwargs length_column_name"
    ),
    "rows are shuffled by train.seed.": "shuffle* dataset_shuffle*",
    "the tokenizer and its settings are the model's own.": (
        "tokenizer tokenizer_* use_fast special_tokens tokens pad_token eos_token padding_side "
        "truncation_side add_bos_token add_eos_token"
    ),
    "on the command line it is `lorakit train RECIPE --overwrite`.": "overwrite_output_dir",
    "`lorakit train` trains and evaluates, `lorakit eval` evaluates, `lorakit generate` writes.": (
        "do_train do_predict test test_batches predict_with_generate eval_max_new_tokens "
        "eval.max_new_tokens"
    ),
    "nothing has to be set for it.": (
        "use_cache disable_tqdm remove_unused_columns tf32 include_* unsloth* use_unsloth* "
        "liger* use_liger* enable_liger* strict plugins lora_*_kernel fast_inference "
        "pad_to_sequence_len pad_to_multiple_of padding_free packing_strategy eval_packing "
        "eval_sample_packing loss loss_type ignore_index debug profiler* model_type "
        "greater_is_better final_validation"
    ),
    "checkpoints are safetensors, and hold what a run needs to go on.": (
        "save_only_model save_safetensors save_on_each_node save_adapter_weights_only "
        "checkpointer recipe_checkpoint"
    ),
    "`lorakit export --merge` or `--adapter` writes a model for other tools.": (
        "save_model save_method save_gguf merge_*"
    ),
    "method.init_lora_weights: qera is the same, weighted by what the layers read.": "loftq*",
    "method.init_lora_weights: eva needs no settings of its own.": "eva_config",
    "an adapter to begin with is named in method.init_from.": "create_new_adapter",
    "it rises from 0.": "warmup_init",
    "the keys inside of it are keys of the section itself.": "init_args",
    "it has nothing of this kind.": (
        "label_smoothing* neftune* lr_scheduler_kwargs min_lr lr_end cosine_min_lr_ratio "
        "rope_scaling s2_attention train_on_eos train_on_eot tie_embeddings "
        "activation_offloading enable_activation_offloading auto_find_batch_size eval_delay "
        "eval_accumulation_steps batch_eval_metrics full_determinism torch_empty_cache_steps "
        "auto_insert_empty_system_msg"
    ),
}


def without_counterpart(name: str) -> Meant | None:
    """Hint about another tool's key `name` that has no counterpart in lorakit; None if it is
    unknown."""
    for instead, patterns in NO_COUNTERPART.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns.split()):
            return Meant(None, f"lorakit has no counterpart: {instead}")
    return None
