"""Benchmark of decoding: lorakit with a vanilla adapter of rank r, unmerged, against PEFT merged
and unmerged and the model without an adapter.

    python scripts/bench_decode.py --text wikitext2_valid.txt --peers DIR [--levels avx2 avx512 amx]
        [--run RUN] [--r 64] [--prefill 512] [--decode 64] [--dtype auto|bf16|fp32] [--rounds 3]

Every arm is a fresh process, on the processor, batch 1, greedy, with the same prompt; the peers are
peer_decode.py of the folder --peers, and without it lorakit runs alone. Arms take turns, with
another one first in every round. lorakit's arm does what `lorakit generate` does, with a run that
two steps of training make, or --run, a finished vanilla run. In bf16 the peers run twice, once with
oneDNN off for the decode steps (`flag`), since its bf16 matrix-vector product is slow on some
processors.

--levels: one table for each of these processor levels; every arm runs in the environment that
stands in for it (at_level.py), as in bench_training.py. --dtype: of all arms; auto is what
`precision: auto` means at the level.

ms a token: the median over the new tokens, without the prompt, in the second of two runs of each
process; given as median (minimum to maximum) of the rounds. speed / X: the milliseconds of PEFT
merged or unmerged, with or without the flag, whichever is faster in the round, divided by those of
the arm. Logit error: the next --decode tokens of the text are fed one by one, and the logits are
compared with those of the merged model in float32, computed by plain transformers in one pass: the
norm of the difference as a share of the logits' spread, and how often the likeliest token is the
same. The same of plain transformers' own decode steps, merged and in the arms' type, stands beside
it. Prints a table for each level and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import at_level
from arms import model_folder
from at_level import AtLevel
from fresh import fresh
from tables import one, spread

from lorakit.kernels import levels

OURS = "lorakit unmerged"
PEERS = {"base": "base", "peft unmerged": "PEFT unmerged", "peft merged": "PEFT merged"}
FLAG = ", flag"
TORCH_NAMES = {"bf16": "bfloat16", "fp32": "float32"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", default="builtin/smollm2-135m-instruct")
    parser.add_argument("--peers", type=Path, help="the folder of peer_decode.py")
    parser.add_argument("--run", type=Path, help="a finished vanilla run, instead of a new one")
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto", choices=("auto", *TORCH_NAMES))
    # What this program runs in its fresh processes.
    parser.add_argument("--arm", choices=("time", "errors"), help=argparse.SUPPRESS)
    at_level.add_option(parser)
    options = parser.parse_args()
    options.text = options.text.resolve()
    if options.arm:
        import decode_arm

        print(
            json.dumps(
                {"time": decode_arm.timed, "errors": decode_arm.errors}[options.arm](options)
            )
        )
        return
    if options.peers is None:
        print("no --peers DIR: lorakit runs alone", file=sys.stderr)
    wanted, left_out = at_level.chosen(options.levels)
    if left_out:
        print(left_out)
    with tempfile.TemporaryDirectory() as scratch:
        run = options.run.resolve() if options.run else trained(options, Path(scratch))
        found = [measured(options, run, at, Path(scratch)) for at in wanted]
    print(
        json.dumps({"model": options.model, "r": options.r, "left_out": left_out, "levels": found})
    )


def trained(options: argparse.Namespace, scratch: Path) -> Path:
    """Make a run whose factors are all in use, by two steps of training at a high rate."""
    recipe = {
        "model": {"name_or_path": options.model, "task": "causal-lm"},
        "data": {
            "name_or_path": str(options.text),
            "max_seq_length": 64,
            "max_train_samples": 8,
            "max_eval_samples": 1,
        },
        "method": {"name": "vanilla", "r": options.r, "lora_alpha": options.r},
        "train": {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2},
        "output_dir": str(scratch / "run"),
    }
    file = scratch / "recipe.yaml"
    file.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is valid YAML
    command = [sys.executable, "-c", "from lorakit.cli import main; main()", "train", str(file)]
    fresh(command, scratch, dict(os.environ))
    return scratch / "run"


def measured(options: argparse.Namespace, run: Path, at: AtLevel, scratch: Path) -> dict[str, Any]:
    """Run all rounds at one level and print their table."""
    auto = "bf16" if levels.bfloat16_is_fast() else "fp32"
    dtype = next(name for name in (options.dtype, at.precision, auto) if name != "auto")
    environment = {**at.environment(), "CUDA_VISIBLE_DEVICES": ""}
    sizes = ["--prefill", str(options.prefill), "--decode", str(options.decode)]
    ours = [sys.executable, str(Path(__file__).resolve()), "--text", str(options.text), *sizes]
    ours += ["--run", str(run), "--dtype", dtype]
    arms = {OURS: [*ours, "--arm", "time"]} | dict(peers(options, sizes, dtype))
    rounds: list[dict[str, dict[str, Any]]] = []
    for number in range(options.rounds):
        once: dict[str, dict[str, Any]] = {}
        for place in range(len(arms)):
            name = list(arms)[(number + place) % len(arms)]
            lines = fresh(arms[name], scratch, environment).output.splitlines()
            once |= {
                variant(line, name): line for line in map(json.loads, lines) if "decode_ms" in line
            }
        rounds.append(once)
        print(json.dumps(once), file=sys.stderr)
    done = fresh([*ours, "--arm", "errors"], scratch, environment)
    errors = json.loads(done.output.splitlines()[-1])
    rows = list(summary(rounds))
    print(at.heading())
    show(rows, errors, dtype, options)
    return at.facts() | {"dtype": dtype, "rows": rows, "errors": errors, "rounds": rounds}


def peers(
    options: argparse.Namespace, sizes: list[str], dtype: str
) -> Iterator[tuple[str, list[str]]]:
    """Yield (arm, command) of the peers."""
    if options.peers is None:
        return
    command = [sys.executable, str(options.peers.resolve() / "peer_decode.py"), *sizes]
    command += [
        "--model",
        model_folder(options.model),
        "--text",
        str(options.text),
        "--r",
        str(options.r),
    ]
    command += ["--dtype", TORCH_NAMES[dtype]]
    yield "peers", command
    if dtype == "bf16":
        yield f"peers{FLAG}", [*command, "--plain-matvec"]


def variant(line: dict[str, Any], arm: str) -> str:
    """The name of a row: lorakit's, or a variant of the peers' script (`peft unmerged r=64`)."""
    if arm == OURS:
        return OURS
    name = str(line["variant"]).partition(" r=")[0]
    return PEERS[name] + (FLAG if arm.endswith(FLAG) else "")


def summary(rounds: list[dict[str, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yield a row for each arm: medians, and ratios within a round."""
    for name in rounds[0]:
        row: dict[str, Any] = {"arm": name}
        row["ms"] = spread([once[name]["decode_ms"] for once in rounds])
        row["prefill_s"] = statistics.median(once[name]["prefill_s"] for once in rounds)
        row["kv_bytes"] = rounds[0][name]["kv_bytes"]
        for other in ("PEFT merged", "PEFT unmerged"):
            if other in rounds[0]:
                row[f"speed / {other}"] = spread(
                    [best(once, other) / once[name]["decode_ms"] for once in rounds]
                )
        yield row


def best(once: dict[str, dict[str, Any]], name: str) -> float:
    """Milliseconds of a peer in one round, with or without the flag."""
    return min(once[one]["decode_ms"] for one in (name, name + FLAG) if one in once)


def show(
    rows: list[dict[str, Any]], errors: dict[str, Any], dtype: str, options: argparse.Namespace
) -> None:
    print(f"{dtype}, r = {options.r}, prompt of {options.prefill} tokens, {options.decode} new")
    head = f"{'arm':22}{'ms a token':>24}{'speed / PEFT merged':>24}{'speed / PEFT unmerged':>26}"
    print(head + f"{'prefill s':>11}{'cache bytes':>13}")
    for row in rows:
        ratios = [one(row.get(f"speed / PEFT {name}"), ".2f") for name in ("merged", "unmerged")]
        print(
            f"{row['arm']:22}{one(row['ms'], '.1f'):>24}{ratios[0]:>24}{ratios[1]:>26}"
            f"{row['prefill_s']:>11.3f}{row['kv_bytes']:>13,}"
        )
    for name in ("lorakit", "transformers"):
        print(
            f"logits of the decode steps of {name}: {errors[name]['error']:.1e} from float32, the"
            f" same likeliest token {errors[name]['same']:.1%} of the time"
        )
    print(f"lorakit's forward pass: {errors['forward']}\n", flush=True)


if __name__ == "__main__":
    main()
