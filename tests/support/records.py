"""Rank records of runs that never were."""

from __future__ import annotations

import json
import os
from pathlib import Path

from rich.console import Console, RenderableType

from lorakit.report.history import RankRecord

BERT_KINDS = [f"attention.self.{x}" for x in ("query", "key", "value")]


BERT_KINDS += ["attention.output.dense", "intermediate.dense", "output.dense"]


LLAMA_KINDS = [f"self_attn.{x}_proj" for x in "qkvo"] + [
    f"mlp.{x}_proj" for x in ("gate", "up", "down")
]
GPT2_KINDS = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
DISTILBERT_KINDS = [f"attention.{x}_lin" for x in ("q", "k", "v", "out")] + ["ffn.lin1", "ffn.lin2"]


def blocks(stack: str, kinds: list[str], layers: int) -> list[str]:
    return [f"{stack}.{i}.{kind}" for i in range(layers) for kind in kinds]


T5_ATTENTION = [f"layer.0.SelfAttention.{x}" for x in "qkvo"]
MODELS = {
    "bert": blocks("bert.encoder.layer", BERT_KINDS, 12),
    "llama": blocks("model.layers", LLAMA_KINDS, 32),
    "gpt2": [*blocks("transformer.h", GPT2_KINDS, 12), "lm_head"],
    "distilbert": [
        *blocks("distilbert.transformer.layer", DISTILBERT_KINDS, 6),
        "pre_classifier",
        "classifier",
    ],
    "t5": [
        *blocks(
            "encoder.block",
            [*T5_ATTENTION, "layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wo"],
            6,
        ),
        *blocks(
            "decoder.block",
            [
                *T5_ATTENTION,
                *(f"layer.1.EncDecAttention.{x}" for x in "qkvo"),
                "layer.2.DenseReluDense.wi",
                "layer.2.DenseReluDense.wo",
            ],
            6,
        ),
    ],
}


def moving(modules: list[str], rank: int = 8, updates: int = 5) -> list[RankRecord]:
    """A made-up history: at each update some modules lose two components, and their neighbours win
    one."""
    ranks = dict.fromkeys(modules, rank)
    budget = rank * len(modules)
    records = [RankRecord(0, dict(ranks), budget, 0, budget)]
    for update in range(updates):
        for i, name in enumerate(modules):
            if i % (update + 3) == 0 and ranks[name] >= 2:
                ranks[name] -= 2
                ranks[modules[i - 1]] += 1
        cost = sum(ranks.values())
        records.append(RankRecord(10 * (update + 1), dict(ranks), cost, budget - cost, budget))
    return records


def write_run(folder: Path, records: list[RankRecord]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text("method: {name: l1ra}\n")
    lines = [
        {"step": r.step, "ranks": r.ranks, "cost": r.cost, "pool": r.pool, "budget": r.budget}
        for r in records
    ]
    (folder / "ranks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def rendered(what: RenderableType, width: int = 80) -> str:
    console = Console(width=width, color_system=None, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(what)
    return console.export_text()
