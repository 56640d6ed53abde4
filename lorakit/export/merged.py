"""The merged model: the update is added to the base, so that plain `from_pretrained` loads it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig

from lorakit.adapters.inject import merge_all
from lorakit.adapters.layer import Adapter
from lorakit.adapters.quantised import count_parameters, dequantised_to
from lorakit.data.batches import Batch, collate
from lorakit.data.examples import Examples
from lorakit.methods import Method
from lorakit.models.fetching import quiet
from lorakit.models.task_model import TaskModel
from lorakit.models.tokenizer import save_tokenizer

PROBE = [
    "The film is a small wonder: funny, sad and never longer than it needs to be.",
    "A tired plot, flat jokes, and two hours that will not come back.",
    "Question: A farmer has 12 hens and buys 7 more. How many hens are there now?",
    "In 1869 the two lines met in Utah, and the journey took a week instead of months.",
]
GENERATION_FILE = "generation_config.json"
# Largest number of parameters for which the base's own rounding is measured, since that needs a
# float32 copy of the base.
ROUNDING_LIMIT = 2_000_000_000


class Gap(NamedTuple):
    """Absolute differences of logits, padding excluded."""

    largest: float
    mean: float


@dataclass(frozen=True)
class MergeReport:
    """Logit differences on a few fixed texts. rounding: the difference that the base's own type
    makes against float32 before merging; None where it is float32 or the model is too large to
    compare.
    """

    dtype: str
    difference: Gap
    largest_logit: float
    rounding: Gap | None


@torch.inference_mode()
def merge(task_model: TaskModel, adapters: dict[str, Adapter]) -> MergeReport:
    """Merge in place and measure how the logits change."""
    model = task_model.model.eval()
    batch = _probe(task_model, PROBE).to(task_model.device)
    unmerged = task_model.logits(batch).float()
    rounding = None
    dtype = next(iter(adapters.values())).base.operand.dtype
    if dtype != torch.float32 and count_parameters(model) <= ROUNDING_LIMIT:
        low = [p for p in model.parameters() if p.dtype == dtype]
        for parameter in low:
            parameter.data = parameter.data.float()
        with dequantised_to(model, torch.float32):
            rounding = _gap(unmerged, task_model.logits(batch), batch)
        for parameter in low:  # exact: the values were converted from this type
            parameter.data = parameter.data.to(dtype)
    merge_all(model, adapters)
    difference = _gap(task_model.logits(batch), unmerged, batch)
    return MergeReport(
        str(dtype).removeprefix("torch."), difference, float(unmerged.abs().max()), rounding
    )


@torch.inference_mode()
def distance_to_full_rank(task_model: TaskModel, method: Method) -> tuple[float, float] | None:
    """(largest logit difference, largest logit) on the same texts, each in one pass, between the
    model as it runs and the model with all components on every token, as a merged or exported
    adapter computes; None for a method without tiers."""
    tiers = method.tiers
    if tiers is None or tiers.scheduler() is None:
        return None
    task_model.model.eval()
    batch = _probe(task_model, [" ".join(PROBE)]).to(task_model.device)
    as_it_runs = task_model.logits(batch)
    with tiers.full_rank():
        full = task_model.logits(batch)
    return _gap(as_it_runs, full, batch).largest, float(full.abs().max())


def save_merged(folder: Path, task_model: TaskModel, base: Path | None) -> None:
    """Write weights, configuration, generation settings, tokenizer and chat template into an
    existing folder.

    base: the folder of the base model. Its generation settings are copied unchanged, since
    transformers refuses to save some settings that it loads.
    """
    model, settings = task_model.model, None if base is None else base / GENERATION_FILE
    if model.can_generate() and settings is not None and settings.is_file():
        own, model.generation_config = model.generation_config, GenerationConfig()  # type: ignore[no-untyped-call]
        with quiet():
            model.save_pretrained(folder)
        model.generation_config = own
        shutil.copyfile(settings, folder / GENERATION_FILE)
    else:
        with quiet():
            model.save_pretrained(folder)
    save_tokenizer(task_model.tokenizer, folder)


def _probe(task_model: TaskModel, texts: list[str]) -> Batch:
    encoded = task_model.tokenizer(texts)
    rows = np.arange(len(texts))
    examples = Examples(
        tokens=_flat(encoded["input_ids"]),
        offsets=np.cumsum([0, *map(len, encoded["input_ids"])]),
        row_ids=rows,
        token_types=_flat(encoded["token_type_ids"]) if "token_type_ids" in encoded else None,
        labels=np.zeros_like(rows),
    )
    return collate(examples, rows, task_model.pad_id)


def _flat(rows: list[list[int]]) -> NDArray[np.int32]:
    return np.concatenate([np.asarray(row, np.int32) for row in rows])


def _gap(a: Tensor, b: Tensor, batch: Batch) -> Gap:
    gap = (a.float() - b.float()).abs()
    if gap.ndim == 3:
        gap = gap[batch.attention_mask.bool()]
    return Gap(float(gap.max()), float(gap.mean()))
