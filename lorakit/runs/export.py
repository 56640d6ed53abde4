"""Exports of a run folder. Checks come first; the export is written to a new folder that appears
only when it is complete."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from lorakit.adapters.base import PlainBase
from lorakit.adapters.inject import detach_all
from lorakit.errors import UsageError
from lorakit.export.gguf import FILE, TYPES, check_gguf, write_gguf
from lorakit.export.merged import MergeReport, distance_to_full_rank, merge, save_merged
from lorakit.export.native import AdapterFacts, read_facts
from lorakit.export.peft import (
    CONFIG_FILE,
    exported_ranks,
    not_for_peft,
    portable_factors,
    write_peft,
    write_portable,
)
from lorakit.export.sparse import write_sparse
from lorakit.files import new_folder, read_json, write_text
from lorakit.methods import Method
from lorakit.models.task_model import TaskModel
from lorakit.models.tasks import task_named
from lorakit.recipes.recipe import Recipe, resolved
from lorakit.report.card import CARD, Exported, model_card
from lorakit.runs.folder import ADAPTER, CHECKPOINTS, MANIFEST, RESULT
from lorakit.runs.saved import saved_model, saved_recipe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
WRITERS = {"peft-portable": write_portable, "peft": write_peft}
FORMS = ("lorakit", *WRITERS, "gguf", "sparse")
# The values of vLLM's --max-lora-rank (vllm/config/lora.py, MaxLoRARanks).
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Subfolder for the base of an exported adapter that was trained on a pruned base.
PRUNED_BASE = "base"


def export_run(
    run: Path,
    *,
    merge: bool,
    adapter: bool,
    form: str,
    dtype: str | None,
    out: Path | None,
    force: bool,
) -> Iterator[str]:
    """Export; yields lines about what was written. Raises UsageError before anything is written."""
    if merge == adapter:
        raise UsageError(
            "say what to export", "--merge for the merged model, --adapter for the adapter alone."
        )
    if form not in FORMS:
        raise UsageError(f"there is no format `{form}`", _choices(form, FORMS))
    dtype = SHORT_DTYPES.get(dtype or "", dtype)
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"there is no dtype `{dtype}`", _choices(dtype, tuple(DTYPES)))
    recipe = saved_recipe(run)
    target = out or export_folder(run, merge, form)
    _refuse_harm(run, target)
    if target.exists() and not target.is_dir():
        raise UsageError(f"`{target}` is a file", "Name a folder with --out.")
    if target.exists() and any(target.iterdir()) and not force:
        raise UsageError(f"`{target}` exists", "--force replaces it; --out names another folder.")
    if merge:
        yield from _merge(run, recipe, target, dtype)
    else:
        yield from _adapter(run, recipe, target, form, DTYPES[dtype or _own_dtype(run, form)])


def _own_dtype(run: Path, form: str) -> str:
    """The type of an exported adapter: that of the file that an adapter was imported from, else
    float32."""
    manifest = read_json(run / MANIFEST) if (run / MANIFEST).is_file() else {}
    dtype: str = manifest.get("imported", {}).get("dtype", "float32")
    return dtype if form in WRITERS and dtype in DTYPES else "float32"


def export_folder(run: Path, merge: bool, form: str) -> Path:
    """The default folder of an export."""
    return run / ("merged" if merge else f"adapter-{form}")


def _refuse_harm(run: Path, target: Path) -> None:
    """Raise UsageError for a target whose replacement would remove the run, its base model or the
    working folder."""
    place = target.resolve()
    kept = [(run / name).resolve() for name in (ADAPTER, CHECKPOINTS)]
    if run.resolve().is_relative_to(place) or any(place.is_relative_to(folder) for folder in kept):
        raise UsageError(
            f"`{target}` is, or holds, or is a part of, the run itself",
            "Name another folder with --out.",
        )
    source = read_facts(run / ADAPTER).source
    if source.kind != "hub" and Path(source.location).resolve().is_relative_to(place):
        raise UsageError(
            f"`{target}` is, or holds, the base model {source.location}",
            "Name another folder with --out.",
        )
    if Path.cwd().is_relative_to(place):
        raise UsageError(
            f"`{target}` is, or holds, the working folder", "Name another folder with --out."
        )


def _merge(run: Path, recipe: Recipe, target: Path, dtype: str | None) -> Iterator[str]:
    task_model, method, facts = saved_model(
        run, recipe, DTYPES[dtype] if dtype else "auto", heads_in_float32=False
    )
    pruned = [a.base for a in method.adapters.values() if a.base.is_changed]
    zeros = _zeros(pruned)
    distance, summary = distance_to_full_rank(task_model, method), method.summary()
    with method.tiers.full_rank() if method.tiers else nullcontext():
        report = merge(task_model, method.adapters)
    with new_folder(target) as staging:
        save_merged(staging, task_model, facts.source.folder())
        _write_card(staging, run, recipe, "merged", facts)
    yield f"merged model written to {target}"
    yield _merge_line(report)
    if quantization := recipe.model.quantization:
        yield (
            f"its base was in {quantization}: the merged weights are the dequantised ones with the"
            f" update, not those of {facts.base}"
        )
    yield from _tier_lines(distance, summary)
    yield from _use_lines(task_model, merged=True)
    if pruned:
        now = f"{zeros:.1%} of its weights were zero, {_zeros(pruned):.1%} are"
        yield f"the pruned base is dense again: {now}; --adapter --format sparse keeps it sparse"


def _tier_lines(distance: tuple[float, float] | None, summary: dict[str, Any]) -> Iterator[str]:
    if distance is None:
        return
    gap, largest = distance
    yield (
        "the top tier acts on every token here: tiers and cache policies are kept by --adapter"
        " --format lorakit alone"
    )
    if summary.get("prompt_rank"):
        yield (
            "so it does on a prompt of this run; how far the tokens that it writes are from that"
            " was not measured"
        )
    else:
        yield (
            f"largest logit difference to the model with its tiers and its cache: {gap:.2e}, logits"
            f" up to {largest:.1f}"
        )


def _zeros(bases: list[PlainBase]) -> float:
    """The share of zeros in the weights of all of them."""
    weights = [base.weight for base in bases]
    return 1 - sum(int(w.count_nonzero()) for w in weights) / max(
        1, sum(w.numel() for w in weights)
    )


def _merge_line(report: MergeReport) -> str:
    gap, rounding = report.difference, report.rounding
    scale = f"in {report.dtype}, mean {gap.mean:.2e}, logits up to {report.largest_logit:.1f}"
    line = f"largest logit difference to the unmerged model: {gap.largest:.2e} {scale}"
    if rounding is not None:
        line += f"; {report.dtype}'s own rounding, unmerged against float32: {rounding.largest:.2e}"
        line += f", mean {rounding.mean:.2e}"
    return line


def _adapter(
    run: Path, recipe: Recipe, target: Path, form: str, dtype: torch.dtype
) -> Iterator[str]:
    if form == "lorakit":
        if dtype != torch.float32:
            raise UsageError(
                "lorakit's own format keeps float32",
                "Leave --dtype out, or choose another --format.",
            )
        with new_folder(target) as staging:
            shutil.copytree(run / ADAPTER, staging, dirs_exist_ok=True)
            _write_card(staging, run, recipe, form, read_facts(run / ADAPTER))
        yield (
            f"adapter written to {target} (lorakit's own format, which lorakit alone reads if it"
            " has gates or tiers)"
        )
        yield from _base_lines(read_facts(run / ADAPTER), recipe)
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
        _write_card(staging, run, recipe, form, facts)
    if form == "sparse":
        yield from _sparse_lines(target, dtype, pruned)
        yield from _tier_lines(distance, summary)
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
    yield from _tier_lines(distance, summary)
    yield from _use_lines(task_model, merged=False)


def _base_lines(facts: AdapterFacts, recipe: Recipe) -> Iterator[str]:
    yield from facts.base_in_words()
    if recipe.model.quantization:
        yield (
            f"it was trained on that base in {recipe.model.quantization}; `lorakit eval RUN"
            " model.quantization=null` measures its loss on the unquantised one"
        )


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


def _write_card(staging: Path, run: Path, recipe: Recipe, form: str, facts: AdapterFacts) -> None:
    """Write README.md into a finished export."""
    files = {
        name: read_json(run / name) if (run / name).is_file() else {} for name in (RESULT, MANIFEST)
    }
    config = read_json(staging / CONFIG_FILE) if (staging / CONFIG_FILE).is_file() else {}
    about = Exported(
        form=form,
        name=run.resolve().name,
        recipe=resolved(recipe),
        result=files[RESULT],
        manifest=files[MANIFEST],
        base=facts.base,
        on_hub=facts.on_hub,
        revision=facts.revision,
        predicts_tokens=task_named(facts.task).predicts_tokens,
        rank=_vllm_rank(config["r"]) if form == "peft-portable" else None,
    )
    write_text(staging / CARD, model_card(about))


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
        limit = _vllm_rank(rank)
        yield (
            f"one rank, {rank}, and one alpha: PEFT, llama.cpp's converter and vLLM"
            f" (--max-lora-rank {limit}) read it"
        )
    empty = sum(rank == 0 for rank in exported_ranks(method).values())
    if empty and form == "peft":
        yield f"{empty} modules of rank 0 are left out: PEFT has no rank 0"


def _vllm_rank(rank: int) -> int:
    """The smallest of vLLM's rank limits that admits `rank`."""
    return next((limit for limit in VLLM_RANKS if limit >= rank), rank)


def _use_lines(task_model: TaskModel, merged: bool) -> Iterator[str]:
    """Lines about the settings with which plain transformers gives lorakit's results: the base's
    own settings are never changed."""
    tokenizer, pad = task_model.tokenizer, task_model.pad_id
    if task_model.reads_at_pad:
        name = tokenizer.convert_ids_to_tokens(pad)
        if not merged and task_model.base_pad_id != pad:
            yield (
                f"the class is read at the last token that is not `{name}`: set"
                f" model.config.pad_token_id = {pad} on the base"
            )
        if tokenizer.pad_token_id != pad:
            yield (
                "the tokenizer has no pad token, as the base's: for batches set"
                f" tokenizer.pad_token = {name!r}"
            )
    end = tokenizer.eos_token_id if task_model.task.predicts_tokens else None
    if end is not None and end not in task_model.ends(own=True):
        yield (
            "generation_config, which is the base's own, does not end a text at"
            f" `{tokenizer.eos_token}`, in which completions"
        )
        yield f"were trained to end: give generate() eos_token_id={sorted(task_model.ends())}"


def _sparse_lines(target: Path, dtype: torch.dtype, pruned: bool) -> Iterator[str]:
    size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    base = " and the pruned base" if pruned else ""
    yield (
        f"adapter{base} written to {target} (sparse, factors in"
        f" {str(dtype).removeprefix('torch.')}, {size:,} bytes of tensors)"
    )


def _choices(wrong: str, choices: tuple[str, ...]) -> str:
    near = get_close_matches(wrong, choices, 1)
    return f"Choose one of {', '.join(choices)}." + (f" Did you mean `{near[0]}`?" if near else "")
