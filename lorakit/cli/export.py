"""lorakit export"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lorakit.cli import common, complete
from lorakit.errors import UsageError

if TYPE_CHECKING:
    from lorakit.runs.push import Destination

FORMAT = complete.one_of(
    None,
    "--format",
    *("lorakit", "peft", "peft-portable", "gguf", "sparse"),
    help=(
        "peft-portable, the default: one rank and one alpha, for PEFT, vLLM, llama.cpp's converter."
        " peft: smaller, each layer's own rank by patterns, which only PEFT reads. lorakit: gates,"
        " tiers and all, for lorakit. sparse: bitmaps and non-zeros. gguf: for llama.cpp; with"
        " --merge one file of the whole model, for llama.cpp and Ollama."
    ),
)
DTYPE = complete.one_of(
    None,
    "--dtype",
    *("float32", "bfloat16", "float16", "q8_0"),
    help="By default the base's own (--merge) or float32. q8_0: of --merge --format gguf.",
)


def export(
    run: Path = common.RUN,
    merge: bool = typer.Option(
        False,
        "--merge",
        help="The base with the update added in: a folder for plain from_pretrained.",
    ),
    adapter: bool = typer.Option(False, "--adapter", help="The adapter alone, in the --format."),
    form: str = FORMAT,
    dtype: str = DTYPE,
    out: Path = typer.Option(
        None,
        "--out",
        metavar="DIR",
        help="By default merged/, merged-gguf/ or adapter-FORMAT/ in the run folder.",
    ),
    force: bool = typer.Option(False, "--force", help="Replace what is at --out."),
    push_to_hub: str = typer.Option(
        None,
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="Send the finished export to the hub, with the token of `hf auth login`.",
    ),
    private: bool = typer.Option(
        None,
        "--private/--public",
        help="Who reads a repository that --push-to-hub makes; by default it is private.",
    ),
    revision: str = typer.Option(
        None, "--revision", metavar="BRANCH", help="Branch for --push-to-hub, by default main."
    ),
    message: str = typer.Option(
        None, "--commit-message", metavar="TEXT", help="Of the commit of --push-to-hub."
    ),
) -> None:
    """Write the trained adapter for other tools: merged into the base, or alone."""
    from lorakit.report.history import run_folder
    from lorakit.runs.export import export_run

    to = _destination(push_to_hub, private, revision, message)
    console, _ = common.consoles()
    for line in export_run(
        run_folder(common.home(run), or_checkpoint=True),
        merge=merge,
        adapter=adapter,
        form=form,
        dtype=dtype,
        out=common.home(out),
        force=force,
        to=to,
    ):
        console.print(line, soft_wrap=True)


def _destination(
    name: str | None, private: bool | None, revision: str | None, message: str | None
) -> Destination | None:
    """The repository that the options name, or None. Raises UsageError for options of a repository
    without one."""
    from lorakit.runs.push import Destination

    if name is not None:
        message = message or Destination.message
        return Destination(common.typed(name), private is not False, revision, message)
    if (private, revision, message) == (None, None, None):
        return None
    raise UsageError(
        "--private, --public, --revision and --commit-message are of --push-to-hub",
        "Say --push-to-hub OWNER/NAME.",
    )
