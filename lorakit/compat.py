"""Everything of other packages that a minor version may rename, move or drop: keywords, private names, attributes of their
objects. Each is named in this module alone. Where one is gone, a RunError names the package, its version, what is missing and
the versions that lorakit was tested with, since going on would give another result without a word.

The tested versions are those of lorakit's own requirements, read from its installed metadata. Nothing heavy is imported before
it is asked for.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, requires, version
from inspect import signature
from typing import Any

from lorakit.errors import RunError

LORAKIT = "lorakit"
# Extras that nobody needs in order to use lorakit.
DEVELOPERS = ("test", "dev")
# Names of a model's key-value cache, as an argument and in its output. transformers 5.24 renamed it.
CACHE_NAMES = ("cache", "past_key_values")
# Methods of transformers' Cache whose results a cache of our own gives instead.
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


# ---- versions


@dataclass(frozen=True)
class Tested:
    """A package that lorakit needs: its installed version (None where it is not installed) and the versions that lorakit was
    tested with, as pip writes them."""

    package: str
    installed: str | None
    range: str
    fits: bool

    def __str__(self) -> str:
        return f"{self.package} {self.installed} is outside of the versions that lorakit was tested with ({self.range})"


def tested() -> dict[str, Tested]:
    """{package: its versions} of lorakit's requirements, extras for users included; {} where lorakit is not installed."""
    from packaging.requirements import Requirement  # `lorakit --help` does not need it

    try:
        lines = requires(LORAKIT) or []
    except PackageNotFoundError:
        return {}
    found: dict[str, Tested] = {}
    for requirement in map(Requirement, lines):
        if requirement.marker and any(f'extra == "{extra}"' in str(requirement.marker) for extra in DEVELOPERS):
            continue
        installed = _version(requirement.name)
        fits = installed is None or requirement.specifier.contains(installed, prereleases=True)
        name = _canonical(requirement.name)
        found[name] = Tested(name, installed, _by_version(str(requirement.specifier)), fits)
    return found


def _canonical(package: str) -> str:
    from packaging.utils import canonicalize_name

    return str(canonicalize_name(package))


def untested() -> list[str]:
    """A sentence for each installed package whose version is outside of the tested range."""
    return [str(package) for package in tested().values() if not package.fits]


def gone(package: str, what: str) -> RunError:
    """The error for something of another package that is not there."""
    known = tested().get(_canonical(package))
    versions = f"{package} {known.range}" if known else f"the versions of {package} in its pyproject.toml"
    return RunError(
        f"{package} {_version(package) or '(unknown version)'} has no {what}, which lorakit needs",
        f"lorakit was tested with {versions}: install one of these.",
    )


def moved(error: ImportError) -> RunError | None:
    """The error to show for something that could not be imported from a package that lorakit needs; None for another one's."""
    package = (error.name or "").partition(".")[0]
    if _canonical(package) not in tested() or _version(package) is None:
        return None
    name = re.search(r"cannot import name '(\w+)'", str(error))
    return gone(package, f"`{error.name}.{name[1]}`" if name else f"`{error.name}`")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _by_version(specifier: str) -> str:
    """`>=5,<6` of `<6,>=5`."""
    return ",".join(sorted(specifier.split(","), reverse=True))


# ---- how things are found


@cache
def part(place: str, takes: tuple[str, ...] = ()) -> Any:
    """The thing at a place such as `torch.nn.Linear`. takes: names of arguments that it must have.

    Raises RunError where it is not there, or takes other arguments.
    """
    package = place.partition(".")[0]
    try:
        found = pkgutil.resolve_name(place)
    except (ImportError, AttributeError) as error:
        raise gone(package, f"`{place}`") from error
    if missing := [name for name in takes if name not in signature(found).parameters]:
        raise gone(package, f"argument `{missing[0]}` of `{place}`")
    return found


def attribute(thing: Any, name: str, package: str) -> Any:
    """The attribute of an object that the package made. Raises RunError where it has none of that name."""
    try:
        return getattr(thing, name)
    except AttributeError as error:
        raise gone(package, f"`{name}` of {type(thing).__name__}") from error


# ---- transformers: key-value caches


def input_embeddings(model: Any) -> Any:
    """The model's table of token embeddings, or None where it has none."""
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # a plain module; CANINE, which hashes characters
        return None


def new_cache(config: Any) -> Any:
    """transformers' own cache for a model with this configuration."""
    return part("transformers.DynamicCache", takes=("config",))(config=config)


def check_cache_methods() -> None:
    """Raises RunError unless transformers' Cache has the methods that a cache of our own stands in for: under another name
    transformers would call its own."""
    base = part("transformers.Cache")
    for name in CACHE_METHODS:
        attribute(base, name, "transformers")


def old_experts(model_type: str) -> str | None:
    """The architecture whose way to name experts, before transformers made them one parameter, this one had; None where it had
    none, or where transformers is older than the table."""
    table = getattr(importlib.import_module("transformers.conversion_mapping"), "_MODEL_TO_CONVERSION_PATTERN", {})
    found: str | None = table.get(model_type)
    return found


def cache_name(module: Any) -> str:
    """The name of the cache among the arguments of a model. Raises RunError for a model that takes none by a known name."""
    forward = module.forward
    names = _argument_names(getattr(forward, "__func__", forward))
    for name in CACHE_NAMES:
        if name in names:
            return name
    raise RunError(
        f"{type(module).__name__} takes no key-value cache as {' or '.join(f'`{name}`' for name in CACHE_NAMES)}",
        f"lorakit was tested with {_tested_transformers()}; a model that keeps something else has no tiers and no cache policy.",
    )


@lru_cache(maxsize=256)
def _argument_names(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(signature(forward).parameters)


def cache_argument(module: Any, cache: Any) -> dict[str, Any]:
    """The cache as an argument of the model. Raises what `cache_name` raises."""
    return {cache_name(module): cache}


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache among the named arguments of a pass, or None.

    Raises RunError for a cache under a name that lorakit does not know, and for two caches.
    """
    given = {name: arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None}
    if len({id(found) for found in given.values()}) > 1:
        raise RunError(f"a pass was given two key-value caches, as {' and '.join(given)}", "Give it one.")
    if given:
        return next(iter(given.values()))
    base = part("transformers.Cache")
    for name, value in arguments.items():
        if isinstance(value, base):
            raise _unknown_cache(name)
    return None


def cache_of(output: Any) -> Any:
    """The cache in the output of a pass, or None. Raises RunError for one under a name that lorakit does not know."""
    fields = getattr(output, "__dataclass_fields__", CACHE_NAMES)
    for name in CACHE_NAMES:  # an older name may still be there beside the field, and warn
        if name in fields and (found := getattr(output, name, None)) is not None:
            return found
    parts = output if isinstance(output, Mapping) else dict(enumerate(output)) if isinstance(output, tuple) else {}
    base = part("transformers.Cache")
    for place, value in parts.items():
        if isinstance(value, base):
            raise _unknown_cache(place)
    return None


def _unknown_cache(name: str | int) -> RunError:
    return RunError(
        f"transformers {_version('transformers')} hands the key-value cache over as `{name}`, which lorakit does not know",
        f"lorakit was tested with {_tested_transformers()}; pass named arguments, and leave `return_dict` as it is.",
    )


def _tested_transformers() -> str:
    known = tested().get("transformers")
    return f"transformers {known.range}" if known else "the versions of transformers in its pyproject.toml"


def new_tokens(query: Any) -> int:
    """How many tokens a mask is asked for: transformers says it by their positions [tokens] before 5.4, later by a number."""
    return query if isinstance(query, int) else int(query.shape[0])


def cache_bytes(cache: Any) -> int:
    """Bytes of what transformers' own cache keeps: keys and values, or the states of layers without them."""
    tensor_type, layers = part("torch.Tensor"), attribute(cache, "layers", "transformers")
    kept = [leaf for layer in layers for leaf in tree_leaves(vars(layer)) if isinstance(leaf, tensor_type)]
    return sum(tensor.nbytes for tensor in kept if tensor.is_floating_point())


# ---- transformers: attention


def register_attention(name: str, function: Callable[..., Any]) -> None:
    """Let models use the function as their attention, with the masks of SDPA."""
    part("transformers.AttentionInterface").register(name, function)
    part("transformers.AttentionMaskInterface").register(name, part("transformers.masking_utils.sdpa_mask"))


def sdpa_attention() -> Callable[..., Any]:
    """transformers' own attention by torch's scaled_dot_product_attention."""
    takes = ("module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal")
    found: Callable[..., Any] = part("transformers.integrations.sdpa_attention.sdpa_attention_forward", takes)
    return found


def attention_name(config: Any) -> str | None:
    """The name of the attention that a model with this configuration uses."""
    name: str | None = attribute(config, "_attn_implementation", "transformers")
    return name


def takes_attention(model: Any) -> bool:
    """True if transformers lets the model use a registered attention. Before 5.1 ModernBERT has a list of its own."""
    return bool(attribute(model, "_can_set_attn_implementation", "transformers")())


def set_attention(model: Any, name: str) -> None:
    """Let the model use the registered attention."""
    attribute(model, "set_attn_implementation", "transformers")(name)


def caps_scores(model: Any) -> bool:
    """True if layers of the model put a soft cap on their attention scores, as those of Gemma 2, T5Gemma and VaultGemma do."""
    return any(getattr(module, "attn_logit_softcapping", None) is not None for module in model.modules())


# ---- transformers: blocks that are computed again for the backward pass


def can_checkpoint(model: Any) -> bool:
    """True if transformers can compute the blocks of the model again."""
    return bool(attribute(model, "supports_gradient_checkpointing", "transformers"))


def checkpoint(model: Any, settings: dict[str, Any]) -> None:
    """Compute the blocks again for the backward pass. settings: of torch.utils.checkpoint."""
    # The newer name first: the older one is there as well.
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        if hasattr(model, name):
            getattr(model, name)(settings)
            return
    raise gone("transformers", f"`activation_checkpointing_enable` of {type(model).__name__}")


def checkpoint_around_forward(block: Any) -> Callable[..., Any] | None:
    """The function by which a block's forward is to be computed again, or None where it is not, or where transformers does it
    around the call of the block, as its first versions 5 do."""
    if not getattr(block, "gradient_checkpointing", False) or not block.training:
        return None
    if type(block).__call__ is not part("torch.nn.Module").__call__:
        return None
    found: Callable[..., Any] = attribute(block, "_gradient_checkpointing_func", "transformers")
    return found


# ---- transformers: tokenizers


def backend(tokenizer: Any) -> Any:
    """The tokenizer of the Rust library that a fast tokenizer wraps."""
    return attribute(tokenizer, "backend_tokenizer", "transformers")


def decode(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    """The texts of rows of tokens, special tokens included and nothing cleaned up.

    Where the tokenizer's class decodes as every fast one does, the Rust library decodes them all at once, which is what
    transformers does row by row.
    """
    if not rows:
        return []
    fast = part("transformers.PreTrainedTokenizerFast")
    usual = {name: attribute(fast, name, "transformers") for name in ("decode", "_decode")}
    if tokenizer.is_fast and all(getattr(type(tokenizer), name) is method for name, method in usual.items()):
        texts: list[str] = backend(tokenizer).decode_batch(rows, skip_special_tokens=False)
        return texts
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return [tokenizer.decode(list(row), **options) for row in rows]


# ---- torch


class _Foreach:
    """torch's operations on lists of tensors: `foreach.add_(tensors, 1.0)`."""

    def __getattr__(self, name: str) -> Any:
        operation = part(f"torch._foreach_{name}")
        setattr(self, name, operation)
        return operation


foreach = _Foreach()


def fused_adamw() -> Callable[..., Any]:
    """torch's AdamW step over lists of tensors."""
    found: Callable[..., Any] = part("torch._fused_adamw_")
    return found


def tree_leaves(tree: Any) -> list[Any]:
    """Leaves of nested lists, tuples and mappings."""
    found: list[Any] = part("torch.utils._pytree.tree_leaves")(tree)
    return found


def dispatch_mode() -> Any:
    """torch's base class for what sees every operation."""
    return part("torch.utils._python_dispatch.TorchDispatchMode")


def weak_storage(storage: Any) -> Any:
    """A reference to a tensor's storage that does not keep it alive; it has a method `expired`."""
    return part("torch.multiprocessing.reductions.StorageWeakRef")(storage)


def storage_number(storage: Any) -> int:
    """A number that only this storage has while it is alive."""
    number: int = attribute(storage, "_cdata", "torch")
    return number


def has_forward_hooks(module: Any) -> bool:
    """True if somebody watches or changes what goes into the module or comes out of it."""
    return any(attribute(module, name, "torch") for name in ("_forward_hooks", "_forward_pre_hooks"))


def check_apply() -> None:
    """Raises RunError unless torch moves modules to devices and types by the method that an adapter stands in for."""
    part("torch.nn.Module._apply")


def compile_for_any_size() -> None:
    """Let torch.compile treat sizes of parameters as it does those of inputs: symbols, once they are seen to differ."""
    config, name = part("torch._dynamo.config"), "force_parameter_static_shapes"
    attribute(config, name, "torch")
    setattr(config, name, False)


def mark_dynamic(tensor: Any, dims: list[int] | int) -> None:
    """Let torch.compile take the sizes of these dimensions for symbols from the first."""
    part("torch._dynamo.maybe_mark_dynamic")(tensor, dims)


# ---- the hub, datasets, typer


def http_error() -> type[Exception]:
    """The base of every error, time-outs included, of the HTTP client that this version of huggingface_hub uses."""
    found: type[Exception] = part("huggingface_hub.errors.HfHubHTTPError").__mro__[1]
    if found.__name__ != "HTTPError":
        raise gone("huggingface_hub", "HTTP client's error as the base of its own")
    return found


@contextlib.contextmanager
def hub_only_from_cache(wanted: bool) -> Iterator[None]:
    """Within it, datasets and huggingface_hub ask no hub, where that is wanted."""
    modules = [part(place) for place in ("datasets.config", "huggingface_hub.constants")]
    before = [attribute(module, "HF_HUB_OFFLINE", module.__package__) for module in modules]
    for module, value in zip(modules, before, strict=True):
        module.HF_HUB_OFFLINE = wanted or value
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def prepared_data(owner: list[str], name: str) -> str:
    """The folder in which datasets keeps a data set of the hub, prepared: CONFIGURATION / VERSION / HASH are below it."""
    folder = "___".join([*owner, part("datasets.naming.camelcase_to_snakecase")(name)])
    cache = attribute(part("datasets.config"), "HF_DATASETS_CACHE", "datasets")  # a setting: asked for each time
    return f"{cache}/{folder}"


def command_line_error() -> Any:
    """All that typer raises about a command line: the base of an error that it exports, since its click is the installed one in
    some versions and its own in others. It has a method `show`."""
    base = part("typer.BadParameter").__base__
    attribute(base, "show", "typer")
    return base
