"""Loading through transformers: the class and the folder, and its errors in lorakit's words."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import transformers
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError

from lorakit import compat
from lorakit.errors import RecipeError, RunError
from lorakit.models.spec import ModelSpec
from lorakit.models.tasks import task_named
from lorakit.sources.resolve import Source

HTTPError = compat.http_error()


def origin(source: Source, spec: ModelSpec) -> dict[str, Any]:
    origin: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    if source.kind == "hub":
        origin["revision"] = source.revision or spec.revision
    else:
        origin["local_files_only"] = True
    return origin


def auto_class(task: str) -> Any:
    """The transformers class that loads a model for the task of this name."""
    return getattr(transformers, task_named(task).auto_class)


def _explained(error: Exception, source: Source, spec: ModelSpec) -> RecipeError | RunError:
    """Error that explains a failed load by its innermost causes: transformers wraps most of them in
    an OSError."""
    name, chain, cause = source.location, [], error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]

    def of(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if of(GatedRepoError):
        return RunError(
            f"`{name}` is gated on the hub",
            "Accept its licence there and log in with `hf auth login`.",
        )
    if of(RevisionNotFoundError):
        return RecipeError.at(
            "model.revision",
            f"`{name}` has no revision `{spec.revision}`",
            "a branch, tag or commit on the hub",
        )
    if of(RepositoryNotFoundError):
        return RecipeError.at(
            "model.name_or_path", f"the hub has no model `{name}`", "owner/name as on the hub"
        )
    if of(SafetensorError):
        return RunError(f"the weights of `{name}` are damaged: {reason}", "Fetch them again.")
    if of(HTTPError, LocalEntryNotFoundError) or (
        isinstance(error, OSError) and error.errno is not None
    ):
        return RunError(
            f"`{name}` could not be fetched: {reason}",
            "Is the hub reachable, and is there room on the disk?",
        )
    if "does not appear to have a file named" in str(error) and "safetensors" in str(error):
        remedy = "Convert it once with transformers' save_pretrained, and name the folder."
        return RunError(
            f"`{name}` has no safetensors weights, and pickled ones are not read", remedy
        )
    if "trust_remote_code" in str(error):
        return RecipeError.at(
            "model.trust_remote_code",
            f"`{name}` needs code of its own",
            "model.trust_remote_code: true, once you have read it",
        )
    return RecipeError.at(
        "model.name_or_path", f"`{source.requested}` can not be loaded for {spec.task}: {reason}"
    )


@contextlib.contextmanager
def loading(source: Source, spec: ModelSpec) -> Iterator[None]:
    """Context: transformers without its progress bars and reports, and with its errors in lorakit's
    words."""
    try:
        with quiet():
            yield
    except (OSError, ValueError, KeyError, ImportError, SafetensorError, HTTPError) as error:
        raise _explained(error, source, spec) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context: transformers without its progress bars and reports; its settings are restored
    afterwards."""
    logs: Any = transformers.logging
    verbosity, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(verbosity)
        if bars:
            logs.enable_progress_bar()
