"""Runs that look trained, and their exports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from lorakit.adapters.base import in_out
from lorakit.adapters.inject import merge_all
from lorakit.adapters.layer import Adapter
from lorakit.data.batches import Batch
from lorakit.export.native import save_native
from lorakit.recipes.recipe import dump_yaml, load_recipe
from lorakit.report.progress import Progress
from lorakit.runs.export import export_run
from lorakit.runs.folder import ADAPTER, RECIPE
from lorakit.runs.saved import saved_model, saved_recipe
from lorakit.runs.session import assemble
from lorakit.training.trained import trainable

TEXTS = ["good film", "a dull plot and a weak cast .", "how many eggs are left ? 3", "bad"]


@dataclass
class Trained:
    """A run folder, and what its merged model says to TEXTS, by lorakit alone."""

    run: Path
    base: Path
    logits: list[Tensor]
    ranks: dict[str, int]


def inputs(tokenizer: Any) -> list[dict[str, Tensor]]:
    """Each text by itself: no padding to agree about."""
    return [dict(tokenizer(text, return_tensors="pt")) for text in TEXTS]


def assert_same(
    found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-4
) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def as_if_trained(
    folder: Path,
    model: Path,
    data: Path,
    method: str,
    ranks: Callable[[int, Adapter], int],
    task: str,
    *overrides: str,
) -> Trained:
    """A run folder as training leaves it, but with the ranks we choose and adapters that matter."""
    folder.mkdir(parents=True)
    recipe_file = folder.parent / f"{folder.name}.yaml"
    recipe_file.write_text(
        f"model: {{name_or_path: {model}, task: {task}}}\ndata: {{name_or_path: {data}}}\n"
        f"method: {{name: {method}, r: 4, lora_alpha: 8}}\ntrain: {{precision: fp32}}\n"
    )
    recipe = load_recipe(recipe_file, overrides)
    session = assemble(recipe, Progress(Console(stderr=True)))
    rng = torch.Generator().manual_seed(0)
    for number, adapter in enumerate(session.method.adapters.values()):
        rank = ranks(number, adapter)
        in_features, out_features = in_out(adapter.base)
        parts = {
            "lora_A": torch.randn(rank, in_features, generator=rng) / 4,
            "lora_B": torch.randn(out_features, rank, generator=rng) / 4,
        }
        if "gate" in adapter.component_dims:
            parts["gate"] = torch.rand(rank, generator=rng)
        adapter.load_tensors(parts)
    for name, parameter in trainable(session.task_model.model).items():
        if not name.endswith(("lora_A", "lora_B", "gate")):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=rng)
    save_native(folder / ADAPTER, session.task_model, session.method, session.facts)
    (folder / RECIPE).write_text(dump_yaml(recipe))
    (folder / "manifest.json").write_text("{}")
    task_model, adapters, _ = saved_model(folder, saved_recipe(folder), torch.float32)
    before = [task_model.logits(_alone(one))[0].detach() for one in inputs(task_model.tokenizer)]
    merge_all(task_model.model, adapters.adapters)
    merged = [task_model.logits(_alone(one))[0].detach() for one in inputs(task_model.tokenizer)]
    assert_same(merged, before)
    return Trained(
        folder, model, merged, {name: adapter.rank for name, adapter in adapters.adapters.items()}
    )


def _alone(one: dict[str, Tensor]) -> Batch:
    ids = one["input_ids"]
    return Batch(
        ids,
        one["attention_mask"],
        torch.tensor([ids.shape[1]]),
        torch.zeros(1, dtype=torch.long),
        [0],
        one.get("token_type_ids"),
    )


RANKS: dict[str, Callable[[int, Adapter], int]] = {
    "ragged": lambda number, adapter: (number * 7) % 6 + 1,
    "one at rank 0": lambda number, adapter: 0 if number == 3 else 4,
    "ragged with zeros and a full one": lambda number, adapter: (
        adapter.max_rank if number == 2 else number % 4
    ),
    "all at rank 0": lambda number, adapter: 0,
}


def export(
    run: Path,
    out: Path | None = None,
    form: str | None = None,
    dtype: str | None = None,
    force: bool = False,
    merge: bool = False,
) -> str:
    """Merged without a form; returns what was said."""
    merge = merge or form is None
    return "\n".join(
        export_run(
            run, merge=merge, adapter=not merge, form=form, dtype=dtype, out=out, force=force
        )
    )
