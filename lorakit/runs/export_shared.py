"""Parts that all exports of a run share: the model card, and lines about their use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lorakit.adapters.base import PlainBase
from lorakit.export.native import AdapterFacts
from lorakit.export.peft import CONFIG_FILE
from lorakit.files import read_json, write_text
from lorakit.models.task_model import TaskModel
from lorakit.models.tasks import task_named
from lorakit.recipes.recipe import Recipe, resolved
from lorakit.report.card import CARD, Exported, model_card
from lorakit.report.history import run_of
from lorakit.runs.moment import is_checkpoint, manifest_of, result_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The values of vLLM's --max-lora-rank (vllm/config/lora.py, MaxLoRARanks).
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def write_card(staging: Path, run: Path, recipe: Recipe, form: str, facts: AdapterFacts) -> None:
    """Write README.md into a finished export."""
    config = read_json(staging / CONFIG_FILE) if (staging / CONFIG_FILE).is_file() else {}
    about = Exported(
        form=form,
        name=run_of(run).resolve().name,
        recipe=resolved(recipe),
        result=result_of(run),
        manifest=manifest_of(run),
        is_checkpoint=is_checkpoint(run),
        base=facts.base,
        on_hub=facts.on_hub,
        revision=facts.revision,
        predicts_tokens=task_named(facts.task).predicts_tokens,
        rank=vllm_rank(config["r"]) if form == "peft-portable" else None,
    )
    write_text(staging / CARD, model_card(about))


def vllm_rank(rank: int) -> int:
    """The smallest of vLLM's rank limits that admits `rank`."""
    return next((limit for limit in VLLM_RANKS if limit >= rank), rank)


def tier_lines(distance: tuple[float, float] | None, summary: dict[str, Any]) -> Iterator[str]:
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


def use_lines(task_model: TaskModel, merged: bool) -> Iterator[str]:
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


def zeros(bases: list[PlainBase]) -> float:
    """The share of zeros in the weights of all of them."""
    weights = [base.weight for base in bases]
    return 1 - sum(int(w.count_nonzero()) for w in weights) / max(
        1, sum(w.numel() for w in weights)
    )
