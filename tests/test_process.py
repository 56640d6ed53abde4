"""Settings of the process: commands make them, and importing lorakit makes none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lorakit

# All that a program could find changed, as text. What other packages do when they are imported is
# no doing of lorakit's, so they are imported first.
LOOK = """
import json, logging, os, signal, sys, warnings
import datasets, gguf, matplotlib.figure, pyarrow, rich, scipy, sklearn, torch, transformers, typer
import torch._dynamo

def look():
    modules = (torch.backends.mkldnn, torch.backends.cpu, torch._dynamo.config)
    flags = {name: repr(getattr(module, name)) for module in modules
             for name in dir(module) if not name.startswith("_")}
    return flags | {
        "environment": dict(os.environ),
        "path": sys.path[:],
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "type": str(torch.get_default_dtype()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "random": torch.get_rng_state().tolist(),
        "verbosity": transformers.logging.get_verbosity(),
        "bars": transformers.logging.is_progress_bar_enabled(),
        "attention": sorted(transformers.AttentionInterface().valid_keys()),
        "rotary": repr(transformers.models.llama.modeling_llama.apply_rotary_pos_emb),
        "data bars": datasets.are_progress_bars_disabled(),
        "signals": [repr(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
        "handlers": repr(logging.getLogger().handlers),
        "level": logging.getLogger().level,
        "ours": repr(logging.getLogger("lorakit").handlers),
        "warnings": repr(warnings.filters),
        "streams": repr([sys.stdout, sys.stderr]),
        "hooks": repr([sys.excepthook, sys.displayhook]),
    }

"""
IMPORT_ALL = """
import pkgutil
import transformers.models.llama.modeling_llama
before = look()
import lorakit
names = [found.name for found in pkgutil.walk_packages(lorakit.__path__, "lorakit.")]
for name in names:
    __import__(name)
after = look()
changed = {name: [old, after[name]] for name, old in before.items() if old != after[name]}
print(json.dumps([len(names), changed]))
"""


def python(code: str, **variables: str) -> Any:
    """What a new process prints, as JSON."""
    own = {"PYTHONPATH": str(Path(lorakit.__file__).parent.parent)}
    # this process may be changed
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=kept | own | variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_all_of_lorakit_changes_nothing() -> None:
    modules, changed = python(LOOK + IMPORT_ALL)
    assert modules > 100
    assert changed == {}


TAKE_OVER = """
import json, os, sys
from lorakit import process
process.IDLE_SHARE = float("inf")  # whatever else runs now
before = dict(os.environ)

def made():
    return {name: value for name, value in os.environ.items() if before.get(name) != value}

process.limit_compiled_products(10)
process.keep_freed_memory()
untouched = made()
process.take_over()
process.take_over()
process.limit_compiled_products(10)
process.spin_if_idle()
print(json.dumps([untouched, made(), "torch" in sys.modules]))
"""
ALWAYS = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "true",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024",
}


def test_a_process_that_is_taken_over_gets_settings_and_no_other(tmp_path: Path) -> None:
    untouched, made, torch = python(TAKE_OVER, LORAKIT_CACHE=str(tmp_path))
    assert untouched == {}
    assert made == ALWAYS | {"GOMP_SPINCOUNT": "100000"}
    assert not torch


@pytest.mark.parametrize(
    ("name", "value"), [("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "7")]
)
def test_who_starts_python_decides_how_threads_wait(name: str, value: str, tmp_path: Path) -> None:
    _, made, _ = python(TAKE_OVER, LORAKIT_CACHE=str(tmp_path), **{name: value})
    assert made == {other: told for other, told in ALWAYS.items() if other != name}
