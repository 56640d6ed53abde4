"""`store` as a cache for the models of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from transformers import Cache

from lorakit import compat
from lorakit.errors import RunError
from lorakit.inference.kv.slots import Integers
from lorakit.inference.kv.store import KVStore
from lorakit.kernels.attention import NAME
from lorakit.methods import KVPolicy

compat.check_cache_methods()


class PolicyCache(Cache):
    """A KVStore as a cache for a transformers model: `model(..., cache=cache)` or
    `model.generate(..., cache=cache)`; before transformers 5.24 the argument is `past_key_values`
    (lorakit.compat).

    The model's attention must be lorakit's (`lorakit.kernels.attention.use_attention`), which finds
    the cache on the keys and leaves attention to it. `open`, before a forward pass, sets the tiers
    of the new tokens; otherwise they are of the top tier. Raises RunError for a model that it can
    not serve, and ValueError as KVStore does.
    """

    def __init__(
        self, config: Any, policies: Sequence[KVPolicy], window: int | None = None
    ) -> None:
        super().__init__(layers=[])
        config = config.get_text_config(decoder=True)
        if (attention := compat.attention_name(config)) != NAME:
            raise RunError(
                "the key-value cache works with lorakit's own attention, and the model has"
                f" `{attention}`",
                "Load the model with the attention `sdpa` and call"
                " `lorakit.kernels.attention.use_attention`.",
            )
        limited = any(
            getattr(config, name, None) is not None
            for name in ("sliding_window", "attention_chunk_size")
        )
        others = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
        if limited or others or config.is_encoder_decoder:
            raise RunError(
                f"the key-value cache can not serve `{config.model_type}`: not all of its layers"
                " see all that came before"
            )
        self.store = KVStore(policies, window, config.num_hidden_layers)
        self._last = config.num_hidden_layers - 1
        self._tiers: Integers | None = None  # of the next forward
        self._padding: Integers | None = None  # [rows]
        self._waiting: tuple[int, Tensor, Tensor] | None = None

    def open(self, tiers: Integers, padding: Integers | None = None) -> None:
        """Set the tiers [rows, n] of the next forward pass's tokens.

        padding [rows], with the first pass: as in KVStore.begin, or else read from the mask.
        """
        self._tiers = tiers
        if padding is not None:
            self._padding = padding

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Take the new keys and values of a layer, and return them alone: lorakit's attention finds
        this cache on the key.

        Raises RunError when the layer before used another attention, which saw the new ones alone.
        """
        self._check_attended()
        self._waiting = (layer_idx, key_states, value_states)
        key_states.kv_store = self  # type: ignore[attr-defined]
        return key_states, value_states

    def attend(self, query: Tensor, attention_mask: Tensor | None, scaling: float | None) -> Tensor:
        """The attention of the layer that was updated last; arguments and result as in
        lorakit.kernels.attention.

        Raises RunError for a mask that hides more than later tokens and padding, and as KVStore
        does.
        """
        if self._waiting is None:
            raise RunError("attention over a key-value cache that got no keys")
        layer, key, value = self._waiting
        self._waiting = None
        if layer == 0:
            self._begin(len(key), key.shape[2], attention_mask)
        self.store.append(layer, key, value)
        result = self.store.attend(layer, query, scaling)
        if layer == self._last:
            self.store.end()
        return result

    def _begin(self, rows: int, n: int, mask: Tensor | None) -> None:
        tiers, self._tiers = self._tiers, None
        if tiers is None:
            tiers = np.full((rows, n), len(self.store.policies) - 1)
        if tiers.shape != (rows, n):
            raise RunError(
                f"the cache was told the tiers of {tiers.shape} tokens, and {(rows, n)} come"
            )
        past = self.store.length
        if mask is not None:
            seen = mask[:, 0].cpu().numpy()  # [rows or 1, n, keys]
            if past == 0 and self._padding is None:
                self._padding = np.broadcast_to(seen[:, -1].argmax(-1), (rows,))
            padding = np.zeros(rows, np.int64) if self._padding is None else self._padding
            query, key = np.arange(past, past + n)[:, None], np.arange(past + n)
            first = padding[:, None, None]
            if (
                seen.dtype != bool
                or seen.shape[1:] != (n, past + n)
                or ((seen != ((key >= first) & (key <= query))) & (query >= first)).any()
            ):
                raise RunError(
                    "the model's attention mask hides something else than what comes later and"
                    " padding at the left"
                )
        self.store.begin(tiers, self._padding if past == 0 else None)

    def _check_attended(self) -> None:
        if self._waiting is not None:
            raise RunError(
                f"layer {self._waiting[0]} did not use lorakit's attention, so it saw the newest"
                " tokens only",
                "The key-value cache works with models whose attention is"
                " `lorakit.kernels.attention`.",
            )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that each row has had, padding included. Raises RunError as `update` does."""
        self._check_attended()
        return self.store.length

    def get_mask_sizes(self, query: int | Tensor, layer_idx: int) -> tuple[int, int]:
        """(keys, offset) of a mask over everything. query: as `compat.new_tokens` takes it."""
        return self.store.length + compat.new_tokens(query), 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Raises RunError: beam search is not supported."""
        self._refuse("beam search")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Raises RunError: rows can not be multiplied."""
        self._refuse("multiplying rows")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Raises RunError: rows can not be picked."""
        self._refuse("picking rows")

    def crop(self, tokens_to_remove: int) -> None:
        """Raises RunError: what was quantised or evicted does not come back."""
        self._refuse("taking tokens back")

    def reset(self) -> None:
        """Raises RunError: make a new one."""
        self._refuse("emptying")

    @property
    def is_croppable(self) -> bool:
        """False."""
        return False

    @staticmethod
    def _refuse(what: str) -> None:
        raise RunError(
            f"{what} is not possible with the key-value cache",
            "Use greedy search or sampling, without a cache policy otherwise.",
        )
