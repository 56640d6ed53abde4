"""Methods on tiny models: cases, and runs of a few steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorakit.adapters.inject import in_blocks, inject, match_targets
from lorakit.adapters.layer import Adapter
from lorakit.adapters.optimizer import AdamW
from lorakit.data.batches import Batch, StepOrder, collate, micro_batches
from lorakit.data.examples import Examples
from lorakit.data.labels import Labels
from lorakit.methods import Calibration, Method, build_method, config_classes
from lorakit.models.heads import train_heads
from lorakit.models.load import load_model
from lorakit.models.spec import ModelSpec
from lorakit.models.task_model import TaskModel
from lorakit.models.tasks import task_named
from lorakit.models.tokenizer import load_tokenizer
from lorakit.sources.resolve import Wanted, resolve
from lorakit.training import checkpoint
from lorakit.training.checkpoint import RunState
from lorakit.training.loop import StepReport, build_optimizer, train
from lorakit.training.spec import TrainSpec
from lorakit.training.trained import trainable, trained_tensors

TASKS = {"bert": "sequence-classification", "llama": "causal-lm", "gpt2": "causal-lm"}
LABELS = Labels(["bad", "good"])


# {name: (method, settings)} of what is tested beside every method by itself.
COMBINED: dict[str, tuple[str, dict[str, Any]]] = {
    "salor+base": ("salor", {"base": {"r_res": 4, "calibration_rows": 8}}),
    "chunkwise+base": (
        "chunkwise",
        {
            "with": [
                {"name": "salor", "factors": None, "base": {"criterion": "magnitude", "r_res": 2}}
            ]
        },
    ),
    "l1ra+salor": (
        "l1ra",
        {"with": [{"name": "salor", "base": {"criterion": "magnitude", "r_res": 2}}]},
    ),
}


# the first token id that is a word in the tests' vocabulary, and how many are used
WORD, WORDS = 5, 40


@dataclass
class Built:
    """A tiny model with adapters, as assembly makes it."""

    task_model: TaskModel
    method: Method
    heads: list[nn.Parameter]
    examples: Examples
    prepared: bool = False

    @property
    def model(self) -> Any:
        return self.task_model.model

    @property
    def adapters(self) -> dict[str, Adapter]:
        return self.method.adapters

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        self.model.eval()
        return self.task_model.logits(batch)

    def calibration(self, batch_size: int = 4, seed: int = 0) -> Calibration:
        """As a run makes it: the first rows that it will be trained on."""

        def batches(rows: int) -> Iterator[Batch]:
            chosen = StepOrder(len(self.examples), min(rows, len(self.examples)), seed).of_step(1)
            for part in micro_batches(self.examples.lengths, chosen, batch_size):
                yield collate(self.examples, part, 0)

        def held_out() -> Iterator[Batch]:
            yield collate(self.examples, np.arange(len(self.examples)), 0)

        def forward(batch: Batch) -> None:
            self.model.eval()
            with torch.no_grad():
                self.task_model.run_body(batch)

        @contextmanager
        def stage(name: str) -> Iterator[Any]:
            yield lambda done, total: None

        return Calibration(
            len(self.examples),
            batches,
            held_out,
            forward,
            stage,
            in_blocks(self.model, self.adapters),
            lambda names: iter(()),
        )

    def prepare(self) -> Built:
        """What a run does before its first step; once."""
        if not self.prepared:
            self.method.prepare(self.calibration())
            self.method.param_groups()  # says what of the residual is trained
            self.prepared = True
        return self


class Case:
    """One method on one model: builds it, as often as wanted."""

    def __init__(
        self,
        method: str,
        kind: str,
        folder: Path,
        settings: Mapping[str, Any] | None = None,
        quantization: Mapping[str, Any] | None = None,
    ) -> None:
        self.quantization = quantization
        self.method, self.kind, self.folder, self.settings = (
            method,
            kind,
            folder,
            dict(settings or {}),
        )
        self.task = TASKS[kind]
        self.source = resolve(Wanted("model", str(folder)))

    def bare(self, seed: int = 0) -> TaskModel:
        """The model without adapters."""
        spec = ModelSpec.model_validate(
            {
                "name_or_path": str(self.folder),
                "task": self.task,
                "quantization": self.quantization,
            }
        )
        labels = LABELS if self.task == "sequence-classification" else None
        torch.manual_seed(seed)
        return load_model(
            self.source, spec, load_tokenizer(self.source, spec), labels, torch.float32
        )[0]

    def build(self, seed: int = 0, **settings: Any) -> Built:
        task_model = self.bare(seed)
        config = config_classes()[self.method].model_validate({"r": 4} | self.settings | settings)
        assert config.conflicts(task_named(self.task)) == []
        method = build_method(config, seed)
        ranks = match_targets(task_model.model, config, task_model.heads)
        inject(task_model.model, method, ranks)
        return Built(task_model, method, train_heads(task_model), self.examples())

    def moving(self, steps: int) -> dict[str, Any]:
        """Settings under which a method whose ranks move moves them at almost every step, up and
        down."""
        fields = config_classes()[self.method].model_fields
        fast = {"rank_update_ratio": 1 / steps, "eta_c": 0.2, "l1_share": 0.2 * steps}
        fast |= {"begin": 0.0, "end": 1 - 1 / steps, "interval": 1 / steps}
        return {name: value for name, value in fast.items() if name in fields}

    @property
    def moves(self) -> bool:
        return config_classes()[self.method].ranks_move

    @property
    def hands_out(self) -> bool:
        """True if freed ranks go to other adapters."""
        return "reassign" in config_classes()[self.method].model_fields

    def examples(self, rows: int = 24, seed: int = 0) -> Examples:
        """Ragged rows that can be learnt: the label, or the completion, follows from the first
        word."""
        rng = np.random.default_rng(seed)
        tokens, targets, labels = [], [], []
        for row in range(rows):
            label = row % 2
            words = rng.integers(WORD + 20, WORD + WORDS, rng.integers(1, 9))
            completion = (np.arange(1 + row % 4) + 7 * label) % WORDS + WORD
            tokens.append(
                np.concatenate(
                    [[WORD + label], words, *([completion] if self.task == "causal-lm" else [])]
                )
            )
            targets.append(np.arange(len(tokens[-1])) > len(words))
            labels.append(label)
        return Examples(
            tokens=np.concatenate(tokens).astype(np.int32),
            offsets=np.cumsum([0, *map(len, tokens)]),
            row_ids=np.arange(rows),
            labels=np.array(labels) if self.task == "sequence-classification" else None,
            targets=np.concatenate(targets) if self.task == "causal-lm" else None,
        )

    def batch(self) -> Batch:
        return collate(self.examples(6, seed=9), np.arange(6), 0)


def spec(**settings: Any) -> TrainSpec:
    usual = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "precision": "fp32",
        "max_steps": 4,
    }
    return TrainSpec.model_validate(usual | settings)


def steps(built: Built, examples: Examples, settings: TrainSpec) -> Iterator[StepReport]:
    """A run from its first step, as lorakit.runs.train starts it."""
    optimizer = started(built, settings)
    torch.manual_seed(settings.seed)
    return train(built.task_model, built.method, optimizer, examples, settings)


def started(built: Built, settings: TrainSpec) -> AdamW:
    built.prepare()
    optimizer = build_optimizer(built.method, built.heads, settings)
    built.method.begin(optimizer, settings.max_steps or 0)
    return optimizer


def without_dropout(built: Built) -> Built:
    for module in built.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return built


@torch.no_grad()
def scramble(built: Built, seed: int = 1) -> None:
    """Random factors, none of them zero; what else a method trains (gates, say) somewhere inside
    (0, 1)."""
    rng = torch.Generator().manual_seed(seed)
    for adapter in built.adapters.values():
        for name, parameter in adapter.components().items():
            if name in ("lora_A", "lora_B"):
                parameter.normal_(std=0.2, generator=rng)
            else:
                parameter.uniform_(0.1, 0.9, generator=rng)


def assert_equal_tensors(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


def optimizer_tensors(built: Built, optimizer: AdamW) -> dict[str, Tensor]:
    named = trainable(built.model).items()
    moments = {
        f"{name}.{part}": t for name, p in named for part, t in vars(optimizer.state[p]).items()
    }
    return {name: tensor for name, tensor in moments.items() if tensor is not None}


STEPS, CUT = 10, 5


def resumed(case: Case, folder: Path) -> list[dict[str, int]]:
    """A run that is cut and resumed, compared with one that is not; returns the ranks after every
    step."""
    settings, examples = (
        spec(max_steps=STEPS, gradient_accumulation_steps=2, warmup_ratio=0.2),
        case.examples(),
    )
    method = {"lora_dropout": 0.1} | case.moving(STEPS)

    whole = case.build(**method)
    optimizer = started(whole, settings)
    torch.manual_seed(settings.seed)
    history, reports = [whole.method.rank_state().ranks], []
    for report in train(whole.task_model, whole.method, optimizer, examples, settings):
        reports.append(replace(report, seconds=0.0))
        history.append(whole.method.rank_state().ranks)
        if report.step == CUT:
            cut = checkpoint.save(
                folder, whole.model, whole.method, optimizer, RunState(step=CUT), keep=None
            )

    torch.manual_seed(99)  # whatever happens between
    other, saved = case.build(seed=0, **method), checkpoint.read(cut)
    saved.restore_model(other.model, other.method)
    continued = build_optimizer(other.method, other.heads, settings)
    other.method.begin(continued, STEPS)
    saved.restore_optimizer(other.model, continued)
    saved.restore_random()
    rest = train(
        other.task_model, other.method, continued, examples, settings, first_step=saved.run.step + 1
    )
    assert [replace(report, seconds=0.0) for report in rest] == reports[CUT:]
    assert_equal_tensors(trained_tensors(other.model), trained_tensors(whole.model))
    assert_equal_tensors(optimizer_tensors(other, continued), optimizer_tensors(whole, optimizer))
    assert other.method.state_dict() == whole.method.state_dict()
    assert other.method.summary() == whole.method.summary()
    return history
