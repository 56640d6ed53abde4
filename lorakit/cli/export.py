"""lorakit export"""

from __future__ import annotations

from pathlib import Path

import typer

from lorakit.cli import common, complete

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
) -> None:
    """Write the trained adapter for other tools: merged into the base, or alone."""
    from lorakit.report.history import run_folder
    from lorakit.runs.export import export_run

    console, _ = common.consoles()
    for line in export_run(
        run_folder(common.home(run)),
        merge=merge,
        adapter=adapter,
        form=form,
        dtype=dtype,
        out=common.home(out),
        force=force,
    ):
        console.print(line, soft_wrap=True)
