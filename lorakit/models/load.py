"""Models: loading them, and trying them on rows before training."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from lorakit import process
from lorakit.adapters.base import dense_weight
from lorakit.adapters.quantised import set_dtype
from lorakit.data.batches import Batch, collate
from lorakit.data.examples import Examples
from lorakit.data.joined import AnyExamples
from lorakit.data.labels import Labels
from lorakit.errors import RecipeError
from lorakit.kernels import levels
from lorakit.kernels.attention import use_attention
from lorakit.kernels.fast_modules import use_fast_elementwise
from lorakit.kernels.rotary import use_fast_rotary
from lorakit.models.fetching import auto_class, loading, origin
from lorakit.models.heads import (
    fit_head,
    reads_at_pad_token,
    set_pad_token,
    start_head,
    with_labels,
)
from lorakit.models.quantise import check_quantiser, quantise
from lorakit.models.spec import ModelSpec
from lorakit.models.task_model import TaskModel, fillers, with_embedding
from lorakit.models.tasks import task_named
from lorakit.sources.resolve import Source

log = logging.getLogger("lorakit")
LONGEST_DEFAULT = 1024
TRIED_LENGTHS = (32, 24)  # maximum lengths, in tokens, of the rows that a model is tried on


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(precision: Literal["auto", "bf16", "fp32"], device: torch.device) -> torch.dtype:
    """The type of base and activations. auto: bf16 where the device multiplies in it natively, else
    float32.

    A processor does so from level avx512 on (`lorakit.kernels.levels`). Raises UsageError for a
    level that the processor lacks."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else torch.float32
    cuda = device.type == "cuda"
    fast = torch.cuda.get_device_capability(device) >= (8, 0) if cuda else levels.bfloat16_is_fast()
    return torch.bfloat16 if fast else torch.float32


def load_config(source: Source, spec: ModelSpec) -> Any:
    """The model's configuration. Raises RecipeError when there is none, or its architecture is
    unknown."""
    with loading(source, spec):
        return AutoConfig.from_pretrained(source.location, **origin(source, spec))


def load_model(
    source: Source,
    spec: ModelSpec,
    tokenizer: Any,
    labels: Labels | None,
    dtype: torch.dtype | str,
    config: Any = None,
) -> tuple[TaskModel, list[str]]:
    """The pretrained model with a head for `labels`, and notes for the log. `dtype` "auto" is the
    checkpoint's own type.

    config: the base's own, if it was read already; it is not changed. The checkpoint's head is kept
    only if it is one for these labels (`fit_head`).

    A quantised base is loaded whole and then quantised layer by layer: in the checkpoint's type
    where nothing but its values is needed in `dtype`, since float32 would take twice the memory of
    most checkpoints. The quantised weights are the same (`lorakit.kernels.codes`).

    Only safetensors are read: pickled weights are refused. Raises RecipeError or RunError.
    """
    check_quantiser(spec.quantization)
    base = load_config(source, spec) if config is None else config
    # A new head would be drawn in the checkpoint's type.
    narrow = spec.quantization is not None and labels is None and dtype == torch.float32
    model, report = _pretrained(source, spec, base, labels, "auto" if narrow else dtype)
    use_kernels(model)
    task = task_named(spec.task)
    heads = task.head_names(model)
    notes = _notes(report, heads, labels)
    if labels is not None and not fit_head(labels, base)[1]:
        start_head(model, heads, labels.count)
    if spec.quantization is not None:
        notes += quantise(model, spec.quantization, heads, default_device())
        if narrow:
            set_dtype(model.float(), torch.float32)
    task_model = TaskModel(model, tokenizer, task, heads)
    others = [entry[0] for entry in report["mismatched_keys"]]
    task_model.fresh = frozenset(
        name for name in [*report["missing_keys"], *others] if name.startswith(tuple(heads))
    )
    if not task.predicts_tokens and reads_at_pad_token(model):
        task_model.reads_at_pad = True
        task_model.base_pad_id = model.config.get_text_config().pad_token_id
        # Batches are usually padded with the tokenizer's pad token, so heads must look for that
        # one.
        first, *others = fillers(tokenizer)
        set_pad_token(model, with_embedding(model, [first, task_model.base_pad_id, *others]))
    return task_model, notes


def dense_weights(
    source: Source, spec: ModelSpec, labels: Labels | None, names: Collection[str]
) -> Iterator[tuple[str, Tensor]]:
    """(module name, its weight [out, in] in the checkpoint's type) of linear layers, read again
    from the source of a model that was quantised as it was loaded. Raises as `load_model`."""
    model, _ = _pretrained(source, spec, load_config(source, spec), labels, "auto")
    for name in names:
        yield name, dense_weight(model.get_submodule(name)).detach()


def _pretrained(
    source: Source, spec: ModelSpec, base: Any, labels: Labels | None, dtype: torch.dtype | str
) -> tuple[Any, Mapping[str, Any]]:
    """The model as transformers loads it, and its report about missing weights. base: the
    checkpoint's configuration."""
    with loading(source, spec):
        model, report = auto_class(spec.task).from_pretrained(
            source.location,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            config=with_labels(base, labels),
            ignore_mismatched_sizes=labels is not None,
            **origin(source, spec),
        )
    return model, report


def _notes(report: Mapping[str, Any], heads: Sequence[str], labels: Labels | None) -> list[str]:
    """Notes about weights that the checkpoint lacks, or has in another shape."""
    notes = []
    missing = [name for name in report["missing_keys"] if not name.startswith(tuple(heads))]
    if missing:
        notes.append(
            f"{len(missing)} weights are not in the checkpoint and start at random:"
            f" {', '.join(sorted(missing)[:3])} …"
        )
    if report["mismatched_keys"]:
        notes.append(
            f"the checkpoint's head has another shape than {labels.count if labels else 0} labels"
            " need: a new one is trained"
        )
    return notes


def check_model(task_model: TaskModel, examples: AnyExamples) -> None:
    """Try the model on two rows of the examples, cut to TRIED_LENGTHS.

    Raises RecipeError where it cannot read them, or where a token of a causal-lm sees the tokens
    after it, which it predicts.
    """
    model, name = task_model.model, type(task_model.model).__name__
    batch = _tried_rows(examples, task_model.pad_id).to(task_model.device)
    last = int(batch.lengths[0]) - 1
    changed = replace(batch, input_ids=batch.input_ids.clone())
    changed.input_ids[0, last] = (
        batch.input_ids[0, 0] + (batch.input_ids[0, 0] == batch.input_ids[0, last]).long()
    )
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = task_model.logits(batch).float()
            after = (
                task_model.logits(changed).float() if task_model.task.predicts_tokens else logits
            )
    except Exception as error:  # any error of a model that cannot take token ids and a mask
        reason = next(iter(str(error).strip().splitlines()), "")
        what = f"{name} can not read rows of different lengths: {type(error).__name__}: {reason}"
        raise RecipeError.at(
            "model.name_or_path", what, "a model that reads padded token ids and their mask"
        ) from error
    finally:
        model.train(mode)
    if not task_model.task.predicts_tokens:
        return
    before, after = logits[0, :last], after[0, :last]
    exact = next(model.parameters()).dtype == torch.float32
    if (after - before).norm() > (1e-4 if exact else 0.02) * (before - before.mean()).norm():
        what = f"the tokens of {name} see those that come after them, which they are to predict"
        decoder = (
            ", or `is_decoder: true` in its config.json"
            if hasattr(model.config, "is_decoder")
            else ""
        )
        raise RecipeError.at(
            "model.task", what, f"sequence-classification, a model that is a decoder{decoder}"
        )


def _tried_rows(examples: AnyExamples, pad_id: int) -> Batch:
    """The longest and the shortest row, cut to TRIED_LENGTHS. Each keeps its last token, where a
    class may be read."""
    rows = [int(examples.lengths.argmax()), int(examples.lengths.argmin())]
    tried = examples.select(np.array(rows))
    kept = []
    for row, most in enumerate(TRIED_LENGTHS):
        start, stop = tried.offsets[row : row + 2]
        kept.append(np.append(np.arange(start, min(start + most, stop) - 1), stop - 1))
    places = np.concatenate(kept)
    cut = Examples(
        tried.tokens[places],
        np.cumsum([0, *map(len, kept)]),
        row_ids=tried.row_ids,
        token_types=None if tried.token_types is None else tried.token_types[places],
        labels=tried.labels,
        targets=None if tried.targets is None else np.ones(len(places), bool),
    )
    return collate(cut, np.arange(2), pad_id)


def use_kernels(model: Any) -> None:
    """Let the model use lorakit's kernels where they give the results of its own code."""
    process.limit_compiled_products(sum(p.numel() for p in model.parameters()))
    use_attention(model)
    use_fast_elementwise(model)
    use_fast_rotary(model)
