"""Kernels in C, compiled on the user's machine by its own compiler, for its own processor.

`csrc/NAME.c` is compiled once into lorakit's cache folder, under a name that holds a hash of all that the result depends on: the
source, the headers, the flags, the compiler, the processor and torch's OpenMP library. A library appears in the cache by one
rename, when it is whole. Whoever has no compiler loses speed and nothing else: every kernel has a twin in torch.

OpenMP: the code is linked against the very library that torch has loaded, as a second one would bring threads of its own, which
fight with torch's for the cores. How many threads work is an argument of each kernel (`torch.get_num_threads()`).
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from lorakit.builtin import cache_root

log = logging.getLogger("lorakit")

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-Wall", "-Werror=implicit")
NEEDED = {"avx2", "fma"}  # what every processor since 2015 has, as /proc/cpuinfo names it
PATIENCE = 120  # seconds that a compiler, or another process that compiles, may take


class Unavailable(Exception):
    """The reason why there are no kernels in C."""


class _Symbol(ctypes.Structure):
    """Dl_info of dladdr(3)."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def load(name: str) -> ctypes.CDLL | None:
    """The library made from `csrc/NAME.c`, compiled first if the cache has none for this machine; the same one for every call.

    None, with the reason in the log at level debug, where there can be none: not Linux on x86-64, a processor without AVX2, no
    compiler, or LORAKIT_NATIVE=0. The compiler is $CC, or `cc`.
    """
    if os.environ.get("LORAKIT_NATIVE") == "0":
        return None
    return _load(name)


def load_with_tiles(name: str) -> ctypes.CDLL | None:
    """`load` of a library that multiplies by AMX tiles (csrc/amx.h); None too where the processor or the system has none."""
    library = load(name)
    return library if library is not None and _has_tiles(library) else None


@cache
def _has_tiles(library: ctypes.CDLL) -> bool:
    return bool(library.tiles_available())


@cache
def _load(name: str) -> ctypes.CDLL | None:
    try:
        place = _library(name)
        try:
            return ctypes.CDLL(str(place))
        except OSError:  # damaged, as by a loss of power: compiled again, once
            place.unlink(missing_ok=True)
            return ctypes.CDLL(str(_library(name)))
    except (Unavailable, OSError, ValueError, NotImplementedError, Timeout, subprocess.SubprocessError) as reason:
        log.debug("no kernels in C from %s.c: %s", name, reason)
        return None


def _library(name: str) -> Path:
    """The compiled file. Raises Unavailable, OSError (a disk, a folder that can not be written), Timeout or SubprocessError."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise Unavailable(f"this is {sys.platform} on {platform.machine()}")
    processor = _processor()
    if missing := NEEDED - set(processor.split()):
        raise Unavailable(f"the processor lacks {', '.join(sorted(missing))}")
    compiler = shlex.split(os.environ.get("CC") or "cc")
    if not compiler or shutil.which(compiler[0]) is None:
        raise Unavailable(f"there is no compiler `{' '.join(compiler)}`")
    openmp = _openmp()
    command = [*compiler, *FLAGS, "-fopenmp"]
    version = _run([*compiler, "--version"])
    source = SOURCES / f"{name}.c"
    texts = [path.read_text(encoding="utf-8") for path in (source, *sorted(SOURCES.glob("*.h")))]
    known = "\0".join([*texts, *command, version, processor, str(openmp)])
    place = cache_root() / "native" / f"{name}-{hashlib.sha256(known.encode()).hexdigest()[:16]}.so"
    place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    for path in (place.parent, place):  # what is in there is run, and its name is no secret
        if path.exists() and (path.stat().st_uid != os.getuid() or path.stat().st_mode & 0o022):
            raise Unavailable(f"`{path}` can be written by others")
    if place.exists():
        return place
    with FileLock(place.parent / ".lock", timeout=PATIENCE):
        if not place.exists():  # another process may have compiled it while this one waited for the lock
            with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}-") as folder:
                compiled, linked = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
                _run([*command, "-c", str(source), "-o", str(compiled)])
                # Without -fopenmp, which would name the compiler's own OpenMP library; -z defs: all names must be found here.
                _run([*compiler, "-shared", "-Wl,-z,defs", str(compiled), str(openmp), "-lm", "-o", str(linked)])
                os.replace(linked, place)
    return place


def _run(command: list[str]) -> str:
    """What the command prints. Raises Unavailable when it fails."""
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise Unavailable(f"`{shlex.join(command)}` failed: {done.stderr.strip()[-2000:]}")
    return done.stdout


def _processor() -> str:
    """Model and flags of the first processor: what -march=native looks at, and what NEEDED is looked for in."""
    first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    return "\n".join(line for line in first.splitlines() if line.startswith(("vendor_id", "model", "flags")))


def _openmp() -> Path:
    """The file of the OpenMP library that torch's own parallel regions run in."""
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        entry = ctypes.cast(ctypes.CDLL(str(torch_library)).GOMP_parallel, ctypes.c_void_p)
    except AttributeError as error:
        raise Unavailable("torch runs without OpenMP, or with one that GCC's code can not use") from error
    found = _Symbol()
    if not ctypes.CDLL(None).dladdr(entry, ctypes.byref(found)) or not found.file:
        raise Unavailable("torch's OpenMP library was not found")
    return Path(os.fsdecode(found.file)).resolve()
