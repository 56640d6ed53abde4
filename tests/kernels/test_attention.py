"""The training attention and dropout against their plain twins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lorakit.errors import RunError
from lorakit.kernels.attention import LONGEST, attention, use_attention
from lorakit.kernels.dropout import FastDropout, fast_dropout, keep_mask, use_fast_dropout


def _module(causal: bool, groups: int) -> nn.Module:
    module = nn.Module()
    module.is_causal, module.num_key_value_groups = causal, groups  # type: ignore[assignment]
    return module.train()


def _inputs(rows: int, heads: int, kv_heads: int, length: int, seed: int) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    shapes = [(rows, h, length, 8) for h in (heads, kv_heads, kv_heads)]
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("length", [1, 7, LONGEST])
@pytest.mark.parametrize("mask", ["none", "causal", "boolean", "additive"])
def test_attention_and_its_gradients_equal_sdpa(kv_heads: int, length: int, mask: str) -> None:
    inputs = _inputs(3, 4, kv_heads, length, seed=length)
    module = _module(mask == "causal", 4 // kv_heads)
    real = torch.arange(length) < torch.tensor([length, max(1, length // 2), 1])[:, None]
    allowed = real[:, None, None, :].expand(3, 1, length, length)
    given = {
        "boolean": allowed,
        "additive": torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -1e30),
    }.get(mask)
    found = []
    for function in (attention, sdpa_attention_forward):
        y, _ = function(module, *inputs, given, is_causal=mask == "causal")
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
        found.append([y, *torch.autograd.grad((y * weights).sum(), inputs)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_soft_cap_on_scores_is_refused() -> None:
    inputs = _inputs(1, 1, 1, 4, seed=0)
    attention(_module(True, 1), *inputs, None, softcap=None)
    with pytest.raises(RunError, match="soft cap on its attention scores"):
        attention(_module(True, 1), *inputs, None, softcap=50.0)


def test_attention_dropout_drops_weights_not_outputs() -> None:
    query, key, _ = _inputs(1, 1, 1, 64, seed=0)
    value = torch.ones(1, 1, 64, 8, dtype=torch.float64)
    torch.manual_seed(0)
    y = attention(_module(False, 1), query, key, value, None, dropout=0.5, is_causal=False)[
        0
    ].detach()
    assert float(y.std()) > 0.01  # sums of kept weights differ from query to query
    assert abs(float(y.mean()) - 1) < 0.1


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_dropout_keeps_the_right_share_and_the_mean(p: float) -> None:
    torch.manual_seed(1)
    mask, kept = keep_mask(torch.Size([1001, 997]), p)
    assert abs(kept - (1 - p)) < 1 / 65536
    assert abs(float(mask.double().mean()) - (1 - p)) < 4 * (p * (1 - p) / mask.numel()) ** 0.5
    y = fast_dropout(torch.ones(1000, 1000), p)
    assert abs(float(y.mean()) - 1) < 4 * (p / (1 - p) / y.numel()) ** 0.5
    assert y.unique().tolist() == pytest.approx([0.0, 1 / kept])


def test_dropout_neighbours_are_independent() -> None:
    """Four elements share one 64-bit number: none of its quarters may tell of another."""
    torch.manual_seed(2)
    mask, _ = keep_mask(torch.Size([400_000]), 0.5)
    quarters = mask.double().view(-1, 4)
    correlations = torch.corrcoef(quarters.T) - torch.eye(4, dtype=torch.float64)
    assert float(correlations.abs().max()) < 0.015


def test_dropout_gradient_is_zero_exactly_where_the_output_is() -> None:
    x = torch.rand(37, 11).add_(0.1).requires_grad_()
    torch.manual_seed(3)
    y = fast_dropout(x, 0.3)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad * x.detach(), y.detach())


def test_dropout_is_decided_by_the_seed_and_off_in_evaluation() -> None:
    layer, x = FastDropout(0.5), torch.ones(100)
    torch.manual_seed(4)
    first = layer(x)
    torch.manual_seed(4)
    assert torch.equal(first, layer(x))
    assert not torch.equal(first, layer(x))
    assert torch.equal(layer.eval()(x), x)


def test_only_plain_dropout_is_replaced() -> None:
    class Other(nn.Dropout):
        pass

    model = nn.Sequential(nn.Dropout(0.2), nn.Sequential(Other(0.1), nn.Dropout(0.3)))
    use_fast_dropout(model)
    assert [type(m) for m in model.modules() if isinstance(m, nn.Dropout)] == [
        FastDropout,
        Other,
        FastDropout,
    ]
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.2, 0.1, 0.3]


def test_a_model_trains_as_with_sdpa(tiny_llama: object) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama).train()
    ids = torch.randint(5, 30, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) < torch.tensor([12, 5, 1])[:, None]).long()
    gradients = []
    for own in (False, True):
        if own:
            use_attention(model)
            assert model.config._attn_implementation == "lorakit"
        model.zero_grad()
        loss = model(
            input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)
        ).loss
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name],
            gradient,
            rtol=1e-4,
            atol=1e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )
