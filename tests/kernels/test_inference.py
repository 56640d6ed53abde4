"""Frozen layers: the same numbers as while training, with what is zero left out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorakit.adapters.base import PrunedBase
from lorakit.adapters.layer import Adapter
from lorakit.kernels.inference import FEW_TOKENS, freeze, semi_structured


def adapter(
    in_features: int = 24,
    out_features: int = 40,
    rank: int = 4,
    residual: int = 0,
    bias: bool = True,
) -> Adapter:
    torch.manual_seed(0)
    base = nn.Linear(in_features, out_features, bias=bias)
    made = Adapter(base, rank, 2.0, 0.0, torch.Generator().manual_seed(0))
    made.lora_B.data.normal_()
    if residual:
        pair = torch.randn(residual, in_features), torch.randn(out_features, residual)
        made.set_base(PrunedBase(base, residual=pair))
    return made.eval()


@pytest.mark.parametrize("residual", [0, 3])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_frozen_is_the_same(rank: int, residual: int, bias: bool) -> None:
    layer, x = adapter(rank=rank, residual=residual, bias=bias), torch.randn(2, 5, 24)
    with torch.no_grad():
        before = layer(x)
        layer.freeze()
        torch.testing.assert_close(layer(x), before)


@pytest.mark.parametrize("tokens", [1, FEW_TOKENS, FEW_TOKENS + 1])
@pytest.mark.parametrize(("dead_inputs", "dead_outputs"), [(20, 0), (0, 30), (20, 30), (24, 40)])
def test_dead_columns_are_left_out(dead_inputs: int, dead_outputs: int, tokens: int) -> None:
    layer, x = adapter(), torch.randn(tokens, 24)
    layer.lora_A.data[:, :dead_inputs] = 0
    layer.lora_B.data[:dead_outputs] = 0
    with torch.no_grad():
        before = layer(x)
        layer.freeze()
        torch.testing.assert_close(layer(x), before)
    frozen = freeze(layer.base.weight, None, layer.lora_A, layer.lora_B, 2.0)
    assert frozen.multiply_adds == 4 * (24 - dead_inputs) + 4 * (40 - dead_outputs)


def test_few_dead_columns_stay() -> None:
    layer = adapter()
    layer.lora_A.data[:, :5] = 0
    assert freeze(layer.base.weight, None, layer.lora_A, layer.lora_B, 2.0).inputs is None


def test_training_ends_the_frozen_state() -> None:
    layer, x = adapter(), torch.randn(3, 24)
    layer.freeze()
    layer.train()
    layer.lora_B.data.zero_()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.base(x))


def test_gradients_flow_beside_a_frozen_state() -> None:
    layer = adapter()
    layer.freeze()
    layer(torch.randn(3, 24)).sum().backward()
    assert layer.lora_A.grad is not None


def test_loading_and_merging_end_the_frozen_state() -> None:
    layer, x = adapter(), torch.randn(3, 24)
    layer.freeze()
    layer.load_tensors({"lora_A": torch.zeros(2, 24), "lora_B": torch.zeros(40, 2)})
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.base(x))


def test_another_dtype_than_the_frozen_one_takes_the_long_way() -> None:
    layer = adapter()
    layer.freeze()
    layer.base.double()
    with torch.no_grad():
        assert layer(torch.randn(3, 24, dtype=torch.float64)).dtype == torch.float64


def test_a_cpu_keeps_the_dense_product() -> None:
    weight = torch.randn(64, 128).reshape(-1, 4)
    weight[:, 2:] = 0
    weight = weight.reshape(64, 128).bfloat16()
    assert semi_structured(weight) is weight


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_two_of_four_uses_sparse_tensor_cores() -> None:
    weight = torch.randn(256, 512, device="cuda").reshape(-1, 4)
    weight[:, 2:] = 0
    weight = weight.reshape(256, 512).half()
    compressed = semi_structured(weight)
    assert compressed is not weight
    x = torch.randn(64, 512, device="cuda", dtype=torch.float16)
    torch.testing.assert_close(
        nn.functional.linear(x, compressed), x @ weight.T, atol=5e-2, rtol=1e-2
    )
