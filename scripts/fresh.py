"""Fresh processes for benchmarks, with their duration and peak memory."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Process:
    """A finished process: its stdout, duration in seconds, largest resident set, and observed
    (steps, time) pairs."""

    output: str
    seconds: float
    peak_mb: float
    seen: list[tuple[int, float]]


def fresh(
    command: list[str], scratch: Path, environment: dict[str, str], metrics: Path | None = None
) -> Process:
    """Run a command in the folder `scratch` to its end while reading its metrics.jsonl 50 times a
    second. Ends this program if the command fails."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=scratch, env=environment, stdout=out, stderr=err)
        seen: list[tuple[int, float]] = []
        ended = 0
        while not ended:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            # The line of an evaluation has no step loss and comes after the last step.
            if metrics is not None and metrics.is_file():
                now, steps = (
                    time.perf_counter(),
                    metrics.read_text(encoding="utf-8").count('"grad_norm"'),
                )
                if steps > (seen[-1][0] if seen else 0):
                    seen.append((steps, now))
            time.sleep(0.02)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        out.seek(0)
        err.seek(0)
        if process.returncode:
            sys.exit(f"{' '.join(command)}\nended with {process.returncode}:\n{err.read()[-4000:]}")
        # A process starts with the size of its parent, so a smaller peak could not be measured.
        assert usage.ru_maxrss > resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, (
            "this process is the larger one"
        )
        return Process(
            out.read(),
            seconds,
            usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10),
            seen,
        )
