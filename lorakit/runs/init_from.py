"""The start of a run at an adapter that was trained before (`method.init_from`)."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from lorakit.adapters.base import in_out
from lorakit.adapters.layer import Adapter
from lorakit.errors import RecipeError, UsageError
from lorakit.export.given import GivenAdapter, no_such_modules, read_given
from lorakit.export.peft import CONFIG_FILE
from lorakit.files import expanded
from lorakit.numerics.lowrank import balanced_product, product_singular_values
from lorakit.recipes.recipe import Recipe, locating
from lorakit.runs.folder import RECIPE
from lorakit.runs.moment import adapter_of, chosen
from lorakit.runs.session import Session
from lorakit.training.trained import trainable

log = logging.getLogger("lorakit")
KEY = "method.init_from"


def given_adapter(recipe: Recipe) -> GivenAdapter | None:
    """The adapter that the recipe's method starts from; None where it starts at zero. Raises
    RecipeError where it can not be read."""
    if recipe.method.init_from is None:
        return None
    with locating(recipe):
        try:
            folder = expanded(recipe.method.init_from)
            if (folder / RECIPE).is_file() and not (folder / CONFIG_FILE).is_file():
                folder = adapter_of(chosen(folder))
            return read_given(folder)
        except UsageError as error:
            raise RecipeError.at(KEY, error.what, error.remedy) from error


@torch.no_grad()
def start_from(session: Session, given: GivenAdapter) -> None:
    """Give the session's adapters and heads the values of `given`, so that the model computes the
    same. Ranks and scales are the recipe's: a difference of scales goes into B, a larger rank gets
    fresh components, and a smaller one the best approximation, with a warning.

    Raises RecipeError for modules that have no adapter of that shape here.
    """
    adapters = session.method.adapters
    with locating(session.recipe):
        _check(session, given)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    lost: dict[str, float] = {}
    for name, (a, b) in given.factors.items():
        adapter = adapters[name]
        a, b = a.float(), b.float()
        if given.scales[name] != adapter.scale:
            b = b * (given.scales[name] / adapter.scale)
        if len(a) > adapter.rank:
            a, b, lost[name] = _truncated(a, b, adapter)
        pairs[name] = a, b
    session.method.start_from(pairs)
    _start_heads(session, given)
    session.started_from = given.record()
    if lost:
        most = max(lost.values())
        message = (
            "init_from: %d layers have a lower rank here and get the best approximation, which"
            " leaves out up to %.1f %% of an update's norm; rank_pattern or r can give them theirs"
        )
        log.warning(message, len(lost), 100 * most)
    if fresh := [name for name in adapters if name not in given.factors]:
        log.info("init_from: %d layers, such as `%s`, start at zero", len(fresh), fresh[0])


def _check(session: Session, given: GivenAdapter) -> None:
    adapters = session.method.adapters
    where = f"the adapter in `{given.folder}`"
    expected = "target_modules that have them, over the same base"
    if wrong := [name for name in given.factors if name not in adapters]:
        names = no_such_modules(wrong, adapters)
        raise RecipeError.at(KEY, f"{where} is on layers without one here: {names}", expected)
    for name, (a, b) in given.factors.items():
        sizes = a.shape[1], b.shape[0]
        if (here := in_out(adapters[name].base)) != sizes:
            what = f"{where} has `{name}` as {sizes[0]} → {sizes[1]}, the model {here[0]} →"
            raise RecipeError.at(KEY, f"{what} {here[1]}", "an adapter of the same base")
    if given.base is not None and not _same(given.base, session.facts.base):
        message = "init_from: %s was trained on `%s`, and this base is `%s`"
        log.warning(message, where, given.base, session.facts.base)


def _same(one: str, other: str) -> bool:
    """True if two names of a base are equal, or paths of one folder."""
    paths = Path(one), Path(other)
    return one == other or (
        all(path.is_dir() for path in paths) and paths[0].resolve() == paths[1].resolve()
    )


def _truncated(a: Tensor, b: Tensor, adapter: Adapter) -> tuple[Tensor, Tensor, float]:
    """The best approximation of B A at the adapter's rank, and the share of the norm that it
    lacks."""
    values = product_singular_values(a, b)
    whole, rest = float(values.norm()), float(values[adapter.rank :].norm())
    a, b = balanced_product(a, b)
    return a[: adapter.rank], b[:, : adapter.rank], rest / whole if whole else 0.0


def _start_heads(session: Session, given: GivenAdapter) -> None:
    """Copy the heads, unless they are for other classes."""
    labels = session.facts.labels
    mine = trainable(session.task_model.model)
    theirs = given.labels
    numbered = theirs == [str(i) for i in range(len(theirs or []))]  # no names were known
    if theirs is not None and not numbered and (labels is None or labels.names != theirs):
        if given.heads:
            log.warning("init_from: its head is for other classes, so a new one is trained")
        return
    for name, tensor in given.heads.items():
        if name in mine and mine[name].shape == tensor.shape:
            mine[name].copy_(tensor)
        else:
            log.warning("init_from: `%s` of it fits nothing here and is left out", name)
