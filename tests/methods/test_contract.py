"""What every method owes: these tests take whatever is in lorakit/methods/, by itself, and the
combinations of `COMBINED`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lorakit.adapters.base import in_out
from lorakit.adapters.inject import merge_all
from lorakit.adapters.layer import Adapter
from lorakit.adapters.optimizer import AdamW
from lorakit.cpu.blocks import checkpoint_blocks
from lorakit.data.batches import Batch, collate
from lorakit.export.native import AdapterFacts, load_native, read_facts, save_native
from lorakit.methods import Method, Tiered, build_method, config_classes, method_names
from lorakit.training import checkpoint
from lorakit.training.checkpoint import RunState
from lorakit.training.loop import build_optimizer, train
from lorakit.training.trained import ADAPTER_FILE, trainable, trained_tensors
from tests.support.contract import (
    COMBINED,
    CUT,
    LABELS,
    TASKS,
    Built,
    Case,
    assert_equal_tensors,
    optimizer_tensors,
    resumed,
    scramble,
    spec,
    started,
    steps,
    without_dropout,
)

# What is tested where a method draws by chance what a micro-batch computes, which other rules of
# the contract rule out.
DRAWN: dict[str, tuple[str, dict[str, Any]]] = {
    "chunkwise nested": ("chunkwise", {"training": "nested", "ladder": [1, 4]}),
    "chunkwise nested+base": (
        "chunkwise",
        {"training": "nested", "ladder": [1, 4], "with": COMBINED["chunkwise+base"][1]["with"]},
    ),
}


@pytest.fixture(params=TASKS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[*method_names(), *COMBINED])
def case(request: pytest.FixtureRequest, kind: str) -> Case:
    method, settings = COMBINED.get(request.param, (request.param, {}))
    return Case(method, kind, request.getfixturevalue(f"tiny_{kind}"), settings)


def resize(built: Built, optimizer: AdamW, name: str, keep: list[int], count: int) -> None:
    """A rank change as a method makes it: through the optimizer, with new components as at
    initialisation."""
    adapter = built.adapters[name]
    new = adapter.new_components(count, torch.Generator().manual_seed(7))
    assert new.keys() == adapter.component_dims.keys() == adapter.components().keys()
    for part, dim in adapter.component_dims.items():
        optimizer.resize(adapter, part, dim, torch.tensor(keep, dtype=torch.long), new[part])


def shuffle_ranks(built: Built, optimizer: AdamW) -> None:
    """Ranks 0, 1, 2 … up to what each layer can take, some by cutting and some by adding."""
    for i, (name, adapter) in enumerate(built.adapters.items()):
        keep = list(range(adapter.rank))[i % 2 :: 2] if i else []
        count = min(i % 4, adapter.max_rank - len(keep)) if i else 0
        resize(built, optimizer, name, keep, count)
    ranks = [adapter.rank for adapter in built.adapters.values()]
    assert min(ranks) == 0
    assert max(ranks) > 4
    assert len(set(ranks)) > 3


# -- at the start ----------------------------------------------------------------------------------


def test_there_are_layers_that_are_not_square_in_both_directions(case: Case) -> None:
    shapes = {in_out(adapter.base) for adapter in case.build().adapters.values()}
    assert any(in_features < out_features for in_features, out_features in shapes)
    assert any(in_features > out_features for in_features, out_features in shapes)


def test_adapters_change_nothing_at_first(case: Case) -> None:
    bare = case.bare()
    bare.model.eval()
    batch = case.batch()
    with torch.no_grad():
        expected = bare.logits(batch)
    torch.testing.assert_close(case.build().logits(batch), expected, rtol=0, atol=1e-6)


def test_a_starts_alike_in_every_method_and_otherwise_for_every_seed(case: Case) -> None:
    mine = {name: adapter.lora_A for name, adapter in case.build(seed=3).adapters.items()}
    for other in method_names():
        theirs = Case(other, case.kind, case.folder).build(seed=3).adapters
        assert_equal_tensors(mine, {name: adapter.lora_A for name, adapter in theirs.items()})
    for name, adapter in case.build(seed=4).adapters.items():
        assert not torch.equal(mine[name], adapter.lora_A)
        # Kaiming uniform, a = √5
        assert adapter.lora_A.abs().max() <= in_out(adapter.base)[0] ** -0.5
        assert not adapter.delta().any()


def test_the_scale_is_alpha_over_the_initial_rank(case: Case) -> None:
    built = case.build(lora_alpha=6.0)
    shuffle_ranks(built, started(built, spec()))
    assert {adapter.scale for adapter in built.adapters.values()} == {1.5}


# -- forward, delta, merge -------------------------------------------------------------------------


def test_forward_is_the_base_plus_delta(case: Case) -> None:
    built = case.build(lora_alpha=3.0).prepare()
    scramble(built)
    for name, adapter in built.adapters.items():
        in_features, out_features = in_out(adapter.base)
        x = torch.randn(2, 5, in_features, generator=torch.Generator().manual_seed(0))
        delta = adapter.delta()
        assert delta.shape == (out_features, in_features)
        assert delta.abs().max() > 0.01
        for training in (True, False):  # lora_dropout is 0
            adapter.train(training)
            torch.testing.assert_close(
                adapter(x), adapter.base.layer(x) + x @ delta.T, rtol=1e-5, atol=1e-5, msg=name
            )


def test_dropout_acts_in_training_alone_and_keeps_the_mean(case: Case) -> None:
    built = case.build(lora_dropout=0.5)
    scramble(built)
    adapter = next(iter(built.adapters.values()))
    x = torch.randn(1, in_out(adapter.base)[0]).expand(4000, -1)
    adapter.eval()
    exact = adapter(x[:1]) - adapter.base.layer(x[:1])
    adapter.train()
    updates = adapter(x) - adapter.base.layer(x)
    assert updates.std(0).min() > 1e-3
    error = (updates.mean(0) - exact[0]).abs() / (updates.std(0) / len(x) ** 0.5)
    assert error.max() < 5  # standard errors


def merged_logits(built: Built, batch: Batch) -> Tensor:
    copied = copy.deepcopy(built.task_model)
    merge_all(
        copied.model,
        {name: m for name, m in copied.model.named_modules() if isinstance(m, Adapter)},
    )
    assert not any(isinstance(module, Adapter) for module in copied.model.modules())
    with torch.no_grad():
        return copied.logits(batch)


def test_merged_equals_unmerged_before_and_after_a_rank_change_and_at_rank_0(case: Case) -> None:
    built, batch = case.build(), case.batch()
    optimizer = started(built, spec())
    base = built.logits(batch)
    scramble(built)
    before = built.logits(batch)
    assert (before - base).abs().max() > 1e-3
    torch.testing.assert_close(merged_logits(built, batch), before, rtol=1e-4, atol=2e-5)
    shuffle_ranks(built, optimizer)
    scramble(built)
    after = built.logits(batch)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(merged_logits(built, batch), after, rtol=1e-4, atol=2e-5)
    for name in built.adapters:
        resize(built, optimizer, name, [], 0)
    if any(adapter.base.rank for adapter in built.adapters.values()):
        torch.testing.assert_close(
            merged_logits(built, batch), built.logits(batch), rtol=1e-4, atol=2e-5
        )
    else:
        assert torch.equal(built.logits(batch), merged_logits(built, batch))
    torch.testing.assert_close(built.logits(batch), base, rtol=0, atol=1e-6)


def test_components_that_are_exported_as_plain_lora_act_alike(case: Case) -> None:
    built = case.build().prepare()
    scramble(built)
    for adapter in built.adapters.values():
        a, b = built.method.export(adapter)
        torch.testing.assert_close(
            adapter.scale * (b @ a), adapter.delta().detach(), rtol=1e-5, atol=1e-6
        )


# -- training --------------------------------------------------------------------------------------


def test_only_adapters_and_heads_train(case: Case) -> None:
    built = case.build().prepare()
    before = {name: tensor.clone() for name, tensor in built.model.state_dict().items()}
    adapters = built.adapters.items()
    saved = {f"{name}.{part}" for name, adapter in adapters for part in adapter.parts()}
    own = {id(p) for _, adapter in adapters for p in adapter.parts().values()}
    parts = {name for name, p in built.model.named_parameters() if id(p) in own}
    heads = {
        name
        for name in before
        if name.startswith(tuple(f"{head}." for head in built.task_model.heads))
    }
    assert bool(heads) == (case.task == "sequence-classification")
    for _ in steps(built, case.examples(), spec(max_steps=3)):
        pass
    after = built.model.state_dict()
    changed = {
        name
        for name in before
        if before[name].shape != after[name].shape or not torch.equal(before[name], after[name])
    }
    assert changed <= parts | heads
    assert changed >= heads | {name for name in parts if name.endswith((".lora_A", ".lora_B"))}
    assert set(trainable(built.model)) == saved | heads


def test_training_lowers_the_loss_on_what_can_be_learnt(case: Case) -> None:
    built = case.build()
    if case.task == "causal-lm":
        # a random head of the usual size can say nothing but "all words alike"
        with torch.no_grad():
            built.model.get_output_embeddings().weight.mul_(20.0)
    # The beginning of a long run: at the very end of one a method may prune what it likes.
    run = steps(
        built,
        case.examples(),
        spec(max_steps=400, per_device_train_batch_size=12, learning_rate=5e-3),
    )
    losses = [report.loss for report in islice(run, 60)]
    assert np.mean(losses[-4:]) < 0.5 * np.mean(losses[:2]), losses


def test_one_seed_gives_the_same_bytes_and_another_does_not(case: Case) -> None:
    ends = []
    for seed in (5, 5, 6):
        built = case.build(seed=seed, lora_dropout=0.1, **case.moving(4))
        losses = [report.loss for report in steps(built, case.examples(), spec(seed=seed))]
        ends.append((losses, trained_tensors(built.model)))
    assert ends[0][0] == ends[1][0]
    assert_equal_tensors(ends[0][1], ends[1][1])
    assert ends[0][0] != ends[2][0]
    assert any(
        not torch.equal(t, ends[2][1][name])
        for name, t in ends[0][1].items()
        if t.shape == ends[2][1][name].shape
    )


# How a step of eight rows is cut: (rows of a micro-batch, times, tokens of a micro-batch) and how
# many micro-batches come of it.
CUTS = {
    (8, 1, None): range(1, 2),
    (1, 8, None): range(8, 9),
    (3, 3, None): range(3, 4),
    (8, 1, 30): range(2, 8),
    (4, 2, 20): range(3, 8),
    (8, 1, 1): range(8, 9),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_the_cut_into_micro_batches_changes_no_step(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for language modelling, where micro-batches differ in their number of target tokens."""
    found = []
    for (rows, accumulated, tokens), expected_count in CUTS.items():
        built = without_dropout(case.build())
        if dtype == torch.float64:
            built.model.double()
            for head in built.task_model.heads:
                # they would make it float32
                built.model.get_submodule(head)._forward_pre_hooks.clear()
        scramble(built)
        # With beta1 = 0, Adam's first moment after a step is its gradient.
        settings = spec(
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulated,
            max_tokens_per_micro_batch=tokens,
            adam_beta1=0.0,
            max_steps=100,
            max_grad_norm=None,
        )
        examples = case.examples(rows=8)
        if case.task == "causal-lm":
            assert len({collate(examples, np.array([row]), 0).targets for row in range(8)}) > 1
        optimizer, told = started(built, settings), []
        monkeypatch.setattr(
            built.method, "before_forward", _also(told.append, built.method.before_forward)
        )
        report = next(train(built.task_model, built.method, optimizer, examples, settings))
        assert len(told) in expected_count
        gradients = {name: optimizer.state[p].first for name, p in trainable(built.model).items()}
        found.append((report, gradients))
    (one, expected), *others = found
    assert sum(float(gradient.abs().sum()) > 0 for gradient in expected.values()) == len(expected)
    for report, gradients in others:
        assert report.loss == pytest.approx(one.loss, abs=1e-6)
        assert report.grad_norm == pytest.approx(one.grad_norm, rel=3e-5)
        assert report.tokens == one.tokens
        for name, gradient in gradients.items():
            # Losses and Adam's moments are in float32 whatever the model is in.
            rtol, atol = (1e-4, 5e-6) if dtype == torch.float32 else (1e-6, 1e-8)
            torch.testing.assert_close(gradient, expected[name], rtol=rtol, atol=atol, msg=name)


def _also(first: Callable[[Batch], None], then: Callable[[Batch], None]) -> Callable[[Batch], None]:
    def both(batch: Batch) -> None:
        first(batch)
        then(batch)

    return both


@pytest.mark.parametrize("name", [*method_names(), *COMBINED, *DRAWN])
def test_blocks_that_are_computed_again_give_the_same_gradients(
    name: str, kind: str, request: pytest.FixtureRequest
) -> None:
    """Gradient checkpointing: a block is computed twice, with whatever the method had set for it
    the first time."""
    method, settings = (COMBINED | DRAWN).get(name, (name, {}))
    case = Case(method, kind, request.getfixturevalue(f"tiny_{kind}"), settings)
    found = []
    for checkpointed in (False, True):
        built = without_dropout(case.build()).prepare()
        scramble(built)
        if checkpointed:
            tiers = built.method.tiers
            checkpoint_blocks(built.task_model, tiers.recompute_context if tiers else nullcontext)
        built.model.train()
        batches = [collate(built.examples, np.arange(start, start + 4), 0) for start in (0, 4)]
        built.method.begin(build_optimizer(built.method, built.heads, spec()), 4)
        torch.manual_seed(3)
        losses = []
        for batch in batches:  # both forward passes before the backward passes
            built.method.before_forward(batch)
            losses.append(built.task_model.row_losses(batch)[0].sum())
        for loss in losses:
            loss.backward()
        found.append({name: p.grad for name, p in trainable(built.model).items()})
    plain, again = found
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, msg=name)


def composed() -> Any:
    name, keys = COMBINED["chunkwise+base"][:2]
    return build_method(config_classes()[name].model_validate(keys), 0)


def test_a_composition_forwards_every_hook() -> None:
    """What is not forwarded does in a composition what no method does."""
    # What follows from the config and the seed, which a composition has from its main method.
    others = {"scale", "alpha", "generator"}
    hooks = {name for name in vars(Method) if not name.startswith("_")}
    assert {"attach", "tiers", "is_final"} < hooks
    assert hooks - vars(type(composed())).keys() == others


def test_a_composition_has_every_hook_of_its_main_methods_tiers() -> None:
    method = composed()
    hooks = {name for name in vars(Tiered) if not name.startswith("_")}
    assert {"scheduler", "kv_policies", "at_tier", "recompute_context", "full_rank"} == hooks
    assert method.tiers is method.main.tiers is not None
    assert all(callable(getattr(method.tiers, name)) for name in hooks)
    assert build_method(config_classes()["vanilla"].model_validate({}), 0).tiers is None


# -- save, load, resume ----------------------------------------------------------------------------


def test_a_checkpoint_holds_every_byte(case: Case, tmp_path: Path) -> None:
    built, settings, batch = case.build(), spec(max_steps=2), case.batch()
    optimizer = started(built, settings)
    for _ in train(built.task_model, built.method, optimizer, case.examples(), settings):
        pass
    shuffle_ranks(built, optimizer)
    folder = checkpoint.save(
        tmp_path, built.model, built.method, optimizer, RunState(step=2, tokens=77), keep=None
    )

    saved, other = checkpoint.read(folder), case.build(seed=8)
    assert (saved.run.step, saved.run.tokens) == (2, 77)
    saved.restore_model(other.model, other.method)
    restored = build_optimizer(other.method, other.heads, settings)
    saved.restore_optimizer(other.model, restored)
    assert_equal_tensors(trained_tensors(other.model), trained_tensors(built.model))
    assert_equal_tensors(optimizer_tensors(other, restored), optimizer_tensors(built, optimizer))
    assert other.method.state_dict() == built.method.state_dict()
    assert other.method.rank_state() == built.method.rank_state()
    assert torch.equal(other.logits(batch), built.logits(batch))
    assert all(p.requires_grad for p in trained(other))


def trained(built: Built) -> list[nn.Parameter]:
    return [p for a in built.adapters.values() for p in a.parts().values()] + built.heads


@pytest.mark.parametrize("ranks", ["initial", "moved", "zero"])
def test_an_adapter_folder_holds_every_byte(case: Case, ranks: str, tmp_path: Path) -> None:
    built, batch = case.build(), case.batch()
    optimizer = started(built, spec())
    if ranks == "moved":
        shuffle_ranks(built, optimizer)
    if ranks == "zero":
        for name in built.adapters:
            resize(built, optimizer, name, [], 0)
    scramble(built)
    labels = LABELS if case.task == "sequence-classification" else None
    facts = AdapterFacts(
        built.method.config.model_dump(mode="json", by_alias=True), case.task, labels, case.source
    )
    save_native(tmp_path / "adapter", built.task_model, built.method, facts)

    assert read_facts(tmp_path / "adapter") == facts
    keys = load_file(tmp_path / "adapter" / ADAPTER_FILE).keys()
    pairs = {
        f"base_model.model.{name}.{part}.weight"
        for name in built.adapters
        for part in ("lora_A", "lora_B")
    }
    assert pairs <= keys  # PEFT's names
    other = case.build(seed=8)
    load_native(tmp_path / "adapter", other.task_model, other.method)
    assert_equal_tensors(trained_tensors(other.model), trained_tensors(built.model))
    assert {n: a.rank for n, a in other.adapters.items()} == {
        n: a.rank for n, a in built.adapters.items()
    }
    assert torch.equal(other.logits(batch), built.logits(batch))


def test_a_resumed_run_ends_with_the_same_bytes(case: Case, tmp_path: Path) -> None:
    """With dropout, and with ranks that fall, and rise if they can, on both sides of the cut where
    a method moves them."""
    history = resumed(case, tmp_path)
    if case.moves:
        for part in (history[: CUT + 1], history[CUT:]):
            moves = [
                after[name] - before[name] for before, after in pairwise(part) for name in before
            ]
            assert min(moves) < 0, "the test should cover ranks that fall"
            assert max(moves) > 0 or not case.hands_out, "the test should cover ranks that rise"


# -- what a new method must say of itself ----------------------------------------------------------


def test_a_method_is_named_as_its_file_and_its_config_needs_nothing_but_that(case: Case) -> None:
    config = config_classes()[case.method].model_validate({})
    assert config.name == case.method
    assert config == config_classes()[case.method]()  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="no_such_key"):
        config_classes()[case.method].model_validate({"no_such_key": 1})


def test_cost_and_pool_are_the_budget(case: Case) -> None:
    built = case.build(**case.moving(6))
    for _ in steps(built, case.examples(), spec(max_steps=6)):
        state = built.method.rank_state()
        assert state.cost + state.pool == state.budget
        assert state.pool >= 0
        held = {name: adapter.lora_A.shape[0] for name, adapter in built.adapters.items()}
        # A method may count components that it still holds but has closed for now; none at the end.
        assert all(rank <= held[name] for name, rank in state.ranks.items())
    assert built.method.is_final
    assert state.ranks == held


def test_the_optimizer_holds_every_trained_parameter_once(case: Case) -> None:
    built = case.build().prepare()
    held = [id(p) for group in built.method.param_groups() for p in group.params]
    assert sorted(held) == sorted(
        id(p) for p in trained(built) if all(p is not head for head in built.heads)
    )
