"""Texts from a saved run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from lorakit.data.tokenise import embedding_rows, prompt_tokens, without_embedding
from lorakit.errors import UsageError
from lorakit.inference.generator import Generated, GenerationSettings, Generator
from lorakit.kernels.dispatch import announce
from lorakit.methods import KVPolicies, KVPolicy
from lorakit.models.load import compute_dtype, default_device
from lorakit.models.positions import longest_input
from lorakit.models.tasks import task_named
from lorakit.recipes.recipe import Recipe
from lorakit.report.chunks import Shown
from lorakit.report.progress import Progress
from lorakit.runs.saved import saved_model, saved_recipe

log = logging.getLogger("lorakit")

LEAST_TEMPERATURE = 0.01  # below it the likeliest token is all that is ever drawn, until the division overflows
CONTEXT = 8  # tokens before a piece of text that decide how it is written (a blank before a word)
WINDOW = 256  # tokens that the policy `window` keeps where it is asked for here and not in the recipe


@dataclass(frozen=True)
class Written:
    """Text that was generated for one prompt, with its figures. shown: None for a method without tiers."""

    generated: Generated
    shown: Shown | None

    def in_words(self) -> str:
        """One line of figures."""
        one = self.generated
        parts = [f"{len(one.tokens)} tokens", f"{1000 * one.step_seconds:.1f} ms a token", f"prefill {one.prefill_seconds:.2f} s"]
        kept = f" ({one.kv_bytes / one.kv_bytes_full - 1:+.0%} against full)" if 0 < one.kv_bytes != one.kv_bytes_full else ""
        parts.append(f"cache {one.kv_bytes:,} bytes{kept}")
        if self.shown is not None:
            parts.insert(0, f"mean rank {self.shown.mean_rank:.2f} in {len(self.shown.chunks)} chunks")
        return " · ".join(parts)

    def as_json(self) -> dict[str, Any]:
        generated, shown = self.generated, self.shown
        facts: dict[str, Any] = {
            "text": generated.text,
            "tokens": len(generated.tokens),
            "prompt_tokens": len(generated.prompt),
            "prefill_seconds": round(generated.prefill_seconds, 4),
            "ms_per_token": round(1000 * generated.step_seconds, 3),
            "kv_bytes": generated.kv_bytes,
            "kv_bytes_full": generated.kv_bytes_full,
        }
        if shown is not None:
            facts["ladder"] = list(shown.ladder)
            facts["mean_rank"] = round(shown.mean_rank, 3)
            facts["mean_rank_written"] = None if shown.mean_rank_written is None else round(shown.mean_rank_written, 3)
            facts["chunks"] = [
                {"start": start, "end": end, "tier": tier, "text": "".join(shown.pieces[start:end])}
                for start, end, tier in shown.chunks
            ]
        return facts


def write(
    run: Path,
    prompts: list[str],
    settings: GenerationSettings,
    progress: Progress,
    *,
    chat: bool = False,
    kv: KVPolicy | None = None,
    tier: int | None = None,
    own: bool = True,
    show: bool = False,
    on_text: Callable[[str], None] = lambda text: None,
) -> tuple[list[Written], str | None]:
    """(a text for each prompt, why the model's own forward pass was used or None).

    kv: one policy for all tokens instead of the run's; tier: all tokens at this one of the ladder; show: what is needed to show
    chunks; on_text: called with the text as it grows, if there is one prompt. Raises UsageError for what does not fit.
    """
    _check(settings)
    recipe = saved_recipe(run)
    ladder = check_writes(run, recipe, tier)
    device = default_device()
    announce(device)
    with progress.stage("loading the model"):
        task_model, method, _ = saved_model(run, recipe, compute_dtype(recipe.train.precision, device))
        generator = Generator(task_model, method, KVPolicies((kv,) * len(ladder or [1]), WINDOW) if kv else None, own)
    return write_with(generator, recipe, prompts, settings, chat, tier, show, on_text), generator.fallback


def check_writes(run: Path, recipe: Recipe, tier: int | None = None) -> list[int] | None:
    """The ladder of a run that writes text, or None. Raises UsageError for a run that writes none,
    and for a tier that it lacks."""
    if not task_named(task := recipe.model.task).predicts_tokens:
        what = f"the run `{run}` is of {task}: it writes nothing"
        raise UsageError(what, "lorakit eval runs a classifier.")
    ladder: list[int] | None = getattr(recipe.method, "rungs", None)
    if tier is not None and (ladder is None or not 0 <= tier < len(ladder)):
        tiers = None if ladder is None else f"the tiers 0 to {len(ladder) - 1}, of the ranks {ladder}"
        raise UsageError(f"there is no tier {tier}", f"The run has {tiers or 'no tiers'}.")
    return ladder


def write_with(
    generator: Generator,
    recipe: Recipe,
    prompts: list[str],
    settings: GenerationSettings,
    chat: bool = False,
    tier: int | None = None,
    show: bool = False,
    on_text: Callable[[str], None] = lambda text: None,
) -> list[Written]:
    """A text for each prompt, by the generator of the recipe's run, which `check_writes` let pass.
    Raises UsageError for settings and prompts that do not fit."""
    _check(settings)
    ladder: list[int] | None = getattr(recipe.method, "rungs", None)
    task_model, method = generator.task_model, generator.method
    tokenizer = task_model.tokenizer
    rows = embedding_rows(task_model.model.config)
    tokens = [_tokens(tokenizer, prompt, chat, rows) for prompt in prompts]
    settings = _within(settings, max(map(len, tokens)), longest_input(task_model.model.config, tokenizer, recipe.model))
    stream = TextStream(tokenizer, settings.stop)

    def on_token(row: int, token: int) -> None:
        if text := stream.push(token):
            on_text(text)

    with ExitStack() as stack:
        if tier is not None:
            stack.enter_context(method.at_tier(tier))
        found = generator.run(tokens, settings, on_token=on_token if len(prompts) == 1 else lambda row, token: None)
    if len(prompts) == 1:
        on_text(found[0].text[stream.told :])
    written = []
    for generated in found:
        shown = None
        if show and ladder and generated.trace:
            pieces = _pieces(tokenizer, [*generated.prompt, *generated.tokens])
            shown = Shown(pieces, generated.trace, len(generated.prompt), ladder)
        written.append(Written(generated, shown))
    return written


class TextStream:
    """Tokens become text as they come: letters of several tokens once they are whole, and nothing of a stop."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), special: bool = False) -> None:
        """special: with the text of special tokens."""
        self.tokenizer, self.stops, self.special = tokenizer, stops, special
        self.tokens: list[int] = []
        self.whole = 0  # tokens whose text is out, or held back
        self.held = ""  # text that may be the beginning of a stop
        self.told = 0  # letters that were given out
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain now."""
        self.tokens.append(token)
        start = max(0, self.whole - CONTEXT)
        before, now = (self._text(self.tokens[start:end]) for end in (self.whole, len(self.tokens)))
        if now.endswith("\ufffd") or self.stopped:
            return ""
        self.whole = len(self.tokens)
        text = self.held + now[len(before) :]
        for stop in self.stops:
            if stop in text:
                text, self.stopped = text.partition(stop)[0], True
        beginnings = (len(k) for stop in self.stops for k in (stop[:i] for i in range(len(stop), 0, -1)) if text.endswith(k))
        keep = 0 if self.stopped else max(beginnings, default=0)
        self.held = text[len(text) - keep :]
        text = text[: len(text) - keep]
        self.told += len(text)
        return text

    def _text(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=not self.special)
        return text


def _check(settings: GenerationSettings) -> None:
    if any(not stop for stop in settings.stop):
        raise UsageError("an empty text can not end an answer", "Give --stop some text, or leave it out.")
    if 0 < settings.temperature < LEAST_TEMPERATURE:
        raise UsageError(
            f"a temperature of {settings.temperature:g} is too low to draw", "0 takes the likeliest token; 0.7 is usual."
        )
    if settings.temperature == 0 and (settings.top_k or settings.top_p < 1):
        raise UsageError("--top-k and --top-p are for drawing, and temperature 0 draws nothing", "Give --temperature 0.7 or so.")


def _within(settings: GenerationSettings, prompt: int, limit: int | None) -> GenerationSettings:
    """The settings with as many new tokens as the model can read after the longest prompt."""
    if limit is None or prompt + settings.max_new_tokens <= limit:
        return settings
    if prompt >= limit:
        raise UsageError(f"the prompt has {prompt} tokens, and the model reads {limit}", "Shorten it.")
    log.warning("the model reads %d tokens: after a prompt of %d there is room for %d", limit, prompt, limit - prompt)
    return replace(settings, max_new_tokens=limit - prompt)


def cache_policy(name: str | None) -> KVPolicy | None:
    """The policy that was named. Raises UsageError for one that there is not."""
    known = get_args(KVPolicy)
    for policy in known:
        if name == policy:
            found: KVPolicy = policy
            return found
    if name is None:
        return None
    near = get_close_matches(name, known, 1)
    meant = f" Did you mean `{near[0]}`?" if near else ""
    raise UsageError(f"there is no cache policy `{name}`", f"One of {', '.join(known)}.{meant}")


def _tokens(tokenizer: Any, prompt: str, chat: bool, rows: int | None) -> list[int]:
    """The ids of a prompt, for a model whose embedding has so many rows. Raises UsageError for one that can not be read."""
    if chat:
        if not tokenizer.chat_template:
            raise UsageError("the run's tokenizer has no chat template", "Leave --chat out.")
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    (ids,) = prompt_tokens(tokenizer, [prompt])
    if not ids:
        raise UsageError("the prompt is empty", "Give some text to go on from.")
    if rows is not None and max(ids) >= rows:
        raise UsageError(f"the prompt has {without_embedding(tokenizer, max(ids), rows)}", "Leave that text out of the prompt.")
    return ids


def _pieces(tokenizer: Any, tokens: list[int]) -> list[str]:
    """The text of each token, so that all together are the text of the whole."""
    stream = TextStream(tokenizer, special=True)
    return [stream.push(token) for token in tokens]
