"""The adapter of a run alone, in one of its forms."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from lorakit.adapters.inject import detach_all
from lorakit.errors import UsageError
from lorakit.export.gguf.adapter import FILE, TYPES, check_gguf, write_gguf
from lorakit.export.merged import distance_to_full_rank, save_merged
from lorakit.export.native import FILES, AdapterFacts, read_facts, read_native
from lorakit.export.peft import (
    CONFIG_FILE,
    exported_ranks,
    not_for_peft,
    portable_factors,
    write_peft,
    write_portable,
)
from lorakit.export.sparse import write_sparse
from lorakit.files import new_folder, read_json
from lorakit.methods import Method
from lorakit.models.task_model import TaskModel
from lorakit.recipes.recipe import Recipe
from lorakit.runs.export_shared import DTYPES, tier_lines, use_lines, vllm_rank, write_card
from lorakit.runs.moment import adapter_of, manifest_of, tokenizer_of
from lorakit.runs.saved import saved_model

WRITERS = {"peft-portable": write_portable, "peft": write_peft}
FORMS = ("lorakit", *WRITERS, "gguf", "sparse")
# Subfolder for the base of an exported adapter that was trained on a pruned base.
PRUNED_BASE = "base"


def export_adapter(
    run: Path, recipe: Recipe, target: Path, form: str, chosen: str | None
) -> Iterator[str]:
    """Write the adapter into the folder `target`; yields lines about it. form: one of FORMS;
    chosen: a key of DTYPES. Raises UsageError before anything is written."""
    dtype = DTYPES[chosen or _own_dtype(run, form)]
    if form == "lorakit":
        yield from _native(run, recipe, target, dtype)
        return
    task_model, method, facts = saved_model(run, recipe, "auto")
    unread = not_for_peft(task_model.model, method.adapters) if form in WRITERS else None
    if unread and unread.certain:
        raise UsageError(
            str(unread), "--merge or --format lorakit, or train with other target_modules."
        )
    pruned = any(adapter.base.is_changed for adapter in method.adapters.values())
    if form == "gguf":
        _check_gguf(task_model, pruned, dtype)
    own_base = str(target.resolve() / PRUNED_BASE) if pruned and form in WRITERS else None
    distance, summary = distance_to_full_rank(task_model, method), method.summary()
    with new_folder(target) as staging:
        if form in WRITERS:
            named = (own_base, None) if own_base else (facts.base, facts.revision)
            WRITERS[form](staging, task_model, method, *named, dtype)
            if pruned:
                detach_all(task_model.model, method.adapters)
                save_merged(staging / PRUNED_BASE, task_model, facts.source.folder())
        elif form == "gguf":
            write_gguf(staging / FILE, task_model.model, portable_factors(method), dtype)
        else:
            write_sparse(staging, task_model, method, facts, dtype)
        write_card(staging, run, recipe, form, facts)
    if form == "sparse":
        yield from _sparse_lines(target, dtype, pruned)
        yield from tier_lines(distance, summary)
        return
    yield f"adapter written to {target} ({form}, {str(dtype).removeprefix('torch.')})"
    if own_base:
        yield (
            f"its base is the pruned one that it was trained on, {own_base}; over the original one"
            " it is not valid"
        )
    elif form == "gguf":
        yield f"its base is {facts.base}"
    else:
        yield from _base_lines(facts, recipe)
    if unread:
        yield f"{unread}; compare its loss there with `lorakit eval`"
    yield from _reader_lines(form, method, target, task_model.heads)
    yield from tier_lines(distance, summary)
    yield from use_lines(task_model, merged=False)


def _native(run: Path, recipe: Recipe, target: Path, dtype: torch.dtype) -> Iterator[str]:
    """Copy the adapter as it is, with its tokenizer, once it could be read."""
    if dtype != torch.float32:
        raise UsageError(
            "lorakit's own format keeps float32",
            "Leave --dtype out, or choose another --format.",
        )
    facts = read_facts(adapter_of(run))
    read_native(adapter_of(run))
    with new_folder(target) as staging:
        shutil.copytree(tokenizer_of(run), staging, dirs_exist_ok=True)
        for name in FILES:
            if (file := adapter_of(run) / name).is_file():
                shutil.copyfile(file, staging / name)
        write_card(staging, run, recipe, "lorakit", facts)
    yield (
        f"adapter written to {target} (lorakit's own format, which lorakit alone reads if it"
        " has gates or tiers)"
    )
    yield from _base_lines(facts, recipe)


def _base_lines(facts: AdapterFacts, recipe: Recipe) -> Iterator[str]:
    yield from facts.base_in_words()
    if recipe.model.quantization:
        yield (
            f"it was trained on that base in {recipe.model.quantization}; `lorakit eval RUN"
            " model.quantization=null` measures its loss on the unquantised one"
        )


def _own_dtype(run: Path, form: str) -> str:
    """The type of an exported adapter: that of the file that an adapter was imported from, else
    float32."""
    dtype: str = manifest_of(run).get("imported", {}).get("dtype", "float32")
    return dtype if form in WRITERS and dtype in DTYPES else "float32"


def _check_gguf(task_model: TaskModel, pruned: bool, dtype: torch.dtype) -> None:
    """Raise UsageError for what a GGUF adapter can not hold."""
    if task_model.heads or not task_model.task.predicts_tokens:
        raise UsageError(
            f"a GGUF adapter has no head, and this one is for {task_model.task.name}",
            "--format peft, or --merge.",
        )
    if pruned:
        raise UsageError(
            "the adapter is valid on its pruned base alone, which GGUF does not carry along",
            "--merge makes a model of both.",
        )
    if dtype not in TYPES:
        raise UsageError("a GGUF adapter is in float32 or float16", "Choose one with --dtype.")
    check_gguf(task_model.model)


def _reader_lines(form: str, method: Method, target: Path, heads: list[str]) -> Iterator[str]:
    """Lines about the tools that can read the adapter that was written."""
    if form == "gguf":
        yield f"llama.cpp reads it, over the base as GGUF: llama-server -m BASE.gguf --lora {FILE}"
        return
    config = read_json(target / CONFIG_FILE)
    rank, patterns = config["r"], config["rank_pattern"] or config["alpha_pattern"]
    if form == "peft" and patterns:
        yield (
            "ranks and alphas are by pattern: PEFT reads them. vLLM and llama.cpp's converter read"
            " one alpha and one r and"
        )
        yield "would scale the layers wrongly without a word: --format peft-portable is for them"
    elif config["use_rslora"] and not heads:
        yield (
            "lora_alpha is scaled by the root of the rank (use_rslora): PEFT and vLLM read it;"
            " llama.cpp's converter would scale it wrongly, --format peft-portable is for it"
        )
    elif heads:
        yield (
            f"PEFT reads it, with the heads that were trained in full ({', '.join(heads)}); loaders"
            " without heads do not"
        )
    else:
        limit = vllm_rank(rank)
        yield (
            f"one rank, {rank}, and one alpha: PEFT, llama.cpp's converter and vLLM"
            f" (--max-lora-rank {limit}) read it"
        )
    empty = sum(rank == 0 for rank in exported_ranks(method).values())
    if empty and form == "peft":
        yield f"{empty} modules of rank 0 are left out: PEFT has no rank 0"


def _sparse_lines(target: Path, dtype: torch.dtype, pruned: bool) -> Iterator[str]:
    size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    base = " and the pruned base" if pruned else ""
    yield (
        f"adapter{base} written to {target} (sparse, factors in"
        f" {str(dtype).removeprefix('torch.')}, {size:,} bytes of tensors)"
    )
