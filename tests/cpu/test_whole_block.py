"""What blocks that are one operation have in common, whatever their make; and what their tests
share. The references are transformers' own models in float64, and the blocks' modules in bfloat16.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.adapters.base import PrunedBase
from lorakit.adapters.inject import merge_all
from lorakit.adapters.layer import Adapter, adapters_of
from lorakit.cpu.blocks import checkpoint_blocks
from lorakit.kernels.packing import Packing
from lorakit.methods import method_names
from lorakit.models.task_model import TaskModel
from tests.support.blocks import (
    BERT,
    DTYPE,
    LLAMA,
    LLAMA_SIZES,
    RAGGED,
    Make,
    Tiny,
    assert_by_modules,
    close,
    errors,
    exact_twin,
    tiny_of,
    trained,
    watch,
)


@pytest.fixture(params=[LLAMA, BERT], ids=["llama", "bert"])
def make(request: pytest.FixtureRequest) -> Make:
    found: Make = request.param
    return found


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch, make: Make) -> list[int]:
    return watch(monkeypatch, make)


# -- against float64 -------------------------------------------------------------------------------


def exact_losses(tiny: Tiny) -> Tensor:
    return (
        Tiny(TaskModel(exact_twin(tiny), None, tiny.task_model.task, []), tiny.method)
        .losses(RAGGED)
        .detach()
        .double()
    )


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
    if torch.bfloat16 == DTYPE:  # in float32, an encoder's modules keep the same
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
        mask = torch.rand(adapter.weight.shape, generator=rng) < 0.5
        adapter.set_base(PrunedBase(adapter.base.layer, mask))
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
        tiny_of(make, dtype=torch.float64)
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
    assert first[-1] < first[0]
    assert first == pytest.approx(theirs, rel=0.1)
