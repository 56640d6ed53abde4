"""lorakit generate"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import typer

from lorakit import process
from lorakit.cli import common, complete
from lorakit.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from lorakit.runs.chat import Chat
    from lorakit.runs.generate import Written


PROMPT = typer.Option(
    [],
    "--prompt",
    "-p",
    help=(
        "Text to go on from; several are written as a batch, or with --chat are the turns of one"
        " conversation. - reads standard input: one text, or with --chat a turn a line."
    ),
    show_default=False,
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
CHAT = typer.Option(
    False,
    "--chat",
    help="Hold a conversation through the chat template; without --prompt, on the terminal.",
)
SYSTEM = typer.Option(None, "--system", help="With --chat: the system message.")
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
    system: str = SYSTEM,
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
    from lorakit.runs.chat import Chat
    from lorakit.runs.generate import cache_policy, write

    out, err = common.consoles()
    prompts, stops = list(map(common.typed, prompt)), tuple(map(common.typed, stop))
    talk = Chat(None if system is None else common.typed(system)) if chat else None
    _check(prompts, talk, system, plot)
    folder, plot = run_folder(common.home(run), or_checkpoint=True), common.home(plot)
    if plot is not None:
        from lorakit.report import chunk_plot

        chunk_plot.check_picture(plot, folder, len(prompts))
    sampling = max_new_tokens, temperature, top_k, top_p, seed, stops
    grows = not (as_json or show_chunks) and (talk is not None or len(prompts) == 1)
    written, fallback = write(
        folder,
        _texts(prompts) if talk is None else _turns(prompts or ["-"], grows),
        GenerationSettings(*sampling, max(len(prompts), 1)),
        Progress(err),
        chat=talk,
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
            _show(one, out, err, show_chunks, grows, ended=talk is not None)
        if fallback and not slow:
            err.print(f"the model's own forward pass was used: {fallback}")
    if plot is not None and written[0].shown is not None:
        chunk_plot.save_picture(plot, written[0].shown, folder.name)
        err.print(f"plot written to {plot}")


def _check(prompts: list[str], talk: Chat | None, system: str | None, plot: Path | None) -> None:
    """Raise UsageError for options that do not go together."""
    if talk is None and not prompts:
        raise UsageError("there is no prompt", "Give --prompt some text, or - for standard input.")
    if talk is None and system is not None:
        raise UsageError("--system is the first message of a conversation", "Add --chat.")
    if talk is not None and plot is not None and (len(prompts) != 1 or "-" in prompts):
        raise UsageError("--plot is for one prompt", "Ask one question by --prompt.")


def _texts(prompts: list[str]) -> list[str]:
    """The prompts, with standard input for -."""
    return [sys.stdin.read() if one == "-" else one for one in prompts]


def _turns(prompts: list[str], shows: bool) -> Iterator[str]:
    """The questions of a conversation, each asked for when the one before is answered. shows:
    answers appear on stdout as they are written."""
    for prompt in prompts:
        lines = iter(_lines(sys.stdin)) if prompt == "-" else iter([prompt])
        for line in lines:
            if shows and len(prompts) > 1 and prompt != "-":
                common.say(f"> {line}")
            yield line
            if shows:
                common.say("")  # the answer's last line ends


def _lines(source: TextIO) -> Iterator[str]:
    """The lines that are not empty; at a terminal, each is asked for."""
    while True:
        if source.isatty():
            common.say("> ", end="")
        line = source.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _show(
    one: Written, out: Console, err: Console, chunks: bool, is_there: bool, ended: bool
) -> None:
    """Print one text, coloured by chunks if `chunks` and it has any, unless it is already on the
    screen; ended: its last line too."""
    from lorakit.report.chunks import coloured, legend

    if is_there:
        common.say("", end="" if ended else "\n")
    elif chunks and one.shown is not None:
        out.print(coloured(one.shown), soft_wrap=True)
        out.print(legend(one.shown))
    else:
        out.print(one.generated.text, soft_wrap=True)
    if chunks and one.shown is None:
        err.print("this run has no tiers: all tokens are at one rank")
    err.print(one.in_words())
