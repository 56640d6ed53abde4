"""Exports of a run folder. Checks come first; the export is written to a new folder that appears
only when it is complete."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from lorakit.errors import UsageError
from lorakit.export.gguf.model import TYPES as GGUF_TYPES
from lorakit.export.native import read_facts
from lorakit.report.history import run_of
from lorakit.runs import export_adapter, export_merged
from lorakit.runs.export_shared import DTYPES
from lorakit.runs.folder import ADAPTER, CHECKPOINTS
from lorakit.runs.moment import adapter_of, chosen, is_checkpoint
from lorakit.runs.push import Destination, push
from lorakit.runs.saved import saved_recipe

SHORT_DTYPES = {
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "f32": "float32",
    "f16": "float16",
}
PORTABLE = "peft-portable"


def export_run(
    run: Path,
    *,
    merge: bool,
    adapter: bool,
    form: str | None,
    dtype: str | None,
    out: Path | None,
    force: bool,
    to: Destination | None = None,
) -> Iterator[str]:
    """Export; yields lines about what was written. form: of the adapter, by default peft-portable;
    or of the merged model, by default a folder of transformers. to: the finished export is sent
    there. Raises UsageError before anything is written, and RunError as `push`."""
    if merge == adapter:
        raise UsageError(
            "say what to export", "--merge for the merged model, --adapter for the adapter alone."
        )
    form = _checked_form(merge, form)
    dtype = _checked_dtype(merge, form, dtype)
    if to is not None:
        to.check()
    run = chosen(run)
    recipe = saved_recipe(run)
    target = out or export_folder(run, merge, form)
    _refuse_harm(run, target)
    if target.exists() and not target.is_dir():
        raise UsageError(f"`{target}` is a file", "Name a folder with --out.")
    if target.exists() and any(target.iterdir()) and not force:
        raise UsageError(f"`{target}` exists", "--force replaces it; --out names another folder.")
    if not merge:
        yield from export_adapter.export_adapter(run, recipe, target, form or PORTABLE, dtype)
    elif form is None:
        yield from export_merged.export_merged(run, recipe, target, dtype)
    else:
        yield from export_merged.export_gguf(run, recipe, target, dtype)
    if to is not None:
        yield from push(target, to)


def export_folder(run: Path, merge: bool, form: str | None) -> Path:
    """The default folder of an export: in the run's, named after the step of a checkpoint."""
    name = f"adapter-{form or PORTABLE}"
    if merge:
        name = "merged" if form is None else f"merged-{form}"
    return run_of(run) / (f"{name}-{run.name}" if is_checkpoint(run) else name)


def _checked_form(merge: bool, form: str | None) -> str | None:
    if form is not None and form not in (*export_adapter.FORMS, *export_merged.FORMS):
        raise UsageError(f"there is no format `{form}`", _choices(form, export_adapter.FORMS))
    if merge and form not in (None, *export_merged.FORMS):
        raise UsageError(
            f"`{form}` is a format of an adapter alone",
            "--adapter writes it; --merge has --format gguf, and without it a folder that"
            " from_pretrained loads.",
        )
    return form


def _checked_dtype(merge: bool, form: str | None, dtype: str | None) -> str | None:
    """A key of DTYPES or, for a merged model as GGUF, of GGUF_TYPES."""
    dtype = SHORT_DTYPES.get(dtype or "", dtype)
    if dtype is not None and dtype not in (*DTYPES, *GGUF_TYPES):
        raise UsageError(f"there is no dtype `{dtype}`", _choices(dtype, tuple(GGUF_TYPES)))
    if dtype not in (None, *DTYPES) and not (merge and form):
        raise UsageError(f"`{dtype}` is a dtype of GGUF alone", "--merge --format gguf writes it.")
    return dtype


def _refuse_harm(run: Path, target: Path) -> None:
    """Raise UsageError for a target whose replacement would remove the run, its base model or the
    working folder."""
    place, home = target.resolve(), run_of(run).resolve()
    kept = [home / name for name in (ADAPTER, CHECKPOINTS)]
    if home.is_relative_to(place) or any(place.is_relative_to(folder) for folder in kept):
        raise UsageError(
            f"`{target}` is, or holds, or is a part of, the run itself",
            "Name another folder with --out.",
        )
    source = read_facts(adapter_of(run)).source
    if source.kind != "hub" and Path(source.location).resolve().is_relative_to(place):
        raise UsageError(
            f"`{target}` is, or holds, the base model {source.location}",
            "Name another folder with --out.",
        )
    if Path.cwd().is_relative_to(place):
        raise UsageError(
            f"`{target}` is, or holds, the working folder", "Name another folder with --out."
        )


def _choices(wrong: str, choices: tuple[str, ...]) -> str:
    near = get_close_matches(wrong, choices, 1)
    return f"Choose one of {', '.join(choices)}." + (f" Did you mean `{near[0]}`?" if near else "")
