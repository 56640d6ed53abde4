"""Run the tests of kernels, and of code that uses them, at every processor level that this machine
has or can emulate.

    python scripts/test_levels.py                 # every level
    python scripts/test_levels.py --suite-ran     # skip the machine's own level, since the whole
                                                  # suite ran without caps
    python scripts/test_levels.py --levels avx2   # only this level

A lower level is emulated by capping torch, oneDNN, MKL and lorakit together (at_level.py). Prints a
table: tests passed, failed and skipped, libraries in C loaded, seconds. Fails (exit code 1) if a
test fails, if a level of this machine did not run, if a level with kernels in C could not load all
of them, or if all tests of a file for this level were skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from at_level import CAPS, environment  # noqa: E402

from lorakit.kernels import levels  # noqa: E402
from lorakit.kernels.levels import Level  # noqa: E402

FILES = (
    *(
        "native",
        "attention",
        "attention_tiles",
        "products",
        "lora_linear",
        "elementwise",
        "cross_entropy",
        "masks",
    ),
    *(
        "encoder_block",
        "decoder_block",
        "whole_block",
        "read_tokens",
        "speed_up",
        "packing",
        "decoder",
        "kv_cache",
        "rotary",
        "shared_input",
    ),
    *("optimizer", "inference", "levels", "contract", "dispatch", "in_c", "optimisation"),
)
# Files whose tests need AMX, and files whose tests need kernels in C.
FOR_AMX = {"attention_tiles"}
FOR_C = {"rotary", "whole_block", "encoder_block", "decoder_block", "read_tokens", "products"}
LIBRARIES = """
import json
from lorakit.kernels import levels, native
names = sorted(path.stem for path in native.SOURCES.glob("*.c"))
loaded = sum(native.load(name) is not None for name in names)
print(json.dumps([str(levels.used()), str(native.level_and_reason()[0]), len(names), loaded]))
"""


@dataclass
class Ran:
    """The results of one level's tests. wrong: the reasons for a failure."""

    level: Level
    passed: int
    failed: int
    skipped: int
    libraries: str
    seconds: float
    wrong: list[str]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [level.name for level in Level]
    parser.add_argument(
        "--levels", nargs="+", choices=names, help="by default all that the machine has"
    )
    parser.add_argument(
        "--suite-ran",
        action="store_true",
        help="the machine's own level was tested by the whole suite",
    )
    options = parser.parse_args()
    highest, lacks = levels.machine_level()
    has = [level for level in Level if level <= highest]
    print(
        f"{levels.processor()}: {', '.join(map(str, has))}{f' ({lacks})' if lacks else ''}",
        flush=True,
    )
    wanted = [Level[name] for name in options.levels or [level.name for level in has]]
    if above := [level for level in wanted if level > highest]:
        parser.error(f"this machine has no {', '.join(map(str, above))}: {lacks}")
    results = [run(level) for level in wanted if not (options.suite_ran and level is highest)]
    print(f"\n{'level':8}{'passed':>8}{'failed':>8}{'skipped':>9}{'in C':>7}{'seconds':>9}")
    for result in results:
        counts = f"{result.passed:>8}{result.failed:>8}{result.skipped:>9}{result.libraries:>7}"
        counts += f"{result.seconds:>9.0f}"
        print(f"{result.level!s:8}{counts}  {'; '.join(result.wrong)}")
    wrong = any(result.wrong for result in results)
    if options.suite_ran:
        # True only if nothing capped the suite and all kernels load.
        used, reached, there, loaded = kernels(dict(os.environ))
        covered = used == reached == highest.name and loaded == (
            0 if highest is Level.torch else there
        )
        wrong |= not covered
        how = (
            "by the whole suite"
            if covered
            else f"did not run: the suite ran at {reached}, {loaded} of {there} kernels loaded"
        )
        print(f"{highest!s:8}{how}")
    sys.exit(wrong)


def run(level: Level) -> Ran:
    """Run the tests at this level in separate processes and print failures."""
    started = time.perf_counter()
    variables = {**CAPS[level], levels.VARIABLE: level.name}
    capped = environment(variables)
    capped["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    print(
        f"\n{level}: {' '.join(f'{name}={value}' for name, value in variables.items())}", flush=True
    )
    wrong = []
    used, reached, there, loaded = kernels(capped)
    if (used, reached) != (level.name, level.name):
        wrong.append(f"kernels ran at {reached}")
    if loaded != (0 if level is Level.torch else there):
        wrong.append(f"{loaded} of {there} kernels were loaded")
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        files = [str(next(ROOT.glob(f"tests/**/test_{name}.py"))) for name in FILES]
        command = [sys.executable, "-m", "pytest", "-n", "auto", f"--junitxml={report}", *files]
        done = subprocess.run(command, env=capped, cwd=ROOT, check=False)
        if not report.exists():
            return Ran(
                level,
                0,
                0,
                0,
                f"{loaded}/{there}",
                time.perf_counter() - started,
                [*wrong, "pytest did not run"],
            )
        counts = count(report)
    failed = sum(states["failed"] for states in counts.values())
    if done.returncode:
        wrong.append(f"pytest ended with {done.returncode}")
    for name in FILES:
        expects = not (name in FOR_AMX and level < Level.amx) and not (
            name in FOR_C and level is Level.torch
        )
        if expects and not counts.get(name, {"passed": 0})["passed"]:
            wrong.append(f"no test of {name} ran")
    passed, skipped = (
        sum(states[state] for states in counts.values()) for state in ("passed", "skipped")
    )
    return Ran(
        level, passed, failed, skipped, f"{loaded}/{there}", time.perf_counter() - started, wrong
    )


def kernels(variables: dict[str, str]) -> tuple[str, str, int, int]:
    """Find (the level in use, the level of the kernels, the number of libraries, the number that
    load) in a separate process."""
    asked = subprocess.run(
        [sys.executable, "-c", LIBRARIES],
        env=variables,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    used, reached, there, loaded = json.loads(asked.stdout.splitlines()[-1])
    return used, reached, there, loaded


def count(report: Path) -> dict[str, dict[str, int]]:
    """Read {file's name: {passed, failed, skipped: number of tests}} from pytest's report."""
    counts: dict[str, dict[str, int]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        where = re.search(r"test_(\w+)", f"{case.get('classname')} {case.get('name')}")
        states = counts.setdefault(
            where[1] if where else "", {"passed": 0, "failed": 0, "skipped": 0}
        )
        kinds = {child.tag for child in case}
        states[
            (
                "failed"
                if kinds & {"failure", "error"}
                else "skipped"
                if "skipped" in kinds
                else "passed"
            )
        ] += 1
    return counts


if __name__ == "__main__":
    main()
