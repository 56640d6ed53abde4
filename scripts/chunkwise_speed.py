"""Speed of bench_chunkwise.py: milliseconds per token of lorakit, PEFT and the base model."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lorakit import compat
from lorakit.inference.generator import GenerationSettings, Generator
from lorakit.methods import KVPolicies
from lorakit.recipes.recipe import load_recipe
from lorakit.report.progress import Progress
from lorakit.runs.session import Session, assemble, calibration

WINDOW = 256
PROGRESS = Progress(Console(stderr=True))

Arm = Callable[[], tuple[float, float, int]]
"""Generates once: (seconds of the prompt, median seconds of a token, bytes of the cache)."""


def speed(options: argparse.Namespace) -> None:
    sessions = {name: _session(options, name) for name in ("vanilla", "chunkwise")}
    static = sessions["vanilla"]
    ids = static.task_model.tokenizer(
        options.text.read_text(encoding="utf-8")[: 20 * options.prefill], return_tensors="pt"
    ).input_ids[:, : options.prefill]
    arms, adapter = _peers(options, static, ids)
    arms |= _ours(sessions, ids, adapter, options.decode)
    measured: dict[str, list[tuple[float, float, int]]] = {name: [] for name in arms}
    for round_ in range(options.rounds + 1):  # the first round warms up
        for name, (arm, _) in arms.items():
            once = arm()
            if round_:
                measured[name].append(once)
    rows = []
    for name, found in measured.items():
        prefill, step = (statistics.median(one[i] for one in found) for i in (0, 1))
        row = {"arm": name, "prefill_s": prefill, "ms_a_token": 1000 * step}
        rows.append(row | {"kv_bytes": found[0][2], "adapter_bytes": arms[name][1]})
    _show(rows)
    facts = {"dtype": str(static.dtype), "r": options.r, "prefill": options.prefill}
    print(json.dumps({"what": "speed", **facts, "rows": rows}))


def _show(rows: list[dict[str, Any]]) -> None:
    by_name = {row["arm"]: row["ms_a_token"] for row in rows}
    head = f"{'arm':28}{'prefill s':>10}{'ms/token':>10}{'/ unmerged':>11}"
    print(head + f"{'/ flag':>8}{'KV bytes':>12}{'adapter':>12}")
    for row in rows:
        ratios = [
            row["ms_a_token"] / by_name[peer] for peer in ("PEFT unmerged", "PEFT unmerged, flag")
        ]
        print(
            f"{row['arm']:28}{row['prefill_s']:>10.3f}{row['ms_a_token']:>10.2f}{ratios[0]:>11.2f}"
            f"{ratios[1]:>8.2f}{row['kv_bytes']:>12,}{row['adapter_bytes']:>12,}"
        )


# -- lorakit ---------------------------------------------------------------------------------------


def _ours(
    sessions: dict[str, Session], ids: torch.Tensor, adapter: int, decode: int
) -> dict[str, tuple[Arm, int]]:
    """{arm: (its run, bytes of its adapter)} of lorakit; adapter: bytes of a plain one."""
    static, chunked = sessions["vanilla"], sessions["chunkwise"]
    settings = GenerationSettings(max_new_tokens=decode + 1, batch_size=1)
    prompt = ids[0].tolist()

    def arm(session: Session, kv: KVPolicies, tier: int | None = None) -> Arm:
        generator = Generator(session.task_model, session.method, kv)
        assert generator.decoder is not None, generator.fallback
        generator.ends = set()  # every arm generates the same number of tokens

        def run() -> tuple[float, float, int]:
            with nullcontext() if tier is None else session.method.tiers.at_tier(tier):
                done = generator.run([prompt], settings)[0]
            return done.prefill_seconds, done.step_seconds, done.kv_bytes

        return run

    with_tables = adapter + sum(t.nbytes for t in chunked.method.tensors().values())
    arms = {
        "lorakit static": (arm(static, KVPolicies()), adapter),
        "lorakit static, int8": (arm(static, KVPolicies(("int8",))), adapter),
    }
    for policy in ("full", "int8", "int4", "window"):
        kv = KVPolicies((policy,) * 3, WINDOW)  # type: ignore[arg-type]
        arms[f"lorakit chunkwise, {policy}"] = arm(chunked, kv), with_tables
    lowest = arm(chunked, KVPolicies(("full",) * 3), 0)
    return arms | {"lorakit lowest tier, full": (lowest, with_tables)}


def _session(options: argparse.Namespace, method: str) -> Session:
    """Load the model with random adapters of this method; chunkwise divides them into a ladder and
    calibrates it on the text."""
    text = (
        f"model: {{name_or_path: {options.model}, task: causal-lm}}\n"
        f"data: {{name_or_path: {options.text.resolve()}, max_seq_length: 512}}\n"
        f"method: {{name: {method}, r: {options.r}, lora_alpha: {options.r}}}\n"
        f"train: {{precision: {options.dtype}}}\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "bench.yaml").write_text(text)
        session = assemble(load_recipe(Path(folder) / "bench.yaml"), PROGRESS)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for adapter in session.method.adapters.values():
            adapter.lora_B.normal_(0, 0.01, generator=rng)
    session.method.conclude(calibration(session, PROGRESS.stage))
    session.task_model.model.eval()
    return session


# -- the peers -------------------------------------------------------------------------------------


def _peers(
    options: argparse.Namespace, static: Session, ids: torch.Tensor
) -> tuple[dict[str, tuple[Arm, int]], int]:
    """({arm: (its run, bytes of its adapter)} of the peers, in the type of lorakit's model; bytes
    of the adapter)."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def load() -> Any:
        folder = static.facts.source.location
        return AutoModelForCausalLM.from_pretrained(folder, dtype=static.dtype).eval()

    lora = LoraConfig(r=options.r, target_modules="all-linear", init_lora_weights=False)
    models = {
        "base": load(),
        "PEFT unmerged": get_peft_model(load(), lora, autocast_adapter_dtype=False).eval(),
    }
    models["PEFT merged"] = (
        get_peft_model(load(), lora, autocast_adapter_dtype=False).merge_and_unload().eval()
    )
    adapter = sum(
        p.numel() * p.element_size()
        for n, p in models["PEFT unmerged"].named_parameters()
        if "lora_" in n
    )
    arms: dict[str, tuple[Arm, int]] = {}
    for name, model in models.items():
        held = adapter if name == "PEFT unmerged" else 0
        arms[name] = (_peer(model, ids, options.decode, nullcontext), held)
        arms[f"{name}, flag"] = (_peer(model, ids, options.decode, _without_onednn), held)
    return arms, adapter


@contextmanager
def _without_onednn() -> Iterator[None]:
    with torch.backends.mkldnn.flags(enabled=False):
        yield


def _peer(
    model: Any, ids: torch.Tensor, tokens: int, around: Callable[[], AbstractContextManager[None]]
) -> Arm:
    """Run a peer: the model's own forward with transformers' own cache."""
    # PEFT's model takes any keyword and hands it on.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model

    @torch.inference_mode()
    def run() -> tuple[float, float, int]:
        started = time.perf_counter()
        out = model(input_ids=ids, use_cache=True)
        prefill, seconds, token = time.perf_counter() - started, [], out.logits[:, -1:].argmax(-1)
        for _ in range(tokens):
            started = time.perf_counter()
            with around():
                out = model(
                    input_ids=token,
                    use_cache=True,
                    **compat.cache_argument(inner, compat.cache_of(out)),
                )
            token = out.logits[:, -1:].argmax(-1)
            seconds.append(time.perf_counter() - started)
        return prefill, statistics.median(seconds), compat.cache_bytes(compat.cache_of(out))

    return run
