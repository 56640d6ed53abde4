"""A whole block as one operation against the model in float64, and against its own modules in bfloat16."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from test_engine import batch_of
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import (
    Ernie4_5Config,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OlmoConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from lorakit import llama
from lorakit.adapter import Adapter, adapters_of
from lorakit.engine import checkpoint_blocks, speed_up
from lorakit.inject import inject, match_targets, merge_all
from lorakit.kernels import native
from lorakit.kernels.attention import use_attention
from lorakit.kernels.decoder_block import decoder_block
from lorakit.kernels.elementwise import use_fast_elementwise
from lorakit.kernels.packed_attention import TILES
from lorakit.kernels.packing import Packing, using
from lorakit.kernels.rotary import use_fast_rotary
from lorakit.methods import Method, build_method, config_classes, method_names
from lorakit.model import AUTO_CLASS, TaskModel
from lorakit.optim import AdamW, ParamGroup

if native.load_with_tiles(TILES) is None:
    pytest.skip("this processor has no AMX, or there is no compiler", allow_module_level=True)

# Weights large enough that attention is far from uniform.
SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.12,
    "pad_token_id": 0,
}
WIDE_HEADS = SIZES | {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
}
RAGGED = (40, 1, 17, 33, 2, 1)


def llama_config(**settings: Any) -> LlamaConfig:
    return LlamaConfig(**(SIZES | settings))


@dataclass
class Tiny:
    """A model in bfloat16 as a run makes it."""

    task_model: TaskModel
    method: Method

    @property
    def model(self) -> Any:
        return self.task_model.model

    @property
    def blocks(self) -> list[Any]:
        return list(self.model.base_model.layers)

    @property
    def adapters(self) -> dict[str, Adapter]:
        return self.method.adapters

    @property
    def is_whole(self) -> list[bool]:
        """Of each block, whether it has a forward of its own."""
        return ["forward" in vars(block) for block in self.blocks]

    def losses(self, lengths: Sequence[int], seed: int = 0) -> Tensor:
        return self.task_model.row_losses(batch_of(lengths, "causal-lm", seed))[0]

    def gradients(self, lengths: Sequence[int] = RAGGED, dropout_seed: int = 0) -> dict[str, Tensor]:
        """Of the losses of random rows, for all factors; and the losses."""
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad and p.numel()}
        torch.manual_seed(dropout_seed)
        losses = self.losses(lengths)
        found = torch.autograd.grad(losses.sum(), list(trained.values()))
        return {"losses": losses.detach(), **dict(zip(trained, found, strict=True))}

    @contextmanager
    def by_modules(self) -> Iterator[None]:
        own = [vars(block).pop("forward") for block in self.blocks]
        yield
        for block, forward in zip(self.blocks, own, strict=True):
            block.forward = forward


def build(
    config: Any, method: str = "vanilla", dtype: torch.dtype = torch.bfloat16, residual: bool = False, **settings: Any
) -> Tiny:
    """With random factors, gates, biases and norms; residual: and one in every adapter."""
    torch.manual_seed(0)
    model: Any = AUTO_CLASS["causal-lm"].from_config(config).to(dtype)  # type: ignore[no-untyped-call]
    use_attention(model)
    use_fast_elementwise(model)
    use_fast_rotary(model)
    task_model = TaskModel(model, None, "causal-lm", [])
    spec = config_classes()[method].model_validate({"r": 4} | settings)
    made = build_method(spec, 0)
    chance = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=chance)
        inject(model, made, match_targets(model, spec))
        for adapter in made.adapters.values():
            randomise(adapter, chance)
            if residual:
                (inputs,), (outputs,) = adapter.lora_A.shape[1:], adapter.lora_B.shape[:1]
                adapter.add_residual(*(0.1 * torch.randn(*shape, generator=chance) for shape in ((2, inputs), (outputs, 2))))
    model.train()
    speed_up(task_model, made.adapters)
    return Tiny(task_model, made)


@torch.no_grad()
def randomise(adapter: Adapter, chance: torch.Generator) -> None:
    for name, parameter in adapter.components().items():
        if name == "gate":
            parameter.uniform_(0.1, 1.0, generator=chance)
        else:
            parameter.normal_(std=0.1, generator=chance)


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each block that was run as one operation."""
    seen: list[int] = []

    def watched(x: Tensor, *arguments: Any) -> Tensor:
        seen.append(x.shape[1])
        return decoder_block(x, *arguments)

    monkeypatch.setattr(llama, "decoder_block", watched)
    return seen


# -- against float64 -----------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """An adapter by its formula."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.base = copy.deepcopy(adapter.base)
        self.factors = nn.ParameterDict({name: p.detach().clone() for name, p in adapter.components().items()})
        self.residual = nn.ParameterDict({name: p.detach().clone() for name, p in adapter.residual().items()})
        self.scale = adapter.scale

    def forward(self, x: Tensor) -> Tensor:
        hidden = linear(x, self.factors["lora_A"])
        if "gate" in self.factors:
            hidden = hidden * self.factors["gate"]
        y: Tensor = self.base(x) + self.scale * linear(hidden, self.factors["lora_B"])
        if self.residual:
            y = y + linear(linear(x, self.residual["residual_A"]), self.residual["residual_B"])
        return y


def exact_twin(tiny: Tiny) -> Any:
    """transformers' own model in float64 with the same numbers."""
    config = copy.deepcopy(tiny.model.config)
    model: Any = AUTO_CLASS["causal-lm"].from_config(config, attn_implementation="eager")  # type: ignore[no-untyped-call]
    weights = {name.replace(".base.", "."): x for name, x in tiny.model.state_dict().items()}
    model.load_state_dict({name: x for name, x in weights.items() if name in model.state_dict()})
    for name, adapter in tiny.adapters.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, Plain(adapter))
    return model.double().eval()


def outcome(model: Any, lengths: Sequence[int], packed: bool) -> dict[str, Tensor]:
    """Hidden states of the real tokens, and gradients of the first block's input and of everything in adapters; in float64."""
    width = model.config.hidden_size
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    chance = torch.Generator().manual_seed(sum(lengths))
    x, upstream = (torch.randn(*real.shape, width, generator=chance).bfloat16().to(model.dtype) for _ in range(2))
    x.requires_grad_()
    packing = Packing(lengths, max(lengths), round_up=False) if packed else None
    with using(packing):
        y = model.base_model(inputs_embeds=x, attention_mask=real.long(), use_cache=False).last_hidden_state
    factors = {plain_name(name): p for name, p in model.named_parameters() if is_factor(name) and p.numel()}
    grad_x, *grads = torch.autograd.grad(y, [x, *factors.values()], upstream * real[..., None])
    assert not grad_x[~real].any()
    found = {"y": y.detach()[real], "x": grad_x[real], **dict(zip(factors, grads, strict=True))}
    # Gates are few numbers: those of all layers are one part.
    gates = [found.pop(name) for name in list(found) if name.endswith("gate")]
    return {name: value.double() for name, value in found.items()} | ({"gates": torch.cat(gates).double()} if gates else {})


def plain_name(name: str) -> str:
    return name.replace("factors.", "").replace("residual.", "")


def is_factor(name: str) -> bool:
    return name.rpartition(".")[2] in ("lora_A", "lora_B", "gate", "residual_A", "residual_B")


@dataclass
class Case:
    config: Any
    settings: dict[str, Any] = field(default_factory=dict)


NO_ATTENTION = dict.fromkeys(("q_proj", "k_proj", "v_proj"), 0)
CASES = {
    "grouped queries": Case(llama_config()),
    "heads of 64": Case(LlamaConfig(**WIDE_HEADS)),
    "biases": Case(llama_config(attention_bias=True, mlp_bias=True)),
    "qwen2": Case(Qwen2Config(**SIZES)),
    "mistral": Case(MistralConfig(**SIZES, sliding_window=None)),
    "ranks": Case(llama_config(), {"rank_pattern": {"k_proj": 0, "o_proj": 1, "gate_proj": 17, "up_proj": 40, "down_proj": 33}}),
    "none for the attention": Case(llama_config(attention_bias=True), {"rank_pattern": NO_ATTENTION | {"o_proj": 0}}),
    "none at all": Case(llama_config(), {"rank_pattern": {r".*_proj": 0}}),
    "gates": Case(llama_config(), {"method": "l1ra", "rank_pattern": {"v_proj": 0, "up_proj": 7}}),
    "residual": Case(llama_config(), {"residual": True, "rank_pattern": {"q_proj": 0, "down_proj": 0}}),
    "gates and residual": Case(llama_config(), {"method": "l1ra", "residual": True}),
}
# How far from float64, as multiples of how far the modules are: all parts together, and each by itself. What is rounded at other
# places is rounded otherwise, which a few numbers do not average out.
TOGETHER, EACH = 1.15, 2.0


@pytest.mark.parametrize("lengths", [RAGGED, (31,), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_results_are_as_near_to_float64_as_those_of_the_modules(name: str, lengths: tuple[int, ...], whole: list[int]) -> None:
    case = CASES[name]
    tiny = build(case.config, **case.settings)
    exact = outcome(exact_twin(tiny), lengths, packed=False)
    whole.clear()  # what was tried
    ours = outcome(tiny.model, lengths, packed=True)
    assert whole == [sum(lengths) + 1] * 2
    with tiny.by_modules():
        theirs = outcome(tiny.model, lengths, packed=True)
    assert len(whole) == 2
    mine, other = errors(ours, exact), errors(theirs, exact)
    for part, error in mine.items():
        assert error <= EACH * other[part] + 1e-3, part
        assert error < 0.06, part
    both = [sum(error**2 for error in found.values()) ** 0.5 for found in (mine, other)]
    assert both[0] <= TOGETHER * both[1]


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """As shares of the norm; of what is nearly zero, as a query's gradient where there is one key, of the largest gradient's."""
    assert found.keys() == exact.keys()
    floor = 0.03 * max(float(value.norm()) for part, value in exact.items() if part != "y")
    return {part: float((found[part] - right).norm() / right.norm().clamp_min(floor)) for part, right in exact.items()}


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], allowed: float = 0.05) -> None:
    """But for roundings."""
    assert max(errors(ours, theirs).values()) <= allowed


# -- what is asked of a pass -------------------------------------------------------------------------------------------


def test_dropout_of_attention_drops_what_the_modules_drop(whole: list[int]) -> None:
    tiny = build(llama_config(attention_dropout=0.3))
    whole.clear()
    ours, otherwise = tiny.gradients(), tiny.gradients(dropout_seed=1)
    assert len(whole) == 4
    with tiny.by_modules():
        theirs = tiny.gradients()
    close(ours, theirs)
    assert max(errors(otherwise, theirs).values()) > 0.3
    tiny.model.eval()
    assert torch.equal(tiny.gradients()["losses"], tiny.gradients(dropout_seed=1)["losses"])


def test_without_gradients_the_results_are_the_same(whole: list[int]) -> None:
    tiny = build(llama_config())
    expected = tiny.gradients()["losses"]
    whole.clear()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(tiny.losses(RAGGED), expected)
    assert len(whole) == 4
    close(tiny.gradients(), tiny.gradients())


def test_adapters_that_are_not_trained_and_an_input_without_a_gradient(whole: list[int]) -> None:
    tiny = build(llama_config(), method="l1ra")
    everything = tiny.gradients()
    for name, adapter in tiny.adapters.items():
        adapter.lora_A.requires_grad_("up_proj" in name)
        adapter.lora_B.requires_grad_("q_proj" not in name)
    whole.clear()
    some = tiny.gradients()
    assert len(whole) == 2
    assert 0 < len(some) < len(everything)
    assert all(torch.equal(grad, everything[name]) for name, grad in some.items())
    for adapter in tiny.adapters.values():
        adapter.requires_grad_(False)
    assert not tiny.losses(RAGGED).requires_grad


def test_the_gradient_of_a_batch_is_added_to_what_is_there() -> None:
    tiny = build(llama_config())
    once = tiny.gradients()
    for _ in range(2):
        tiny.losses(RAGGED).sum().backward()  # type: ignore[no-untyped-call]
    for name, parameter in tiny.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, 2 * once[name])


def test_gradients_can_be_had_once() -> None:
    tiny = build(llama_config())
    loss = tiny.losses(RAGGED).sum()
    trained = [p for p in tiny.model.parameters() if p.requires_grad]
    torch.autograd.grad(loss, trained, retain_graph=True)
    with pytest.raises(RuntimeError, match="can not be gone through again"):
        torch.autograd.grad(loss, trained)


def test_the_number_of_threads_changes_no_bit(whole: list[int]) -> None:
    tiny = build(llama_config(attention_dropout=0.1, attention_bias=True), method="l1ra")
    before, found = torch.get_num_threads(), []
    whole.clear()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(tiny.gradients((300, 40, 1)))
    finally:
        torch.set_num_threads(before)
    assert len(whole) == 6
    for others in found[1:]:
        assert all(torch.equal(value, found[0][name]) for name, value in others.items())


def test_fillers_come_into_nothing() -> None:
    """Tokens rounded up to another number, whatever the fillers hold: the values of the embedding of a padded place."""
    tiny = build(llama_config(attention_bias=True))
    exact = tiny.gradients((50, 23, 1))
    tiny.task_model.compiles = True
    assert Packing((50, 23, 1), 50).tokens > 75
    close(tiny.gradients((50, 23, 1)), exact, 0.01)


# -- passes that can not be one operation --------------------------------------------------------------------------------


def assert_by_modules(tiny: Tiny, whole: list[int], blocks: int = 0, **settings: Any) -> None:
    """`blocks` of the blocks are one operation, and the results are those of the modules."""
    whole.clear()
    ours = tiny.gradients(**settings)
    assert len(whole) == blocks
    with tiny.by_modules():
        theirs = tiny.gradients(**settings)
    close(ours, theirs, 0.05 if blocks else 0.0)


@pytest.mark.parametrize("part", ["self_attn.k_proj", "mlp.down_proj", "self_attn", "mlp", "post_attention_layernorm"])
def test_hooks_are_called(part: str, whole: list[int]) -> None:
    tiny = build(llama_config())
    expected, seen = tiny.gradients(), []
    module = tiny.blocks[1].get_submodule(part)
    for register in (module.register_forward_pre_hook, module.register_forward_hook):
        handle = register(lambda module, *others: seen.append(type(module).__name__))
        whole.clear()
        found = tiny.gradients()
        assert len(whole) == 1
        assert len(seen) == 1
        close(found, expected)
        handle.remove()
        seen.clear()
    assert_by_modules(tiny, whole, blocks=2)


def test_padded_rows_go_through_the_modules(whole: list[int]) -> None:
    tiny = build(llama_config())
    packed = tiny.gradients()
    tiny.task_model.packs = False
    assert_by_modules(tiny, whole)
    close(tiny.gradients(), packed)


def test_generation_with_a_cache_goes_through_the_modules(whole: list[int]) -> None:
    tiny = build(llama_config())
    tiny.model.eval()
    batch = batch_of((12,), "causal-lm")
    whole.clear()
    with torch.no_grad():
        logits = tiny.model(batch.input_ids).logits[:, -1]
        first = tiny.model(batch.input_ids[:, :7], use_cache=True)
        later = tiny.model(batch.input_ids[:, 7:], past_key_values=first.past_key_values, use_cache=True).logits[:, -1]
    assert not whole
    torch.testing.assert_close(later.float(), logits.float(), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("ranks", [(64, 0, 0), (63, 1, 1)], ids=str)
def test_ranks_too_high_to_be_joined(ranks: tuple[int, ...], whole: list[int]) -> None:
    tiny = build(llama_config(), rank_pattern=dict(zip(("q_proj", "k_proj", "v_proj"), ranks, strict=True)))
    assert_by_modules(tiny, whole, 2 if sum(ranks) <= SIZES["hidden_size"] else 0)


def test_ranks_that_grow_too_high_between_passes(whole: list[int]) -> None:
    tiny = build(llama_config())
    up = tiny.blocks[0].mlp.up_proj
    chance = torch.Generator().manual_seed(0)
    up.lora_A, up.lora_B = (nn.Parameter(torch.randn(shape, generator=chance) / 10) for shape in ((61, 64), (96, 61)))
    assert_by_modules(tiny, whole, 1)


def test_dropout_of_adapters_goes_through_the_modules(whole: list[int]) -> None:
    tiny = build(llama_config())
    tiny.blocks[0].mlp.down_proj.dropout = 0.1
    assert_by_modules(tiny, whole, 1)
    tiny.model.eval()
    assert_by_modules(tiny, whole, 2)
    assert build(llama_config(), lora_dropout=0.1).is_whole == [False] * 2


def test_chunkwise_is_one_operation_where_no_plan_is_followed(whole: list[int]) -> None:
    tiny = build(llama_config(), method="chunkwise", training="nested", difficulty={"source": "table"})
    method: Any = tiny.method
    assert_by_modules(tiny, whole, 2)
    expected = tiny.gradients()
    for tier in range(len(method.steps) + 1) if hasattr(method, "steps") else range(2):
        with method.at_tier(tier):
            assert_by_modules(tiny, whole)
    with method.at_tier(0):
        assert not torch.equal(tiny.gradients()["losses"], expected["losses"])


def test_frozen_adapters_are_run_as_such_without_gradients(whole: list[int]) -> None:
    tiny = build(llama_config())
    tiny.model.eval()
    expected = tiny.gradients()
    for adapter in tiny.adapters.values():
        adapter.freeze()
    whole.clear()
    with torch.no_grad():
        losses = tiny.losses(RAGGED)
    assert not whole
    torch.testing.assert_close(losses, expected["losses"], rtol=0.02, atol=0.1)
    close(tiny.gradients(), expected, 0.0)
    assert len(whole) == 2


@pytest.mark.parametrize("method", ["vanilla", "l1ra"])
@pytest.mark.parametrize("residual", [False, True])
def test_gradient_checkpointing(residual: bool, method: str, whole: list[int]) -> None:
    tiny = build(llama_config(attention_dropout=0.2), method=method, residual=residual)
    expected, kept = tiny.gradients(), kept_by(tiny)
    with tiny.by_modules():
        of_modules = kept_by(tiny)
    checkpoint_blocks(tiny.task_model, nullcontext)
    whole.clear()
    close(tiny.gradients(), expected, 0.0)
    assert len(whole) == 4
    assert kept_by(tiny) < kept / 2
    assert kept < of_modules


def kept_by(tiny: Tiny) -> int:
    """Bytes that autograd keeps for the backward pass of a batch, beside parameters."""
    known = {p.data_ptr() for p in tiny.model.parameters()}
    found: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if x.data_ptr() not in known:
            found[x.data_ptr()] = x.nbytes
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        losses = tiny.losses((100, 60))
    del losses
    return sum(found.values())


def test_the_modules_can_be_checkpointed_too() -> None:
    """What a layer is added to, and gates with it, is made anew for each pass."""
    for residual in (False, True):
        tiny = build(llama_config(), method="l1ra", residual=residual)
        with tiny.by_modules():
            expected = tiny.gradients()
            checkpoint_blocks(tiny.task_model, nullcontext)
            close(tiny.gradients(), expected, 0.0)


def test_every_adapter_with_a_forward_of_its_own_says_when_it_is_plain() -> None:
    assert method_names()
    kinds, found = list(Adapter.__subclasses__()), []
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        if "forward" in vars(kind):
            found.append(kind.__name__)
            assert "is_plain" in vars(kind), kind
    assert "TieredAdapter" in found


# -- models that change --------------------------------------------------------------------------------------------------


def test_a_merged_model_has_no_adapters(whole: list[int]) -> None:
    tiny = build(llama_config())
    with torch.no_grad():
        expected = tiny.losses(RAGGED)
        merge_all(tiny.model, tiny.adapters)
        assert not adapters_of(tiny.model)
        whole.clear()
        losses = tiny.losses(RAGGED)
        assert not whole
        torch.testing.assert_close(losses, expected, rtol=0.02, atol=0.1)
        with tiny.by_modules():
            assert torch.equal(losses, tiny.losses(RAGGED))


def test_a_copy_of_a_model_has_its_own_adapters() -> None:
    tiny = build(llama_config())
    expected = tiny.gradients()
    twin = copy.deepcopy(tiny)
    close(twin.gradients(), expected)
    with torch.no_grad():
        for adapter in tiny.adapters.values():
            adapter.lora_B.zero_()
    close(twin.gradients(), expected)
    assert not torch.equal(tiny.gradients()["losses"], expected["losses"])


def test_changes_of_the_base_are_seen(whole: list[int]) -> None:
    """Pruned, loaded, and weights of norms."""
    tiny = build(llama_config())
    before = tiny.gradients()["losses"]
    chance = torch.Generator().manual_seed(5)
    for adapter in tiny.adapters.values():
        adapter.prune_base(torch.rand(adapter.weight.shape, generator=chance) < 0.5)
    assert_by_modules(tiny, whole, 2)
    assert not torch.equal(tiny.gradients()["losses"], before)
    tiny.model.load_state_dict({name: x * 1.1 for name, x in tiny.model.state_dict().items()})
    assert_by_modules(tiny, whole, 2)


@pytest.mark.parametrize("what", ["columns", "float64"])
def test_factors_that_the_kernels_do_not_read(what: str, whole: list[int]) -> None:
    tiny = build(llama_config())
    layer = tiny.blocks[0].self_attn.o_proj
    if what == "columns":
        layer.lora_B = nn.Parameter(layer.lora_B.detach().T.contiguous().T)
    else:
        layer.lora_A, layer.lora_B = (nn.Parameter(x.detach().double()) for x in (layer.lora_A, layer.lora_B))
    assert_by_modules(tiny, whole, 1)


def test_a_model_that_is_cast_afterwards_still_runs(whole: list[int]) -> None:
    tiny = build(llama_config())
    expected = tiny.gradients()
    tiny.model.double()
    whole.clear()
    close({name: x.float() for name, x in tiny.gradients().items()}, expected)
    tiny.model.bfloat16()  # factors too: nothing reads these
    close({name: x.float() for name, x in tiny.gradients().items()}, expected, 0.08)
    assert not whole


# -- models that are not taken -------------------------------------------------------------------------------------------

FEW: dict[str, Any] = {"vocab_size": 48, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 96, "initializer_range": 0.12}
REFUSED = {
    "gemma": GemmaConfig(**SIZES),
    "gemma with silu": GemmaConfig(**SIZES, hidden_act="silu"),
    "gemma2": Gemma2Config(**SIZES),
    "gpt2": GPT2Config(**FEW),
    "granite": GraniteConfig(**SIZES, residual_multiplier=0.99),
    "neighbours turned, weights near zero": Ernie4_5Config(**SIZES | {"initializer_range": 0.02}),
    "mistral with a window": MistralConfig(**SIZES, sliding_window=20),
    "olmo": OlmoConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "smollm3": SmolLM3Config(**SIZES, no_rope_layers=[1, 0]),
    "heads of 16": llama_config(head_dim=16),
    "odd widths": llama_config(intermediate_size=80),
    "another activation": llama_config(hidden_act="gelu"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_of_another_make_go_through_their_modules(name: str, whole: list[int]) -> None:
    tiny = build(REFUSED[name])
    blocks = tiny.model.transformer.h if name == "gpt2" else tiny.blocks
    assert not any("forward" in vars(block) for block in blocks)
    whole.clear()
    found = tiny.gradients((12, 3, 1))
    assert not whole
    assert all(value.isfinite().all() and value.any() for value in found.values())


@pytest.mark.parametrize("settings", [{"target_modules": ["q_proj", "v_proj"]}, {"dtype": torch.float32}], ids=str)
def test_settings_that_no_block_is_one_operation_with(settings: dict[str, Any], whole: list[int]) -> None:
    tiny = build(llama_config(), **settings)
    assert tiny.is_whole == [False] * 2
    assert all(value.isfinite().all() for value in tiny.gradients().values())
    assert not whole


def test_where_there_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_NATIVE", "0")
    assert build(llama_config()).is_whole == [False] * 2


# -- training ------------------------------------------------------------------------------------------------------------


def trained(tiny: Tiny, steps: int = 8) -> list[float]:
    """Losses of steps over two batches, with ranks of one layer that move on the way."""
    optimizer = AdamW([ParamGroup([p for p in tiny.model.parameters() if p.requires_grad])])
    losses = []
    for step in range(steps):
        if step == steps // 2:
            move(optimizer, tiny.blocks[0].self_attn.v_proj, keep=[0, 2], new=3)
            move(optimizer, tiny.blocks[1].mlp.down_proj, keep=[], new=0)
            move(optimizer, tiny.blocks[1].mlp.gate_proj, keep=[3], new=0)
        loss = tiny.losses(RAGGED, step % 2).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        for parameter in optimizer.state:
            assert parameter.grad is None or parameter.grad.shape == parameter.shape
            assert parameter.grad is not None or not parameter.numel()
        optimizer.step(0.02)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def move(optimizer: AdamW, adapter: Adapter, keep: list[int], new: int) -> None:
    newcomers = adapter.new_components(new, torch.Generator().manual_seed(7))
    for name, dim in adapter.component_dims.items():
        optimizer.resize(adapter, name, dim, torch.tensor(keep, dtype=torch.int64), newcomers[name])


def test_training_is_repeatable_and_goes_as_it_does_by_modules(whole: list[int]) -> None:
    config = llama_config(attention_dropout=0.1)
    runs = []
    for by_modules in (False, False, True):
        tiny = build(config, method="l1ra")
        torch.manual_seed(0)
        whole.clear()
        with tiny.by_modules() if by_modules else nullcontext():
            losses = trained(tiny)
        assert len(whole) == (0 if by_modules else 2 * len(losses))
        runs.append((losses, [p.detach().clone() for p in tiny.model.parameters() if p.requires_grad]))
    (first, factors), (second, same), (theirs, _) = runs
    assert first == second
    assert all(torch.equal(one, other) for one, other in zip(factors, same, strict=True))
    assert first[-1] < 0.8 * first[0]
    assert first == pytest.approx(theirs, rel=0.03)
