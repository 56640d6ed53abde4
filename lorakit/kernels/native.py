"""Kernels in C, compiled on the user's machine by its own compiler for the level in use (`levels`).

`csrc/NAME.c` is compiled once into lorakit's cache folder, under a name that holds the level and a
hash of everything the result depends on: the source, the headers, the flags, the compiler, the
processor and torch's OpenMP library. A complete library enters the cache by one rename. Without a
compiler only speed is lost: every kernel has an equivalent in torch.

Since a library is executed, none is loaded that anyone but its owner could have written: the
permissions of the folder and the libraries are set explicitly, independent of the umask, and a
library that others can write is compiled again.

The code is linked against the OpenMP library that torch has loaded: a second one would bring its
own threads, which compete with torch's for the cores. The number of threads is an argument of each
kernel (`torch.get_num_threads()`).
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import logging
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

from lorakit.files import cache_root
from lorakit.kernels import levels
from lorakit.kernels.levels import Level

log = logging.getLogger("lorakit")

SOURCES = Path(__file__).parent / "csrc"
FLAGS = [
    "-std=gnu11",
    "-O3",
    "-mtune=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-fopenmp",
]
FLAGS += ["-Wall", "-Werror=implicit"]
PATIENCE = 120  # seconds to wait for a compiler, or for another process that compiles
PRIVATE = stat.S_IRWXU
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class Unavailable(Exception):
    """The reason why there are no kernels in C."""


@dataclass(frozen=True)
class Toolchain:
    """The compiler of the libraries. level: the level that it compiles for; reason: why that is
    lower than the requested one, or ""."""

    level: Level
    reason: str
    compiler: list[str]
    version: str

    @property
    def command(self) -> list[str]:
        """The compiler with all flags, for compiling without linking."""
        return [*self.compiler, *FLAGS, *levels.compiler_flags(self.level)]


class _Symbol(ctypes.Structure):
    """Dl_info of dladdr(3)."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


FAILURES = (
    Unavailable,
    OSError,
    ValueError,
    NotImplementedError,
    Timeout,
    subprocess.SubprocessError,
)


def load(name: str) -> ctypes.CDLL | None:
    """Load the library of `csrc/NAME.c`, compiled first if the cache has none for this machine;
    every call gives the same object.

    None at the level torch, and where no library can be made, with the reason in the log: an
    unsupported processor or system, or no compiler. The compiler is $CC, or `cc`. Raises UsageError
    as `levels.used` does.
    """
    level = levels.used()
    return None if level is Level.torch else _load(name, level)


def level_and_reason() -> tuple[Level, str]:
    """(the level of the kernels that run, the reason why it is lower than the machine's or "").

    It is lower than `compiled_level` where torch's OpenMP library can not be used. Loads torch's
    libraries.
    """
    level, reason = compiled_level()
    lacking = "" if level is Level.torch else _no_openmp()
    return (Level.torch, lacking) if lacking else (level, reason)


def compiled_level() -> tuple[Level, str]:
    """(the level that kernels are compiled for, the reason why it is lower than the machine's or
    ""). Loads no torch.

    It is lower than `levels.used` where there is no compiler, or none that supports that level.
    """
    level, reason = levels.used(), levels.reason()
    if level is Level.torch:
        return level, reason
    found = _toolchain(level)
    if isinstance(found, str):
        return Level.torch, found
    return found.level, found.reason or reason


def forget() -> None:
    """Have compilers and libraries looked for again, as in a new process. What has been loaded
    stays in memory."""
    for known in (_load, _tell, _toolchain, _no_openmp):
        known.cache_clear()


@cache
def _load(name: str, level: Level) -> ctypes.CDLL | None:
    toolchain = _toolchain(level)
    if isinstance(toolchain, str):
        _tell(f"torch does the work of the kernels in C, which is slower: {toolchain}")
        return None
    try:
        place = _library(name, toolchain)
        try:
            return ctypes.CDLL(str(place))
        except OSError:  # damaged, for example by a power loss: compiled again, once
            place.unlink(missing_ok=True)
            return ctypes.CDLL(str(_library(name, toolchain)))
    except FAILURES as error:
        _tell(f"torch does the work of the kernels of {name}.c, which is slower: {error}")
        return None


@cache
def _tell(message: str) -> None:
    """Log a message once in a process: the same cause may affect every library."""
    log.info("%s", message)


@cache
def _toolchain(level: Level) -> Toolchain | str:
    """The toolchain for a level, or for the highest lower one that the compiler supports; or the
    reason why there is none."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    try:
        if not compiler or shutil.which(compiler[0]) is None:
            raise Unavailable(f"there is no compiler `{' '.join(compiler)}`")
        version = _run([*compiler, "--version"])
        reason = ""
        for reached in range(level, Level.torch, -1):
            try:
                _run(
                    [*compiler, *levels.compiler_flags(Level(reached)), "-E", "-x", "c", os.devnull]
                )
                return Toolchain(Level(reached), reason, compiler, version)
            except Unavailable as error:
                reason = f"the compiler `{' '.join(compiler)}` does not know {Level(reached)}"
                log.debug("%s: %s", reason, error)
        raise Unavailable(reason)
    except FAILURES as error:
        return str(error)


def _library(name: str, toolchain: Toolchain) -> Path:
    """The path of the compiled library, which is compiled if it is missing. Raises Unavailable,
    OSError (a disk error, a folder that can not be written), Timeout or SubprocessError."""
    source, openmp = SOURCES / f"{name}.c", str(_openmp())
    texts = [path.read_text(encoding="utf-8") for path in (source, *sorted(SOURCES.glob("*.h")))]
    known = "\0".join([*texts, *toolchain.command, toolchain.version, levels.tuned_for(), openmp])
    folder = _private_folder()
    place = (
        folder / f"{name}-{toolchain.level}-{hashlib.sha256(known.encode()).hexdigest()[:16]}.so"
    )
    if _is_sound(place):
        return place
    with FileLock(folder / ".lock", timeout=PATIENCE):
        # another process may have compiled it while this one waited for the lock
        if not _is_sound(place):
            with tempfile.TemporaryDirectory(dir=folder, prefix=f".{place.name}-") as scratch:
                compiled, linked = Path(scratch) / "kernel.o", Path(scratch) / "kernel.so"
                _run([*toolchain.command, "-c", str(source), "-o", str(compiled)])
                # Without -fopenmp, which would link the compiler's own OpenMP library; with -z
                # defs, undefined names are errors.
                link = [
                    *toolchain.compiler,
                    "-shared",
                    "-Wl,-z,defs",
                    str(compiled),
                    openmp,
                    "-lm",
                    "-o",
                    str(linked),
                ]
                _run(link)
                linked.chmod(PRIVATE)  # linkers follow the umask
                os.replace(linked, place)
    return place


def _private_folder() -> Path:
    """The folder of libraries, writable by its owner only. Raises Unavailable if it belongs to
    another user."""
    folder = cache_root() / "native"
    folder.mkdir(parents=True, exist_ok=True, mode=PRIVATE)
    about = folder.stat()
    if about.st_uid != os.getuid():
        raise Unavailable(
            f"`{folder}` belongs to another user; LORAKIT_CACHE names another cache folder"
        )
    if about.st_mode & OTHERS_WRITE:
        folder.chmod(PRIVATE)
        for library in folder.glob("*.so"):
            library.unlink(missing_ok=True)
        log.info(
            "others could write into `%s`: that is over, and its kernels are compiled anew", folder
        )
    return folder


def _is_sound(place: Path) -> bool:
    """True if the library exists and nobody else can have written it; one that others could write
    is removed."""
    if not place.exists():
        return False
    about = place.stat()
    if about.st_uid == os.getuid() and not about.st_mode & OTHERS_WRITE:
        return True
    log.info("others could write `%s`: it is compiled anew", place)
    place.unlink(missing_ok=True)
    return False


def _run(command: list[str]) -> str:
    """Run the command and return its standard output. Raises Unavailable if it fails."""
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise Unavailable(f"`{shlex.join(command)}` failed: {done.stderr.strip()[-2000:]}")
    return done.stdout


@cache
def _no_openmp() -> str:
    """The reason why torch's OpenMP library can not be used, or ""."""
    try:
        _openmp()
    except FAILURES as error:
        return str(error)
    return ""


def _openmp() -> Path:
    """The file of the OpenMP library that torch's parallel regions use."""
    # found without importing torch, which callers that only report levels do not need
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise Unavailable("torch is not installed")
    torch_library = Path(torch.origin).parent / "lib" / "libtorch_cpu.so"
    try:
        entry = ctypes.cast(ctypes.CDLL(str(torch_library)).GOMP_parallel, ctypes.c_void_p)
    except AttributeError as error:
        raise Unavailable(
            "torch runs without OpenMP, or with one that GCC's code can not use"
        ) from error
    found = _Symbol()
    if not ctypes.CDLL(None).dladdr(entry, ctypes.byref(found)) or not found.file:
        raise Unavailable("torch's OpenMP library was not found")
    return Path(os.fsdecode(found.file)).resolve()
