"""Schedules: functions from a progress in [0, 1] to a value, without state or tensors.

They serve everything that changes along a run: the learning rate, the rank budget and the density
of sparse factors.
"""

from __future__ import annotations

import math
from typing import Literal

Shape = Literal["cubic", "linear", "constant", "one-shot"]
LearningRateShape = Literal["cosine", "linear", "constant"]


def ramp(progress: float, start: float, end: float, shape: Shape = "cubic") -> float:
    """The value between `start` (progress 0) and `end` (progress 1).

    `cubic` is end + (start - end) * (1 - progress)^3 (Zhu and Gupta, arXiv 1710.01878, eq. 1;
    AdaLoRA, arXiv 2303.10512, eq. 12): fast at first, slow at the end. `constant` stays at `start`.
    `one-shot` is `start` before progress 1 and `end` from there on. Progress is clamped to [0, 1].
    """
    left = 1.0 - min(max(progress, 0.0), 1.0)
    if shape == "constant" or (shape == "one-shot" and left > 0):
        return start
    return end + (start - end) * (left**3 if shape == "cubic" else left)


def step_at(fraction: float, total_steps: int) -> int:
    """The optimizer step at this fraction of a run, or the number of steps in it: at least 1."""
    # 0.29 · 100 is a hair below 29 in floating point.
    return max(1, math.floor(fraction * total_steps + 1e-9))


def learning_rate_factor(
    step: int, total_steps: int, warmup_steps: int, shape: LearningRateShape
) -> float:
    """The factor of the peak learning rate at optimizer step `step` (the first is 1, the last
    `total_steps`).

    Rises linearly to 1 at step `warmup_steps`, then falls to 0 just after the last step, so that
    no step has factor 0.
    """
    if step <= warmup_steps:
        return step / warmup_steps
    if shape == "constant":
        return 1.0
    progress = (step - 1 - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * progress)) if shape == "cosine" else 1.0 - progress
