"""lorakit: fine-tunes language models with low-rank adapters whose capacity adapts.

From Python: `train` and `load_run`, which give a `Run` (`lorakit.runs.api`). They are imported when
they are first asked for, and torch with them; importing lorakit changes nothing in a process.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lorakit.errors import LorakitError

if TYPE_CHECKING:
    from lorakit.runs.api import Run, load_run, train

__version__ = "0.1.0"
__all__ = ["LorakitError", "Run", "load_run", "train"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("lorakit.runs.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
