"""Signals before the first step: one line and exit 130, from the very start of a command."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.training.interrupt import Stopped, StopRequest, Stops

PATIENCE_S = 90
RECIPE = """\
model: {{name_or_path: {model}, task: sequence-classification}}
data: {{name_or_path: {data}}}
method: {{name: l1ra, r: 4}}
train: {{max_steps: 100000, precision: fp32}}
"""


@pytest.fixture
def start(tmp_path: Path, tiny_bert: Path, sentiment: Path) -> Callable[..., subprocess.Popen[str]]:
    (tmp_path / "a.yaml").write_text(RECIPE.format(model=tiny_bert, data=sentiment))
    # A shell's background jobs ignore SIGINT, and so would what they start.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731

    def run(*arguments: str) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=tmp_path, preexec_fn=heed, **pipes
        )  # type: ignore[call-overload, no-any-return]

    return run


def caught(pid: int, number: int) -> bool:
    """Whether the process handles the signal (Linux)."""
    found = re.search(
        r"^SigCgt:\s*([0-9a-f]+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE
    )
    assert found
    return bool(int(found[1], 16) >> (number - 1) & 1)


def wait(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(),
    reason="Linux alone says which signals a process handles",
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["at once", "importing torch", "in assembly"])
def test_a_signal_before_the_first_step_is_one_line(
    moment: str, number: signal.Signals, start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = start("-m", "lorakit", "train", "a.yaml")
    pid = process.pid
    wait(process, lambda: caught(pid, signal.SIGTERM))
    # A moment of the start is known by the libraries that the process has loaded.
    if moment != "at once":
        library = "libtorch_cpu" if moment == "importing torch" else "libarrow"
        wait(process, lambda: library in Path(f"/proc/{pid}/maps").read_text())
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, err
    assert out == ""
    assert re.fullmatch(
        rf"stopped by {number.name}( before training began: nothing was written)?\n", err
    ), err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_an_interrupted_library_makes_of_it_is_no_error(number: signal.Signals) -> None:
    """Stopped is no Exception, and a second signal does not wait for Python."""

    def wait() -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)

    with Stops() as stops, pytest.raises(Stopped, match=f"stopped by {number.name}"):
        wait()
    assert stops.number == number
    assert not issubclass(Stopped, Exception | KeyboardInterrupt)


def test_a_second_signal_ends_a_command_that_does_not_end(
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    hangs = """if True:
        import time
        from lorakit.training.interrupt import Stops
        with Stops():
            try:
                print(1, flush=True)
                time.sleep(60)
            finally:
                print(2, flush=True)
                time.sleep(60)
    """
    process = start("-c", hangs)
    assert process.stdout is not None
    for line in ("1\n", "2\n"):
        assert process.stdout.readline() == line
        process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert err == "stopped by SIGTERM at once\n"


def test_handlers_are_as_they_were_afterwards() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Stops(), StopRequest():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
