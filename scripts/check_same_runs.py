#!/usr/bin/env python
"""Check that two checkouts train identically, bit for bit: hashes of the losses, adapters and
exports of five short seeded runs.

    python scripts/check_same_runs.py --save before.json       in the first checkout
    python scripts/check_same_runs.py --against before.json    in the second checkout

Runs are in float32 on the builtins, which are fetched once. The exit code is 1 if anything differs.
Run both on the same machine with the same packages, since other processors round differently.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRAIN = {
    "max_steps": 12,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "precision": "fp32",
    "eval_steps": 6,
}
SPARSE = {"density": 0.5, "begin": 0.0, "end": 0.7}
BUDGET = {"unit": "rank", "start": 1.0, "end": 0.5}
METHODS = {
    "vanilla": {"name": "vanilla", "r": 8},
    "l1ra": {"name": "l1ra", "r": 8, "l1_share": 0.9, "rank_update_ratio": 0.3, "budget": BUDGET},
    "salor": {"name": "salor", "r": 8, "factors": SPARSE},
    "chunkwise": {"name": "chunkwise", "r": 8, "ladder": [2, 8], "training": "nested"},
    "l1ra_salor": {
        "name": "l1ra",
        "r": 8,
        "l1_share": 0.9,
        "with": [{"name": "salor", "factors": SPARSE}],
    },
}


def rows(folder: Path) -> None:
    rng = random.Random(0)
    words = [
        "the",
        "a",
        "film",
        "plot",
        "cast",
        "is",
        "good",
        "bad",
        "dull",
        "how",
        "many",
        "eggs",
        "and",
        "hens",
        "boxes",
    ]
    text = [" ".join(rng.choices(words, k=rng.randint(4, 24))) for _ in range(160)]
    (folder / "class.jsonl").write_text(
        "".join(json.dumps({"text": t, "label": i % 2}) + "\n" for i, t in enumerate(text))
    )
    lines = ({"prompt": t, "completion": " " + text[-i]} for i, t in enumerate(text[:40]))
    (folder / "lm.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def lorakit(folder: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lorakit", *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}: {done.stderr}")
    return done.stdout


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def one(folder: Path, name: str) -> dict[str, object]:
    """Run one recipe and collect the results that must not change."""
    causal = name == "chunkwise"
    model = "smollm2-135m-instruct" if causal else "minilm-l6"
    recipe = {
        "model": {
            "name_or_path": f"builtin/{model}",
            "task": "causal-lm" if causal else "sequence-classification",
        },
        "data": {"name_or_path": "lm.jsonl" if causal else "class.jsonl", "max_seq_length": 64},
        "method": METHODS[name],
        "train": (
            TRAIN
            | (
                {"max_steps": 3, "eval_steps": 3, "per_device_train_batch_size": 4}
                if causal
                else {}
            )
        ),
        "output_dir": name,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(recipe))
    lorakit(folder, "train", f"{name}.yaml")
    lorakit(folder, "export", name, "--merge")
    lorakit(folder, "export", name, "--adapter")
    metrics = [
        json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()
    ]
    files = sorted(
        file
        for part in ("adapter", "merged", "adapter-peft-portable")
        for file in (folder / name / part).glob("*.safetensors")
    )
    return {
        "losses": [line["loss"] for line in metrics if "loss" in line],
        "evaluated": json.loads(lorakit(folder, "eval", name, "--json"))["metrics"],
        "bytes": {str(file.relative_to(folder)): digest(file) for file in files},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", type=Path, help="write what was found")
    parser.add_argument("--against", type=Path, help="compare with what was saved")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows(folder)
        found = json.loads(json.dumps({method: one(folder, method) for method in METHODS}))
    if options.save:
        options.save.write_text(json.dumps(found, indent=1))
    before = json.loads(options.against.read_text()) if options.against else found
    for method, facts in found.items():
        same = facts == before[method]
        print(
            f"{method:12} {len(facts['losses'])} losses, {len(facts['bytes'])} files:"
            f" {'the same' if same else 'OTHER'}"
        )
    sys.exit(found != before)


if __name__ == "__main__":
    main()
