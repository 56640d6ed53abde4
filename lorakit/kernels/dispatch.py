"""Dispatch: which implementation of each operation runs in this process.

Every operation can be computed by torch. Where kernels in C are faster, the table below lists the
processor levels (`levels`) that have kernels, and the libraries (`csrc/`) that contain them.
Vector kernels are written once and compiled for vectors of 8 or 16 floats. Each operation checks
which tensors its kernels take, and asks this module which implementation runs.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING

from lorakit.kernels import levels, native
from lorakit.kernels.levels import Level

if TYPE_CHECKING:
    import torch

log = logging.getLogger("lorakit")


def _vectors(library: str) -> dict[Level, tuple[str, ...]]:
    return {Level.avx2: (library,), Level.avx512: (library,)}


_OF_BLOCKS = ("activations", "norms", "rotary")
# {operation: {level of an implementation other than torch's: the libraries it needs}}
OPERATIONS: dict[str, dict[Level, tuple[str, ...]]] = {
    "activations": _vectors("activations"),
    "attention": {**_vectors("attention"), Level.amx: ("attention_tiles",)},
    "block": {
        Level.avx2: ("attention", "linear", *_OF_BLOCKS),
        Level.avx512: ("attention", "linear", *_OF_BLOCKS),
        Level.amx: ("attention_tiles", "linear_tiles", *_OF_BLOCKS),
    },
    "cross_entropy": {Level.amx: ("cross_entropy",)},
    "decode": _vectors("decode"),
    "dropout": _vectors("dropout"),
    "lora_linear": {**_vectors("linear"), Level.amx: ("linear_tiles",)},
    "masks": _vectors("masks"),
    "norms": _vectors("norms"),
    "rotary": _vectors("rotary"),
    "softmax": _vectors("softmax"),
}


def implementation(operation: str, most: Level = Level.amx) -> Level:
    """The level of the implementation that runs: the highest, up to `most`, that the processor,
    the compiler and LORAKIT_KERNELS allow and whose libraries load; torch if there is none.

    Raises UsageError as `levels.used` does.
    """
    return _implementation(operation, levels.used(), most)


def table(reached: Level | None = None) -> dict[str, Level]:
    """{operation: level of its implementation} in this process; with `reached`, the table expected
    where kernels compile up to that level, found without compiling anything. A library that fails
    to compile later is reported in the log, and torch does its work."""
    reached = native.level_and_reason()[0] if reached is None else reached
    return {name: max(_reached(name, reached), default=Level.torch) for name in OPERATIONS}


@cache
def announce(device: torch.device) -> None:
    """Log, once in a process, the level at which work on this device runs, why it is not higher,
    and the implementation of each operation.

    Raises UsageError as `levels.used` does.
    """
    if device.type != "cpu":
        return
    machine, lacks = levels.machine_level()
    level, reason = native.level_and_reason()
    if level < machine:
        faster = f"though this machine has {machine}, which is faster ({reason})"
        log.info("kernels: %s, %s", level, faster)
    elif level is Level.torch:
        log.info("kernels: torch (%s)", lacks)
    else:
        log.info("kernels: %s (%s)", level, levels.processor())
    if level is not Level.torch:
        chosen = table(level)
        by_level = {each: [name for name in chosen if chosen[name] is each] for each in Level}
        said = (f"{each}: {', '.join(names)}" for each, names in by_level.items() if names)
        log.info("operations: %s", "; ".join(said))


def forget() -> None:
    """Have it found out and said again, as in a new process, which implementations run."""
    native.forget()
    for known in (_implementation, announce):
        known.cache_clear()


@cache
def _implementation(operation: str, used: Level, most: Level) -> Level:
    reached = min(native.level_and_reason()[0], most)
    for level in sorted(_reached(operation, reached), reverse=True):
        if all(native.load(name) is not None for name in OPERATIONS[operation][level]):
            return level
    return Level.torch


def _reached(operation: str, level: Level) -> list[Level]:
    return [each for each in OPERATIONS[operation] if each <= level]
