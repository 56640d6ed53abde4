"""A model with its tokenizer and task: padding, logits, and the loss of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from lorakit import compat
from lorakit.data.batches import IGNORED, Batch
from lorakit.kernels.cross_entropy import linear_cross_entropy
from lorakit.kernels.packing import Packing, using
from lorakit.models.tasks import Task

# Configuration keys that limit how far a token attends.
LOCAL_ATTENTION = ("sliding_window", "attention_chunk_size", "local_attention")


@dataclass
class TaskModel:
    """A model with its tokenizer and task. `heads` are the modules trained in full, in float32.

    new_cache: makes the key-value cache of a pass without gradients; None where the keys and values
    that it stores are exact, so that no cache is needed. reads_at_pad: the class is read at the
    last token that is not the pad token (`reads_at_pad_token`). reads_first: the class is read at
    the first token alone. fresh: the heads' parameters that the checkpoint lacks. base_pad_id: pad
    token of the base's configuration. packs: rows go through the blocks without padding;
    pads_to_train: except where gradients are needed. compiles: products are compiled for each
    number of tokens (lorakit.cpu.speed_up)."""

    model: Any  # no type of transformers has the attributes of both the module and the config
    tokenizer: Any
    task: Task
    heads: list[str]
    new_cache: Callable[[], Any] = field(default=lambda: None)
    reads_at_pad: bool = False
    reads_first: bool = False
    fresh: frozenset[str] = frozenset()
    base_pad_id: int | None = None
    packs: bool = False
    pads_to_train: bool = False
    compiles: bool = True

    @cached_property
    def pad_id(self) -> int:
        """The token id that rows are padded with: the model's own pad token, the tokenizer's, or
        another that has an embedding.

        The tokenizer itself is never changed: its padding settings are the base's own, and are
        exported.
        """
        config = self.model.config.get_text_config()
        return with_embedding(
            self.model, [getattr(config, "pad_token_id", None), *fillers(self.tokenizer)]
        )

    def ends(self, own: bool = False) -> set[int]:
        """Tokens that end a generated text: those of the base's generation settings and, unless
        `own`, the tokenizer's end token, with which completions end in training."""
        named = getattr(self.model.generation_config, "eos_token_id", None)
        found = named if isinstance(named, list) else [named]
        return {
            token
            for token in [*found, None if own else self.tokenizer.eos_token_id]
            if token is not None
        }

    @cached_property
    def bare_head(self) -> bool:
        """True if the token logits are exactly the output embedding applied to the last hidden
        states.

        Found by running the model: some architectures scale or cap their logits (Gemma 2, Granite,
        Cohere).
        """
        head = self.model.get_output_embeddings()
        if head is None:
            return False
        ids = (
            torch.arange(1, 9, device=self.device)[None]
            % self.model.config.get_text_config().vocab_size
        )
        mode = self.model.training
        self.model.eval()
        with torch.no_grad():
            # A model without a body of its own (Llama 4's text part) is its own base model, and
            # returns logits here.
            hidden = getattr(self.model.base_model(ids, use_cache=False), "last_hidden_state", None)
            same = hidden is not None and torch.equal(
                head(hidden), self.model(ids, use_cache=False).logits
            )
        self.model.train(mode)
        return same

    def _target_losses(self, batch: Batch, present: Tensor, targets: Tensor) -> Tensor:
        """The loss of each target [targets], computed only from the positions before targets where
        the architecture allows it."""
        if not self.bare_head:
            return cross_entropy(
                self.logits(batch)[:, :-1][present].float(), targets, reduction="none"
            )
        inputs = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
        } | self._cached(self.model.base_model)
        with using(self.packing(batch, present)):
            hidden = self.model.base_model(**inputs).last_hidden_state[:, :-1][present]
        head = self.model.get_output_embeddings()
        frozen = (
            type(head) is nn.Linear
            and not head.weight.requires_grad
            and head.weight.dtype == hidden.dtype
        )
        if not frozen:
            return cross_entropy(head(hidden).float(), targets, reduction="none")
        return linear_cross_entropy(hidden, head.weight, head.bias, targets)

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    def logits(self, batch: Batch) -> Tensor:
        """Class logits [rows, classes], or token logits [rows, longest, vocabulary]."""
        if self._class_token is not None:
            # Models refuse a batch whose rows have different counts of this token, which happens
            # when a text spells it out; rows of equal count are computed together.
            ends = (batch.input_ids == self._class_token).sum(1)
            if len(counts := torch.unique(ends)) > 1:
                groups = [(ends == count).nonzero().squeeze(1) for count in counts]
                order = torch.cat(groups).argsort()
                return torch.cat([self.logits(batch.select(rows)) for rows in groups])[order]
        inputs: dict[str, Any] = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
        }
        if batch.token_type_ids is not None:
            inputs["token_type_ids"] = batch.token_type_ids
        # The model's own pass, heads included: where a decoder reads its class is its own rule,
        # here as in plain transformers.
        with using(self.packing(batch)):
            logits: Tensor = self.model(**(inputs | self._cached(self.model))).logits
        return logits

    @cached_property
    def _class_token(self) -> int | None:
        return self.task.class_token(getattr(self.model, "config", None))

    def packing(self, batch: Batch, read: Tensor | None = None) -> Packing | None:
        """How the rows of a batch are packed; None where they stay padded, as they must for a
        cache.

        read [rows, at most longest]: True at the positions whose last hidden states are read, as
        far as the caller knows.
        """
        longest = batch.input_ids.shape[1]
        if longest > self.longest_packed:
            return None
        packing = Packing(batch.lengths.tolist(), longest, self.device, self.compiles)
        if self.reads_first:
            packing.read = packing.firsts[:-1].to(self.device)
        elif read is not None and read.any():
            places = packing.packed_place.view(-1, longest)[:, : read.shape[1]]
            packing.read = places[read].sort().values
        return packing

    @property
    def longest_packed(self) -> float:
        """Tokens of the longest row that is packed, in the current gradient mode; 0 where none
        is."""
        if not self.packs or (
            self.pads_to_train if torch.is_grad_enabled() else self.new_cache() is not None
        ):
            return 0
        return self._shortest_window

    @cached_property
    def _shortest_window(self) -> float:
        """Longest row that may be packed: packed attention ignores limits on how far a token
        attends. Infinite without limits."""
        config = self.model.config.get_text_config()
        limits = (getattr(config, name, None) for name in LOCAL_ATTENTION)
        return min((limit for limit in limits if isinstance(limit, int)), default=math.inf)

    def _cached(self, module: Any) -> dict[str, Any]:
        """Cache arguments for a pass of the model or of its body: no cache, unless the cache
        affects the result."""
        if not self.task.predicts_tokens or torch.is_grad_enabled():
            return dict(self.task.uncached)
        cache = self.new_cache()
        if cache is None:
            return dict(self.task.uncached)
        # Rows are padded on the right, which no earlier token can see: no mask is needed, and a
        # cache keeps none.
        return {"use_cache": True, "attention_mask": None} | compat.cache_argument(module, cache)

    def run_body(self, batch: Batch) -> None:
        """Run the model without its head, for callers that watch its layers."""
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if batch.token_type_ids is not None:
            inputs["token_type_ids"] = batch.token_type_ids
        self.model.base_model(**inputs, **self.task.uncached)

    def row_losses(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """(loss of each row, summed over its targets [rows]; class logits, or None where tokens are
        predicted), in float32."""
        losses: tuple[Tensor, Tensor | None] = self.task.row_losses(self, batch)
        return losses

    def token_losses(self, batch: Batch) -> Tensor:
        """The loss of each row [rows] whose targets are tokens."""
        targets = batch.labels[:, 1:]
        present = targets != IGNORED
        losses = torch.zeros(targets.shape, device=targets.device)
        losses[present] = self._target_losses(batch, present, targets[present])
        return losses.sum(1)

    def label_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(the loss of each row [rows], whose target is a class or a number; the logits)."""
        logits = self.logits(batch)
        if batch.labels.is_floating_point():
            return mse_loss(logits.float().squeeze(-1), batch.labels, reduction="none"), logits
        return cross_entropy(logits.float(), batch.labels, reduction="none"), logits


def with_embedding(model: Any, tokens: Sequence[int | None]) -> int:
    """The first of the tokens that is not None and has a row in the input embeddings; 0 if none
    has."""
    rows = getattr(compat.input_embeddings(model), "num_embeddings", math.inf)
    return next((token for token in tokens if token is not None and 0 <= token < rows), 0)


def fillers(tokenizer: Any) -> list[int | None]:
    """Tokens to pad with, the tokenizer's own first."""
    return [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
