"""Generation: prompts become texts, token by token, at the tiers that the method's scheduler chooses.

The forward pass is our own (`decoder`) where the architecture allows, with the cache's storage beneath it; elsewhere it is the
model's, with the same storage as a cache of transformers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lorakit import compat
from lorakit.inference.decoder import Decoder
from lorakit.inference.kv.policy_cache import PolicyCache
from lorakit.inference.kv.store import KVStore
from lorakit.methods import KVPolicies, Method, Scheduler, Token
from lorakit.models.task_model import TaskModel


@dataclass(frozen=True)
class GenerationSettings:
    """temperature 0 takes the likeliest token. stop: texts that end a sequence, left out of it."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    batch_size: int = 8


@dataclass(frozen=True)
class Generated:
    """One sequence. tokens: the new ones, without end-of-sequence; trace: what the prompt's and the new tokens got, [] without
    tiers (the last token was never run, so it has none). Of its batch: kv_bytes, the mean over its sequences of the bytes of keys
    and values as they are kept, and kv_bytes_full in the model's own type; prefill_seconds, and step_seconds, the median over
    the new tokens, without what `on_token` took."""

    prompt: list[int]
    tokens: list[int]
    text: str
    trace: list[Token]
    kv_bytes: int
    kv_bytes_full: int
    prefill_seconds: float
    step_seconds: float


class _Forward(Protocol):
    """One batch of sequences in progress."""

    def start(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits [rows, vocabulary] after the prompts ids [rows, n], padded on the left; mask [rows, n] is true for tokens."""

    def step(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Logits after one more token each, ids [rows, 1], chosen from `logits`."""

    @property
    def traces(self) -> list[list[Token]]:
        """Trace of each sequence, with a Token for each of its tokens; [] without tiers."""

    @property
    def kept(self) -> tuple[int, int]:
        """Bytes of keys and values as they are kept, and as many tokens' in the model's own type."""


class _Own:
    """The pass of `decoder`."""

    def __init__(self, decoder: Decoder, scheduler: Scheduler | None, kv: KVPolicies) -> None:
        self.decoder, self.scheduler = decoder, scheduler
        self.store = KVStore(kv.by_tier, kv.window, len(decoder.layers))

    def start(self, ids: Tensor, mask: Tensor) -> Tensor:
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        self.next = positions[:, -1:] + 1
        schedule = self.scheduler.prompt(ids, mask) if self.scheduler else None
        self.store.begin(_tiers(schedule, ids, self.store), (~mask).sum(1).cpu().numpy())
        return self._run(ids, positions, schedule)

    def step(self, ids: Tensor, logits: Tensor) -> Tensor:
        schedule = self.scheduler.step(ids, logits) if self.scheduler else None
        self.store.begin(_tiers(schedule, ids, self.store))
        positions, self.next = self.next, self.next + 1
        return self._run(ids, positions, schedule)

    def _run(self, ids: Tensor, positions: Tensor, schedule: Any) -> Tensor:
        logits: Tensor = self.decoder.forward(ids, positions, self.store, schedule.plan if schedule else None)
        self.store.end()
        return logits

    @property
    def traces(self) -> list[list[Token]]:
        return self.scheduler.traces if self.scheduler else []

    @property
    def kept(self) -> tuple[int, int]:
        return self.store.nbytes, self.store.nbytes_if_full


def _tiers(schedule: Any, ids: Tensor, store: KVStore) -> Any:
    """[rows, n]: without a scheduler the top tier, whose policy is the last."""
    return schedule.tiers if schedule else np.full(tuple(ids.shape), len(store.policies) - 1)


class _Theirs:
    """The model's own pass, in which the method's hooks do the scheduling."""

    def __init__(self, model: Any, method: Method, kv: KVPolicies) -> None:
        self.model, self.method = model, method
        # Where nothing is lost any architecture's own cache will do.
        self.cache = compat.new_cache(model.config) if kv.exact else PolicyCache(model.config, kv.by_tier, kv.window)

    def start(self, ids: Tensor, mask: Tensor) -> Tensor:
        self.mask = mask.long()
        return self._run(ids, (self.mask.cumsum(1) - 1).clamp(min=0))

    def step(self, ids: Tensor, logits: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), 1)], 1)
        return self._run(ids, self.mask.sum(1, keepdim=True) - 1)

    def _run(self, ids: Tensor, positions: Tensor) -> Tensor:
        output = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **compat.cache_argument(self.model, self.cache),
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    @property
    def traces(self) -> list[list[Token]]:
        scheduler = self.method.scheduler(self.cache)
        return scheduler.traces if scheduler else []

    @property
    def kept(self) -> tuple[int, int]:
        if isinstance(self.cache, PolicyCache):
            return self.cache.store.nbytes, self.cache.store.nbytes_if_full
        held = compat.cache_bytes(self.cache)
        return held, held


class Generator:
    """Writes with a saved run's model. fallback: why the model's own pass is used, or None; ends: tokens that end a sequence."""

    def __init__(self, task_model: TaskModel, method: Method, kv: KVPolicies | None = None, own: bool = True) -> None:
        """kv: other policies than the method's; own: false for the model's own forward pass."""
        self.task_model, self.method = task_model, method
        self.kv = kv or method.kv_policies()
        task_model.model.eval()
        self.decoder: Decoder | None = None
        self.fallback: str | None = "the model's own forward pass was asked for"
        if own:
            with method.full_rank():  # the proof is of all components on every token
                self.decoder, why = Decoder.build(task_model.model, method.adapters)
            self.fallback = None if self.decoder else why
        self.ends = task_model.ends()

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings,
        progress: Callable[[int, int], None] = lambda done, total: None,
        on_token: Callable[[int, int], None] = lambda row, token: None,
    ) -> list[Generated]:
        """A text for each prompt of token ids, none of them empty, in their order.

        progress(prompts done, in all) is called after each batch, on_token(prompt, token) for each new token.
        """
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        found: dict[int, Generated] = {}
        for start in range(0, len(order), settings.batch_size):
            part = order[start : start + settings.batch_size]
            results = self._batch([prompts[i] for i in part], settings, lambda row, token, part=part: on_token(part[row], token))  # type: ignore[misc]
            found |= dict(zip(part, results, strict=True))
            progress(len(found), len(order))
        return [found[i] for i in range(len(order))]

    def _forward(self) -> _Forward:
        if self.decoder is not None:
            return _Own(self.decoder, self.method.scheduler(), self.kv)
        return _Theirs(self.task_model.model, self.method, self.kv)

    @torch.inference_mode()
    def _batch(
        self, prompts: Sequence[Sequence[int]], settings: GenerationSettings, on_token: Callable[[int, int], None]
    ) -> list[Generated]:
        device, tokenizer = self.task_model.device, self.task_model.tokenizer
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = True
        forward, choose = self._forward(), _chooser(settings)
        started = time.perf_counter()
        logits = forward.start(ids.to(device), mask.to(device))
        prefill, seconds = time.perf_counter() - started, []
        written: list[list[int]] = [[] for _ in prompts]
        open_ = [True] * len(prompts)
        for place in range(settings.max_new_tokens):
            started = time.perf_counter()
            chosen = choose(logits)
            new = [(row, token) for row, token in enumerate(chosen.tolist()) if open_[row]]
            for row, token in new:
                open_[row] = token not in self.ends
                if open_[row]:
                    written[row].append(token)
                    open_[row] = not _stopped(tokenizer, written[row], settings.stop)
            if any(open_) and place + 1 < settings.max_new_tokens:
                logits = forward.step(chosen[:, None], logits)
                seconds.append(time.perf_counter() - started)
            for row, token in new:
                if token not in self.ends:
                    on_token(row, token)
            if not any(open_):
                break
        step = statistics.median(seconds) if seconds else 0.0
        return list(self._results(prompts, written, forward, settings, prefill, step))

    def _results(
        self,
        prompts: Sequence[Sequence[int]],
        written: list[list[int]],
        forward: _Forward,
        settings: GenerationSettings,
        prefill: float,
        step: float,
    ) -> Iterator[Generated]:
        traces, (held, whole), share = forward.traces, forward.kept, len(prompts)
        for row, (prompt, tokens) in enumerate(zip(prompts, written, strict=True)):
            text = self.task_model.tokenizer.decode(tokens, skip_special_tokens=True)
            for stop in settings.stop:
                text = text.partition(stop)[0]
            trace = traces[row][: len(prompt) + len(tokens)] if traces else []
            yield Generated(list(prompt), tokens, text, trace, held // share, whole // share, prefill, step)


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
        no_ids: Any = torch.empty(len(logits), 0, dtype=torch.long)  # the warpers look at the logits alone
        scores: Any = logits.float().cpu()
        shares = warpers(no_ids, scores).softmax(-1)
        return shares.multinomial(1, generator=rng).squeeze(1).to(logits.device)

    return draw


def _stopped(tokenizer: Any, tokens: list[int], stops: tuple[str, ...]) -> bool:
    """True if the text ends with, or has just gone beyond, one of the stops."""
    if not stops:
        return False
    # No token is shorter than a byte, so this many hold any stop that the newest one completes.
    tail = tokenizer.decode(tokens[-(max(len(stop.encode()) for stop in stops) + 1) :], skip_special_tokens=True)
    return any(stop in tail for stop in stops)
