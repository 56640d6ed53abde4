"""Benchmark of SALOR: sparse factors and a pruned base against controls, on one task and several
seeds.

    python scripts/bench_salor.py factors RECIPE data.name_or_path=… data.subset=sst2
        train.num_train_epochs=3
    python scripts/bench_salor.py base RECIPE data.name_or_path=… train.max_steps=60 --seeds 0 1 2

RECIPE is a salor recipe; all arms share its model, data, r, alpha / r, optimizer, schedule and
order of rows. `factors`: vanilla at r; vanilla at smaller ranks, with the same number of non-zeros;
one-shot pruning of the trained vanilla; PEFT's SHiRA with the same number of non-zeros, in
lorakit's own loop; salor with 50, 70, 80 and 90 % zeros. `base`: the dense base with LoRA; the
pruned base with LoRA of rank r, and of rank r + r_res; salor.

Finished runs are kept under --out and not repeated. Prints a table of means, paired differences to
the first arm with their standard errors, and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lorakit import process

ZEROS = (0.5, 0.7, 0.8, 0.9)
# Keys of a base that have no meaning without a residual.
RESIDUAL = ("svd", "residual_lr_factor")


def main() -> None:
    process.take_over()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("factors", "base"))
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value for every arm")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", help="only these, by name")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, default=Path("bench_salor"), help="where finished runs are kept"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        _one(options.recipe, options.overrides, **json.loads(options.one))
        return

    arms = dict(_factor_arms(options) if options.what == "factors" else _base_arms(options))
    arms = {name: arm for name, arm in arms.items() if not options.arms or name in options.arms}
    options.out.mkdir(parents=True, exist_ok=True)
    settings = json.dumps([options.what, options.recipe.read_text(), options.overrides])
    if (options.out / "settings.json").is_file() and (
        options.out / "settings.json"
    ).read_text() != settings:
        parser.error(f"{options.out} holds runs of other settings: name another --out")
    (options.out / "settings.json").write_text(settings)
    jobs = [
        (name, seed) for seed in options.seeds for name in arms if not arms[name].get("derived")
    ]

    def run(job: tuple[str, int]) -> None:
        name, seed = job
        file = options.out / f"{name}-{seed}.json"
        if file.is_file():
            return
        one = json.dumps({"file": str(file), "seed": seed} | arms[name])
        command = [
            sys.executable,
            __file__,
            options.what,
            str(options.recipe),
            *options.overrides,
            "--one",
            one,
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        if done.returncode:
            raise SystemExit(f"{name}, seed {seed}:\n{done.stderr[-2000:]}")
        print(f"{name}, seed {seed}: {file.read_text().strip()}", file=sys.stderr)

    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(run, jobs))
    _report(
        {
            name: [_read(options.out, name, arm, seed) for seed in options.seeds]
            for name, arm in arms.items()
        }
    )


def _factor_arms(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    from lorakit.recipes.recipe import load_recipe

    method = load_recipe(options.recipe, options.overrides).method
    yield (
        "vanilla",
        {"method": _vanilla(method, method.r), "one_shot": [1 - zeros for zeros in ZEROS]},
    )
    for zeros in ZEROS:
        factors = method.factors.model_dump(exclude_defaults=True) | {
            "density": round(1 - zeros, 6)
        }
        yield (
            f"salor-{zeros:.0%}",
            {"method": {"name": "salor", "factors": factors, **_shared(method, method.r)}},
        )
    for zeros in ZEROS:
        yield f"one-shot-{zeros:.0%}", {"derived": ("vanilla", f"{1 - zeros:.1f}")}
    for rank in sorted({max(1, round(method.r * (1 - zeros))) for zeros in ZEROS}, reverse=True):
        yield f"vanilla-r{rank}", {"method": _vanilla(method, rank)}
    for rank in sorted(
        {max(1, round(method.r * (1 - zeros))) for zeros in (0.5, 0.8)}, reverse=True
    ):
        yield f"shira-r{rank}", {"method": _vanilla(method, rank), "shira": rank}


def _base_arms(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    from lorakit.recipes.recipe import load_recipe

    method = load_recipe(options.recipe, options.overrides).method
    base = method.base.model_dump(exclude_defaults=True)
    start = {"more": ["train.eval_on_start=true"]}

    def pruned(rank: int, r_res: int) -> dict[str, Any]:
        mine = (
            base | {"r_res": r_res}
            if r_res
            else {k: v for k, v in base.items() if k not in RESIDUAL} | {"r_res": 0}
        )
        method_section = {"name": "salor", "factors": None, "base": mine, **_shared(method, rank)}
        return {"method": method_section} | start

    yield "dense", {"method": _vanilla(method, method.r)} | start
    yield "pruned", pruned(method.r, 0)
    yield "pruned-wide", pruned(method.r + method.base.r_res, 0)
    yield "salor", pruned(method.r, method.base.r_res)


def _shared(method: Any, rank: int) -> dict[str, Any]:
    """The settings of all arms; the scale alpha / r is the same for every rank."""
    same = {
        key: getattr(method, key) for key in ("lora_dropout", "target_modules", "exclude_modules")
    }
    return {"r": rank, "lora_alpha": method.lora_alpha * rank / method.r, **same}


def _vanilla(method: Any, rank: int) -> dict[str, Any]:
    return {"name": "vanilla", **_shared(method, rank)}


# -- one run, in a process of its own --------------------------------------------------------------


def _one(
    recipe_path: Path,
    overrides: list[str],
    file: str,
    seed: int,
    method: dict[str, Any],
    one_shot: list[float] | None = None,
    shira: int | None = None,
    more: list[str] | None = None,
) -> None:
    from rich.console import Console

    from lorakit.recipes.recipe import load_recipe
    from lorakit.report.progress import Progress
    from lorakit.runs.train import run_training

    folder = Path(file).with_suffix("")
    mine = [
        f"method={json.dumps(method)}",
        f"train.seed={seed}",
        f"output_dir={folder}",
        "train.save_steps=null",
    ]
    recipe = load_recipe(recipe_path, ["train.eval_steps=null", *overrides, *mine, *(more or [])])
    progress = Progress(Console(stderr=True))
    if shira is not None:
        found = _shira(recipe, shira, progress)
    else:
        result = run_training(recipe, progress, overwrite=True)
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        metric = next(iter(result["metrics"]))
        found = {
            "metric": metric,
            "value": result["metrics"][metric],
            "start": next((line[f"eval_{metric}"] for line in steps if line["step"] == 0), None),
            "nonzeros": sum(result["nonzeros"].values()),
            "density": result["density"]["total"],
            "trainable": result["trainable_parameters"],
            "seconds": result["train_seconds"],
        }
        if one_shot:
            found["one_shot"] = {
                f"{density:.1f}": _one_shot(folder, recipe, density) for density in one_shot
            }
    Path(file).write_text(json.dumps(found) + "\n")


def _one_shot(folder: Path, recipe: Any, density: float) -> dict[str, Any]:
    """Set the smallest entries of each matrix of the trained adapter to zero, without training
    afterwards."""
    import torch

    from lorakit.models.load import compute_dtype, default_device
    from lorakit.numerics.sparsity import masks
    from lorakit.report.progress import Progress
    from lorakit.runs.factors import factor_facts
    from lorakit.runs.saved import saved_model
    from lorakit.runs.session import find_sources, read_inputs
    from lorakit.training.loop import evaluation_limits
    from lorakit.training.metrics import evaluate

    dtype = compute_dtype(recipe.train.precision, default_device())
    task_model, method, _ = saved_model(folder, recipe, dtype)
    with torch.no_grad():
        for adapter in method.adapters.values():
            for factor in (adapter.lora_A, adapter.lora_B):
                factor.mul_(masks([factor.abs()], density)[0])
            adapter.freeze()
    from rich.console import Console

    inputs = read_inputs(recipe, *find_sources(recipe), Progress(Console(stderr=True)))
    metrics = evaluate(
        task_model, inputs.validation, inputs.metrics, *evaluation_limits(recipe.train)
    ).metrics
    facts = factor_facts(method.adapters)
    return {
        "value": metrics[inputs.metrics[0]],
        "nonzeros": sum(facts["nonzeros"].values()),
        "density": facts["density"]["total"],
    }


def _shira(recipe: Any, rank: int, progress: Any) -> dict[str, Any]:
    """Train PEFT's SHiRA (arXiv 2406.13175) on the recipe's layers in lorakit's loop, with as many
    trained entries as LoRA of `rank`."""
    import re

    import torch
    from peft import ShiraConfig, inject_adapter_in_model

    from lorakit.adapters.inject import detach_all
    from lorakit.adapters.optimizer import ParamGroup
    from lorakit.methods import Method
    from lorakit.runs.session import assemble
    from lorakit.training.loop import build_optimizer, evaluation_limits, train
    from lorakit.training.metrics import evaluate

    session = assemble(recipe, progress)
    names = list(session.method.adapters)
    detach_all(session.task_model.model, session.method.adapters)
    config = ShiraConfig(
        r=rank, random_seed=recipe.train.seed, target_modules="|".join(re.escape(n) for n in names)
    )
    heads = [(p, p.requires_grad) for p in session.heads]
    model = inject_adapter_in_model(config, session.task_model.model)
    for parameter, trained in heads:
        parameter.requires_grad_(trained)
    weights = [p for name, p in model.named_parameters() if "shira_weight" in name]
    for weight in weights:
        weight.data = weight.data.float()  # float32 as in every arm, instead of the base's type

    class Shira(Method):
        def param_groups(self) -> list[ParamGroup]:
            return [ParamGroup(weights)]

    method = Shira(recipe.method)
    optimizer = build_optimizer(method, session.heads, recipe.train)
    torch.manual_seed(recipe.train.seed)
    seconds = 0.0
    for report in train(session.task_model, method, optimizer, session.train, recipe.train):
        seconds += report.seconds
        if report.step % 50 == 0:
            print(
                f"step {report.step}/{report.total_steps} loss {report.loss:.4f}", file=sys.stderr
            )
    metrics = evaluate(
        session.task_model, session.validation, session.metrics, *evaluation_limits(recipe.train)
    ).metrics
    count = sum(p.numel() for p in weights)
    metric = session.metrics[0]
    trainable = count + sum(p.numel() for p in session.heads)
    return {
        "metric": metric,
        "value": metrics[metric],
        "start": None,
        "nonzeros": count,
        "trainable": trainable,
        "seconds": seconds,
    }


# -- what came of it -------------------------------------------------------------------------------


def _read(out: Path, name: str, arm: dict[str, Any], seed: int) -> dict[str, Any]:
    source, key = arm.get("derived", (name, None))
    found: dict[str, Any] = json.loads((out / f"{source}-{seed}.json").read_text())
    return found if key is None else {"metric": found["metric"], **found["one_shot"][key]}


def _report(results: dict[str, list[dict[str, Any]]]) -> None:
    names = list(results)
    first = results[names[0]]
    metric = first[0]["metric"]
    print(f"{'arm':14}{'non-zeros':>11}{metric:>12}{'- ' + names[0]:>14}{'± s.e.':>9}   by seed")
    rows = []
    for name, runs in results.items():
        pairs = [run["value"] - base["value"] for run, base in zip(runs, first, strict=True)]
        error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan
        row = {
            "arm": name,
            "nonzeros": statistics.mean(run["nonzeros"] for run in runs),
            "metric": metric,
            "mean": statistics.mean(run["value"] for run in runs),
            "difference": statistics.mean(pairs),
            "standard_error": error,
            "values": [run["value"] for run in runs],
            "trainable": runs[0].get("trainable"),
            "seconds": [run.get("seconds") for run in runs],
        }
        if runs[0].get("start") is not None:
            # The share of the distance from the untrained pruned model to the trained dense one
            # that this arm recovers.
            row["start"] = statistics.mean(run["start"] for run in runs)
            if "pruned" in results:
                top, bottom = results["pruned"], first
                ways = [
                    (t["start"] - r["value"]) / (t["start"] - b["value"])
                    for t, r, b in zip(top, runs, bottom, strict=True)
                ]
                row["recovered"] = statistics.mean(ways)
        rows.append(row)
        shown = " ".join(f"{value:.4f}" for value in row["values"])
        more = (
            f"   start {row['start']:.4f} recovered {row['recovered']:.3f}"
            if "recovered" in row
            else ""
        )
        line = (
            f"{name:14}{row['nonzeros']:>11,.0f}{row['mean']:>12.4f}{row['difference']:>+14.4f}{error:>9.4f}"
            f"   {shown}{more}"
        )
        print(line)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
