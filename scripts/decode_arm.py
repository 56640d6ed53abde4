"""lorakit's arm of bench_decode.py, in a process of its own: its speed, and the error of its
logits."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from lorakit import process

# As the command line does, before anything imports torch.
process.take_over()
process.wait_by_spinning()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import lorakit  # noqa: E402
from lorakit import compat  # noqa: E402
from lorakit.inference.generator import GenerationSettings, Generator  # noqa: E402
from lorakit.models.load import compute_dtype, default_device  # noqa: E402
from lorakit.runs.saved import saved_model, saved_recipe  # noqa: E402


def timed(options: argparse.Namespace) -> dict[str, Any]:
    """Generate twice; the figures of the second time, under the names of peer_decode.py."""
    generator = opened(options.run, options.dtype)
    generator.ends = set()  # every arm generates the same number of tokens
    prompt = tokens(generator, options)[0, : options.prefill].tolist()
    settings = GenerationSettings(max_new_tokens=options.decode + 1, batch_size=1)
    generator.run([prompt], settings)
    done = generator.run([prompt], settings)[0]
    return {
        "decode_ms": 1000 * done.step_seconds,
        "prefill_s": done.prefill_seconds,
        "kv_bytes": done.kv_bytes,
    }


def opened(run: Path, dtype: str) -> Generator:
    """The generator of a finished run, as `lorakit generate` makes it."""
    recipe = saved_recipe(run)
    chosen = compute_dtype(dtype, default_device())  # type: ignore[arg-type]
    task_model, method, _ = saved_model(run, recipe, chosen)
    return Generator(task_model, method)


def tokens(generator: Generator, options: argparse.Namespace) -> Tensor:
    """Ids [1, prefill + decode] of the text, the first ones as in peer_decode.py."""
    text = options.text.read_text(encoding="utf-8")[: 20 * options.prefill]
    ids: Tensor = generator.task_model.tokenizer(text, return_tensors="pt").input_ids
    return ids[:, : options.prefill + options.decode]


@torch.inference_mode()
def errors(options: argparse.Namespace) -> dict[str, Any]:
    """Compare the logits of decode steps with those of the merged model in float32."""
    generator = opened(options.run, options.dtype)
    ids = tokens(generator, options)
    ours = lorakit_steps(generator, ids, options.prefill)
    with tempfile.TemporaryDirectory() as scratch:
        merged = lorakit.load_run(options.run).export(out=Path(scratch) / "merged", dtype="float32")
        model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
        exact = model(input_ids=ids).logits[0, options.prefill :]
        own_type = compute_dtype(options.dtype, default_device())
        theirs = transformers_steps(model.to(own_type), ids, options.prefill)
    return {
        "lorakit": compared(ours, exact),
        "transformers": compared(theirs, exact),
        "forward": generator.fallback or "its own",
    }


def lorakit_steps(generator: Generator, ids: Tensor, prefill: int) -> Tensor:
    """Logits [decode, vocabulary] after each token beyond the prompt, fed one by one."""
    forward = generator.forward()
    prompt = ids[:, :prefill]
    logits = forward.start(prompt, torch.ones_like(prompt, dtype=torch.bool))
    found = []
    for place in range(prefill, ids.shape[1]):
        logits = forward.step(ids[:, place : place + 1], logits)
        found.append(logits[0].float().clone())
    return torch.stack(found)


def transformers_steps(model: Any, ids: Tensor, prefill: int) -> Tensor:
    """The same of a model of transformers, with its own cache."""
    out = model(input_ids=ids[:, :prefill], use_cache=True)
    found = []
    for place in range(prefill, ids.shape[1]):
        cache = compat.cache_argument(model, compat.cache_of(out))
        out = model(input_ids=ids[:, place : place + 1], use_cache=True, **cache)
        found.append(out.logits[0, -1].float())
    return torch.stack(found)


def compared(logits: Tensor, exact: Tensor) -> dict[str, float]:
    """error: norm of the difference as a share of the spread of the exact logits [tokens,
    vocabulary]; same: share of tokens with the same likeliest next one."""
    spread = (exact - exact.mean(-1, keepdim=True)).norm()
    return {
        "error": float((logits - exact).norm() / spread),
        "same": float((logits.argmax(-1) == exact.argmax(-1)).double().mean()),
    }
