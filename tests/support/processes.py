"""Commands as processes of their own: started, waited for, ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lorakit.cli import main

ENTRY = [sys.executable, "-c", "from lorakit.cli import main; main()"]
WEIGHTS = "adapter/adapter_model.safetensors"
PATIENCE_S = 90  # for a process that should have got somewhere long ago


@dataclass
class Done:
    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


def in_this_process(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """`main` in this process, as the console script calls it."""

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["lorakit", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capfd.readouterr()
        return Done(int(exit_.value.code or 0), captured.out, captured.err)

    return run


def start(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    """A process of its own, in `folder`. One thread: several of them run at once, and the same sums
    in each."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*ENTRY, *map(str, arguments)], cwd=folder, env=env, stdout=pipe, stderr=pipe, text=True
    )


def end(process: subprocess.Popen[str]) -> Done:
    out, err = process.communicate(timeout=PATIENCE_S)
    return Done(process.returncode, out, err)


def wait_for(process: subprocess.Popen[str], what: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"the process ended before {what}: {end(process)}")
        if time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"{what}: not within {PATIENCE_S} s; {end(process)}")
        time.sleep(0.002)


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))
