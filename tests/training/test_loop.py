"""What the loop reads from `train`: the length of the warm-up and the order of the rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import TrainingArguments

from lorakit.training.loop import count_warmup_steps, step_order
from lorakit.training.spec import TrainSpec


def spec(**keys: Any) -> TrainSpec:
    return TrainSpec.model_validate_json(json.dumps(keys))


@pytest.mark.parametrize(
    ("keys", "total", "steps"),
    [
        ({}, 1000, 0),
        ({"warmup_ratio": 0.05}, 1000, 50),
        ({"warmup_ratio": 0.05}, 30, 2),
        ({"warmup_ratio": 1}, 30, 30),
        ({"warmup_steps": 0}, 30, 0),
        ({"warmup_steps": 0.05}, 30, 2),
        ({"warmup_steps": 1}, 30, 1),
        ({"warmup_steps": 100}, 1000, 100),
        ({"warmup_steps": 100}, 30, 100),
        ({"warmup_steps": 100, "warmup_ratio": 0}, 1000, 100),
    ],
)
def test_a_warm_up_is_a_number_of_steps_or_a_share(
    keys: dict[str, float], total: int, steps: int
) -> None:
    assert count_warmup_steps(total, spec(**keys)) == steps


@pytest.mark.parametrize("warmup", [0, 0.03, 0.07, 0.5, 1, 20])
@pytest.mark.parametrize("total", [1, 33, 100, 1000])
def test_warmup_steps_are_those_of_transformers(warmup: float, total: int, tmp_path: Path) -> None:
    peer = TrainingArguments(output_dir=str(tmp_path), warmup_steps=warmup, report_to="none")
    assert count_warmup_steps(total, spec(warmup_steps=warmup)) == peer.get_warmup_steps(total)


def test_either_key_groups_rows_by_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 40)
    keys: list[dict[str, Any]] = [
        {},
        {"train_sampling_strategy": "random"},
        {"group_by_length": True},
        {"train_sampling_strategy": "group_by_length"},
        {"train_sampling_strategy": "group_by_length", "group_by_length": True},
        {"train_sampling_strategy": "sequential"},
    ]
    steps = [step_order(lengths, spec(**one)).of_step(2).tolist() for one in keys]
    assert steps[0] == steps[1]
    assert steps[2] == steps[3] == steps[4]
    assert steps[5] == list(range(8, 16))
    assert len({tuple(step) for step in steps}) == 3
    assert [spec(**one).sampling for one in keys] == [
        *["random"] * 2,
        *["group_by_length"] * 3,
        "sequential",
    ]
