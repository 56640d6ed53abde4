"""Figures about the trained factors: non-zeros, density, and the effective rank of each product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lorakit.adapters.layer import Adapter
from lorakit.numerics.lowrank import effective_rank


@torch.no_grad()
def factor_facts(adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """For result.json: `density` (non-zeros as a share of the entries of A and B, overall and by
    module), `nonzeros` by module and `effective_ranks` of B A by module."""
    nonzeros, entries, ranks = {}, {}, {}
    for name, adapter in adapters.items():
        a, b = (factor.detach().cpu() for factor in adapter.factors())
        nonzeros[name] = int(torch.count_nonzero(a)) + int(torch.count_nonzero(b))
        entries[name] = a.numel() + b.numel()
        ranks[name] = round(effective_rank(a, b), 3)
    total = sum(nonzeros.values()) / max(1, sum(entries.values()))
    modules = {
        name: round(count / entries[name], 6) if entries[name] else 0.0
        for name, count in nonzeros.items()
    }
    return {
        "density": {"total": round(total, 6), "modules": modules},
        "nonzeros": nonzeros,
        "effective_ranks": ranks,
    }
