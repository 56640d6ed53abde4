"""lorakit generate"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lorakit import process
from lorakit.cli import common, complete

if TYPE_CHECKING:
    from rich.console import Console

    from lorakit.runs.generate import Written


PROMPT = typer.Option(
    ..., "--prompt", "-p", help="Text to go on from; several are written as a batch."
)
MAX_NEW_TOKENS = typer.Option(128, "--max-new-tokens", min=1, help="Most tokens to write.")
TEMPERATURE = typer.Option(0.0, "--temperature", min=0.0, help="0 takes the likeliest token.")
TOP_K = typer.Option(0, "--top-k", min=0, help="Draw from so many tokens; 0 for all.")
TOP_P = typer.Option(
    1.0,
    "--top-p",
    min=0.0,
    max=1.0,
    help="Draw from the likeliest tokens that have this share.",
)
SEED = typer.Option(0, "--seed", min=0, max=2**31 - 1, help="Seed of drawing.")
STOP = typer.Option([], "--stop", help="A text that ends the answer; may be given again.")
CHAT = typer.Option(False, "--chat", help="Put the prompt into the tokenizer's chat template.")
KV = complete.one_of(
    None,
    "--kv",
    *("full", "int8", "int4", "window"),
    help="Cache policy for all tokens, instead of the run's.",
)
TIER = typer.Option(
    None, "--tier", help="Chunkwise: all tokens at this tier of the ladder, counted from 0."
)
SHOW_CHUNKS = typer.Option(False, "--show-chunks", help="Chunkwise: colour the text by tier.")
PLOT = typer.Option(
    None, "--plot", metavar="FILE.png", help="Chunkwise: draw difficulty, chunks and tiers."
)
SLOW = typer.Option(
    False,
    "--plain-forward",
    help="The model's own forward pass, in place of lorakit's faster one.",
)
AS_JSON = typer.Option(False, "--json", help="One JSON object and nothing else.")


def generate(
    run: Path = common.RUN,
    prompt: list[str] = PROMPT,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = TEMPERATURE,
    top_k: int = TOP_K,
    top_p: float = TOP_P,
    seed: int = SEED,
    stop: list[str] = STOP,
    chat: bool = CHAT,
    kv: str = KV,
    tier: int = TIER,
    show_chunks: bool = SHOW_CHUNKS,
    plot: Path = PLOT,
    slow: bool = SLOW,
    as_json: bool = AS_JSON,
) -> None:
    """Continue a text, with the tiers and the cache of the run."""
    process.wait_by_spinning()
    from lorakit.inference.generator import GenerationSettings
    from lorakit.report.history import run_folder
    from lorakit.report.progress import Progress
    from lorakit.runs.generate import cache_policy, write

    out, err = common.consoles()
    prompts, stops = list(map(common.typed, prompt)), tuple(map(common.typed, stop))
    folder, plot = run_folder(common.home(run)), common.home(plot)
    if plot is not None:
        from lorakit.report import chunk_plot

        chunk_plot.check_picture(plot, folder, len(prompts))
    sampling = max_new_tokens, temperature, top_k, top_p, seed, stops
    grows = not (as_json or show_chunks) and len(prompts) == 1  # printed as it is generated
    written, fallback = write(
        folder,
        prompts,
        GenerationSettings(*sampling, len(prompts)),
        Progress(err),
        chat=chat,
        kv=cache_policy(kv),
        tier=tier,
        own=not slow,
        show=as_json or show_chunks or plot is not None,
        on_text=partial(common.say, end="") if grows else lambda text: None,
    )
    if as_json:
        texts = [one.as_json() for one in written]
        common.say_json({"run": str(folder), "own_forward": fallback is None, "texts": texts})
    else:
        for one in written:
            _show(one, out, err, show_chunks, grows)
        if fallback and not slow:
            err.print(f"the model's own forward pass was used: {fallback}")
    if plot is not None and written[0].shown is not None:
        chunk_plot.save_picture(plot, written[0].shown, folder.name)
    if plot is not None and not as_json:
        err.print(f"plot written to {plot}")


def _show(one: Written, out: Console, err: Console, chunks: bool, is_there: bool) -> None:
    """Print one text, coloured by chunks if `chunks` and it has any, unless it is already on the
    screen."""
    from lorakit.report.chunks import coloured, legend

    if is_there:
        common.say("")  # its last line ends
    elif chunks and one.shown is not None:
        out.print(coloured(one.shown), soft_wrap=True)
        out.print(legend(one.shown))
    else:
        out.print(one.generated.text, soft_wrap=True)
    if chunks and one.shown is None:
        err.print("this run has no tiers: all tokens are at one rank")
    err.print(one.in_words())
