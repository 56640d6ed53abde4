"""The elementwise kernels, in C and their twins in torch, against float64; swapped modules against
their own forward."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoModelForCausalLM, activations
from transformers.models.bert.modeling_bert import BertOutput, BertSelfOutput
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from lorakit.kernels import dispatch
from lorakit.kernels.activations import gelu, silu, silu_mul
from lorakit.kernels.dropout import FastDropout, fast_dropout, levels_dropped
from lorakit.kernels.fast_modules import use_fast_elementwise
from lorakit.kernels.levels import Level
from lorakit.kernels.norms import add_layer_norm, add_layer_norm_in_c, layer_norm, rms_norm
from lorakit.kernels.softmax import cross_entropy_tile

SIZES = [0, 1, 7, 33, 1000]
DTYPES = [torch.float32, torch.bfloat16]
pytestmark = pytest.mark.usefixtures("form")


def randn(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def assert_close(ours: Tensor, exact: Tensor, floor: float = 1e-6) -> None:
    """Within 1e-5 relative in float32, one rounding in bfloat16; torch, which rounds between its
    operations, may take four.

    `floor` is what a sum of terms of size 1 may be off by in float32 where they cancel.
    """
    ours_is_bf16, ours_is_torch = (
        ours.dtype == torch.bfloat16,
        dispatch.implementation("activations") is Level.torch,
    )
    allowed = 1.02 * 2**-8 if ours_is_bf16 else 1e-5
    if ours_is_torch:
        allowed, floor = 4 * allowed, max(floor, 0.01 if ours_is_bf16 else 1e-5)
    torch.testing.assert_close(ours.double(), exact.double(), rtol=allowed, atol=floor)


def compare(
    function: Callable[..., Tensor],
    exact: Callable[..., Tensor],
    inputs: list[Tensor],
    floor: float = 1e-6,
) -> None:
    """Function and gradients of `inputs` against the same in float64."""
    results = []
    for f, wanted in ((function, None), (exact, torch.float64)):
        leaves = [x.to(wanted or x.dtype).clone().requires_grad_() for x in inputs]
        y = f(*leaves)
        grad = randn(*y.shape, dtype=inputs[0].dtype, seed=9)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == inputs[0].dtype
        assert_close(ours, theirs, floor)


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "gelu": (gelu, lambda x: x * torch.special.erfc(-x / math.sqrt(2)) / 2),
    "gelu_tanh": (lambda x: gelu(x, "tanh"), lambda x: functional.gelu(x, approximate="tanh")),
    "silu": (silu, functional.silu),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(name: str, dtype: torch.dtype) -> None:
    function, exact = ACTIVATIONS[name]
    floor = 5e-5 if dtype == torch.bfloat16 else 1e-6  # where the slope crosses zero
    for size in SIZES:
        compare(function, exact, [randn(size, dtype=dtype, scale=2)], floor)
    compare(function, exact, [torch.linspace(-14, 14, 4999).to(dtype)], floor)
    compare(
        function, exact, [torch.tensor([-100.0, -30.0, -0.0, 0.0, 1e-30, 30.0, 100.0]).to(dtype)]
    )


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_native_activations_of_infinity_and_nan(form: str, name: str) -> None:
    if form == "torch":
        pytest.skip("torch's gelu(inf) is NaN in some versions")
    y = ACTIVATIONS[name][0](torch.tensor([math.inf, math.nan] * 20))
    assert y[::2].eq(math.inf).all()
    assert y[1::2].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_native_activations_keep_relative_precision_in_the_tail(
    form: str, dtype: torch.dtype
) -> None:
    """torch's erf(x) + 1 leaves nothing of it from x = -5.5 on."""
    if form == "native":
        x = torch.linspace(-12.5, -1, 999).to(dtype)
        assert_close(gelu(x), ACTIVATIONS["gelu"][1](x.double()), floor=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", SIZES)
def test_silu_mul(dtype: torch.dtype, width: int) -> None:
    def exact(gate: Tensor, up: Tensor) -> Tensor:
        return functional.silu(gate) * up

    compare(
        silu_mul,
        exact,
        [randn(2, 3, width, dtype=dtype, scale=3), randn(2, 3, width, dtype=dtype, seed=1)],
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_of_halves_of_one_tensor(dtype: torch.dtype) -> None:
    def halves(f: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda both: f(*both.chunk(2, -1))

    compare(
        halves(silu_mul),
        halves(lambda gate, up: functional.silu(gate) * up),
        [randn(2, 5, 2 * 37, dtype=dtype)],
    )


def test_strides_and_types_that_the_kernels_do_not_take_go_to_torch() -> None:
    x = randn(6, 8, dtype=torch.float32)
    torch.testing.assert_close(gelu(x.T), functional.gelu(x.T))
    torch.testing.assert_close(silu_mul(x.T, x.T), functional.silu(x.T) * x.T)
    torch.testing.assert_close(silu(x.double()), functional.silu(x.double()))
    torch.testing.assert_close(
        layer_norm(x.T, torch.ones(6), None, 1e-5), functional.layer_norm(x.T, (6,))
    )


# ---- dropout


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_dropout_and_its_gradient_keep_the_same_entries(dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(0)
    mask = fast_dropout(torch.ones(size, dtype=dtype), 0.3) != 0
    kept = 1 - round(0.3 * 65536) / 65536
    x = randn(size, dtype=dtype).requires_grad_()
    torch.manual_seed(0)
    y = fast_dropout(x, 0.3)
    grad = randn(size, dtype=dtype, seed=2)
    y.backward(grad)
    assert_close(y.detach(), x.detach().double() * mask / kept)
    assert x.grad is not None
    assert_close(x.grad, grad.double() * mask / kept)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_entries_are_independent_of_their_neighbours_rows_and_calls(p: float) -> None:
    """Correlations of 2^20 pairs are below 5 standard deviations, at distances within and across
    numbers, rows and seeds."""
    torch.manual_seed(5)
    first, second = ((fast_dropout(torch.ones(2**20), p) != 0).double() for _ in range(2))
    assert abs(float(first.mean()) - (1 - p)) < 5 * (p * (1 - p) / 2**20) ** 0.5
    for distance in (1, 2, 3, 4, 16, 31, 32, 1024, 4096, 8192):
        assert (
            abs(float(torch.corrcoef(torch.stack([first, first.roll(distance)]))[0, 1])) < 5 / 2**10
        )
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 5 / 2**10
    # of blocks: as wide as the binomial
    counts = (first.view(-1, 64).sum(1) - 64 * (1 - p)) / (64 * p * (1 - p)) ** 0.5
    assert abs(float(counts.var()) - 1) < 0.05


# ---- norms


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 33, 1000])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm(dtype: torch.dtype, width: int, bias: bool) -> None:
    weight, shift = (
        randn(width, dtype=dtype, seed=1),
        randn(width, dtype=dtype, seed=2) if bias else None,
    )

    def exact(x: Tensor) -> Tensor:
        return functional.layer_norm(
            x, (width,), weight.double(), None if shift is None else shift.double(), 1e-5
        )

    for shape in ((0, width), (1, width), (3, 5, width)):
        compare(
            lambda x: layer_norm(x, weight, shift, 1e-5),
            exact,
            [randn(*shape, dtype=dtype, scale=3) + 1],
            floor=2e-5,
        )


@pytest.mark.parametrize("width", [1, 7, 33, 1000])
def test_rms_norm(width: int) -> None:
    weight = randn(width, dtype=torch.float32, seed=1)

    def exact(x: Tensor) -> Tensor:
        return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    for shape in ((0, width), (1, width), (3, 5, width)):
        x = randn(*shape, dtype=torch.float32, scale=3)
        compare(lambda x: rms_norm(x, weight, 1e-6), exact, [x], floor=2e-5)


@pytest.mark.parametrize("width", [7, 33, 1000])
def test_rms_norm_in_bf16_rounds_where_llama_does(width: int) -> None:
    module = LlamaRMSNorm(width).to(torch.bfloat16)
    module.weight = nn.Parameter(randn(width, dtype=torch.bfloat16, seed=1), requires_grad=False)
    x = randn(50, width, dtype=torch.bfloat16, scale=3)
    ours, theirs = rms_norm(x, module.weight, 1e-6), module(x)
    # 1 / sqrt in float32 may differ in its last bit
    assert (ours == theirs).double().mean() > 0.999
    torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=0)


def test_rms_norm_gradient_in_bf16_is_that_of_float64() -> None:
    weight, x = randn(40, dtype=torch.bfloat16, seed=1), randn(9, 40, dtype=torch.bfloat16, scale=3)
    grads = []
    for dtype in (torch.bfloat16, torch.float64):
        leaf = x.detach().to(dtype, copy=True).requires_grad_()
        exact = weight * leaf * leaf.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt()
        y = rms_norm(leaf, weight, 1e-6) if dtype == torch.bfloat16 else exact
        grads += torch.autograd.grad(
            y, leaf, randn(9, 40, dtype=torch.bfloat16, seed=3).to(y.dtype)
        )
    assert_close(grads[0], grads[1], floor=1e-3)


def test_norms_whose_weights_train_give_them_gradients() -> None:
    x = randn(5, 16, dtype=torch.float32).requires_grad_()
    weight, bias = (randn(16, dtype=torch.float32, seed=seed).requires_grad_() for seed in (1, 2))
    for y in (
        layer_norm(x, weight, bias, 1e-5),
        add_layer_norm(x, x, weight, bias, 1e-5),
        rms_norm(x, weight, 1e-5) + bias,
    ):
        assert all(
            g.abs().sum() > 0 for g in torch.autograd.grad(y.pow(2).sum(), [x, weight, bias])
        )


# ---- cross-entropy


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_by_tiles_is_the_softmax_over_all(dtype: torch.dtype) -> None:
    logits = randn(9, 300, dtype=dtype, scale=8)
    logits[0, :250] = -math.inf
    logits[1, 17], logits[2, :] = 100, -100
    maxima, sums = torch.full((9,), -math.inf), torch.zeros(9)
    tiles = []
    for tile in logits.split([7, 33, 200, 1, 59], 1):
        tile = tile.contiguous()
        factor = cross_entropy_tile(tile, maxima, sums)
        tiles = [old * factor[:, None].double() for old in tiles] + [tile.double()]
    torch.testing.assert_close(maxima.double(), logits.double().amax(-1))
    assert_close(maxima + sums.log(), logits.double().logsumexp(-1))
    softmax = torch.cat(tiles, 1) / sums[:, None].double()
    assert_close(
        softmax.float() if dtype == torch.float32 else softmax.to(dtype),
        logits.double().softmax(-1),
        floor=1e-4,
    )


# ---- threads


def test_results_do_not_depend_on_the_number_of_threads(form: str) -> None:
    if form == "torch":
        pytest.skip("the order of torch's sums is torch's own")
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            found.append(everything())
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def everything() -> list[Tensor]:
    """All kernels, forward and backward, on inputs that are large enough to be shared."""
    x, other = (
        randn(65, 1001, dtype=torch.bfloat16, seed=seed).requires_grad_() for seed in (0, 1)
    )
    weight = randn(1001, dtype=torch.bfloat16, seed=2)
    torch.manual_seed(0)
    outputs = [gelu(x), gelu(x, "tanh"), silu(x), silu_mul(x, other), fast_dropout(x, 0.2)]
    outputs += [add_layer_norm(x, other, weight, weight, 1e-5, p) for p in (0.0, 0.2)]
    outputs += [layer_norm(x, weight, weight, 1e-5), rms_norm(x, weight, 1e-5)]
    outputs += [torch.autograd.grad(y, x, other.detach())[0] for y in outputs]
    tile, maxima, sums = x.detach().clone(), torch.zeros(65), torch.zeros(65)
    factors = cross_entropy_tile(tile, maxima, sums)
    return [*outputs, tile, maxima, sums, factors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [1, 33, 384])
def test_add_layer_norm_is_the_norm_of_the_sum(dtype: torch.dtype, width: int, bias: bool) -> None:
    weight, shift = (
        randn(width, dtype=dtype, seed=3),
        randn(width, dtype=dtype, seed=4) if bias else None,
    )
    found = []
    for fused in (True, False):
        x, residual = (randn(7, width, dtype=dtype, seed=seed).requires_grad_() for seed in (0, 1))
        y = (
            add_layer_norm(x, residual, weight, shift, 1e-5)
            if fused
            else layer_norm(residual + x, weight, shift, 1e-5)
        )
        y.backward(randn(7, width, dtype=dtype, seed=2))
        found.append((y.detach(), x.grad, residual.grad))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_layer_norm_drops_the_same_entries_of_x_forward_and_backward(
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(3)
    x = torch.zeros(50, 401, dtype=dtype, requires_grad=True)
    residual = randn(50, 401, dtype=dtype).requires_grad_()
    weight, shift = torch.ones(401, dtype=dtype), torch.zeros(401, dtype=dtype)
    with torch.no_grad():
        x += 1000  # the sum says which entry was kept
    y = add_layer_norm(x, residual, weight, shift, 1e-5, 0.25)
    y.backward(randn(50, 401, dtype=dtype, seed=2))
    assert x.grad is not None and residual.grad is not None  # noqa: PT018
    kept = y > 0
    assert 0.7 < kept.double().mean() < 0.8
    assert x.grad[~kept].eq(0).all()
    torch.testing.assert_close(x.grad[kept], (residual.grad[kept].double() / 0.75).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_what_is_normed_may_take_the_place_of_x(form: str, dtype: torch.dtype, p: float) -> None:
    if form == "torch":
        pytest.skip("of the kernel in C alone")
    x, residual = (randn(50, 401, dtype=dtype, seed=seed) for seed in (0, 1))
    weight, shift, drop = (
        randn(401, dtype=torch.float32, seed=3),
        randn(401, dtype=torch.float32, seed=4),
        (7, *levels_dropped(p)),
    )
    z = torch.empty_like(x)
    y, statistics = add_layer_norm_in_c(x, residual, weight, shift, 1e-5, drop, z)
    again, others = add_layer_norm_in_c(x, residual, weight, shift, 1e-5, drop, x)
    assert torch.equal(x, z)
    assert torch.equal(y, again)
    assert torch.equal(statistics, others)
    dropped = (z == residual).double().mean()
    assert dropped < 0.05 if p == 0 else 0.2 < dropped < 0.3


# ---- modules


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_gpt2", "tiny_bert"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_with_swapped_modules_is_the_same_model(
    fixture: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(fixture)
    auto = AutoModel if fixture == "tiny_bert" else AutoModelForCausalLM
    model: Any = auto.from_pretrained(folder, dtype=dtype).requires_grad_(False)
    before, types_before = (
        copy.deepcopy(model.state_dict()),
        {name: type(module) for name, module in model.named_modules()},
    )
    ids = torch.randint(5, 30, (3, 12), generator=torch.Generator().manual_seed(0))
    expected = model.eval()(ids)[0]
    changed = use_fast_elementwise(model)
    assert use_fast_elementwise(model) == [], "a second call changes nothing"
    norms = [name for name, module in model.named_modules() if "Norm" in type(module).__name__]
    assert norms
    assert set(norms) < set(changed)
    ends = {
        name
        for name, module in model.named_modules()
        if type(module) in (BertSelfOutput, BertOutput)
    }
    assert len(ends) == (4 if fixture == "tiny_bert" else 0)
    assert ends <= set(changed)
    assert any(
        type(model.get_submodule(name)) in (nn.SiLU, activations.SiLUActivation, *GELUS)
        for name in changed
    )
    assert [name for name in changed if name.endswith("mlp")] == [
        name for name, module in model.named_modules() if isinstance(module, LlamaMLP)
    ]
    assert [name for name, module in model.named_modules() if type(module) is nn.Dropout] == []
    assert {name: type(m) for name, m in model.named_modules() if type(m) is not FastDropout} == {
        name: t for name, t in types_before.items() if t is not nn.Dropout
    }
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for found in (model(ids)[0], copy.deepcopy(model)(ids)[0]):
        torch.testing.assert_close(
            found,
            expected,
            rtol=0.05 if dtype == torch.bfloat16 else 1e-4,
            atol=0.02 if dtype == torch.bfloat16 else 1e-5,
        )


GELUS = (activations.GELUActivation, activations.NewGELUActivation, activations.GELUTanh, nn.GELU)


def test_a_norm_that_means_something_else_is_left_alone() -> None:
    gemma, llama = GemmaRMSNorm(16), LlamaRMSNorm(16)
    nn.init.normal_(gemma.weight)
    model = nn.Sequential(
        gemma, llama, nn.LayerNorm((2, 8)), nn.GELU("tanh"), nn.ReLU(), OtherMLP()
    )
    assert use_fast_elementwise(model) == ["1", "3", "5.act_fn"]


class OtherMLP(nn.Module):
    """Has what Llama's has, and does something else with it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8) for _ in range(3))
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))
        return y
