"""Blocks of tiny models in two forms, and their gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import BertConfig, LlamaConfig

from lorakit.adapters.base import PrunedBase
from lorakit.adapters.inject import inject, match_targets
from lorakit.adapters.layer import Adapter
from lorakit.adapters.optimizer import AdamW, ParamGroup
from lorakit.cpu import bert, llama
from lorakit.cpu.speed_up import speed_up
from lorakit.kernels.attention import use_attention
from lorakit.kernels.fast_modules import use_fast_elementwise
from lorakit.kernels.levels import Level
from lorakit.kernels.packing import Packing, using
from lorakit.kernels.products import kernel_level
from lorakit.kernels.rotary import use_fast_rotary
from lorakit.methods import Method, build_method, config_classes
from lorakit.models.fetching import auto_class
from lorakit.models.heads import train_heads
from lorakit.models.task_model import TaskModel
from lorakit.models.tasks import task_named
from tests.support.batches import batch_of
from tests.support.kernels import why_not

if reason := why_not("block"):
    pytest.skip(reason, allow_module_level=True)

# The type of the models here: bfloat16 where blocks of it are one operation.
DTYPE = torch.float32 if kernel_level(torch.bfloat16, "block") is Level.torch else torch.bfloat16

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


def watch(monkeypatch: pytest.MonkeyPatch, make: Make) -> list[int]:
    """The number of tokens of each block that is run as one operation from now on."""
    seen: list[int] = []
    real = getattr(make.module, make.operation)

    def watched(x: Tensor, *arguments: Any) -> Any:
        seen.append(x.shape[1])
        return real(x, *arguments)

    monkeypatch.setattr(make.module, make.operation, watched)
    return seen


@dataclass
class Tiny:
    """A model in DTYPE as a run makes it."""

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
    dtype: torch.dtype = DTYPE,
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
                a, b = (
                    0.1 * torch.randn(*shape, generator=rng)
                    for shape in ((2, inputs), (outputs, 2))
                )
                adapter.set_base(PrunedBase(adapter.base.layer, residual=(a, b)))
    train_heads(task_model)
    model.train()
    speed_up(task_model, made.adapters)
    # Else the last block draws other masks than its modules, for fewer tokens (test_read_tokens).
    task_model.reads_first = False
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


class Plain(nn.Module):
    """An adapter by its formula."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.base = copy.deepcopy(adapter.base.layer)
        self.factors = nn.ParameterDict(
            {name: p.detach().clone() for name, p in adapter.components().items()}
        )
        self.residual = nn.ParameterDict(
            {name: p.detach().clone() for name, p in adapter.base.components().items()}
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
    weights = {name.replace(".base.layer.", "."): x for name, x in tiny.model.state_dict().items()}
    model.load_state_dict({name: x for name, x in weights.items() if name in model.state_dict()})
    for name, adapter in tiny.adapters.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, Plain(adapter))
    return model.double().eval()


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
    for holder in ("factors.", "residual.", "base."):
        name = name.replace(holder, "")
    return name


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
