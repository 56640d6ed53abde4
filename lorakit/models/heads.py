"""Heads: the modules that are trained in full, the order of a base's classes, and the position at
which a class is read."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.data.labels import Labels, listed_classes, shown_class
from lorakit.models.task_model import TaskModel

log = logging.getLogger("lorakit")
# Three token ids, to test whether the class is read at another position when the last of two tokens
# is the pad token.
TRIED = (1, 2, 3)


def reads_at_pad_token(model: Any) -> bool:
    """True if the class is read at the last token that is not `config.pad_token_id`, as decoders of
    transformers do. Found by running the model."""
    mode, own = model.training, model.config.get_text_config().pad_token_id
    model.eval()
    logits = []
    try:
        for pad in TRIED[1:]:
            set_pad_token(model, pad)
            with torch.no_grad():
                logits.append(
                    model(input_ids=torch.tensor([TRIED[:2]], device=model.device)).logits
                )
    # not a decoder, since it cannot read two tokens; a real fault shows elsewhere
    except Exception as error:
        log.debug("where %s reads its class could not be tried: %s", type(model).__name__, error)
        return False
    finally:
        set_pad_token(model, own)
        model.train(mode)
    return not torch.equal(*logits)


def set_pad_token(model: Any, pad: int | None) -> None:
    """Set the pad token in the configuration and in that of the text part: heads read one or the
    other."""
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = pad


def with_labels(config: Any, labels: Labels | None) -> Any:
    """A copy of a model's configuration with these labels; without labels a plain copy."""
    config = copy.deepcopy(config)
    if labels is None:
        return config
    config.num_labels = labels.count
    config.problem_type = "regression" if labels.regression else "single_label_classification"
    if not labels.regression:
        config.id2label = dict(enumerate(labels.names))
        config.label2id = {name: i for i, name in enumerate(labels.names)}
    return config


def fit_head(labels: Labels, config: Any) -> tuple[Labels, bool, str | None]:
    """(the labels in the order of a base's head, whether that head is usable, a message about it or
    None).

    config: the base's. If it is a classifier of the same classes (ignoring case), its order is
    used. Classes without names, `LABEL_0` or `0`, are matched by their number. Classes with other
    names are different classes, even if there are as many. A head of another size is left to
    transformers, which starts a new one.
    """
    trained = any(
        "ForSequenceClassification" in name for name in getattr(config, "architectures", None) or []
    )
    theirs = [str(name) for _, name in sorted((config.id2label or {}).items())] if trained else []
    ours = labels.names
    if not theirs or labels.regression or len(theirs) != len(ours):
        return labels, True, None
    by_name = {name.casefold(): name for name in ours}
    if len(by_name) == len(ours) and by_name.keys() == {name.casefold() for name in theirs}:
        ordered = [by_name[name.casefold()] for name in theirs]
        said = (
            "the base is a classifier of these classes: they are numbered as there,"
            f" {listed_classes(ordered)}"
        )
        return Labels(ordered), True, None if ordered == ours else said
    if _numbered(theirs) or _numbered(ours):
        pairs = ", ".join(
            f"{shown_class(their)} is {shown_class(our)}"
            for their, our in zip(theirs, ours, strict=True)
        )
        said = (
            "the base is a classifier, and its head is kept: classes are matched by number,"
            f" {pairs}"
        )
        return labels, True, None if _numbered(theirs) and _numbered(ours) else said
    said = (
        f"the base is a classifier of other classes ({listed_classes(theirs)}) than"
        f" {listed_classes(ours)}: a new head is started"
    )
    return labels, False, said


def _numbered(names: list[str]) -> bool:
    """True if classes are named by their numbers alone."""
    return any(names == [form.format(i) for i in range(len(names))] for form in ("LABEL_{}", "{}"))


def start_head(model: Any, heads: list[str], classes: int) -> None:
    """Reinitialise the last layer of the head, as transformers does where its shape does not
    fit."""
    std = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    outside = (name for name in heads if not name.startswith(f"{model.base_model_prefix}."))
    for layer in (layer for name in outside for layer in model.get_submodule(name).modules()):
        if isinstance(layer, nn.Linear) and layer.out_features == classes:
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def train_heads(task_model: TaskModel, in_float32: bool = True) -> list[nn.Parameter]:
    """Make the heads trainable, in float32 whatever the base's type; returns their parameters."""
    parameters: list[nn.Parameter] = []
    for name in task_model.heads:
        head = task_model.model.get_submodule(name).requires_grad_(True)
        if in_float32:
            head.float().register_forward_pre_hook(_inputs_to_float)
        parameters += head.parameters()
    return parameters


def _inputs_to_float(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs
    )
