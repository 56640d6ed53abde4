"""Key-value caches of transformers: their names in a model's arguments and output, and their
methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from inspect import signature
from typing import Any

from lorakit.compat.lookup import attribute, part
from lorakit.compat.torch import tree_leaves
from lorakit.compat.versions import installed, tested_range
from lorakit.errors import RunError

# Names of the cache in a model's arguments and output, which transformers 5.24 renamed.
CACHE_NAMES = ("cache", "past_key_values")
# Methods of transformers' Cache that `PolicyCache` overrides.
CACHE_METHODS = (
    "update",
    "get_seq_length",
    "get_mask_sizes",
    "reorder_cache",
    "batch_repeat_interleave",
    "batch_select_indices",
    "crop",
    "reset",
)


def new_cache(config: Any) -> Any:
    """Make transformers' own cache for a model with this configuration."""
    return part("transformers.DynamicCache", takes=("config",))(config=config)


def check_cache_methods() -> None:
    """Raise RunError unless transformers' Cache has the methods that `PolicyCache` overrides.

    If one were renamed, transformers would call its own method instead.
    """
    base = part("transformers.Cache")
    for name in CACHE_METHODS:
        attribute(base, name, "transformers")


def cache_name(module: Any) -> str:
    """The name of the cache among the arguments of a model.

    Raises RunError for a model that takes none by a known name.
    """
    forward = module.forward
    names = _argument_names(getattr(forward, "__func__", forward))
    for name in CACHE_NAMES:
        if name in names:
            return name
    known = " or ".join(f"`{name}`" for name in CACHE_NAMES)
    tested = f"lorakit was tested with {tested_range('transformers')}"
    raise RunError(
        f"{type(module).__name__} takes no key-value cache as {known}",
        f"{tested}; a model that keeps something else has no tiers and no cache policy.",
    )


@lru_cache(maxsize=256)
def _argument_names(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(signature(forward).parameters)


def cache_argument(module: Any, cache: Any) -> dict[str, Any]:
    """The cache as an argument of the model. Raises RunError as `cache_name` does."""
    return {cache_name(module): cache}


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache among the named arguments of a forward pass, or None.

    Raises RunError for a cache under a name that lorakit does not know, and for two caches.
    """
    given = {name: arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None}
    if len({id(found) for found in given.values()}) > 1:
        both = " and ".join(given)
        raise RunError(f"a pass was given two key-value caches, as {both}", "Give it one.")
    if given:
        return next(iter(given.values()))
    _refuse_unknown(arguments)
    return None


def cache_of(output: Any) -> Any:
    """The cache in the output of a forward pass, or None.

    Raises RunError for a cache under a name that lorakit does not know.
    """
    fields = getattr(output, "__dataclass_fields__", CACHE_NAMES)
    for name in CACHE_NAMES:  # fields only: an older name may still be an attribute, which warns
        if name in fields and (found := getattr(output, name, None)) is not None:
            return found
    if isinstance(output, Mapping):
        _refuse_unknown(output)
    elif isinstance(output, tuple):
        _refuse_unknown(dict(enumerate(output)))
    return None


def _refuse_unknown(parts: Mapping[Any, Any]) -> None:
    """Raise RunError for a cache among arguments or outputs that have no cache under a known
    name."""
    base = part("transformers.Cache")
    for name, value in parts.items():
        if isinstance(value, base):
            here = f"transformers {installed('transformers')}"
            tested = f"lorakit was tested with {tested_range('transformers')}"
            raise RunError(
                f"{here} hands the key-value cache over as `{name}`, which lorakit does not know",
                f"{tested}; pass named arguments, and leave `return_dict` as it is.",
            )


def new_tokens(query: Any) -> int:
    """The number of tokens for which a mask is requested.

    transformers passes their positions [tokens] before 5.4, and their number from then on.
    """
    return query if isinstance(query, int) else int(query.shape[0])


def cache_bytes(cache: Any) -> int:
    """Bytes held by transformers' own cache: keys and values, or the states of layers that have
    none."""
    tensor_type, layers = part("torch.Tensor"), attribute(cache, "layers", "transformers")
    leaves = [leaf for layer in layers for leaf in tree_leaves(vars(layer))]
    kept = [leaf for leaf in leaves if isinstance(leaf, tensor_type)]
    return sum(tensor.nbytes for tensor in kept if tensor.is_floating_point())
