"""Clients of the hub: huggingface_hub and datasets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lorakit.compat.lookup import attribute, part
from lorakit.compat.versions import gone


def http_error() -> type[Exception]:
    """The base of every error, time-outs included, of huggingface_hub's HTTP client."""
    found: type[Exception] = part("huggingface_hub.errors.HfHubHTTPError").__mro__[1]
    if found.__name__ != "HTTPError":
        raise gone("huggingface_hub", "HTTP client's error as the base of its own")
    return found


@contextlib.contextmanager
def hub_only_from_cache(wanted: bool) -> Iterator[None]:
    """Context in which, if wanted, datasets and huggingface_hub read only their caches."""
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
    """The folder in which datasets keeps a prepared data set of the hub.

    Its sub-folders are CONFIGURATION / VERSION / HASH.
    """
    folder = "___".join([*owner, part("datasets.naming.camelcase_to_snakecase")(name)])
    # Read at every call, as the setting may change while lorakit runs.
    cache = attribute(part("datasets.config"), "HF_DATASETS_CACHE", "datasets")
    return f"{cache}/{folder}"
