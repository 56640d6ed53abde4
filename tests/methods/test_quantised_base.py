"""Every method on a base in 4 bits: the rules of the contract that the form of the base can
break."""

from __future__ import annotations

import copy
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lorakit.adapters.base import PlainBase, in_out
from lorakit.adapters.inject import linear_layers, merge_all
from lorakit.adapters.layer import Adapter
from lorakit.adapters.quantised import QuantisedLinear
from lorakit.cpu.speed_up import speed_up
from lorakit.export.native import AdapterFacts, load_native, save_native
from lorakit.methods import method_names
from lorakit.training.trained import trainable, trained_tensors
from tests.support.contract import (
    LABELS,
    Built,
    Case,
    assert_equal_tensors,
    resumed,
    scramble,
    spec,
    steps,
    without_dropout,
)

pytest.importorskip("bitsandbytes")
JOINED: dict[str, tuple[str, dict[str, Any]]] = {
    "l1ra+salor": ("l1ra", {"with": [{"name": "salor"}]}),
}
ON_LLAMA = [(name, "llama") for name in [*method_names(), *JOINED]]


@pytest.fixture(
    params=[*ON_LLAMA, ("vanilla", "bert"), ("vanilla", "gpt2")],
    ids=" ".join,
)
def case(request: pytest.FixtureRequest) -> Case:
    name, kind = request.param
    method, settings = JOINED.get(name, (name, {}))
    folder = request.getfixturevalue(f"tiny_{kind}")
    return Case(method, kind, folder, settings, {"bits": 4})


def test_the_linear_layers_of_the_blocks_are_quantised_and_no_others(case: Case) -> None:
    bare, plain = case.bare().model, Case(case.method, case.kind, case.folder).bare().model
    quantised = {n for n, m in bare.named_modules() if isinstance(m, QuantisedLinear)}
    assert quantised == {name for name in linear_layers(plain) if ".0." in name or ".1." in name}
    for name, parameter in bare.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name))
    for name in quantised:
        sizes = in_out(bare.get_submodule(name))
        assert sizes == in_out(plain.get_submodule(name))
        mine, theirs = bare.get_submodule(name).weight, plain.get_submodule(name).weight
        assert 0.02 < (mine - theirs).norm() / theirs.norm() < 0.12


def test_forward_is_the_dequantised_base_plus_delta(case: Case) -> None:
    built = case.build(lora_alpha=3.0).prepare()
    scramble(built)
    for name, adapter in built.adapters.items():
        x = torch.randn(2, 9, in_out(adapter.base)[0], generator=torch.Generator().manual_seed(0))
        weight = adapter.base.weight + adapter.delta()
        for training in (True, False):
            adapter.train(training)
            expected = linear(x, weight, adapter.bias)
            torch.testing.assert_close(adapter(x), expected, rtol=1e-5, atol=1e-5, msg=name)
        adapter.freeze()
        with torch.no_grad():
            torch.testing.assert_close(adapter(x), expected, rtol=1e-5, atol=1e-5, msg=name)


def merged_logits(built: Built, case: Case) -> Tensor:
    copied = copy.deepcopy(built.task_model)
    adapters = {n: m for n, m in copied.model.named_modules() if isinstance(m, Adapter)}
    left_out = next(reversed(adapters))
    kept = {name: adapter for name, adapter in adapters.items() if name != left_out}
    # a layer without an adapter is dense after merging too
    parent, _, child = left_out.rpartition(".")
    assert not adapters[left_out].delta().any()
    setattr(copied.model.get_submodule(parent), child, adapters[left_out].base.layer)
    merge_all(copied.model, kept)
    plain = Case(case.method, case.kind, case.folder).bare().model
    types = {name: type(module) for name, module in plain.named_modules()}
    assert types == {name: type(module) for name, module in copied.model.named_modules()}
    with torch.no_grad():
        return copied.logits(case.batch())


def test_merged_equals_unmerged_and_is_a_plain_model(case: Case) -> None:
    built = case.build().prepare()
    before = built.logits(case.batch())
    scramble(built)
    with torch.no_grad():
        list(built.adapters.values())[-1].lora_B.zero_()
    after = built.logits(case.batch())
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(merged_logits(built, case), after, rtol=1e-4, atol=2e-5)


def test_training_moves_adapters_and_heads_alone_as_over_a_dense_base(case: Case) -> None:
    ends, losses = [], []
    for dense in (False, True):
        built = without_dropout(case.build().prepare())
        scramble(built)
        if dense:
            for adapter in built.adapters.values():
                layer = adapter.base.layer
                assert isinstance(layer, QuantisedLinear)
                twin = nn.Linear(layer.in_features, layer.out_features, bias=False)
                twin.weight.data = layer.stored.dense()
                twin.bias = layer.bias
                adapter.set_base(PlainBase(twin))
        codes = {name: buffer.clone() for name, buffer in built.model.named_buffers()}
        run = steps(built, case.examples(), spec(max_steps=6, learning_rate=1e-3))
        losses.append([report.loss for report in islice(run, 2)])
        for name, buffer in built.model.named_buffers():
            assert torch.equal(buffer, codes[name])
        ends.append(trained_tensors(built.model))
        assert not any("codes" in name for name in trainable(built.model))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert ends[0].keys() == ends[1].keys()


@pytest.mark.parametrize("method", ["vanilla", "chunkwise"])
def test_training_lowers_the_loss(method: str, tiny_llama: Path) -> None:
    case = Case(method, "llama", tiny_llama, None, {"bits": 4})
    built = case.build()
    with torch.no_grad():
        built.model.get_output_embeddings().weight.mul_(20.0)
    speed_up(built.task_model, built.adapters)
    settings = spec(max_steps=400, per_device_train_batch_size=12)
    losses = [report.loss for report in islice(steps(built, case.examples(), settings), 24)]
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:2]), losses


def test_resume_equals_uninterrupted(case: Case, tmp_path: Path) -> None:
    resumed(case, tmp_path)


def test_save_and_load_are_exact(case: Case, tmp_path: Path) -> None:
    built = case.build().prepare()
    scramble(built)
    facts = AdapterFacts(
        {"name": case.method},
        case.task,
        LABELS if case.kind == "bert" else None,
        case.source,
    )
    save_native(tmp_path / "adapter", built.task_model, built.method, facts)
    other = case.build(seed=0)
    load_native(tmp_path / "adapter", other.task_model, other.method)
    assert_equal_tensors(trained_tensors(other.model), trained_tensors(built.model))
    assert torch.equal(other.logits(case.batch()), built.logits(case.batch()))
