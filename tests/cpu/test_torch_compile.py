"""Blocks that torch.compile makes, against the same blocks without. Backend `eager` traces as the
real one does and runs torch's own operations, `aot_eager` traces the backward pass too; the last
test has the real one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler

from lorakit.cpu import blocks
from lorakit.cpu.blocks import checkpoint_blocks, compile_blocks
from lorakit.cpu.speed_up import speed_up
from lorakit.errors import RecipeError, RunError
from lorakit.kernels import attention
from lorakit.kernels.packed_attention import packed_attention
from lorakit.methods import config_classes, method_names
from lorakit.recipes.recipe import load_recipe
from tests.support.contract import (
    COMBINED,
    TASKS,
    Built,
    Case,
    resumed,
    spec,
    steps,
    without_dropout,
)

STEPS = 5
RECIPE = """
model: {{name_or_path: {model}, task: sequence-classification}}
data: {{name_or_path: {data}}}
method: {{name: vanilla, r: 4}}
train: {{max_steps: 4, per_device_train_batch_size: 4, precision: fp32, save_steps: 2,
  torch_compile: true}}
output_dir: {folder}/run
"""


@pytest.fixture(autouse=True)
def _as_in_a_new_process() -> Iterator[None]:
    """What was compiled is forgotten, and compiling leaves dynamo's settings as they were."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(force_parameter_static_shapes=True):
        yield
    torch._dynamo.reset()


class Compiled(Case):
    """A case whose models are compiled as a run compiles them."""

    def __init__(self, case: Case, backend: str = "eager") -> None:
        super().__init__(case.method, case.kind, case.folder, case.settings)
        self.backend = backend

    def build(self, seed: int = 0, **settings: Any) -> Built:
        torch._dynamo.reset()
        built = super().build(seed, **settings)
        speed_up(built.task_model, built.adapters)
        compile_blocks(built.task_model, built.method.config.ranks_move, self.backend)
        return built


def case_of(name: str, kind: str, request: pytest.FixtureRequest) -> Case:
    method, settings = COMBINED.get(name, (name, {}))
    return Case(method, kind, request.getfixturevalue(f"tiny_{kind}"), settings)


def gradients(built: Built, losses: Tensor) -> dict[str, Tensor]:
    trained = {name: p for name, p in built.model.named_parameters() if p.requires_grad}
    return dict(
        zip(trained, torch.autograd.grad(losses.sum(), list(trained.values())), strict=True)
    )


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], allowed: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, right in theirs.items():
        error = float((ours[name] - right).norm())
        assert error <= allowed * max(1.0, float(right.norm())), (name, error)


@pytest.mark.parametrize(
    ("kind", "checkpoints"), [*((kind, False) for kind in TASKS), ("llama", True)]
)
def test_losses_and_gradients_are_the_same_and_blocks_share_what_is_compiled(
    kind: str, checkpoints: bool, request: pytest.FixtureRequest
) -> None:
    case = case_of("vanilla", kind, request)
    plain, built = without_dropout(case.build()), without_dropout(case.build())
    if checkpoints:
        checkpoint_blocks(built.task_model, None)
    notes = speed_up(built.task_model, built.adapters) + compile_blocks(
        built.task_model, backend="aot_eager"
    )
    assert len(notes) == 1
    assert "padded" in notes[0]
    assert graphs() == 1, "one for both blocks"
    for batch in (case.batch(), case.batch()):
        found = []
        for one in (plain, built):
            with torch.no_grad():
                for adapter in one.adapters.values():
                    adapter.lora_B.copy_(
                        torch.linspace(-0.1, 0.1, adapter.lora_B.numel()).view_as(adapter.lora_B)
                    )
            one.model.train()
            losses = one.task_model.row_losses(batch)[0]
            found.append({"losses": losses.detach()} | gradients(one, losses))
        assert_close(found[1], found[0])
    assert graphs() == 1, "lengths are symbols"
    assert not counters["graph_break"]


@pytest.mark.parametrize("name", [*method_names(), "l1ra+salor"])
def test_every_method_trains_as_without(name: str, request: pytest.FixtureRequest) -> None:
    """Ranks that move make new parameters, which have to be used from then on."""
    case = case_of(name, "llama", request)
    reports, ends = [], []
    for one in (case, Compiled(case)):
        built = without_dropout(one.build(**case.moving(STEPS)))
        reports.append(
            [report.loss for report in steps(built, built.examples, spec(max_steps=STEPS))]
        )
        ends.append(
            {name: p.detach() for name, p in built.model.named_parameters() if p.requires_grad}
        )
        ranks = [adapter.rank for adapter in built.adapters.values()]
        assert (len(set(ranks)) > 1) == case.moves
    assert graphs()
    assert reports[1] == pytest.approx(reports[0], abs=1e-5)
    assert {name: p.shape for name, p in ends[1].items()} == {
        name: p.shape for name, p in ends[0].items()
    }
    # Adam makes much of roundings where gradients are nearly zero
    assert_close(ends[1], ends[0], 1e-3)


def test_ranks_that_move_are_symbols_and_past_the_limit_blocks_run_as_without(
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = case_of("l1ra", "llama", request)
    built = without_dropout(Compiled(case).build(r=6))
    assert graphs() == 1

    def loss_at(ranks: Callable[[int], int]) -> Tensor:
        rng = torch.Generator().manual_seed(3)
        for number, adapter in enumerate(built.adapters.values()):
            new = adapter.new_components(ranks(number), rng)
            new["lora_B"].normal_(std=0.1, generator=rng)
            for part, values in new.items():
                setattr(adapter, part, nn.Parameter(values))
        built.model.train()
        losses: Tensor = built.task_model.row_losses(case.batch())[0]
        with torch.no_grad():  # not compiled
            torch.testing.assert_close(
                losses, built.task_model.row_losses(case.batch())[0], rtol=1e-5, atol=1e-5
            )
        return losses

    for shift in range(3):
        loss_at(lambda number, shift=shift: 2 + (number + shift) % 5)  # type: ignore[misc]
    assert graphs() == 1
    dynamo_log = logging.getLogger("torch._dynamo")
    with monkeypatch.context() as patch, torch._dynamo.config.patch(recompile_limit=3):
        # What torch logs does not reach the root logger, where older versions of pytest listen.
        patch.setattr(dynamo_log, "handlers", [caplog.handler])
        for zeros in range(4):
            loss_at(lambda number, zeros=zeros: 3 if number > zeros else 0).sum().backward()  # type: ignore[misc,no-untyped-call]
    assert graphs() == 3
    assert "recompile_limit" in caplog.text


@pytest.mark.parametrize("name", ["vanilla", "l1ra"])
def test_a_resumed_run_ends_with_the_same_bytes(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    resumed(Compiled(case_of(name, "bert", request)), tmp_path)


def test_names_stay_and_evaluation_is_packed(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of("vanilla", "llama", request)
    plain, built = case.build(), Compiled(case).build()
    assert built.model.state_dict().keys() == plain.model.state_dict().keys()
    packed: list[int] = []
    real = packed_attention

    def watched(*arguments: Any) -> Tensor:
        packed.append(arguments[3].rows)
        return real(*arguments)

    monkeypatch.setattr(attention, "packed_attention", watched)
    batch = case.batch()
    built.model.train()
    built.task_model.row_losses(batch)
    assert not packed
    with torch.no_grad():
        ours, theirs = (one.task_model.row_losses(batch)[0] for one in (built, plain))
    assert packed
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert graphs() == 1


# -- refused ---------------------------------------------------------------------------------------


def test_what_can_not_be_compiled_is_refused_by_the_recipe(tmp_path: Path) -> None:
    assert {
        name for name, config in config_classes().items() if config.model_validate({}).not_compiled
    } == set()
    recipe = tmp_path / "nested.yaml"
    text = RECIPE.format(model="m", data="d", folder=tmp_path)
    recipe.write_text(
        text.replace("vanilla, r: 4", "chunkwise, r: 4, training: nested"), encoding="utf-8"
    )
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe)
    (problem,) = error.value.problems
    assert problem.key == "train.torch_compile"
    assert "nested" in problem.what
    assert load_recipe(recipe, ["method.training=posthoc"]).train.torch_compile


def test_a_model_without_blocks_is_refused(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = case_of("vanilla", "llama", request).build()
    monkeypatch.setattr(blocks, "blocks_of", lambda model: [])
    with pytest.raises(RecipeError, match="no list of blocks") as error:
        compile_blocks(built.task_model)
    assert error.value.problems[0].key == "train.torch_compile"


def test_without_a_compiler_the_error_is_one_that_says_so(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    built = case_of("vanilla", "bert", request).build()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    nothing = torch._inductor.config.patch({"cpp.cxx": (None, "/nonexistent")})
    with nothing, pytest.raises(RunError, match=r"torch.compile fails .* compiler") as error:
        compile_blocks(built.task_model)
    assert error.value.remedy
    assert "torch_compile: false" in error.value.remedy


# -- the real one ----------------------------------------------------------------------------------


def can_compile() -> bool:
    try:
        return bool(cpp_builder.get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


@pytest.mark.skipif(not can_compile(), reason="torch.compile finds no C++ compiler")
def test_a_run_from_recipe_to_merged_model_and_the_same_bytes_when_resumed(
    tiny_bert: Path, sentiment: Path, tmp_path: Path, call: Callable[..., str]
) -> None:
    """With dropout."""
    recipe = tmp_path / "compiled.yaml"
    recipe.write_text(
        RECIPE.format(model=tiny_bert, data=sentiment, folder=tmp_path), encoding="utf-8"
    )
    call("train", recipe)
    assert graphs()
    run = tmp_path / "run"
    weights = run / "adapter/adapter_model.safetensors"
    whole = weights.read_bytes()
    torch._dynamo.reset()
    torch.manual_seed(5)
    call("train", recipe, "--resume", run / "checkpoints/step-00000002")
    assert weights.read_bytes() == whole
    call("export", run, "--merge")
    assert b"_orig_mod" not in (run / "merged/model.safetensors").read_bytes()
