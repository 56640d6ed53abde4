"""Adapters into models: which linear layers match, what rank each gets, and the swap."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit.adapter import Adapter, in_out
from lorakit.errors import Problem, RecipeError
from lorakit.methods import Method, MethodConfig, Target

ALL_LINEAR = "all-linear"


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """{name: layer} of every nn.Linear and Conv1D."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def block_linears(model: nn.Module) -> list[str]:
    """Linear layers of the transformer blocks: those inside a list of repeated modules (`layers.0`, `h.0` …)."""
    return in_blocks(model, linear_layers(model))


def in_blocks(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the module names that lie in a list of repeated modules."""
    blocks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    return [name for name in names if name.startswith(blocks)]


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern`, a module name, its last parts, or a regular expression, means module `name`.

    The rule is that of PEFT's rank_pattern: the pattern fits the name from its start or from after a dot to its end.
    """
    return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name) is not None


def match_targets(model: nn.Module, config: MethodConfig, heads: Sequence[str] = ()) -> dict[str, int]:
    """{module name: initial rank} of the layers that get an adapter, in the model's order.

    `heads` are modules trained in full, which take none. Raises RecipeError with everything that is wrong: a pattern
    that matches nothing (the candidates are listed), a rank above min(in, out), a tied or a head layer as target, and
    what the method itself finds that does not fit the layers.
    """
    layers = linear_layers(model)
    trained = {n for n in layers for head in heads if n == head or n.startswith(f"{head}.")}
    blocks = [name for name in block_linears(model) if name not in trained]
    problems: list[Problem] = []

    def matching(key: str, value: str | list[str]) -> set[str]:
        if value == ALL_LINEAR:
            return set(blocks)
        found: set[str] = set()
        for pattern in [value] if isinstance(value, str) else value:
            try:
                hits = {name for name in layers if matches(pattern, name)}
            except re.error as error:
                problems.append(Problem(f"`{pattern}` is not a regular expression: {error}", key))
                continue
            if not hits:
                problems.append(_no_match(key, pattern, layers, blocks))
            found |= hits
        return found

    targets = matching("method.target_modules", config.target_modules)
    targets -= matching("method.exclude_modules", config.exclude_modules)
    for name in sorted(targets & trained):
        problems.append(Problem(f"`{name}` is trained in full, so it can not have an adapter", "method.target_modules"))
    targets -= trained
    for name in sorted(targets):
        if _is_tied(model, layers[name]):
            what = f"`{name}` shares its weight with the input embeddings: an adapter on it could not be merged"
            problems.append(Problem(what, "method.target_modules"))

    ranks = {name: config.r for name in layers if name in targets}
    keys = dict.fromkeys(ranks, "method.r")
    for pattern, rank in config.rank_pattern.items():
        key = f"method.rank_pattern.{pattern}"
        for name in matching(key, [pattern]) & ranks.keys():
            if keys[name] == "method.r":  # the first pattern that matches decides, as in PEFT
                ranks[name], keys[name] = rank, key
    too_large = {name: rank for name, rank in ranks.items() if rank > min(in_out(layers[name]))}
    for key in dict.fromkeys(keys[name] for name in too_large):
        name = min((n for n in too_large if keys[n] == key), key=lambda n: min(in_out(layers[n])))
        width, height = in_out(layers[name])
        what = f"rank {too_large[name]} is larger than a layer: `{name}` is {width} → {height}"
        problems.append(Problem(what, key, f"at most {min(width, height)}"))
    if not ranks and not problems:
        problems.append(Problem("no layer is left to adapt", "method.exclude_modules"))
    inside = set(blocks)
    problems += config.misfits({name: Target(*in_out(layers[name]), rank, name in inside) for name, rank in ranks.items()})
    if problems:
        raise RecipeError(problems)
    return ranks


def inject(model: nn.Module, method: Method, ranks: dict[str, int]) -> dict[str, Adapter]:
    """Freeze the model and put an adapter of the given rank around each layer; returns {module name: adapter}."""
    model.requires_grad_(False)
    layers = linear_layers(model)
    adapters = {name: method.make_adapter(name, layers[name], rank) for name, rank in ranks.items()}
    for name, adapter in adapters.items():
        _replace(model, name, adapter)
    method.attach(adapters, model)
    return adapters


def merge_all(model: nn.Module, adapters: dict[str, Adapter]) -> None:
    """Merge every adapter into its base layer and put the layer back where it was."""
    for name, adapter in adapters.items():
        _replace(model, name, adapter.merge())


def detach_all(model: nn.Module, adapters: dict[str, Adapter]) -> None:
    """Take every adapter away: the base layers, pruned or not, are back where they were."""
    for name, adapter in adapters.items():
        _replace(model, name, adapter.base)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _is_tied(model: nn.Module, layer: nn.Module) -> bool:
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    return embeddings is not None and getattr(embeddings, "weight", None) is layer.weight


def _no_match(key: str, pattern: str, layers: Iterable[str], blocks: Sequence[str]) -> Problem:
    endings = sorted({name.rsplit(".", 1)[-1] for name in layers})
    kinds = sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in blocks})
    near = get_close_matches(pattern.rsplit(".", 1)[-1], endings, 1)
    return Problem(
        f"`{pattern}` matches no linear layer of the model",
        key,
        f"`{ALL_LINEAR}`, a name or a regular expression over: {', '.join(kinds)}",
        near[0] if near else None,
    )
