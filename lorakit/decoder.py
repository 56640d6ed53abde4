"""Decoders of Llama's make, run without their modules: for generating text, where a step of one token is many small
operations and one pass over all weights.

- Layers that read the same input (q/k/v; gate/up) are one matrix, with the adapters' A stacked under the weights: one
  product gives the base's outputs and the low-rank ones. Components stand tier after tier, so that a tier is a prefix of
  the rows. The model's own weights become views of that matrix, and nothing is held twice.
- One token is a vector, and its products are `torch.mv`: measured on two cores in bf16, over weights that are in no cache,
  oneDNN's matrix-vector product took 0.6 to 0.85 of the time of the matrix product that `linear` runs for one row. Whether
  oneDNN's or torch's own is faster for a weight differs by up to 2 times either way between shapes and machines, and is
  measured as the decoder is built; for the small B, torch's own is (4 to 16 against 20 to 25 µs).
- From four tokens on, and for a prompt, oneDNN's matrix product won at every shape; at two, neither clearly did.
- Which architectures these are is read off their structure, and then proved with random tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, rms_norm, silu

from lorakit.adapter import Adapter
from lorakit.kernels.tiered_linear import TierPlan
from lorakit.kv_store import KVStore

# How far logits may be from the model's own, as a share of their spread: roundings of the type, layer after layer. (In
# bf16, 30 layers: ours and the model's own are each 5 to 10 % from those of float32, and as far from each other.)
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.25}
PROOF_PREFILL, PROOF_STEPS = 8, 4
REPEATS = 4
BODY_PARTS = {"embed_tokens", "layers", "norm", "rotary_emb"}
LAYER_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
ATTENTION_PARTS, HEAD_NORMS = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"q_norm", "k_norm"}
FEED_FORWARD_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
# What is not computed here: None in the config of a model without it. The few tokens of the proof would fit any window.
ABSENT = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")


Matvec = Callable[[Tensor, Tensor], Tensor]


class Unsupported(Exception):
    """The reason why a model can not be run here."""


class Up(NamedTuple):
    """The B of one layer in a group: outputs [start, stop) get b [stop - start, last - first] times components [first, last)."""

    b: Tensor
    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True)
class Tier:
    """What a group multiplies when no token needs more than a certain block.

    weight [out + components, in]: the first rows of the group's. order [components]: puts those of each layer side by
    side, or None where they are.
    """

    weight: Tensor
    order: Tensor | None
    ups: list[Up]


class Group:
    """Linear layers that read the same input, as one: W x + bias + B (m ⊙ (A x)), the scale within B.

    The layers' own weights become views of the group's, [out + components, in]. ends: after how many components of the
    group each tier ends.
    """

    def __init__(self, layers: Sequence[nn.Module], blocks: int) -> None:
        bases = [_base(layer) for layer in layers]
        ladders = [_ladder(layer, blocks) for layer in layers]
        like = bases[0].weight
        if any(base.weight.dtype != like.dtype or base.weight.device != like.device for base in bases):
            raise Unsupported("layers that read the same input differ in type or device")
        stops = np.cumsum([0, *(len(base.weight) for base in bases)]).tolist()
        self.out: int = stops[-1]
        self.ends = [sum(ends) for ends in zip(*(ends for _, _, ends in ladders), strict=True)]
        self.bias = None
        if any(base.bias is not None for base in bases):
            self.bias = torch.cat([like.new_zeros(len(b.weight)) if b.bias is None else b.bias.detach() for b in bases])
        self.product: Matvec = _torch_mv  # with one vector: see _choose_matvec
        # Block after block, and in each the components of each layer.
        pieces: list[tuple[int, int, int]] = []  # layer, first and last of its components
        for block in range(len(self.ends)):
            for number, (_, _, ends) in enumerate(ladders):
                pieces.append((number, ends[block - 1] if block else 0, ends[block]))
        if len(bases) == 1 and self.ends[-1] == 0:
            weight = like.detach()
        else:
            downs = [ladders[number][0][first:last].to(like) for number, first, last in pieces]
            weight = torch.cat([*(base.weight.detach() for base in bases), *downs])
            for base, (start, stop) in zip(bases, pairwise(stops), strict=True):
                base.weight.data = weight[start:stop]
        owner = np.repeat([number for number, _, _ in pieces], [last - first for _, first, last in pieces])
        full = [b.to(like).contiguous() for _, b, _ in ladders]
        self.tiers = []
        for tier, count in enumerate(self.ends):
            order = np.argsort(owner[:count], kind="stable")
            ranks = [ends[tier] for _, _, ends in ladders]
            firsts = np.cumsum([0, *ranks]).tolist()
            spans = zip(full, ranks, pairwise(stops), pairwise(firsts), strict=True)
            ups = [Up(b[:, :rank], *outs, *components) for b, rank, outs, components in spans if rank]
            sorted_already = bool((order == np.arange(count)).all())
            index = None if sorted_already else torch.from_numpy(order).to(like.device)
            self.tiers.append(Tier(weight[: self.out + count], index, ups))

    def __call__(self, x: Tensor, plan: TierPlan | None) -> Tensor:
        """x [tokens, in], or [in] for one token; returns [tokens, out] or [out]."""
        tier = self.tiers[-1 if plan is None else plan.top]
        one = x.dim() == 1
        y = self.product(tier.weight, x) if one else linear(x, tier.weight)
        if not tier.ups:
            return y if self.bias is None else y.add_(self.bias)
        base, low = y[..., : self.out], y[..., self.out :]
        if self.bias is not None:
            base.add_(self.bias)
        if plan is not None and not plan.uniform:
            # For many tokens too: gathering those of each block loses (see kernels.tiered_linear).
            low = low * plan.mask(self.ends, x.dtype).view(low.shape)
        if tier.order is not None:
            low = low.index_select(-1, tier.order)
        for b, start, stop, first, last in tier.ups:
            part = low[..., first:last]
            base[..., start:stop].add_(torch.mv(b, part) if one else linear(part, b))
        return base


@dataclass(frozen=True)
class Layer:
    """A block of the decoder. head_norm [heads + kv heads, head_dim]: weights of the norms of queries and keys."""

    norm: Tensor
    qkv: Group
    head_norm: Tensor | None
    scaling: float
    o: Group
    feed_forward_norm: Tensor
    gate_up: Group
    down: Group


class Decoder:
    """A causal language model with adapters, for inference only. Make one with `build`.

    Base weights are shared with the model; A and B are copies: after a change of them, build anew.
    """

    def __init__(self, model: Any) -> None:
        """Raises Unsupported for what can be seen from the structure."""
        body = _body_of(model)
        blocks = {len(adapter.ladder()[2]) for adapter in model.modules() if isinstance(adapter, Adapter)} or {1}
        if len(blocks) > 1:
            raise Unsupported(f"its adapters have different numbers of tiers: {sorted(blocks)}")
        first = body.layers[0]
        self.head_dim: int = first.self_attn.head_dim
        self.heads = len(first.self_attn.q_proj.weight) // self.head_dim
        self.kv_heads = len(first.self_attn.k_proj.weight) // self.head_dim
        self.embedding: Tensor = body.embed_tokens.weight.detach()
        device, dtype = self.embedding.device, self.embedding.dtype
        self.eps: float = body.norm.variance_epsilon
        self.eps_tensor = torch.tensor(self.eps, device=device)
        self.rotary = body.rotary_emb
        self.sign = torch.tensor([[-1.0], [1.0]], dtype=dtype, device=device)  # of the two halves of a head: see forward
        self.layers = [self._layer(block, max(blocks)) for block in body.layers]
        self.norm: Tensor = body.norm.weight.detach()
        self.head = Group([model.lm_head], max(blocks))
        for kind in ("qkv", "o", "gate_up", "down"):
            _choose_matvec([getattr(layer, kind) for layer in self.layers])
        _choose_matvec([self.head])

    @staticmethod
    def build(model: Any, adapters: Mapping[str, Adapter]) -> tuple[Decoder | None, str]:
        """A decoder that was seen to give the model's own logits, with all adapters at their top tier; or None, and why.

        adapters: {module name: adapter}, all of the model's. The model goes on working: its weights become views of joined
        ones, which writers of safetensors refuse to save as they are.
        """
        if model.training:
            return None, "the model is in training mode"
        try:
            with torch.no_grad():
                decoder = Decoder(model)
                for adapter in adapters.values():
                    if adapter._frozen is not None:  # it holds on to the weight of before
                        adapter.freeze()
                decoder._prove(model)
        except Unsupported as reason:
            return None, str(reason)
        return decoder, ""

    @torch.inference_mode()
    def forward(
        self, ids: Tensor, positions: Tensor, store: KVStore, plan: TierPlan | None = None, all_logits: bool = False
    ) -> Tensor:
        """Logits [rows, vocabulary] of the last tokens, or all of them [rows, n, vocabulary].

        ids and positions [rows, n]. store: opened for these tokens (`begin`) by the caller, who closes it. plan: of these
        tokens, rows · n of them; None: the top tier.
        """
        with _small_products(self.embedding, ids.numel()):
            return self._forward(ids, positions, store, plan, all_logits)

    def _forward(self, ids: Tensor, positions: Tensor, store: KVStore, plan: TierPlan | None, all_logits: bool) -> Tensor:
        rows, n = ids.shape
        x = embedding(ids.reshape(-1), self.embedding)  # [tokens, hidden]
        if len(x) == 1:
            x = x[0]  # [hidden]
        # Rotary embedding: x ⊙ cos + rotate_half(x) ⊙ sin, the halves of a head [2, head_dim / 2] swapped and the sign in sin.
        halves = (rows * n, 1, 2, self.head_dim // 2)
        cos, sin = (table.view(halves) for table in self.rotary(x, positions))
        sin = sin * self.sign
        rotated = self.heads + self.kv_heads
        for number, layer in enumerate(self.layers):
            y = layer.qkv(self._normed(x, layer.norm), plan)
            qk, value = y[..., : rotated * self.head_dim], y[..., rotated * self.head_dim :]
            if layer.head_norm is not None:
                qk = rms_norm(qk.view(rows * n, rotated, self.head_dim), (self.head_dim,), None, self.eps) * layer.head_norm
            qk = qk.view(rows * n, rotated, *halves[2:])
            qk = torch.addcmul(qk * cos, qk.flip(-2), sin).view(rows, n, rotated, self.head_dim).transpose(1, 2)
            store.append(number, qk[:, self.heads :], value.view(rows, n, self.kv_heads, self.head_dim).transpose(1, 2))
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
        return (x * torch.addcmul(self.eps_tensor, norm, norm, value=1 / len(x)).rsqrt_()).mul_(weight)

    def _layer(self, block: Any, blocks: int) -> Layer:
        attention, feed_forward = block.self_attn, block.mlp
        head_norm = None
        if hasattr(attention, "q_norm"):
            norms = attention.q_norm.weight, attention.k_norm.weight
            head_norm = torch.cat([w.expand(n, -1) for w, n in zip(norms, (self.heads, self.kv_heads), strict=True)]).detach()
        return Layer(
            block.input_layernorm.weight.detach(),
            Group([attention.q_proj, attention.k_proj, attention.v_proj], blocks),
            head_norm,
            attention.scaling,
            Group([attention.o_proj], blocks),
            block.post_attention_layernorm.weight.detach(),
            Group([feed_forward.gate_proj, feed_forward.up_proj], blocks),
            Group([feed_forward.down_proj], blocks),
        )

    def _prove(self, model: Any) -> None:
        """Raises Unsupported unless logits of random tokens, some at once and then one by one, are those of the model."""
        tokens = PROOF_PREFILL + PROOF_STEPS
        ids = torch.randint(len(self.embedding), (1, tokens), generator=torch.Generator().manual_seed(0)).to(
            self.embedding.device
        )
        positions = torch.arange(tokens, device=ids.device)[None]
        expected = model(input_ids=ids, use_cache=False).logits[0].float()
        store, ours = KVStore(["full"], layers=len(self.layers)), []
        for start, stop in pairwise([0, *range(PROOF_PREFILL, tokens + 1)]):
            store.begin(np.zeros((1, stop - start), np.int64))
            ours.append(self.forward(ids[:, start:stop], positions[:, start:stop], store, None, all_logits=True)[0])
            store.end()
        error = torch.cat(ours).float() - expected
        share = float(error.norm() / (expected - expected.mean(-1, keepdim=True)).norm())
        if not share <= TOLERANCE[self.embedding.dtype]:
            raise Unsupported(f"its logits are not those of a Llama with these weights: they differ by {share:.1%}")


def _body_of(model: Any) -> Any:
    """The model without its head. Raises Unsupported unless all parts are those of a Llama, Qwen3's head norms included."""
    prefix = getattr(model, "base_model_prefix", "")
    _check_parts(model, {prefix, "lm_head"}, "the model")
    body = getattr(model, prefix)
    _check_parts(body, BODY_PARTS, "its body")
    for block in body.layers:
        _check_parts(block, LAYER_PARTS, "a layer")
        _check_parts(block.self_attn, ATTENTION_PARTS, "its attention", HEAD_NORMS)
        _check_parts(block.mlp, FEED_FORWARD_PARTS, "its feed-forward part")
        if _name(block.mlp.act_fn) not in ("SiLU", "SiLUActivation"):
            raise Unsupported(f"its activation is {_name(block.mlp.act_fn)}")
        attention = block.self_attn
        for norm in (getattr(attention, name) for name in HEAD_NORMS if hasattr(attention, name)):
            if norm.weight.shape != (attention.head_dim,):
                raise Unsupported("its queries or keys are normed across heads")
    norms = [module for name, module in model.named_modules() if name.endswith("norm")]
    if any(getattr(norm, "variance_epsilon", None) != norms[-1].variance_epsilon or hasattr(norm, "bias") for norm in norms):
        raise Unsupported("its norms are not all RMSNorm with the same epsilon")
    config = model.config
    for key in ABSENT:
        if getattr(config, key, None) is not None:
            raise Unsupported(f"{key} is {getattr(config, key)}")
    if kinds := set(getattr(config, "layer_types", None) or []) - {"full_attention"}:
        raise Unsupported(f"it has layers of {', '.join(sorted(kinds))}")
    own = [p for module in model.modules() if not isinstance(module, Adapter) for p in module.parameters(recurse=False)]
    if own[0].dtype not in TOLERANCE or len({(p.dtype, p.device) for p in own}) > 1:
        raise Unsupported("its weights are not all of one floating type, on one device")
    return body


def _check_parts(module: nn.Module, needed: Set[str], what: str, optional: Set[str] = frozenset()) -> None:
    parts = {name for name, _ in module.named_children()}
    if needed - parts or parts - needed - optional:
        raise Unsupported(f"{what} ({_name(module)}) consists of {', '.join(sorted(parts)) or 'nothing'}")


def _name(module: nn.Module) -> str:
    return type(module).__name__


def _base(layer: nn.Module) -> nn.Linear:
    """The linear layer itself, under an adapter or not."""
    base = layer.base if isinstance(layer, Adapter) else layer
    if type(base) is not nn.Linear:
        raise Unsupported(f"a {_name(base)} is where a linear layer is expected")
    return base


def _ladder(layer: nn.Module, blocks: int) -> tuple[Tensor, Tensor, list[int]]:
    """What `Adapter.ladder` gives; without an adapter no components, at every tier."""
    if isinstance(layer, Adapter):
        return layer.ladder()
    weight = _base(layer).weight
    return weight.new_zeros(0, weight.shape[1]), weight.new_zeros(len(weight), 0), [0] * blocks


# -- matrix-vector products ------------------------------------------------------------------------------------------


def _switch_onednn(on: bool) -> None:
    """Without the 20 µs of the context manager `torch.backends.mkldnn.flags`."""
    torch.backends.mkldnn.enabled = on  # type: ignore[assignment]


def _torch_mv(matrix: Tensor, vector: Tensor) -> Tensor:
    return torch.mv(matrix, vector)


def _onednn_mv(matrix: Tensor, vector: Tensor) -> Tensor:
    """A product with oneDNN among those without."""
    _switch_onednn(True)
    y = torch.mv(matrix, vector)
    _switch_onednn(False)
    return y


@contextmanager
def _small_products(like: Tensor, tokens: int) -> Iterator[None]:
    """For one token in half precision on a processor: oneDNN is off but for the groups that turn it on."""
    before: Any = torch.backends.mkldnn.enabled
    if tokens > 1 or not _has_choice(like):
        yield
        return
    _switch_onednn(False)
    try:
        yield
    finally:
        _switch_onednn(before)


def _has_choice(like: Tensor) -> bool:
    """Whether oneDNN and torch each have a product of their own."""
    half = like.dtype in (torch.bfloat16, torch.float16)
    return half and like.device.type == "cpu" and bool(torch.backends.mkldnn.enabled)


def _choose_matvec(groups: Sequence[Group]) -> None:
    """Decide for groups of the same shape, but for their ranks, by whichever way multiplies all of them faster; all, so
    that none is still in a cache. The best of a few turns each, as other work on the machine only ever adds time."""
    weights = [group.tiers[-1].weight for group in groups]
    if not _has_choice(weights[0]):
        return
    vector = torch.ones_like(weights[0][0])
    best: dict[Matvec, float] = dict.fromkeys((_torch_mv, _onednn_mv), float("inf"))
    with _small_products(vector, 1):
        for _ in range(REPEATS):
            for product in best:
                start = time.perf_counter()
                for weight in weights:
                    product(weight, vector)
                best[product] = min(best[product], time.perf_counter() - start)
    for group in groups:
        group.product = min(best, key=best.__getitem__)
