"""Text generation from a saved run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, get_args

from lorakit.data.chat_template import ends_of_turn
from lorakit.data.tokenise import prompt_tokens
from lorakit.data.vocabulary import embedding_rows, without_embedding
from lorakit.errors import UsageError
from lorakit.inference.generator import Generated, GenerationSettings, Generator
from lorakit.inference.text_stream import TextStream
from lorakit.kernels.dispatch import announce
from lorakit.methods import KVPolicies, KVPolicy
from lorakit.models.load import compute_dtype, default_device
from lorakit.models.positions import longest_input
from lorakit.models.tasks import task_named
from lorakit.recipes.recipe import Recipe
from lorakit.report.chunks import Shown
from lorakit.report.progress import Progress
from lorakit.runs.chat import Chat
from lorakit.runs.moment import chosen
from lorakit.runs.saved import saved_model, saved_recipe

log = logging.getLogger("lorakit")

# Below this, sampling only ever draws the likeliest token, until the division overflows.
LEAST_TEMPERATURE = 0.01
# Tokens that the policy `window` keeps when the command line names it instead of the recipe.
WINDOW = 256


@dataclass(frozen=True)
class Written:
    """Text generated for one prompt, with its figures. shown: None for a method without tiers."""

    generated: Generated
    shown: Shown | None

    def in_words(self) -> str:
        """The figures in one line."""
        one = self.generated
        parts = [
            f"{len(one.tokens)} tokens",
            f"{1000 * one.step_seconds:.1f} ms a token",
            f"prefill {one.prefill_seconds:.2f} s",
        ]
        kept = (
            f" ({one.kv_bytes / one.kv_bytes_full - 1:+.0%} against full)"
            if 0 < one.kv_bytes != one.kv_bytes_full
            else ""
        )
        parts.append(f"cache {one.kv_bytes:,} bytes{kept}")
        if self.shown is not None:
            parts.insert(
                0, f"mean rank {self.shown.mean_rank:.2f} in {len(self.shown.chunks)} chunks"
            )
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
            facts["mean_rank_written"] = (
                None if shown.mean_rank_written is None else round(shown.mean_rank_written, 3)
            )
            facts["chunks"] = [
                {"start": start, "end": end, "tier": tier, "text": "".join(shown.pieces[start:end])}
                for start, end, tier in shown.chunks
            ]
        return facts


def write(
    run: Path,
    prompts: Iterable[str],
    settings: GenerationSettings,
    progress: Progress,
    *,
    chat: Chat | None = None,
    kv: KVPolicy | None = None,
    tier: int | None = None,
    own: bool = True,
    show: bool = False,
    on_text: Callable[[str], None] = lambda text: None,
) -> tuple[list[Written], str | None]:
    """(a text for each prompt, the reason why the model's own forward pass was used, or None).

    chat: the prompts are turns of one conversation, answered one after the other; kv: one policy
    for all tokens instead of the run's; tier: index in the ladder of one tier for all tokens; own:
    use lorakit's own forward pass where possible; show: also return what the display of chunks
    needs; on_text: called with the text as it grows, if there is one prompt or a conversation.
    Raises UsageError for settings and prompts that do not fit.
    """
    _check(settings)
    run = chosen(run)
    recipe = saved_recipe(run)
    ladder = check_writes(run, recipe, tier)
    device = default_device()
    announce(device)
    with progress.stage("loading the model"):
        task_model, method, _ = saved_model(
            run, recipe, compute_dtype(recipe.train.precision, device)
        )
        generator = Generator(
            task_model, method, KVPolicies((kv,) * len(ladder or [1]), WINDOW) if kv else None, own
        )
    return (
        write_with(generator, recipe, prompts, settings, chat, tier, show, on_text),
        generator.fallback,
    )


def check_writes(run: Path, recipe: Recipe, tier: int | None = None) -> list[int] | None:
    """The ladder of a run that generates text, or None. Raises UsageError for a run that generates
    none, and for a tier that it lacks."""
    if not task_named(task := recipe.model.task).predicts_tokens:
        what = f"the run `{run}` is of {task}: it writes nothing"
        raise UsageError(what, "lorakit eval runs a classifier.")
    ladder: list[int] | None = getattr(recipe.method, "rungs", None)
    if tier is not None and (ladder is None or not 0 <= tier < len(ladder)):
        tiers = (
            None if ladder is None else f"the tiers 0 to {len(ladder) - 1}, of the ranks {ladder}"
        )
        raise UsageError(f"there is no tier {tier}", f"The run has {tiers or 'no tiers'}.")
    return ladder


def write_with(
    generator: Generator,
    recipe: Recipe,
    prompts: Iterable[str],
    settings: GenerationSettings,
    chat: Chat | None = None,
    tier: int | None = None,
    show: bool = False,
    on_text: Callable[[str], None] = lambda text: None,
) -> list[Written]:
    """A text for each prompt, by the generator of the recipe's run, which `check_writes` has
    accepted. With `chat`, the prompts are read one by one, each after the answer to the one before.
    Raises UsageError for settings and prompts that do not fit."""
    _check(settings)
    ladder: list[int] | None = getattr(recipe.method, "rungs", None)
    task_model, tiers = generator.task_model, generator.method.tiers
    tokenizer, config = task_model.tokenizer, task_model.model.config
    rows, limit = embedding_rows(config), longest_input(config, tokenizer, recipe.model)
    found: list[Generated] = []
    with nullcontext() if tier is None or tiers is None else tiers.at_tier(tier):
        if chat is None:
            tokens = [
                _checked(tokenizer, ids, rows) for ids in prompt_tokens(tokenizer, [*prompts])
            ]
            fitting = _within(settings, max(map(len, tokens)), limit)
            found = _generate(generator, tokens, fitting, on_text)
        else:
            chat.check(tokenizer)
            settings = replace(settings, batch_size=1, ends=ends_of_turn(tokenizer))
            for prompt in prompts:
                ids = _checked(tokenizer, chat.asked(tokenizer, prompt), rows)
                fitting = _within(settings, len(ids), limit)
                found += _generate(generator, [ids], fitting, on_text)
                chat.answered(found[-1].text)
    shown = partial(_shown, tokenizer, ladder if show else None)
    return [Written(generated, shown(generated)) for generated in found]


def _generate(
    generator: Generator,
    prompts: list[list[int]],
    settings: GenerationSettings,
    on_text: Callable[[str], None],
) -> list[Generated]:
    """The generated sequences; a single one is also passed to `on_text` as it grows."""
    if len(prompts) > 1:
        return generator.run(prompts, settings)
    stream = TextStream(generator.task_model.tokenizer, settings.stop)

    def on_token(_: int, token: int) -> None:
        if text := stream.push(token):
            on_text(text)

    found = generator.run(prompts, settings, on_token=on_token)
    on_text(found[0].text[stream.written :])
    return found


def _shown(tokenizer: Any, ladder: list[int] | None, generated: Generated) -> Shown | None:
    """The sequence with its chunks; None without tiers."""
    if not (ladder and generated.trace):
        return None
    pieces = _pieces(tokenizer, [*generated.prompt, *generated.tokens])
    return Shown(pieces, generated.trace, len(generated.prompt), ladder)


def _check(settings: GenerationSettings) -> None:
    if any(not stop for stop in settings.stop):
        raise UsageError(
            "an empty text can not end an answer", "Give --stop some text, or leave it out."
        )
    if 0 < settings.temperature < LEAST_TEMPERATURE:
        raise UsageError(
            f"a temperature of {settings.temperature:g} is too low to draw",
            "0 takes the likeliest token; 0.7 is usual.",
        )
    if settings.temperature == 0 and (settings.top_k or settings.top_p < 1):
        raise UsageError(
            "--top-k and --top-p are for drawing, and temperature 0 draws nothing",
            "Give --temperature 0.7 or so.",
        )


def _within(settings: GenerationSettings, prompt: int, limit: int | None) -> GenerationSettings:
    """The settings, with max_new_tokens limited to what the model can read after the longest
    prompt."""
    if limit is None or prompt + settings.max_new_tokens <= limit:
        return settings
    if prompt >= limit:
        raise UsageError(
            f"the prompt has {prompt} tokens, and the model reads {limit}", "Shorten it."
        )
    log.warning(
        "the model reads %d tokens: after a prompt of %d there is room for %d",
        limit,
        prompt,
        limit - prompt,
    )
    return replace(settings, max_new_tokens=limit - prompt)


def cache_policy(name: str | None) -> KVPolicy | None:
    """The policy of this name. Raises UsageError for an unknown one."""
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


def _checked(tokenizer: Any, ids: list[int], rows: int | None) -> list[int]:
    """The ids of a prompt, for a model whose embedding has `rows` rows. Raises UsageError for a
    prompt that cannot be read."""
    if not ids:
        raise UsageError("the prompt is empty", "Give some text to go on from.")
    if rows is not None and max(ids) >= rows:
        raise UsageError(
            f"the prompt has {without_embedding(tokenizer, max(ids), rows)}",
            "Leave that text out of the prompt.",
        )
    return ids


def _pieces(tokenizer: Any, tokens: list[int]) -> list[str]:
    """The text of each token; joined, they are the whole text."""
    stream = TextStream(tokenizer, special=True)
    return [stream.push(token) for token in tokens]
