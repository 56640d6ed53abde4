"""bitsandbytes and torchao, which quantise weights."""

from __future__ import annotations

import logging
import warnings
from functools import cache
from typing import Any

from lorakit.compat.lookup import attribute, part


def bitsandbytes(name: str) -> Any:
    """A function or class of `bitsandbytes.functional`."""
    return attribute(_imported("bitsandbytes.functional"), name, "bitsandbytes")


def torchao(name: str) -> Any:
    """A function or class of `torchao.quantization`."""
    return attribute(_imported("torchao.quantization"), name, "torchao")


@cache
def _imported(module: str) -> Any:
    """The module, imported without messages about accelerators that the machine lacks."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return part(module)
    finally:
        logging.disable(before)
