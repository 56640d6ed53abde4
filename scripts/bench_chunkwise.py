"""Benchmark of chunkwise: its speed against PEFT, and its quality against static LoRA, uniform
prefixes and random tiers.

    python scripts/bench_chunkwise.py speed --text wikitext2_valid.txt [--model DIR] [--r 64]
        [--prefill 512] [--decode 64]
    python scripts/bench_chunkwise.py quality RUN RUN RUN
        [method.ladder=… data.max_seq_length=2048 …]
    python scripts/bench_chunkwise.py answers RUN RUN RUN [data.references=… …]
        [--max-new-tokens 32]
    python scripts/bench_chunkwise.py signal RUN

speed: milliseconds per token, batch 1, greedy, with random adapters of rank r on all linear layers.
Arms: the base model, PEFT unmerged and PEFT merged, each unchanged and with oneDNN off for its
decode steps (oneDNN's bf16 matrix-vector product is slow on some processors; lorakit detects this
by itself); lorakit's own pass with a static adapter, and with chunks under every cache policy. All
arms run in one process, interleaved. bench_decode.py compares fresh processes, at each level.

quality and answers: finished vanilla (or l1ra, salor) runs with different seeds, with the same
adapter in all arms; measures perplexity, or exact match and F1.

signal: how well the values known before a chunk predict the gain of a higher rank in it.

--dtype: the type of all models, the peers' too. auto: bf16 if the processor multiplies in it at the
level in use, else fp32.

Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from chunkwise_speed import PROGRESS, WINDOW, speed

import lorakit.methods.chunkwise.scheduler as scheduler
from lorakit import compat, process
from lorakit.data.batches import collate
from lorakit.data.draw import limited
from lorakit.data.load import load_rows
from lorakit.inference.generator import GenerationSettings, Generator
from lorakit.inference.kv.policy_cache import PolicyCache
from lorakit.methods.chunkwise.chunking import Chunks, chunk
from lorakit.methods.chunkwise.config import KV
from lorakit.models.positions import longest_input
from lorakit.runs.answer import answer
from lorakit.runs.convert import converted
from lorakit.runs.session import Session, calibration
from lorakit.training.answer_metrics import exact_match, f1
from lorakit.training.metrics import evaluate


def main() -> None:
    process.take_over()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("speed", "quality", "answers", "signal"))
    parser.add_argument("arguments", nargs="*", help="run folders, then key=value overrides")
    parser.add_argument("--model", default="builtin/smollm2-135m-instruct")
    parser.add_argument("--text", type=Path, help="speed: a text file")
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--dtype", default="auto", choices=("auto", "bf16", "fp32"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument(
        "--arms", nargs="+", help="quality, answers: only these beside the static one, by name"
    )
    options = parser.parse_intermixed_args()
    options.runs = [Path(name) for name in options.arguments if "=" not in name]
    options.overrides = [name for name in options.arguments if "=" in name]
    if options.dtype != "auto":
        options.overrides.append(f"train.precision={options.dtype}")
    if options.what == "speed" and options.text is None:
        parser.error("speed needs --text FILE")
    if options.what != "speed" and not options.runs:
        parser.error(f"{options.what} needs run folders")
    {"speed": speed, "quality": quality, "answers": answers, "signal": signal}[options.what](
        options
    )


# -- quality ---------------------------------------------------------------------------------------


@contextmanager
def _cache(session: Session, *policies: str, window: int = WINDOW) -> Iterator[None]:
    """Context in which the cache has these policies, by tier."""
    config = session.method.config
    named = config.model_copy(
        update={"kv": KV.model_validate({"policy": list(policies), "window": window})}
    )
    session.method.config = named
    try:
        yield
    finally:
        session.method.config = config


@contextmanager
def _random_tiers(seed: int = 0) -> Iterator[None]:
    """Context in which a text's chunks stay the same but get random tiers. Each tier keeps its
    number of tokens, up to the length of a chunk. For texts that are read, not generated."""
    real, rng = chunk, np.random.default_rng(seed)

    def dealt(*arguments: Any) -> Chunks:
        chunks = real(*arguments)
        order = rng.permutation(len(chunks.tiers))
        lengths = chunks.lengths[order]
        middles = np.cumsum(lengths) - lengths / 2
        counts = np.bincount(chunks.tiers, chunks.lengths)
        tiers = np.empty_like(chunks.tiers)
        tiers[order] = np.searchsorted(np.cumsum(counts)[:-1], middles)
        return replace(chunks, tiers=tiers)

    scheduler.chunk = dealt  # type: ignore[attr-defined,assignment]
    try:
        yield
    finally:
        scheduler.chunk = real  # type: ignore[attr-defined]


@contextmanager
def _ranks_seen(ladder: list[int], into: list[float]) -> Iterator[None]:
    """Context that measures the mean rank of the texts that are read, and appends it to `into` at
    the end."""
    real, seen = scheduler.chunk, np.zeros(2)  # type: ignore[attr-defined]

    def counted(*arguments: Any) -> Chunks:
        chunks: Chunks = real(*arguments)
        seen[:] += np.asarray(ladder)[chunks.tiers] @ chunks.lengths, chunks.length
        return chunks

    scheduler.chunk = counted  # type: ignore[attr-defined]
    try:
        yield
    finally:
        scheduler.chunk = real  # type: ignore[attr-defined]
        if seen[1]:
            into.append(float(seen[0] / seen[1]))


def _arms(
    session: Session, wanted: list[str] | None
) -> dict[str, tuple[AbstractContextManager[Any], ...]]:
    """{arm: contexts of its evaluation}. The first is the baseline, plain LoRA with an exact
    cache."""
    method, full = session.method, ("full",) * len(session.method.config.rungs)  # type: ignore[attr-defined]
    rungs = session.method.config.rungs  # type: ignore[attr-defined]
    arms: dict[str, tuple[AbstractContextManager[Any], ...]] = {
        "static": (method.tiers.full_rank(),)
    }
    for tier, rank in enumerate(rungs[:-1]):
        arms[f"uniform prefix {rank}"] = (method.tiers.at_tier(tier),)
    arms["chunkwise, full"] = (_cache(session, *full),)
    arms["random tiers, full"] = (_cache(session, *full), _random_tiers())
    for policy in ("int8", "int4"):
        arms[f"chunkwise, {policy}"] = (_cache(session, *(policy for _ in rungs)),)
    easy = ("window", *("int8" for _ in rungs[1:]))
    arms["chunkwise, window for the easy"] = (_cache(session, *easy),)
    arms["random tiers, window for as many"] = (_cache(session, *easy), _random_tiers())
    return {
        name: contexts
        for name, contexts in arms.items()
        if not wanted or name in ("static", *wanted)
    }


def _concluded(run: Path, overrides: list[str]) -> Session:
    with tempfile.TemporaryDirectory() as folder:
        session = converted(run, overrides, Path(folder) / "out", PROGRESS)
    session.method.conclude(calibration(session, PROGRESS.stage))
    session.task_model.model.eval()
    for adapter in session.method.adapters.values():
        adapter.freeze()
    return session


def quality(options: argparse.Namespace) -> None:
    found: dict[str, list[float]] = {}
    facts: dict[str, tuple[int, int]] = {}
    ranks: dict[str, list[float]] = {}
    for run in options.runs:
        session = _concluded(run, options.overrides)
        recipe = session.recipe.train
        size = recipe.per_device_eval_batch_size or recipe.per_device_train_batch_size
        for name, contexts in _arms(session, options.arms).items():
            rank: list[float] = []
            with _all((*contexts, _ranks_seen(session.method.config.rungs, rank))):  # type: ignore[attr-defined]
                loss = evaluate(session.task_model, session.validation, ("loss",), size).metrics[
                    "loss"
                ]
                facts.setdefault(name, _cache_bytes(session))
            found.setdefault(name, []).append(math.exp(loss))
            ranks.setdefault(name, []).extend(rank)
            print(f"{run} {name}: {math.exp(loss):.4f}, mean rank {rank}", flush=True)
        print(f"{run}: {session.method.summary()}", flush=True)
    rows = _compared(found, relative=True)
    print(f"{'arm':36}{'perplexity':>11}{'against static':>20}{'KV bytes':>12}{'':>8}")
    for row in rows:
        held, whole = facts[row["arm"]]
        row |= {"kv_bytes": held, "kv_share": held / whole, "mean_ranks": ranks[row["arm"]]}
        print(
            f"{row['arm']:36}{row['mean']:>11.4f}{100 * row['difference']:>+11.3f} ±"
            f" {100 * row['error']:.3f} %{held:>12,}{held / whole - 1:>+8.1%}"
        )
    print(json.dumps({"what": "quality", "runs": [str(run) for run in options.runs], "rows": rows}))


@torch.inference_mode()
def _cache_bytes(session: Session) -> tuple[int, int]:
    """(bytes of the cache after the first validation row, bytes that it would take in the model's
    type)."""
    batch = collate(session.validation, np.zeros(1, np.int64), 0)
    kv = session.method.tiers.kv_policies()
    cache = PolicyCache(session.task_model.model.config, kv.by_tier, kv.window)
    model = session.task_model.model
    model(
        input_ids=batch.input_ids,
        use_cache=True,
        logits_to_keep=1,
        **compat.cache_argument(model, cache),
    )
    return cache.store.nbytes, cache.store.nbytes_if_full


def answers(options: argparse.Namespace) -> None:
    metrics = {"exact_match": exact_match, "f1": f1}
    found: dict[str, dict[str, list[float]]] = {name: {} for name in metrics}
    for run in options.runs:
        session = _concluded(run, options.overrides)
        task_model = session.task_model
        rows = load_rows(
            session.sets[0].source,
            session.recipe.data,
            "causal-lm",
            record=session.sets[0].shape,
        )
        asked = limited(rows.validation, rows.spec.max_eval_samples, rows.spec, False)
        asked = rows.format.questions(asked, rows.spec)
        limit = longest_input(task_model.model.config, task_model.tokenizer)
        settings = GenerationSettings(max_new_tokens=options.max_new_tokens, batch_size=8)
        arms = {
            name: contexts
            for name, contexts in _arms(session, options.arms).items()
            if "random" not in name
        }
        for name, contexts in arms.items():
            with _all(contexts):
                written = answer(
                    Generator(task_model, session.method),
                    task_model.tokenizer,
                    asked,
                    settings,
                    limit,
                    PROGRESS,
                )
            for metric, of in metrics.items():
                value = 100 * of(
                    [one.text for one in written], [one.question.references for one in written]
                )
                found[metric].setdefault(name, []).append(value)
                print(f"{run} {name}: {metric} {value:.2f}", flush=True)
    for metric, arms_found in found.items():
        rows = _compared(arms_found, relative=False)
        print(f"{metric:36}{'mean':>8}{'against static':>18}")
        for row in rows:
            print(
                f"{row['arm']:36}{row['mean']:>8.2f}{row['difference']:>+11.2f} ±"
                f" {row['error']:.2f}"
            )
        print(
            json.dumps({"what": metric, "runs": [str(run) for run in options.runs], "rows": rows})
        )


@contextmanager
def _all(contexts: tuple[AbstractContextManager[Any], ...]) -> Iterator[None]:
    if not contexts:
        yield
        return
    with contexts[0], _all(contexts[1:]):
        yield


def _compared(found: dict[str, list[float]], relative: bool) -> list[dict[str, Any]]:
    """Compute means over the runs, and the mean paired difference to the first arm with its
    standard error."""
    baseline = next(iter(found.values()))
    rows = []
    for name, values in found.items():
        gaps = [(v / b - 1) if relative else v - b for v, b in zip(values, baseline, strict=True)]
        error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
        rows.append(
            {
                "arm": name,
                "values": values,
                "mean": statistics.mean(values),
                "difference": statistics.mean(gaps),
                "error": error,
            }
        )
    return rows


# -- signal ----------------------------------------------------------------------------------------


def signal(options: argparse.Namespace, length: int = 16) -> None:
    """Compute correlations over stretches of 16 tokens between the gain of the top tier over the
    lowest in a stretch and the values known before it."""
    session = _concluded(options.runs[0], options.overrides)
    method: Any = session.method
    losses, entropies = {}, {}
    for name, context in {
        "base": method._at(0),
        "lowest": method.tiers.at_tier(0),
        "top": method.tiers.full_rank(),
    }.items():
        with context:
            losses[name], entropies[name] = _per_token(session)
    stretches = {
        "gain": losses["lowest"] - losses["top"],
        "surprisal": losses["top"],
        "entropy": entropies["top"],
        "surprisal of the base": losses["base"],
        "entropy of the base": entropies["base"],
        "gain of the adapter over the base": losses["base"] - losses["top"],
    }
    means = {name: _stretch_means(values, length) for name, values in stretches.items()}
    gain = means.pop("gain")
    rows = []
    for name, values in {"gain of the higher rank": gain, **means}.items():
        past = np.cumsum(values, 1)[:, :-1] / np.arange(1, values.shape[1])
        one = float(np.corrcoef(values[:, :-1].ravel(), gain[:, 1:].ravel())[0, 1])
        all_ = float(np.corrcoef(past.ravel(), gain[:, 1:].ravel())[0, 1])
        rows.append({"signal": name, "stretch_before": one, "all_before": all_})
    print(
        f"gain a token {gain.mean():.4f} nats, standard deviation over stretches {gain.std():.4f},"
        f" {gain[:, 1:].size} stretches"
    )
    print(f"{'correlation of the gain with':36}{'stretch before':>16}{'all before':>12}")
    for row in rows:
        print(f"{row['signal']:36}{row['stretch_before']:>16.3f}{row['all_before']:>12.3f}")
    print(json.dumps({"what": "signal", "gain": float(gain.mean()), "rows": rows}))


def _stretch_means(values: np.ndarray[Any, Any], length: int) -> np.ndarray[Any, Any]:
    """Compute the means of stretches [rows, stretches]."""
    whole = values.shape[1] // length * length
    means: np.ndarray[Any, Any] = values[:, :whole].reshape(len(values), -1, length).mean(2)
    return means


@torch.inference_mode()
def _per_token(session: Session) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Compute (loss, entropy) [rows, tokens - 1] of the validation rows of full length."""
    examples = session.validation
    chosen = np.flatnonzero(examples.lengths == examples.lengths.max())
    losses, entropies = [], []
    for row in chosen:
        batch = collate(examples, np.asarray([row]), 0)
        logits = session.task_model.model(input_ids=batch.input_ids, use_cache=False).logits[0, :-1]
        loss, entropy = scheduler.predicted(logits, batch.input_ids[0, 1:])
        losses.append(loss.numpy())
        entropies.append(entropy.numpy())
    return np.stack(losses), np.stack(entropies)


if __name__ == "__main__":
    main()
