"""Weights in few bits: against the packages that quantise, and products against dense ones."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from lorakit.kernels.codes import Bitsandbytes4Bit, Bitsandbytes8Bit, Torchao4Bit, Torchao8Bit
from lorakit.kernels.lora_linear import LoraFactors, lora_linears
from lorakit.kernels.stored import StoredWeight, linear

bitsandbytes = pytest.importorskip("bitsandbytes")
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)

Make = Callable[[Tensor], StoredWeight]
# {name: (form, largest error as a share of the weight, most bits a weight of a large layer)}
FORMS: dict[str, tuple[Make, float, float]] = {
    "nf4": (lambda w: Bitsandbytes4Bit(w, w.dtype, "nf4", True), 0.11, 4.2),
    "nf4, plain scales": (lambda w: Bitsandbytes4Bit(w, w.dtype, "nf4", False), 0.11, 4.6),
    "fp4": (lambda w: Bitsandbytes4Bit(w, w.dtype, "fp4", True), 0.14, 4.2),
    "int8": (lambda w: Bitsandbytes8Bit(w, w.dtype), 0.01, 8.2),
    "torchao nf4": (lambda w: Torchao4Bit(w, w.dtype), 0.11, 4.2),
    "torchao int8": (lambda w: Torchao8Bit(w, w.dtype), 0.01, 8.2),
}


@pytest.fixture(
    params=[pytest.param(name, marks=needs_torchao if "torchao" in name else ()) for name in FORMS]
)
def code(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def weights(out: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    rng = torch.Generator().manual_seed(out * width)
    return (torch.randn(out, width, generator=rng) * 0.05).to(dtype)


@pytest.mark.parametrize("shape", [(96, 80), (64, 33), (7, 5), (640, 512)])
def test_codes_are_near_the_weight_and_small(code: str, shape: tuple[int, int]) -> None:
    make, error, bits = FORMS[code]
    weight = weights(*shape)
    if code == "torchao nf4" and weight.numel() % 64:
        pytest.skip("torchao takes no such number of weights")
    stored = make(weight)
    dense = stored.dense()
    assert dense.shape == weight.shape
    assert dense.is_contiguous()
    assert 1e-4 < (dense - weight).norm() / weight.norm() < error
    assert torch.equal(dense, stored.dense())
    if shape == (640, 512):
        assert stored.bytes_stored * 8 / weight.numel() < bits


def test_codes_depend_on_the_checkpoint_and_not_on_the_type_it_is_loaded_in(code: str) -> None:
    make = FORMS[code][0]
    weight = weights(64, 48)
    full, half = make(weight), make(weight.bfloat16())
    for (name, mine), (other, theirs) in zip(
        full.named_buffers(), half.named_buffers(), strict=True
    ):
        assert name == other
        assert torch.equal(mine, theirs), name
    assert half.dense().dtype == torch.bfloat16
    torch.testing.assert_close(half.dense().float(), full.dense(), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_those_of_bitsandbytes(kind: str, double: bool) -> None:
    weight = weights(96, 80).bfloat16().float()
    layer = bitsandbytes.nn.Linear4bit(
        80, 96, bias=False, quant_type=kind, compress_statistics=double
    )
    layer.load_state_dict({"weight": weight})
    layer = layer.to("cpu")  # quantises
    theirs = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    stored = Bitsandbytes4Bit(weight, torch.float32, kind, double)
    assert torch.equal(stored.dense(), theirs)
    x, y = (torch.randn(7, 80, requires_grad=True) for _ in range(2))
    y.data = x.data
    mine, expected = linear(x, stored, None), layer(y)
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)
    for product in (mine, expected):
        product.sin().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-6)


def test_eight_bits_are_those_of_bitsandbytes() -> None:
    weight = weights(96, 80).bfloat16().float()
    layer = bitsandbytes.nn.Linear8bitLt(80, 96, bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": weight})
    layer = layer.to("cpu")
    codes, scales = layer.weight.CB, layer.weight.SCB
    stored = Bitsandbytes8Bit(weight, torch.float32)
    torch.testing.assert_close(stored.dense(), codes * scales[:, None] / 127)


@needs_torchao
def test_codes_are_those_of_torchao() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_, to_nf4

    weight = weights(96, 64).bfloat16().float()
    layer = torch.nn.Linear(64, 96, bias=False)
    layer.weight.data = weight.clone()
    quantize_(layer, Int8WeightOnlyConfig())
    torch.testing.assert_close(
        Torchao8Bit(weight, torch.float32).dense(), layer.weight.dequantize()
    )
    nf4 = to_nf4(weight, 64, 32).get_original_weight()  # 96 blocks, in threes of 32
    assert torch.equal(Torchao4Bit(weight, torch.float32).dense(), nf4)


# -- products --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_products_and_gradients_are_those_of_the_dense_weight(rank: int, bias: bool) -> None:
    stored = Bitsandbytes4Bit(weights(48, 32), torch.float32, "nf4", True)
    rng = torch.Generator().manual_seed(0)
    b_of_layer = torch.randn(48, generator=rng) if bias else None
    found = []
    for weight in (stored, stored.dense()):
        rng.manual_seed(1)
        x = torch.randn(3, 20, 32, generator=rng).requires_grad_()
        a = torch.randn(rank, 32, generator=rng).requires_grad_()
        b = torch.randn(48, rank, generator=rng).requires_grad_()
        factors = [LoraFactors(a, b, 0.5)]
        y = lora_linears(x, weight, b_of_layer, factors)[0] if rank else None
        y = linear(x, weight, b_of_layer) if y is None else y
        y.sin().sum().backward()
        found.append([y.detach(), x.grad, *((a.grad, b.grad) if rank else ())])
    for mine, expected in zip(*found, strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
    if not rank:
        torch.testing.assert_close(
            found[0][0], dense_linear(x.detach(), stored.dense(), b_of_layer), rtol=1e-5, atol=1e-5
        )


@pytest.mark.usefixtures("form")
def test_no_dense_weight_is_kept_for_the_backward_pass() -> None:
    stored = Bitsandbytes4Bit(weights(48, 32), torch.float32, "nf4", True)
    kept: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    x, a, b = (torch.randn(*s, requires_grad=True) for s in ((20, 32), (4, 32), (48, 4)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        low = lora_linears(x, stored, None, [LoraFactors(a, b, 1.0)])[0]
        y = linear(x, stored, None) + low
        assert kept
        assert torch.Size([48, 32]) not in kept
        kept.clear()
        lora_linears(x, stored.dense(), None, [LoraFactors(a, b, 1.0)])
        assert torch.Size([48, 32]) in kept
    y.sum().backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_same_weight_and_gradient(code: str) -> None:
    stored = FORMS[code][0](weights(640, 512))
    here = stored.dense()
    x = torch.randn(9, 512, requires_grad=True)
    linear(x, stored, None).sum().backward()
    expected, x.grad = x.grad, None
    there = stored.to("cuda")
    torch.testing.assert_close(there.dense().cpu(), here, rtol=1e-5, atol=1e-7)
    linear(x.cuda(), there, None).sum().backward()
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)
