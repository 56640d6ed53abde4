"""Generation: prompts become texts, token by token, at the tiers that the method's scheduler
chooses.

The forward pass is lorakit's own (`decoder`) where the architecture allows, elsewhere the model's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lorakit.inference.decoder import Decoder
from lorakit.inference.forward import Forward, HFForward, NativeForward
from lorakit.methods import KVPolicies, Method, Token
from lorakit.models.task_model import TaskModel

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class GenerationSettings:
    """Settings of generation: temperature 0 takes the likeliest token; stop: texts that end a
    sequence, left out of it; ends: tokens that do so beside the model's own."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    batch_size: int = 8
    ends: tuple[int, ...] = ()


@dataclass(frozen=True)
class Generated:
    """One sequence.

    tokens: the new ones, without end-of-sequence; trace: tiers of the prompt's and the new tokens,
    [] without tiers (the last token was never run, so it has none). Of its batch: kv_bytes, the
    mean over its sequences of the bytes of keys and values as they are kept, and kv_bytes_full in
    the model's own type; prefill_seconds, and step_seconds, the median over the new tokens, without
    the time of `on_token`.
    """

    prompt: list[int]
    tokens: list[int]
    text: str
    trace: list[Token]
    kv_bytes: int
    kv_bytes_full: int
    prefill_seconds: float
    step_seconds: float


@dataclass
class _Sequences:
    """Sequences that are generated together: their new tokens, and how long they took."""

    prompts: Prompts
    tokens: list[list[int]]
    open: list[bool]  # not ended yet
    prefill_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)


class Generator:
    """Writes with a saved run's model.

    fallback: why the model's own forward pass is used, or None; ends: tokens that end a sequence.
    """

    def __init__(
        self,
        task_model: TaskModel,
        method: Method,
        kv: KVPolicies | None = None,
        own: bool = True,
    ) -> None:
        """kv: other policies than the method's; own: false for the model's own forward pass."""
        self.task_model, self.method = task_model, method
        tiers = method.tiers
        self.kv = kv or (tiers.kv_policies() if tiers else KVPolicies())
        task_model.model.eval()
        self.decoder: Decoder | None = None
        self.fallback: str | None = "the model's own forward pass was asked for"
        if own:
            # The decoder is compared with all components on every token.
            with tiers.full_rank() if tiers else nullcontext():
                self.decoder, why = Decoder.build(task_model.model, method.adapters)
            self.fallback = None if self.decoder else why
        self.ends = task_model.ends()

    def run(
        self,
        prompts: Prompts,
        settings: GenerationSettings,
        progress: Callable[[int, int], None] = lambda done, total: None,
        on_token: Callable[[int, int], None] = lambda row, token: None,
    ) -> list[Generated]:
        """A text for each prompt of token ids, none of them empty, in their order.

        progress(prompts done, in all) is called after each batch, on_token(prompt, token) for each
        new token.
        """
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        found: dict[int, Generated] = {}
        for start in range(0, len(order), settings.batch_size):
            numbers = order[start : start + settings.batch_size]

            def on_row(row: int, token: int, numbers: list[int] = numbers) -> None:
                on_token(numbers[row], token)

            results = self._batch([prompts[i] for i in numbers], settings, on_row)
            found |= dict(zip(numbers, results, strict=True))
            progress(len(found), len(order))
        return [found[i] for i in range(len(order))]

    def forward(self) -> Forward:
        """Forward passes for a new batch of sequences."""
        tiers = self.method.tiers
        if self.decoder is not None:
            return NativeForward(self.decoder, tiers.scheduler() if tiers else None, self.kv)
        return HFForward(self.task_model.model, tiers, self.kv)

    @torch.inference_mode()
    def _batch(
        self,
        prompts: Prompts,
        settings: GenerationSettings,
        on_token: Callable[[int, int], None],
    ) -> list[Generated]:
        device = self.task_model.device
        ids, mask = _left_padded(prompts)
        forward, choose = self.forward(), _chooser(settings)
        batch = _Sequences(prompts, [[] for _ in prompts], [True] * len(prompts))
        started = time.perf_counter()
        logits = forward.start(ids.to(device), mask.to(device))
        batch.prefill_seconds = time.perf_counter() - started
        for place in range(settings.max_new_tokens):
            started = time.perf_counter()
            chosen = choose(logits)
            new = self._take(batch, chosen.tolist(), settings)
            if any(batch.open) and place + 1 < settings.max_new_tokens:
                logits = forward.step(chosen[:, None], logits)
                batch.step_seconds.append(time.perf_counter() - started)
            for row, token in new:
                on_token(row, token)
            if not any(batch.open):
                break
        return list(self._results(batch, forward, settings))

    def _take(
        self,
        batch: _Sequences,
        chosen: list[int],
        settings: GenerationSettings,
    ) -> list[tuple[int, int]]:
        """Add the chosen tokens to the sequences that have not ended: (row, token) of each."""
        new = []
        for row, token in enumerate(chosen):
            if not batch.open[row]:
                continue
            if token in self.ends or token in settings.ends:
                batch.open[row] = False
                continue
            new.append((row, token))
            batch.tokens[row].append(token)
            batch.open[row] = not _stopped(
                self.task_model.tokenizer, batch.tokens[row], settings.stop
            )
        return new

    def _results(
        self,
        batch: _Sequences,
        forward: Forward,
        settings: GenerationSettings,
    ) -> Iterator[Generated]:
        traces, rows = forward.traces, len(batch.prompts)
        kept, full = (size // rows for size in forward.kv_bytes)
        step = statistics.median(batch.step_seconds) if batch.step_seconds else 0.0
        seconds = batch.prefill_seconds, step
        for row, (prompt, tokens) in enumerate(zip(batch.prompts, batch.tokens, strict=True)):
            text = self.task_model.tokenizer.decode(tokens, skip_special_tokens=True)
            for stop in settings.stop:
                text = text.partition(stop)[0]
            trace = traces[row][: len(prompt) + len(tokens)] if traces else []
            yield Generated(list(prompt), tokens, text, trace, kept, full, *seconds)


def _left_padded(prompts: Prompts) -> tuple[Tensor, Tensor]:
    """(ids, mask) [prompts, tokens of the longest], the mask true for tokens."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = True
    return ids, mask


def _chooser(settings: GenerationSettings) -> Callable[[Tensor], Tensor]:
    """logits [rows, vocabulary] → tokens [rows]."""
    if settings.temperature == 0:
        return lambda logits: logits.argmax(-1)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(settings.temperature)])
    if settings.top_k:
        warpers.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        warpers.append(TopPLogitsWarper(settings.top_p))
    rng = torch.Generator().manual_seed(settings.seed)

    def draw(logits: Tensor) -> Tensor:
        # The warpers look at the logits alone.
        no_ids: Any = torch.empty(len(logits), 0, dtype=torch.long)
        scores: Any = logits.float().cpu()
        shares = warpers(no_ids, scores).softmax(-1)
        return shares.multinomial(1, generator=rng).squeeze(1).to(logits.device)

    return draw


def _stopped(tokenizer: Any, tokens: list[int], stops: tuple[str, ...]) -> bool:
    """True if the text ends with, or has just gone beyond, one of the stops."""
    if not stops:
        return False
    # No token is shorter than a byte, so this many hold any stop that the newest one completes.
    longest = max(len(stop.encode()) for stop in stops) + 1
    tail = tokenizer.decode(tokens[-longest:], skip_special_tokens=True)
    return any(stop in tail for stop in stops)
