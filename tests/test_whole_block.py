"""What blocks that are one operation have in common, whatever their make; and what their tests
share. The references are transformers' own models in float64, and the blocks' modules in bfloat16.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import why_not
from test_engine import batch_of
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import BertConfig, LlamaConfig

from lorakit.adapters.inject import inject, match_targets, merge_all
from lorakit.adapters.layer import Adapter, adapters_of
from lorakit.adapters.optimizer import AdamW, ParamGroup
from lorakit.cpu import bert, llama
from lorakit.cpu.blocks import checkpoint_blocks
from lorakit.cpu.speed_up import speed_up
from lorakit.kernels.attention import use_attention
from lorakit.kernels.fast_modules import use_fast_elementwise
from lorakit.kernels.levels import Level
from lorakit.kernels.packing import Packing, using
from lorakit.kernels.rotary import use_fast_rotary
from lorakit.methods import Method, build_method, config_classes, method_names
from lorakit.models.fetching import auto_class
from lorakit.models.heads import train_heads
from lorakit.models.task_model import TaskModel
from lorakit.models.tasks import task_named

if reason := why_not("block", Level.amx):
    pytest.skip(reason, allow_module_level=True)

# Weights large enough that attention is far from uniform.
LLAMA_SIZES: dict[str, Any] = {
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
BERT_SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 320,
    "initializer_range": 0.16,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
RAGGED = (40, 1, 17, 33, 2, 1)


def llama_config(**settings: Any) -> LlamaConfig:
    return LlamaConfig(**(LLAMA_SIZES | settings))


def bert_config(**settings: Any) -> BertConfig:
    return BertConfig(**(BERT_SIZES | settings))


@dataclass(frozen=True)
class Make:
    """A kind of blocks. Layers and other parts by their names within one."""

    task: str
    config: Callable[..., Any]
    module: ModuleType
    operation: str  # in the module
    dropouts: dict[str, Any]
    joined: tuple[str, str, str]  # layers that read the same input
    alone: str
    parts: tuple[str, ...]  # that are called, by modules


LLAMA = Make(
    "causal-lm",
    llama_config,
    llama,
    "decoder_block",
    {"attention_dropout": 0.3},
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.down_proj",
    ("self_attn.k_proj", "mlp.down_proj", "self_attn", "mlp", "post_attention_layernorm"),
)
BERT = Make(
    "sequence-classification",
    bert_config,
    bert,
    "encoder_block",
    {"attention_probs_dropout_prob": 0.3, "hidden_dropout_prob": 0.2},
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    "output.dense",
    (
        "attention.self.key",
        "output.dense",
        "attention",
        "intermediate.intermediate_act_fn",
        "output",
    ),
)


@pytest.fixture(params=[LLAMA, BERT], ids=["llama", "bert"])
def make(request: pytest.FixtureRequest) -> Make:
    found: Make = request.param
    return found


def watch(monkeypatch: pytest.MonkeyPatch, make: Make) -> list[int]:
    """The number of tokens of each block that is run as one operation from now on."""
    seen: list[int] = []
    real = getattr(make.module, make.operation)

    def watched(x: Tensor, *arguments: Any) -> Any:
        seen.append(x.shape[1])
        return real(x, *arguments)

    monkeypatch.setattr(make.module, make.operation, watched)
    return seen


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch, make: Make) -> list[int]:
    return watch(monkeypatch, make)


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
        lists = [module for module in self.model.modules() if isinstance(module, nn.ModuleList)]
        largest = max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))
        return list(largest)

    @property
    def adapters(self) -> dict[str, Adapter]:
        return self.method.adapters

    @property
    def is_whole(self) -> list[bool]:
        """Of each block, whether it has a forward of its own."""
        return ["forward" in vars(block) for block in self.blocks]

    def losses(self, lengths: Sequence[int], seed: int = 0) -> Tensor:
        return self.task_model.row_losses(batch_of(lengths, self.task_model.task.name, seed))[0]

    def gradients(
        self, lengths: Sequence[int] = RAGGED, dropout_seed: int = 0
    ) -> dict[str, Tensor]:
        """Of the losses of random rows, for all factors; and the losses."""
        trained = {
            name: p for name, p in self.model.named_parameters() if p.requires_grad and p.numel()
        }
        torch.manual_seed(dropout_seed)
        losses = self.losses(lengths)
        found = torch.autograd.grad(losses.sum(), list(trained.values()))
        return {"losses": losses.detach(), **dict(zip(trained, found, strict=True))}

    @contextmanager
    def by_modules(self) -> Iterator[None]:
        own = {
            block: vars(block).pop("forward") for block in self.blocks if "forward" in vars(block)
        }
        yield
        for block, forward in own.items():
            block.forward = forward


def build(
    config: Any,
    task: str = "causal-lm",
    method: str = "vanilla",
    dtype: torch.dtype = torch.bfloat16,
    residual: bool = False,
    **settings: Any,
) -> Tiny:
    """With random factors, gates, biases and norms; residual: and one in every adapter."""
    torch.manual_seed(0)
    model: Any = auto_class(task).from_config(config).to(dtype)  # type: ignore[no-untyped-call]
    use_attention(model)
    use_fast_elementwise(model)
    use_fast_rotary(model)
    task_model = TaskModel(model, None, task_named(task), task_named(task).head_names(model))
    spec = config_classes()[method].model_validate({"r": 4} | settings)
    made = build_method(spec, 0)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=rng)
        inject(model, made, match_targets(model, spec, task_model.heads))
        for adapter in made.adapters.values():
            randomise(adapter, rng)
            if residual:
                (inputs,), (outputs,) = adapter.lora_A.shape[1:], adapter.lora_B.shape[:1]
                adapter.add_residual(
                    *(
                        0.1 * torch.randn(*shape, generator=rng)
                        for shape in ((2, inputs), (outputs, 2))
                    )
                )
    train_heads(task_model)
    model.train()
    speed_up(task_model, made.adapters)
    return Tiny(task_model, made)


def tiny_of(make: Make, config: Any = None, **settings: Any) -> Tiny:
    return build(config or make.config(), make.task, **settings)


@torch.no_grad()
def randomise(adapter: Adapter, rng: torch.Generator) -> None:
    for name, parameter in adapter.components().items():
        if name == "gate":
            parameter.uniform_(0.1, 1.0, generator=rng)
        else:
            parameter.normal_(std=0.1, generator=rng)


# -- against float64 -------------------------------------------------------------------------------


class Plain(nn.Module):
    """An adapter by its formula."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.base = copy.deepcopy(adapter.base)
        self.factors = nn.ParameterDict(
            {name: p.detach().clone() for name, p in adapter.components().items()}
        )
        self.residual = nn.ParameterDict(
            {name: p.detach().clone() for name, p in adapter.residual().items()}
        )
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
    auto: Any = auto_class(tiny.task_model.task.name)
    model = auto.from_config(config, attn_implementation="eager")
    weights = {name.replace(".base.", "."): x for name, x in tiny.model.state_dict().items()}
    model.load_state_dict({name: x for name, x in weights.items() if name in model.state_dict()})
    for name, adapter in tiny.adapters.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, Plain(adapter))
    return model.double().eval()


def exact_losses(tiny: Tiny) -> Tensor:
    return (
        Tiny(TaskModel(exact_twin(tiny), None, tiny.task_model.task, []), tiny.method)
        .losses(RAGGED)
        .detach()
        .double()
    )


def outcome(model: Any, lengths: Sequence[int], packed: bool) -> dict[str, Tensor]:
    """Hidden states of the real tokens, and gradients of the first block's input and of everything
    in adapters; in float64."""
    width = model.config.hidden_size
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    rng = torch.Generator().manual_seed(sum(lengths))
    x, upstream = (
        torch.randn(*real.shape, width, generator=rng).bfloat16().to(model.dtype) for _ in range(2)
    )
    x.requires_grad_()
    packing = Packing(lengths, max(lengths), round_up=False) if packed else None
    with using(packing):
        y = model.base_model(
            inputs_embeds=x, attention_mask=real.long(), use_cache=False
        ).last_hidden_state
    factors = {
        plain_name(name): p for name, p in model.named_parameters() if is_factor(name) and p.numel()
    }
    grad_x, *grads = torch.autograd.grad(y, [x, *factors.values()], upstream * real[..., None])
    assert not grad_x[~real].any()
    found = {"y": y.detach()[real], "x": grad_x[real], **dict(zip(factors, grads, strict=True))}
    # Gates are few numbers: those of all layers are one part.
    gates = [found.pop(name) for name in list(found) if name.endswith("gate")]
    return {name: value.double() for name, value in found.items()} | (
        {"gates": torch.cat(gates).double()} if gates else {}
    )


def plain_name(name: str) -> str:
    return name.replace("factors.", "").replace("residual.", "")


def is_factor(name: str) -> bool:
    return name.rpartition(".")[2] in ("lora_A", "lora_B", "gate", "residual_A", "residual_B")


@dataclass
class Case:
    config: Any
    settings: dict[str, Any] = field(default_factory=dict)


# How far from float64, as multiples of how far the modules are: all parts together, and each by
# itself. What is rounded at other places is rounded otherwise, which a few numbers do not average
# out.
TOGETHER, EACH = 1.15, 2.0


def compare_with_float64(tiny: Tiny, lengths: Sequence[int], whole: list[int]) -> None:
    """The whole blocks are as near to it as their modules are."""
    exact = outcome(exact_twin(tiny), lengths, packed=False)
    whole.clear()  # what was tried
    ours = outcome(tiny.model, lengths, packed=True)
    assert whole == [sum(lengths) + 1] * 2
    with tiny.by_modules():
        theirs = outcome(tiny.model, lengths, packed=True)
    assert len(whole) == 2
    assert_as_near(ours, theirs, exact)


def assert_as_near(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], exact: dict[str, Tensor]
) -> None:
    mine, other = errors(ours, exact), errors(theirs, exact)
    for part, error in mine.items():
        assert error <= EACH * other[part] + 1e-3, part
        assert error < 0.06, part
    both = [sum(error**2 for error in found.values()) ** 0.5 for found in (mine, other)]
    assert both[0] <= TOGETHER * both[1]


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """As shares of the norm; of what is nearly zero, as a query's gradient where there is one key,
    of the largest gradient's."""
    assert found.keys() == exact.keys()
    floor = 0.03 * max(
        float(value.norm()) for part, value in exact.items() if part not in ("y", "losses")
    )
    return {
        part: float((found[part] - right).norm() / right.norm().clamp_min(floor))
        for part, right in exact.items()
    }


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], allowed: float = 0.05) -> None:
    """But for roundings."""
    assert max(errors(ours, theirs).values()) <= allowed


def assert_by_modules(tiny: Tiny, whole: list[int], blocks: int = 0, **settings: Any) -> None:
    """`blocks` of the blocks are one operation, and the results are those of the modules."""
    whole.clear()
    ours = tiny.gradients(**settings)
    assert len(whole) == blocks
    with tiny.by_modules():
        theirs = tiny.gradients(**settings)
    close(ours, theirs, 0.05 if blocks else 0.0)


# -- what is asked of a pass -----------------------------------------------------------------------


def test_dropout_drops_what_the_modules_drop(make: Make, whole: list[int]) -> None:
    tiny = tiny_of(make, make.config(**make.dropouts))
    whole.clear()
    ours, otherwise = tiny.gradients(), tiny.gradients(dropout_seed=1)
    assert len(whole) == 4
    with tiny.by_modules():
        theirs = tiny.gradients()
    close(ours, theirs)
    assert max(errors(otherwise, theirs).values()) > 0.3
    tiny.model.eval()
    assert torch.equal(tiny.gradients()["losses"], tiny.gradients(dropout_seed=1)["losses"])


def test_without_gradients_the_results_are_the_same(make: Make, whole: list[int]) -> None:
    tiny = tiny_of(make)
    expected = tiny.gradients()["losses"]
    whole.clear()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(tiny.losses(RAGGED), expected)
    assert len(whole) == 4
    close(tiny.gradients(), tiny.gradients())


def test_adapters_that_are_not_trained_and_an_input_without_a_gradient(
    make: Make, whole: list[int]
) -> None:
    tiny = tiny_of(make, method="l1ra")
    everything = tiny.gradients()
    for name, adapter in tiny.adapters.items():
        adapter.lora_A.requires_grad_(name.endswith(make.alone))
        adapter.lora_B.requires_grad_(not name.endswith(make.joined[0]))
    whole.clear()
    some = tiny.gradients()
    assert len(whole) == 2
    assert 0 < len(some) < len(everything)
    assert all(torch.equal(grad, everything[name]) for name, grad in some.items())
    tiny.model.requires_grad_(False)
    assert not tiny.losses(RAGGED).requires_grad


def test_the_gradient_of_a_batch_is_added_to_what_is_there(make: Make) -> None:
    tiny = tiny_of(make)
    once = tiny.gradients()
    for _ in range(2):
        tiny.losses(RAGGED).sum().backward()  # type: ignore[no-untyped-call]
    for name, parameter in tiny.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, 2 * once[name])


def test_gradients_can_be_had_once(make: Make) -> None:
    tiny = tiny_of(make)
    loss = tiny.losses(RAGGED).sum()
    trained = [p for p in tiny.model.parameters() if p.requires_grad]
    torch.autograd.grad(loss, trained, retain_graph=True)
    with pytest.raises(RuntimeError, match="can not be gone through again"):
        torch.autograd.grad(loss, trained)


def test_the_number_of_threads_changes_no_bit(make: Make, whole: list[int]) -> None:
    tiny = tiny_of(make, make.config(**make.dropouts), method="l1ra")
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


def test_fillers_come_into_nothing(make: Make) -> None:
    """Tokens rounded up to another number, whatever the fillers hold: the values of the embedding
    of a padded place."""
    tiny = tiny_of(make)
    exact = tiny.gradients((50, 23, 1))
    tiny.task_model.compiles = True
    assert Packing((50, 23, 1), 50).tokens > 75
    close(tiny.gradients((50, 23, 1)), exact, 0.01)


# -- passes that can not be one operation ----------------------------------------------------------


@pytest.mark.parametrize("part", range(5))
def test_hooks_are_called(make: Make, part: int, whole: list[int]) -> None:
    tiny = tiny_of(make)
    expected, seen = tiny.gradients(), []
    module = tiny.blocks[1].get_submodule(make.parts[part])
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


def test_padded_rows_go_through_the_modules(make: Make, whole: list[int]) -> None:
    tiny = tiny_of(make)
    packed = tiny.gradients()
    tiny.task_model.packs = False
    assert_by_modules(tiny, whole)
    close(tiny.gradients(), packed)


@pytest.mark.parametrize("ranks", [(64, 0, 0), (63, 1, 1)], ids=str)
def test_ranks_too_high_to_be_joined(make: Make, ranks: tuple[int, ...], whole: list[int]) -> None:
    tiny = tiny_of(make, rank_pattern=dict(zip(make.joined, ranks, strict=True)))
    assert_by_modules(tiny, whole, 2 if sum(ranks) <= LLAMA_SIZES["hidden_size"] else 0)


def test_ranks_that_grow_too_high_between_passes(make: Make, whole: list[int]) -> None:
    tiny = tiny_of(make)
    layer, rank = tiny.blocks[0].get_submodule(make.joined[2]), LLAMA_SIZES["hidden_size"] - 3
    shapes, rng = (
        ((rank, layer.weight.shape[1]), (len(layer.weight), rank)),
        torch.Generator().manual_seed(0),
    )
    layer.lora_A, layer.lora_B = (
        nn.Parameter(torch.randn(shape, generator=rng) / 10) for shape in shapes
    )
    assert_by_modules(tiny, whole, 1)


def test_dropout_of_adapters_goes_through_the_modules(make: Make, whole: list[int]) -> None:
    tiny = tiny_of(make)
    tiny.blocks[0].get_submodule(make.alone).dropout = 0.1
    assert_by_modules(tiny, whole, 1)
    tiny.model.eval()
    assert_by_modules(tiny, whole, 2)
    assert tiny_of(make, lora_dropout=0.1).is_whole == [False] * 2


def test_chunkwise_is_one_operation_where_no_plan_is_followed(make: Make, whole: list[int]) -> None:
    ladder = {"r": 8, "ladder": [2, 4, 8], "difficulty": {"source": "table"}}
    tiny = tiny_of(make, method="chunkwise", training="nested", **ladder)
    method: Any = tiny.method
    assert_by_modules(tiny, whole, 2)
    expected = tiny.gradients()
    for tier in range(2):
        with method.tiers.at_tier(tier):
            assert_by_modules(tiny, whole)
    with method.tiers.at_tier(2):  # that is all components
        assert_by_modules(tiny, whole, 2)
    with method.tiers.at_tier(0):
        assert not torch.equal(tiny.gradients()["losses"], expected["losses"])


def test_frozen_adapters_are_run_as_such_without_gradients(make: Make, whole: list[int]) -> None:
    tiny = tiny_of(make)
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
def test_gradient_checkpointing(make: Make, residual: bool, method: str, whole: list[int]) -> None:
    tiny = tiny_of(make, make.config(**make.dropouts), method=method, residual=residual)
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


def test_the_modules_can_be_checkpointed_too(make: Make) -> None:
    """What a layer is added to, and gates with it, is made anew for each pass."""
    for residual in (False, True):
        tiny = tiny_of(make, method="l1ra", residual=residual)
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


# -- models that change ----------------------------------------------------------------------------


def test_a_merged_model_has_no_adapters(make: Make, whole: list[int]) -> None:
    tiny = tiny_of(make)
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


def test_a_copy_of_a_model_has_its_own_adapters(make: Make) -> None:
    tiny = tiny_of(make)
    expected = tiny.gradients()
    twin = copy.deepcopy(tiny)
    close(twin.gradients(), expected)
    with torch.no_grad():
        for adapter in tiny.adapters.values():
            adapter.lora_B.zero_()
    close(twin.gradients(), expected)
    assert not torch.equal(tiny.gradients()["losses"], expected["losses"])


def test_changes_of_the_base_are_seen(make: Make, whole: list[int]) -> None:
    """Pruned, loaded, and weights of norms and biases."""
    tiny = tiny_of(make)
    before = tiny.gradients()["losses"]
    rng = torch.Generator().manual_seed(5)
    for adapter in tiny.adapters.values():
        adapter.prune_base(torch.rand(adapter.weight.shape, generator=rng) < 0.5)
    assert_by_modules(tiny, whole, 2)
    assert not torch.equal(tiny.gradients()["losses"], before)
    tiny.model.load_state_dict(
        {name: x * (3 if "bias" in name else 1.1) for name, x in tiny.model.state_dict().items()}
    )
    assert_by_modules(tiny, whole, 2)
    torch.testing.assert_close(
        tiny.losses(RAGGED).double(), exact_losses(tiny), rtol=0.03, atol=0.1
    )


@pytest.mark.parametrize("what", ["columns", "float64"])
def test_factors_that_the_kernels_do_not_read(make: Make, what: str, whole: list[int]) -> None:
    tiny = tiny_of(make)
    layer = tiny.blocks[0].get_submodule(make.alone)
    if what == "columns":
        layer.lora_B = nn.Parameter(layer.lora_B.detach().T.contiguous().T)
    else:
        layer.lora_A, layer.lora_B = (
            nn.Parameter(x.detach().double()) for x in (layer.lora_A, layer.lora_B)
        )
    assert_by_modules(tiny, whole, 1)


@pytest.mark.parametrize("what", ["layers", "type"])
def test_settings_that_no_block_is_one_operation_with(
    make: Make, what: str, whole: list[int]
) -> None:
    tiny = (
        tiny_of(make, dtype=torch.float32)
        if what == "type"
        else tiny_of(make, target_modules=list(make.joined[::2]))
    )
    assert tiny.is_whole == [False] * 2
    assert all(value.isfinite().all() for value in tiny.gradients().values())
    assert not whole


def test_where_there_is_no_compiler(monkeypatch: pytest.MonkeyPatch, make: Make) -> None:
    monkeypatch.setenv("LORAKIT_KERNELS", "torch")
    assert tiny_of(make).is_whole == [False] * 2


# -- training --------------------------------------------------------------------------------------


def trained(tiny: Tiny, make: Make, steps: int = 8) -> list[float]:
    """Losses of steps over two batches, with ranks that move on the way."""
    optimizer = AdamW([ParamGroup([p for p in tiny.model.parameters() if p.requires_grad])])
    losses = []
    for step in range(steps):
        if step == steps // 2:
            move(optimizer, tiny.blocks[0].get_submodule(make.joined[2]), keep=[0, 2], new=3)
            move(optimizer, tiny.blocks[1].get_submodule(make.alone), keep=[], new=0)
            move(optimizer, tiny.blocks[1].get_submodule(make.joined[0]), keep=[3], new=0)
        loss = tiny.losses(RAGGED, step % 2).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        for parameter in optimizer.state:
            assert parameter.grad is None or parameter.grad.shape == parameter.shape
            assert parameter.grad is not None or not parameter.numel()
        optimizer.step(0.02)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def move(optimizer: AdamW, adapter: Any, keep: list[int], new: int) -> None:
    newcomers = adapter.new_components(new, torch.Generator().manual_seed(7))
    for name, dim in adapter.component_dims.items():
        optimizer.resize(adapter, name, dim, torch.tensor(keep, dtype=torch.int64), newcomers[name])


def test_training_is_repeatable_and_goes_as_it_does_by_modules(
    make: Make, whole: list[int]
) -> None:
    runs = []
    for by_modules in (False, False, True):
        tiny = tiny_of(make, make.config(**make.dropouts), method="l1ra")
        torch.manual_seed(0)
        whole.clear()
        with tiny.by_modules() if by_modules else nullcontext():
            losses = trained(tiny, make)
        assert len(whole) == (0 if by_modules else 2 * len(losses))
        runs.append(
            (losses, [p.detach().clone() for p in tiny.model.parameters() if p.requires_grad])
        )
    (first, factors), (second, same), (theirs, _) = runs
    assert first == second
    assert all(torch.equal(one, other) for one, other in zip(factors, same, strict=True))
    assert first[-1] < 0.9 * first[0]
    assert first == pytest.approx(theirs, rel=0.1)
