"""Processes that need not import anything: forked from one that has imported all that commands do.

They are processes of their own, with streams, signals, a working folder and an exit code; only the
five seconds of imports, most of the time of such tests, are spent once for each environment that an
interpreter reads when it starts. What a start does itself is tested with new interpreters
(test_startup.py, test_interrupt.py, test_consoles.py).
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any

# Of the interpreter itself, or read while libraries are loaded: a forked process keeps the old
# ones.
AT_START = ("PYTHON", "LC_", "LANG", "OMP_", "GOMP_", "ATEN_", "ONEDNN_", "HF_", "LD_", "MKL_")
AVAILABLE = sys.platform == "linux"  # sequenced packets between processes
LARGEST = 1 << 18  # bytes of a request
SERVER = "from tests.support.warm import serve; serve({})"


class WarmProcess:
    """A command in a forked process, with the part of Popen's interface that tests use."""

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        env: Mapping[str, str],
        given: bytes = b"",
        encoding: str = "utf-8",
    ) -> None:
        self._server, self._encoding = _server(_at_start(env)), encoding
        self.streams: list[IO[bytes]] = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115
        self.streams[0].write(given)
        self.streams[0].seek(0)
        request = {"arguments": list(arguments), "folder": str(folder), "env": dict(env)}
        self.pid: int = _ask(self._server, request, [stream.fileno() for stream in self.streams])
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            status = _ask(self._server, {"status_of": self.pid})
            self.returncode = None if status is None else os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """(stdout, stderr) after the end of the process."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("lorakit", timeout)
            time.sleep(0.005)
        texts = []
        for stream in self.streams[1:]:
            stream.seek(0)
            texts.append(stream.read().decode(self._encoding))
        return texts[0], texts[1]


def _at_start(env: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """The part of an environment that an interpreter, or a library, reads when it starts. The
    number of threads is that of all processes of the tests."""
    names = sorted(name for name in env if name.startswith(AT_START))
    return tuple((name, env[name]) for name in names if name != "OMP_NUM_THREADS")


@cache
def _server(env: tuple[tuple[str, str], ...]) -> socket.socket:
    """A connection to the process that was started in this environment."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER.format(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        cwd=Path(__file__).parent.parent.parent,
        env={name: value for name, value in os.environ.items() if not name.startswith(AT_START)}
        | dict(env)
        | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    theirs.close()
    atexit.register(process.wait)
    atexit.register(ours.close)
    return ours


def _ask(server: socket.socket, request: dict[str, Any], streams: Sequence[int] = ()) -> Any:
    socket.send_fds(server, [json.dumps(request).encode()], list(streams))
    return json.loads(server.recv(LARGEST))


def serve(descriptor: int) -> None:
    """Fork a process for each request, until the other side closes."""
    from lorakit import process

    process.take_over()
    import transformers.models.bert.modeling_bert
    import transformers.models.gpt2.modeling_gpt2
    import transformers.models.llama.modeling_llama  # noqa: F401

    import lorakit.runs.api
    import lorakit.runs.convert
    import lorakit.runs.estimate
    import lorakit.runs.preview  # noqa: F401

    gc.freeze()  # what is shared stays shared
    with socket.socket(fileno=descriptor) as requests:
        while True:
            text, streams, _, _ = socket.recv_fds(requests, LARGEST, 3)
            if not text:
                return
            request = json.loads(text)
            if pid := request.get("status_of"):
                done, status = os.waitpid(pid, os.WNOHANG)
                requests.send(json.dumps(status if done else None).encode())
                continue
            if (pid := os.fork()) == 0:
                break
            requests.send(json.dumps(pid).encode())
            for stream in streams:
                os.close(stream)
    _run(request, streams)


def _run(request: dict[str, Any], streams: Sequence[int]) -> None:
    """The command, in the new process. Its end is that of an interpreter (exit code, callbacks,
    flushed streams), but for taking the modules apart, which takes seconds."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["folder"].encode())
    os.environ.clear()
    os.environb.update({name.encode(): value.encode() for name, value in request["env"].items()})
    # As an interpreter of this locale decodes them.
    sys.argv = ["lorakit", *(os.fsdecode(word.encode()) for word in request["arguments"])]
    from lorakit.cli import main

    code = 1
    try:
        main()
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
