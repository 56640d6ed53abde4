"""Commands as processes of their own: started, waited for, ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lorakit.cli import main
from tests.support.warm import AVAILABLE, WarmProcess

Process = subprocess.Popen[str] | WarmProcess
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


def start(folder: Path, *arguments: object, given: str = "", **environment: str) -> Process:
    """A process of its own, in `folder`. One thread: several of them run at once, and the same sums
    in each. given: its standard input."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"} | environment
    words = [str(argument) for argument in arguments]
    if AVAILABLE:
        return WarmProcess(words, folder, env, given.encode())
    command, pipe = [*ENTRY, *words], subprocess.PIPE
    with tempfile.TemporaryFile("w+") as typed:
        typed.write(given)
        typed.seek(0)
        return subprocess.Popen(
            command, cwd=folder, env=env, stdin=typed, stdout=pipe, stderr=pipe, text=True
        )


def end(process: Process) -> Done:
    out, err = process.communicate(timeout=PATIENCE_S)
    return Done(int(process.returncode or 0), out, err)


def wait_for(process: Process, what: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"the process ended before {what}: {end(process)}")
        if time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"{what}: not within {PATIENCE_S} s; {end(process)}")
        time.sleep(0.01)


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))
