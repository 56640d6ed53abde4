"""Injection of adapters into a model: matching linear layers, choosing their ranks, and replacing
them."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Protocol

from torch import nn

from lorakit import compat
from lorakit.adapters.base import Linear, in_out
from lorakit.adapters.layer import Adapter, Target
from lorakit.adapters.quantised import QuantisedLinear
from lorakit.adapters.trial import bypassed_layers, is_linear
from lorakit.errors import Problem, RecipeError

log = logging.getLogger("lorakit")


class TargetConfig(Protocol):
    """The config keys of a method that choose the adapted layers and their ranks."""

    @property
    def r(self) -> int: ...
    @property
    def target_modules(self) -> str | list[str]: ...
    @property
    def exclude_modules(self) -> str | list[str]: ...
    @property
    def rank_pattern(self) -> dict[str, int]: ...
    @property
    def alpha_pattern(self) -> dict[str, float]: ...

    def misfits(self, targets: Mapping[str, Target]) -> list[Problem]:
        """Problems that a method has with the layers {name: target} it would adapt."""


class AdapterMaker(Protocol):
    """The part of a method that injection needs."""

    def make_adapter(self, name: str, linear: nn.Module, rank: int) -> Adapter:
        """Make the adapter around a layer."""

    def attach(self, adapters: dict[str, Adapter], model: nn.Module) -> None:
        """Set the method up; called once all adapters are in the model."""


ALL_LINEAR = "all-linear"
# Largest share of the adapted weights in layers smaller than the rank; above it the rank is too
# large.
SMALL_SHARE = 0.01
# Smallest share of the blocks' weights that is reported as unadapted; smaller ones are
# convolutions of Mamba or tables of T5.
TOLD_SHARE = 0.02


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """{name: layer} of every linear layer except those that compute something else, such as routers
    of experts."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Linear) and is_linear(module)
    }


def block_linears(model: nn.Module) -> list[str]:
    """Names of the linear layers of the transformer blocks: those inside a list of repeated
    modules (`layers.0`, `h.0` …)."""
    return in_blocks(model, linear_layers(model))


def in_blocks(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The module names that lie in a list of repeated modules."""
    blocks = tuple(
        f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)
    )
    return [name for name in names if name.startswith(blocks)]


def matches(pattern: str, name: str) -> bool:
    """True if `pattern` (a module name, its last parts, or a regular expression) matches module
    `name`.

    As in PEFT's rank_pattern, the pattern must match from the start of the name, or from after a
    dot, to its end.
    """
    return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name) is not None


def find_targets(
    model: nn.Module, config: TargetConfig, heads: Sequence[str]
) -> tuple[dict[str, int], list[str]]:
    """(result of `match_targets`, messages), with bypassed layers found by running the model.
    Raises RecipeError."""
    bypassed = _bypassed(model)
    ranks = match_targets(model, config, heads, bypassed)
    return ranks, left_out(model, config, ranks, heads, bypassed)


def find_quantisable(model: nn.Module, heads: Sequence[str]) -> list[str]:
    """Names of the layers that may be stored in few bits: those that `all-linear` selects, without
    tied layers and those whose weight the model reads itself."""
    layers, bypassed = linear_layers(model), _bypassed(model)
    return [
        name
        for name in block_linears(model)
        if not f"{name}.".startswith(tuple(f"{head}." for head in heads))
        and name not in bypassed
        and not _is_tied(model, layers[name])
    ]


def _bypassed(model: nn.Module) -> set[str]:
    """Result of `bypassed_layers` for the layers that may be bypassed."""
    layers = {
        name: layer
        for name, layer in linear_layers(model).items()
        # quantised layers were tried before, and reading their weight dequantises it
        if not isinstance(layer, QuantisedLinear) and not _is_tied(model, layer)
    }
    try:
        return bypassed_layers(model, layers)
    except Exception as error:  # a model that reads more than token ids may raise anything
        log.info(
            "which layers %s does not call could not be tried: %s", type(model).__name__, error
        )
        return set()


def match_targets(
    model: nn.Module,
    config: TargetConfig,
    heads: Sequence[str] = (),
    bypassed: Collection[str] = (),
) -> dict[str, int]:
    """{module name: initial rank} of the layers that get an adapter, in the model's order.

    heads: modules trained in full, which get no adapter. bypassed: layers whose adapter would have
    no effect (`lorakit.adapters.trial.bypassed_layers`). `all-linear` skips those, and also layers
    smaller than the rank if they hold a negligible share of the weights, such as gates of one
    output.

    Raises RecipeError with all problems: a pattern that matches nothing (the candidates are
    listed), a rank above min(in, out), a tied layer, a head or a bypassed layer as target, and the
    method's own problems with the layers.
    """
    layers = linear_layers(model)
    trained = {n for n in layers for head in heads if n == head or n.startswith(f"{head}.")}
    blocks = [name for name in block_linears(model) if name not in trained and name not in bypassed]
    matcher = _Matcher(layers, blocks)
    targets = matcher.matching("method.target_modules", config.target_modules)
    targets -= matcher.matching("method.exclude_modules", config.exclude_modules)
    problems = matcher.problems
    problems += _not_to_adapt(model, layers, targets, trained, bypassed)
    targets -= {*trained, *bypassed}
    ranks = _ranks(config, matcher, [name for name in layers if name in targets])
    for pattern in config.alpha_pattern:
        matcher.matching(f"method.alpha_pattern.{pattern}", [pattern])
    if not ranks and not problems:
        problems.append(Problem("no layer is left to adapt", "method.exclude_modules"))
    inside = set(blocks)
    problems += config.misfits(
        {name: Target(*in_out(layers[name]), rank, name in inside) for name, rank in ranks.items()}
    )
    if problems:
        raise RecipeError(problems)
    return ranks


class _Matcher:
    """Finder of a model's layers by the patterns of a recipe. problems: those of the patterns so
    far."""

    def __init__(self, layers: Mapping[str, nn.Module], blocks: Sequence[str]) -> None:
        """blocks: names of the layers that `all-linear` selects."""
        self.layers, self.blocks = layers, blocks
        self.problems: list[Problem] = []

    def matching(self, key: str, value: str | list[str]) -> set[str]:
        """Names of the layers that the value of recipe key `key` selects."""
        if value == ALL_LINEAR:
            return set(self.blocks)
        found: set[str] = set()
        for pattern in [value] if isinstance(value, str) else value:
            try:
                hits = {name for name in self.layers if matches(pattern, name)}
            except re.error as error:
                what = f"`{pattern}` is not a regular expression: {error}"
                self.problems.append(Problem(what, key))
                continue
            if not hits:
                self.problems.append(_no_match(key, pattern, self.layers, self.blocks))
            found |= hits
        return found


def _not_to_adapt(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    targets: Collection[str],
    trained: Collection[str],
    bypassed: Collection[str],
) -> list[Problem]:
    """Problems of targets that can not get an adapter: heads, bypassed and tied layers."""
    problems: list[Problem] = []
    for name in sorted(set(targets).intersection(trained)):
        problems.append(
            Problem(
                f"`{name}` is trained in full, so it can not have an adapter",
                "method.target_modules",
            )
        )
    for name in sorted(set(targets).intersection(bypassed).difference(trained)):
        what = (
            f"the model reads the weight of `{name}` without calling it: an adapter there would"
            " change nothing"
        )
        problems.append(Problem(what, "method.target_modules", "other layers"))
    for name in sorted(set(targets).difference(bypassed, trained)):
        if _is_tied(model, layers[name]):
            what = (
                f"`{name}` shares its weight with the input embeddings: an adapter on it could not"
                " be merged"
            )
            problems.append(Problem(what, "method.target_modules"))
    return problems


def _ranks(config: TargetConfig, matcher: _Matcher, found: Sequence[str]) -> dict[str, int]:
    """{module name: initial rank} of the layers in `found`. A rank that is too large for its layer
    is added to the matcher's problems."""
    layers = matcher.layers
    ranks, keys = dict.fromkeys(found, config.r), dict.fromkeys(found, "method.r")
    for pattern, rank in config.rank_pattern.items():
        key = f"method.rank_pattern.{pattern}"
        for name in matcher.matching(key, [pattern]) & ranks.keys():
            if keys[name] == "method.r":  # the first pattern that matches decides, as in PEFT
                ranks[name], keys[name] = rank, key
    too_large = {name: rank for name, rank in ranks.items() if rank > min(in_out(layers[name]))}
    if config.target_modules == ALL_LINEAR:
        total = sum(math.prod(in_out(layers[name])) for name in ranks)
        small = [name for name in too_large if keys[name] == "method.r"]
        if sum(math.prod(in_out(layers[name])) for name in small) < SMALL_SHARE * total:
            ranks, too_large = (
                {n: rank for n, rank in found.items() if n not in small}
                for found in (ranks, too_large)
            )
    for key in dict.fromkeys(keys[name] for name in too_large):
        name = min((n for n in too_large if keys[n] == key), key=lambda n: min(in_out(layers[n])))
        in_features, out_features = in_out(layers[name])
        what = f"rank {too_large[name]} is larger than a layer: `{name}` is "
        what += f"{in_features} → {out_features}"
        at_most = f"at most {min(in_features, out_features)}"
        matcher.problems.append(Problem(what, key, at_most))
    return ranks


def left_out(
    model: nn.Module,
    config: TargetConfig,
    ranks: Mapping[str, int],
    heads: Sequence[str],
    bypassed: Collection[str],
) -> list[str]:
    """Descriptions, with the reason, of the blocks' weights that get no adapter although the
    recipe says `all-linear`. Takes the arguments and the result of `match_targets`."""
    if config.target_modules != ALL_LINEAR:
        return []
    layers = linear_layers(model)
    in_heads = tuple(f"{head}." for head in heads)
    excluded = (
        [config.exclude_modules]
        if isinstance(config.exclude_modules, str)
        else config.exclude_modules
    )
    blocks = [
        name
        for name in block_linears(model)
        if name not in ranks
        and not f"{name}.".startswith(in_heads)
        and not any(matches(pattern, name) for pattern in excluded)
    ]
    said = []
    for names, why in (
        (
            [name for name in blocks if name in bypassed],
            "the model reads their weights without calling them",
        ),
        ([name for name in blocks if name not in bypassed], "they are smaller than the rank"),
    ):
        kinds = Counter(
            f"{_kind(name)} ({'→'.join(map(str, in_out(layers[name])))})" for name in names
        )
        if kinds:
            said.append(f"without adapter, since {why}: {_counted(kinds)}")
    weights = {
        name: p
        for name, p in model.named_parameters()
        if p.ndim > 1 and not name.startswith(in_heads)
    }
    inside = in_blocks(model, weights)
    total = sum(weights[name].numel() for name in inside)
    total += sum(
        math.prod(in_out(layer)) for layer in layers.values() if isinstance(layer, QuantisedLinear)
    )
    others = [name for name in inside if name.rpartition(".")[0] not in layers]
    others.sort(key=lambda name: -weights[name].numel())
    share = sum(weights[name].numel() for name in others) / max(1, total)
    if share >= TOLD_SHARE:
        kinds = Counter(f"{_kind(name)} {[*weights[name].shape]}" for name in others)
        said.append(
            f"without adapter, since they are no linear layers: {share:.0%} of the blocks' weights,"
            f" {_counted(kinds)}"
        )
    return said


def _kind(name: str) -> str:
    """The module's name inside its block."""
    return re.sub(r"^.*?\.\d+\.", "", name)


def _counted(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} × {kind}" for kind, count in kinds.items())


def saved_targets(config: TargetConfig, names: Iterable[str]) -> dict[str, int]:
    """{module name: rank} of saved adapters, whose layers are adapted again wherever they are
    loaded."""

    def rank(name: str) -> int:
        return next(
            (rank for pattern, rank in config.rank_pattern.items() if matches(pattern, name)),
            config.r,
        )

    return {name: rank(name) for name in names}


def inject(model: nn.Module, method: AdapterMaker, ranks: dict[str, int]) -> dict[str, Adapter]:
    """Freeze the model and put an adapter of the given rank around each layer; returns {module
    name: adapter}."""
    model.requires_grad_(False)
    layers = linear_layers(model)
    adapters = {name: method.make_adapter(name, layers[name], rank) for name, rank in ranks.items()}
    for name, adapter in adapters.items():
        replace_layer(model, name, adapter)
    method.attach(adapters, model)
    return adapters


def merge_all(model: nn.Module, adapters: dict[str, Adapter]) -> None:
    """Merge every adapter into its base layer and put that layer back into the model, dense. Other
    quantised layers become dense too."""
    for name, adapter in adapters.items():
        replace_layer(model, name, adapter.merge())
    for name, layer in linear_layers(model).items():
        if isinstance(layer, QuantisedLinear):
            replace_layer(model, name, layer.as_dense())


def detach_all(model: nn.Module, adapters: dict[str, Adapter]) -> None:
    """Remove every adapter and put its base layer, pruned or not, back into the model."""
    for name, adapter in adapters.items():
        replace_layer(model, name, adapter.base.layer)


def replace_layer(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module into the place of the one of this name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _is_tied(model: nn.Module, layer: nn.Module) -> bool:
    if isinstance(layer, QuantisedLinear):
        return False
    embeddings = compat.input_embeddings(model)
    return embeddings is not None and getattr(embeddings, "weight", None) is layer.weight


def _no_match(key: str, pattern: str, layers: Iterable[str], blocks: Sequence[str]) -> Problem:
    endings = sorted({name.rsplit(".", 1)[-1] for name in layers})
    kinds = sorted({_kind(name) for name in blocks})
    near = get_close_matches(pattern.rsplit(".", 1)[-1], endings, 1)
    return Problem(
        f"`{pattern}` matches no linear layer of the model",
        key,
        f"`{ALL_LINEAR}`, a name or a regular expression over: {', '.join(kinds)}",
        near[0] if near else None,
    )
