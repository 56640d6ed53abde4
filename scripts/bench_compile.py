"""Benchmark of torch.compile against lorakit's vector kernels in C, on the chains of element-wise
operations in a training step.

    python scripts/bench_compile.py [--levels avx2 avx512 amx] [--dtypes bf16 fp32] [--rounds 60]
        [--threads N] [--chains gelu …]

Each chain is one forward and backward pass, at the shapes of MiniLM (800 tokens) or SmolLM2-135M
(1600 tokens), by torch's own operations, by the same under torch.compile(dynamic=True), and by the
kernel in C. The arms take turns, with another one first in every round. ms: medians, of processor
time with --threads 1, else of time; ratio: median of the ratios within a round, with its quartiles.
--dtypes: by default the level's own and float32. --levels: one table for each of these processor
levels, in the environment that stands in for it (at_level.py), which torch.compile obeys
too; level torch has no kernels and is left out.

compile s: seconds of the first forward and backward pass under torch.compile, in a process with an
empty cache, and in the next process, which finds the cache filled. start s: the same for a trivial
function before all chains. C s: compiling and loading the five libraries in C, which serve all
chains.

Every arm is compared with torch's operations, without dropout. Prints a table for each level and
one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import at_level
from at_level import AtLevel
from fresh import fresh

from lorakit.kernels.levels import Level


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtypes", nargs="+", choices=("bf16", "fp32"))
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, help="by default torch's")
    parser.add_argument("--chains", nargs="+", help="only chains whose names begin so")
    # What this program runs in its fresh processes.
    parser.add_argument("--here", choices=("time", "compile"), help=argparse.SUPPRESS)
    at_level.add_option(parser)
    options = parser.parse_args()
    if options.here:
        import chains

        print(json.dumps(chains.measured(options, options.here == "time")))
        return
    wanted, left_out = at_level.chosen(options.levels)
    lines = [left_out] * bool(left_out)
    if any(at.level is Level.torch for at in wanted):
        lines.append("level torch is left out: it has no kernels in C")
    print(*lines, sep="\n")
    found = [compared(options, at) for at in wanted if at.level is not Level.torch]
    print(json.dumps({"left_out": lines, "levels": found}))


def compared(options: argparse.Namespace, at: AtLevel) -> dict[str, Any]:
    """Measure all chains at one level, in two fresh processes, and print their table."""
    command = [sys.executable, str(Path(__file__).resolve()), "--rounds", str(options.rounds)]
    command += ["--dtypes", *options.dtypes] if options.dtypes else []
    command += ["--chains", *options.chains] if options.chains else []
    command += ["--threads", str(options.threads)] if options.threads else []
    with tempfile.TemporaryDirectory() as scratch:
        caches = {
            "TORCHINDUCTOR_CACHE_DIR": str(Path(scratch) / "inductor"),
            "LORAKIT_CACHE": str(Path(scratch) / "lorakit"),
            "CUDA_VISIBLE_DEVICES": "",
        }
        cold, warm = (
            json.loads(
                fresh(
                    [*command, "--here", what], Path(scratch), at.environment() | caches
                ).output.splitlines()[-1]
            )
            for what in ("time", "compile")
        )
    for row, again in zip(cold["rows"], warm["rows"], strict=True):
        row["compile_again_s"] = again["compile_s"]
    cold |= {f"{name}_again_s": warm[f"{name}_s"] for name in ("c", "start")}
    print(at.heading())
    show(cold)
    return at.facts() | cold


def show(found: dict[str, Any]) -> None:
    print(
        f"{found['threads']} threads; start s: {found['start_s']:.1f}, then"
        f" {found['start_again_s']:.1f}; C s: {found['c_s']:.1f}, then {found['c_again_s']:.1f}"
    )
    head = f"{'chain':40}{'type':>6}{'eager ms':>10}{'compiled':>10}{'C':>8}"
    print(head + f"{'compiled / C':>24}{'eager / C':>12}{'compile s':>16}")
    for row in found["rows"]:
        low, middle, high = row["compiled / c"]
        ratio = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        seconds = f"{row['compile_s']:.1f}, then {row['compile_again_s']:.1f}"
        print(
            f"{row['chain']:40}{row['dtype']:>6}{row['eager_ms']:>10.3f}{row['compiled_ms']:>10.3f}"
            f"{row['c_ms']:>8.3f}{ratio:>24}{row['eager / c'][1]:>12.2f}{seconds:>16}"
        )
    print(flush=True)


if __name__ == "__main__":
    main()
