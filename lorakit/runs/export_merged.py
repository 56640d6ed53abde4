"""The merged model of a run: a folder for plain `from_pretrained`, or one GGUF file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from lorakit.errors import UsageError
from lorakit.export.gguf.model import FILE, About, plan_model, write_model
from lorakit.export.merged import MergeReport, distance_to_full_rank, merge, save_merged
from lorakit.export.native import AdapterFacts
from lorakit.files import new_folder
from lorakit.methods import Method
from lorakit.models.task_model import TaskModel
from lorakit.recipes.recipe import Recipe
from lorakit.report.history import run_of
from lorakit.runs.export_shared import DTYPES, tier_lines, use_lines, write_card, zeros
from lorakit.runs.saved import saved_model
from lorakit.sources.licence import licence_of

FORMS = ("gguf",)


def export_merged(run: Path, recipe: Recipe, target: Path, dtype: str | None) -> Iterator[str]:
    """Write the merged model into the folder `target`; yields lines about it. dtype: a key of
    DTYPES, by default the base's own."""
    task_model, method, facts = saved_model(
        run, recipe, DTYPES[dtype] if dtype else "auto", heads_in_float32=False
    )
    lines = _merge(task_model, method, recipe, facts)
    with new_folder(target) as staging:
        save_merged(staging, task_model, facts.source.folder())
        write_card(staging, run, recipe, "merged", facts)
    yield f"merged model written to {target}"
    yield from lines
    yield from use_lines(task_model, merged=True)


def export_gguf(run: Path, recipe: Recipe, target: Path, dtype: str | None) -> Iterator[str]:
    """Write the merged model as one GGUF file into the folder `target`; yields lines about it.

    dtype: a key of lorakit.export.gguf.model.TYPES, by default the base's own; the update is added
    in the base's own type where it is none of PyTorch. Raises UsageError before anything is
    written.
    """
    task_model, method, facts = saved_model(
        run, recipe, DTYPES.get(dtype or "", "auto"), heads_in_float32=False
    )
    if task_model.heads or not task_model.task.predicts_tokens:
        raise UsageError(
            f"a GGUF file is a language model, and this run is for {task_model.task.name}",
            "--merge writes a folder for transformers.",
        )
    model = task_model.model
    planned = plan_model(model, task_model.tokenizer, task_model.ends())
    lines = _merge(task_model, method, recipe, facts)
    about = About(
        run_of(run).resolve().name, facts.base if facts.on_hub else None, licence_of(facts.source)
    )
    dtype = dtype or str(model.dtype).removeprefix("torch.")
    with new_folder(target) as staging:
        others = write_model(staging / FILE, model, planned, about, dtype)
        write_card(staging, run, recipe, "merged-gguf", facts)
    file = target / FILE
    yield f"merged model written to {file} ({dtype}, {file.stat().st_size:,} bytes)"
    yield from lines
    if others:
        yield f"{others} matrices are in float16: their rows are not whole blocks of 32 for q8_0"
    yield from planned.notes
    yield f"llama.cpp reads it: llama-server -m {file}"
    yield f"Ollama: `ollama create NAME -f Modelfile`, with the line FROM {file} in Modelfile"
    if dtype != "q8_0":
        yield f"for 4 bits, llama.cpp's: llama-quantize {file} model-q4_k_m.gguf Q4_K_M"


def _merge(task_model: TaskModel, method: Method, recipe: Recipe, facts: AdapterFacts) -> list[str]:
    """Merge in place; lines about what that changed."""
    pruned = [a.base for a in method.adapters.values() if a.base.is_changed]
    before = zeros(pruned)
    distance, summary = distance_to_full_rank(task_model, method), method.summary()
    with method.tiers.full_rank() if method.tiers else nullcontext():
        report = merge(task_model, method.adapters)
    lines = [_merge_line(report)]
    if quantization := recipe.model.quantization:
        lines.append(
            f"its base was in {quantization}: the merged weights are the dequantised ones with the"
            f" update, not those of {facts.base}"
        )
    lines += tier_lines(distance, summary)
    if pruned:
        now = f"{before:.1%} of its weights were zero, {zeros(pruned):.1%} are"
        lines.append(
            f"the pruned base is dense again: {now}; --adapter --format sparse keeps it sparse"
        )
    return lines


def _merge_line(report: MergeReport) -> str:
    gap, rounding = report.difference, report.rounding
    scale = f"in {report.dtype}, mean {gap.mean:.2e}, logits up to {report.largest_logit:.1f}"
    line = f"largest logit difference to the unmerged model: {gap.largest:.2e} {scale}"
    if rounding is not None:
        line += f"; {report.dtype}'s own rounding, unmerged against float32: {rounding.largest:.2e}"
        line += f", mean {rounding.mean:.2e}"
    return line
