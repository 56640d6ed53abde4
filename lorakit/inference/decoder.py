"""Decoders like Llama's, run without their modules.

This is for generation, where a step of one token is many small operations and one pass over all
weights.

- Layers that read the same input (q/k/v; gate/up) are one product (`linear_groups`). The model's
  own weights become views.
- One token in bfloat16 or float32 on a processor is one call of a kernel in C (`decode_step`),
  where there is a compiler.
- A model is recognised by its structure; then its logits for random tokens are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, rms_norm, silu

from lorakit.adapters.layer import Adapter
from lorakit.cpu.llama import check_blocks
from lorakit.cpu.whole_block import check_parts
from lorakit.inference.decode_step import DecodeStep
from lorakit.inference.kv.store import KVStore
from lorakit.inference.linear_groups import (
    DecoderLayer,
    JoinedLinear,
    choose_matvec,
    small_products,
)
from lorakit.kernels.huge_pages import Arena
from lorakit.kernels.optimisation import Optimisation, Unsupported, attempt
from lorakit.kernels.tiered_linear import TierPlan

# How far logits may be from the model's own, as a share of their spread: roundings of the type,
# layer after layer. (In bf16, 30 layers: ours and the model's own are each 5 to 10 % from those of
# float32, and as far from each other.)
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.25}
COMPARED_PREFILL, COMPARED_STEPS = 8, 4
BODY_PARTS = {"embed_tokens", "layers", "norm", "rotary_emb"}


class Decoder:
    """A causal language model with adapters, for inference only. Make one with `build`.

    Base weights are shared with the model; A and B are copies: after a change of them, build anew.
    """

    def __init__(self, model: Any) -> None:
        """Raises Unsupported for a model of another structure."""
        body = _body_of(model)
        blocks = {
            len(adapter.ladder()[2]) for adapter in model.modules() if isinstance(adapter, Adapter)
        } or {1}
        if len(blocks) > 1:
            raise Unsupported(f"its adapters have different numbers of tiers: {sorted(blocks)}")
        first = body.layers[0]
        self.head_dim: int = first.self_attn.head_dim
        self.heads = len(first.self_attn.q_proj.weight) // self.head_dim
        self.kv_heads = len(first.self_attn.k_proj.weight) // self.head_dim
        device, dtype = body.norm.weight.device, body.norm.weight.dtype
        self.eps: float = body.norm.variance_epsilon
        self.eps_tensor = torch.tensor(self.eps, device=device)
        self.rotary = body.rotary_emb
        self.as_float = torch.empty(0, device=device)  # the type of cosines and sines: see forward
        # of the two halves of a head: see forward
        self.sign = torch.tensor([[-1.0], [1.0]], dtype=dtype, device=device)
        join = partial(JoinedLinear, blocks=max(blocks), arena=Arena())
        self.layers = [self._layer(block, join) for block in body.layers]
        self.norm: Tensor = body.norm.weight.detach()
        self.head = join([model.lm_head])
        # after the head, whose weight it may share
        self.embedding: Tensor = body.embed_tokens.weight.detach()
        self.step = DecodeStep.of(
            self.layers, self.head, self.embedding, self.norm, self.heads, self.eps
        )
        if self.step is None:
            for kind in ("qkv", "o", "gate_up", "down"):
                choose_matvec([getattr(layer, kind) for layer in self.layers])
            choose_matvec([self.head])

    @staticmethod
    def build(model: Any, adapters: Mapping[str, Adapter]) -> tuple[Decoder | None, str]:
        """(decoder, "") once its logits are the model's own, with all adapters at their top tier;
        or (None, the reason).

        adapters: {module name: adapter}, all of the model's. The model still works: its weights
        become views of joined ones, which safetensors refuses to save as they are.
        """
        fast = FastDecoding(model, adapters)
        reason = attempt(fast)
        return fast.decoder, reason or ""

    @torch.inference_mode()
    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        store: KVStore,
        plan: TierPlan | None = None,
        all_logits: bool = False,
    ) -> Tensor:
        """Logits [rows, vocabulary] of the last tokens, or all of them [rows, n, vocabulary]: in
        the model's type, or in float32 where they are computed in C.

        ids and positions [rows, n]. store: opened for these tokens (`begin`) by the caller, who
        closes it. plan: of these tokens, rows · n of them; None: the top tier.
        """
        if self.step is not None and ids.numel() == 1 and (held := store.hand_over()) is not None:
            cos, sin = (table.view(-1) for table in self.rotary(self.as_float, positions))
            logits = self.step(int(ids), cos, sin, held, plan)
            return logits[None] if all_logits else logits
        with small_products(self.embedding, ids.numel()):
            return self._forward(ids, positions, store, plan, all_logits)

    def _forward(
        self,
        ids: Tensor,
        positions: Tensor,
        store: KVStore,
        plan: TierPlan | None,
        all_logits: bool,
    ) -> Tensor:
        rows, n = ids.shape
        x = embedding(ids.reshape(-1), self.embedding)  # [tokens, hidden]
        if len(x) == 1:
            x = x[0]  # [hidden]
        # Rotary embedding: x ⊙ cos + rotate_half(x) ⊙ sin, the halves of a head [2, head_dim / 2]
        # swapped and the sign in sin.
        halves = (rows * n, 1, 2, self.head_dim // 2)
        cos, sin = (table.view(halves) for table in self.rotary(x, positions))
        sin = sin * self.sign
        rotated = self.heads + self.kv_heads
        for number, layer in enumerate(self.layers):
            y = layer.qkv(self._normed(x, layer.norm), plan)
            qk, value = y[..., : rotated * self.head_dim], y[..., rotated * self.head_dim :]
            if layer.head_norm is not None:
                qk = (
                    rms_norm(
                        qk.view(rows * n, rotated, self.head_dim), (self.head_dim,), None, self.eps
                    )
                    * layer.head_norm
                )
            qk = qk.view(rows * n, rotated, *halves[2:])
            qk = (
                torch.addcmul(qk * cos, qk.flip(-2), sin)
                .view(rows, n, rotated, self.head_dim)
                .transpose(1, 2)
            )
            store.append(
                number,
                qk[:, self.heads :],
                value.view(rows, n, self.kv_heads, self.head_dim).transpose(1, 2),
            )
            attended = store.attend(number, qk[:, : self.heads], layer.scaling)
            x += layer.o(attended.reshape(*x.shape[:-1], self.heads * self.head_dim), plan)
            gate, up = layer.gate_up(self._normed(x, layer.feed_forward_norm), plan).chunk(2, -1)
            x += layer.down(silu(gate).mul_(up), plan)
        if not all_logits:
            x = x if x.dim() == 1 else x.view(rows, n, -1)[:, -1]
        logits = self.head(self._normed(x, self.norm), None)
        return logits.view(rows, n, -1) if all_logits else logits.view(rows, -1)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm (arXiv 1910.07467) of x [tokens, hidden] or [hidden]."""
        if x.dim() > 1:
            return rms_norm(x, weight.shape, weight, self.eps)
        # torch's is put together from many operations: 10.7 µs for 576 in bf16, against 7.6.
        norm = torch.linalg.vector_norm(x, dtype=torch.float32)
        return (x * torch.addcmul(self.eps_tensor, norm, norm, value=1 / len(x)).rsqrt_()).mul_(
            weight
        )

    def _layer(
        self, block: Any, join: Callable[[Sequence[nn.Module]], JoinedLinear]
    ) -> DecoderLayer:
        attention, feed_forward = block.self_attn, block.mlp
        head_norm = None
        if hasattr(attention, "q_norm"):
            norms = attention.q_norm.weight, attention.k_norm.weight
            head_norm = torch.cat(
                [w.expand(n, -1) for w, n in zip(norms, (self.heads, self.kv_heads), strict=True)]
            ).detach()
        return DecoderLayer(
            block.input_layernorm.weight.detach(),
            join([attention.q_proj, attention.k_proj, attention.v_proj]),
            head_norm,
            attention.scaling,
            join([attention.o_proj]),
            block.post_attention_layernorm.weight.detach(),
            join([feed_forward.gate_proj, feed_forward.up_proj]),
            join([feed_forward.down_proj]),
        )

    def compare(self, model: Any) -> None:
        """Raises Unsupported unless logits of random tokens, some at once and then one by one, are
        those of the model."""
        tokens = COMPARED_PREFILL + COMPARED_STEPS
        ids = torch.randint(
            len(self.embedding), (1, tokens), generator=torch.Generator().manual_seed(0)
        ).to(self.embedding.device)
        positions = torch.arange(tokens, device=ids.device)[None]
        expected = model(input_ids=ids, use_cache=False).logits[0].float()
        store, ours = KVStore(["full"], layers=len(self.layers)), []
        for start, stop in pairwise([0, *range(COMPARED_PREFILL, tokens + 1)]):
            store.begin(np.zeros((1, stop - start), np.int64))
            ours.append(
                self.forward(
                    ids[:, start:stop], positions[:, start:stop], store, None, all_logits=True
                )[0]
            )
            store.end()
        error = torch.cat(ours).float() - expected
        share = float(error.norm() / (expected - expected.mean(-1, keepdim=True)).norm())
        if not share <= TOLERANCE[self.embedding.dtype]:
            raise Unsupported(
                "its logits are not those of a Llama with these weights: they differ by"
                f" {share:.1%}"
            )


class FastDecoding(Optimisation):
    """A decoder beside a model, for steps without its modules. The model stays as it is, but that
    its weights become views of joined ones."""

    trouble = "its decoder fails"
    decoder: Decoder | None = None

    def __init__(self, model: Any, adapters: Mapping[str, Adapter]) -> None:
        self.model, self.adapters = model, adapters

    @torch.no_grad()
    def install(self) -> None:
        if self.model.training:
            raise Unsupported("the model is in training mode")
        self.decoder = Decoder(self.model)
        for adapter in self.adapters.values():
            if adapter.frozen is not None:  # made from the weight that was replaced
                adapter.freeze()

    @torch.no_grad()
    def verify(self) -> None:
        assert self.decoder is not None
        self.decoder.compare(self.model)

    def undo(self) -> None:
        self.decoder = None


def _body_of(model: Any) -> Any:
    """The model without its head. Raises Unsupported unless all parts are those of a Llama, Qwen3's
    head norms included."""
    prefix = getattr(model, "base_model_prefix", "")
    check_parts(model, {prefix, "lm_head"}, "the model")
    body = getattr(model, prefix)
    check_parts(body, BODY_PARTS, "its body")
    check_blocks(body.layers, model.config)
    norms = [module for name, module in model.named_modules() if name.endswith("norm")]
    if any(
        getattr(norm, "variance_epsilon", None) != norms[-1].variance_epsilon
        or hasattr(norm, "bias")
        for norm in norms
    ):
        raise Unsupported("its norms are not all RMSNorm with the same epsilon")
    own = [
        p
        for module in model.modules()
        if not isinstance(module, Adapter)
        for p in module.parameters(recurse=False)
    ]
    if own[0].dtype not in TOLERANCE or len({(p.dtype, p.device) for p in own}) > 1:
        raise Unsupported("its weights are not all of one floating type, on one device")
    return body
