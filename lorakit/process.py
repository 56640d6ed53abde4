"""Settings of the whole process. Importing lorakit changes none; commands call `take_over`.

Settings that can not be undone (how threads wait, what the allocator and oneDNN keep) are changed
only in a process that was taken over. A program that uses lorakit as a library keeps its own
settings, unless it calls `take_over` itself before anything imports torch. Imports no torch.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import sys
import time
from pathlib import Path
from typing import IO

from lorakit.files import cache_root

# Duration of the look at other processes, and the share of a core from which they count as busy:
# the clock of /proc/stat ticks every 10 ms.
LOOK_SECONDS, IDLE_SHARE = 0.15, 0.3
# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
LARGE = 50_000_000  # parameters from which few compiled products are kept
WAITING = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}


class _State:
    """Changes made to this process so far."""

    taken_over = False
    waiting_as_told = False  # the environment already decided how threads wait
    locked: list[IO[str]] = []  # noqa: RUF012  # files locked until the process ends


def take_over() -> None:
    """Make the process lorakit's own. Call it before anything imports torch, whose OpenMP reads
    the environment when it is loaded. A second call does nothing."""
    if _State.taken_over:
        return
    _State.taken_over = True
    _State.waiting_as_told = bool(os.environ.keys() & WAITING)
    # Threads that wait for the next parallel region sleep instead of spinning. On a busy machine,
    # a spinning thread holds the core that the slowest thread waits for: measured on two cores with
    # one busy neighbour, a step takes 1.3 s with spinning and 0.3 s with sleeping.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def wait_by_spinning() -> None:
    """Let threads spin for a moment before they sleep, for commands that generate token by token,
    where torch's operations make a step hundreds of short parallel regions. Measured on two cores,
    SmolLM2-135M without kernels in C: 30 ms a token instead of 65. Call it before anything imports
    torch."""
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def spin_if_idle() -> None:
    """Let threads spin before they sleep, for commands that train, if the machine is idle and no
    other lorakit process spins. Call it before anything imports torch.

    Measured on two cores, MiniLM: 6 700 tokens a second with 100 000 iterations of spinning, 5 000
    without; beside one busy process 800 with spinning, 4 400 without.
    """
    if _State.waiting_as_told or not Path("/proc/stat").exists():
        return
    if not _first_to_spin(cache_root() / "spins.lock"):
        return
    before, started = _busy_elsewhere(), time.perf_counter()
    time.sleep(LOOK_SECONDS)
    share = (_busy_elsewhere() - before) / (time.perf_counter() - started)
    if share < IDLE_SHARE:
        os.environ["GOMP_SPINCOUNT"] = "100000"


def keep_freed_memory() -> None:
    """Let the allocator keep freed memory for the next step instead of returning it to the system,
    which would hand it out again page by page: a tenth of a step of a small model."""
    if not _State.taken_over or sys.platform != "linux":
        return
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never


def limit_compiled_products(parameters: int) -> None:
    """Set the number of compiled products that oneDNN caches, for a model with this many
    parameters.

    oneDNN compiles a kernel for every shape of a product, and reads the limit when it compiles the
    first one. Measured: a run of SmolLM2-135M peaks at 4.2 GB with a limit of 16384, 4.0 GB with
    256 and 3.0 GB with 128, at the same speed; MiniLM needs 256, with which it processes 6 400
    tokens a second instead of 5 600, and its kernels take little memory.
    """
    if _State.taken_over:
        kept = "128" if parameters > LARGE else "1024"
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", kept)


def processes() -> int:
    """The number of processes that a launcher (`lorakit train --nproc`, torchrun) has started for
    this command, this one among them; 1 without a launcher."""
    # Some clusters set WORLD_SIZE alone, to something else.
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def attempt() -> int:
    """How often the launcher has started this process anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _first_to_spin(lock: Path) -> bool:
    """True if no other running process holds the lock, which this call takes. Needed since two
    processes that start at once both see an idle machine."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = lock.open("w")
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    _State.locked.append(held)
    return True


def _busy_elsewhere() -> float:
    """Seconds of processor time used by all other processes since the machine started."""
    fields = Path("/proc/stat").read_text().split()[1:9]
    user, nice, system, _, _, irq, soft_irq, steal = map(int, fields)
    own = os.times()
    ticks = user + nice + system + irq + soft_irq + steal
    return ticks / os.sysconf("SC_CLK_TCK") - own.user - own.system
