"""AdaLoRA: its equations by hand, PEFT's allocator as the oracle, and what leaves when the budget
arrives."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from peft.tuners.adalora.layer import RankAllocator
from torch import Tensor, nn

from lorakit.adapters.inject import inject, match_targets, merge_all
from lorakit.adapters.layer import Target
from lorakit.adapters.optimizer import AdamW
from lorakit.errors import RecipeError
from lorakit.methods import build_method, config_classes
from lorakit.methods.adalora.config import Config
from lorakit.methods.adalora.method import AdaLoRA, TripletAdapter
from lorakit.models.tasks import task_named
from lorakit.recipes.recipe import load_recipe
from lorakit.training import checkpoint

SHAPES = {"q": (12, 8), "k": (12, 5), "up": (12, 20), "down": (20, 12)}  # {layer: (in, out)}


class Layers(nn.Module):
    """Four layers of different shapes."""

    def __init__(self) -> None:
        super().__init__()
        layers = {name: nn.Linear(*shape) for name, shape in SHAPES.items()}
        self.blocks = nn.ModuleList([nn.ModuleDict(layers)])

    def forward(self, x: Tensor) -> Tensor:
        block = self.blocks[0]
        down: Tensor = block["down"](torch.tanh(block["up"](x)))
        return torch.cat([block["q"](x), block["k"](x), down], -1)


class Bench:
    """A run whose gradients come from the test."""

    def __init__(self, total_steps: int = 20, seed: int = 3, **settings: Any) -> None:
        torch.manual_seed(0)
        self.config = Config.model_validate({"r": 4, "orth_reg_weight": 0.0} | settings)
        self.method = AdaLoRA(self.config, seed)
        self.model = Layers()
        ranks = match_targets(self.model, self.config)
        self.adapters = inject(self.model, self.method, ranks)
        self.optimizer = AdamW(self.method.param_groups())
        self.method.begin(self.optimizer, total_steps)
        self.total_steps, self.step = total_steps, 0
        self.rng = torch.Generator().manual_seed(7)

    def adapter(self, name: str) -> TripletAdapter:
        found = self.adapters[f"blocks.0.{name}"]
        assert isinstance(found, TripletAdapter)
        return found

    def parameters(self) -> dict[str, nn.Parameter]:
        """{layer.part: parameter}."""
        return {
            f"{layer}.{part}": parameter
            for layer in SHAPES
            for part, parameter in self.adapter(layer).components().items()
        }

    def go(self, steps: int) -> list[int]:
        """Steps with random gradients; the total rank after each."""
        totals = []
        for _ in range(steps):
            self.step += 1
            for parameter in self.parameters().values():
                parameter.grad = torch.randn(parameter.shape, generator=self.rng)
            self.method.before_step(self.step)
            self.optimizer.step(1e-2)
            self.optimizer.zero_grad()
            metrics = self.method.after_step(self.step)
            totals.append(self.method.rank_state().cost)
            assert metrics["rank_total"] == totals[-1]
        return totals


# -- the equations, by hand ------------------------------------------------------------------------


def test_the_budget_falls_as_a_cube_from_begin_to_end() -> None:
    """Eq. 12: 16 at first, 4 in the end; half way between, 4 + 12 / 8."""
    method = Bench(total_steps=100, target_r=1.0, begin=0.1, end=0.5, interval=0.01).method
    budgets = {step: method.budget(step) for step in (1, 10, 11, 20, 30, 49, 50, 100)}
    assert budgets == {1: 16, 10: 16, 11: 15, 20: 9, 30: 5, 49: 4, 50: 4, 100: 4}


def test_the_run_ends_with_two_thirds_of_its_ranks_unless_told() -> None:
    assert Bench(r=3).method.budget(20) == 8
    assert Bench(r=3, target_r=2.5).method.budget(20) == 10


def test_importance_of_triplets_by_hand() -> None:
    """Eqs. 7 to 11 for one layer of 2 → 2 with one triplet, after two gradients."""
    config = Config.model_validate({"r": 1, "beta1": 0.5, "beta2": 0.75, "orth_reg_weight": 0.0})
    method = AdaLoRA(config)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)])})
    (adapter,) = inject(model, method, {"layers.0": 1}).values()
    assert isinstance(adapter, TripletAdapter)
    method.begin(AdamW(method.param_groups()), 10)
    values = {"lora_A": [[1.0, -2.0]], "lora_B": [[3.0], [0.0]], "gate": [2.0]}
    for step in (1, 2):
        for name, parameter in adapter.components().items():
            parameter.data = torch.tensor(values[name])
            parameter.grad = torch.full_like(parameter, -float(step))
        method.before_step(step)
    # |w · gradient| is w, then 2 w. The mean: w / 2, then 5/4 w. The deviation: w / 8, then 9/32 w.
    score = 5 / 4 * 9 / 32  # of w = 1; the square of w for others
    torch.testing.assert_close(
        method.importance(adapter), torch.tensor([score * (4 + (9 + 0) / 2 + (1 + 4) / 2)])
    )


def test_the_penalty_pulls_p_and_q_to_orthogonal_ones() -> None:
    """Eq. 4: its gradient is autograd's, and nothing is left of it at orthonormal vectors."""
    bench = Bench(orth_reg_weight=0.3)
    adapter = bench.adapter("down")
    a, b = (x.detach().clone().requires_grad_() for x in (adapter.lora_A, adapter.lora_B))
    eye = torch.eye(4)
    penalty = (a @ a.T - eye).square().sum() + (b.T @ b - eye).square().sum()
    (0.3 * penalty).backward()
    for parameter in bench.parameters().values():
        parameter.grad = torch.zeros_like(parameter)
    bench.method.before_step(1)
    torch.testing.assert_close(adapter.lora_A.grad, a.grad)
    torch.testing.assert_close(adapter.lora_B.grad, b.grad)
    assert adapter.gate.grad is not None
    assert not adapter.gate.grad.any()
    reported = bench.method.after_step(1)["orthogonality"]
    assert reported > float(penalty.detach()) > 0  # those of the other layers are in it

    for layer in SHAPES:
        for parameter in (bench.adapter(layer).lora_A, bench.adapter(layer).lora_B):
            nn.init.orthogonal_(parameter)
            parameter.grad = torch.zeros_like(parameter)
    bench.method.before_step(2)
    assert bench.method.after_step(2)["orthogonality"] == pytest.approx(0.0, abs=1e-10)


def test_lambda_starts_at_zero_and_its_vectors_do_not() -> None:
    bench = Bench()
    for layer in SHAPES:
        adapter = bench.adapter(layer)
        assert not adapter.gate.any()
        assert adapter.lora_B.abs().min() > 0
        assert not adapter.delta().any()
    wide = TripletAdapter(nn.Linear(8, 3000), 50, 1.0, 0.0, torch.Generator().manual_seed(0))
    lengths = wide.lora_B.detach().square().sum(0)
    assert lengths.mean() == pytest.approx(1 / 3, rel=0.01)


# -- PEFT's allocator ------------------------------------------------------------------------------


def of_peft(total_steps: int, tinit: int, tfinal: int) -> tuple[nn.Module, RankAllocator]:
    config = AdaLoraConfig(
        init_r=4,
        target_r=2,
        tinit=tinit,
        tfinal=tfinal,
        deltaT=2,
        total_step=total_steps,
        target_modules=list(SHAPES),
    )
    model = get_peft_model(Layers(), config)  # type: ignore[arg-type]
    return model, RankAllocator(model, config, "default")


PEFT_NAMES = {"lora_A": "lora_A", "lora_B": "lora_B", "gate": "lora_E"}


def test_importance_budget_and_masks_are_those_of_peft() -> None:
    total, tinit, tfinal = 20, 3, 6
    model, allocator = of_peft(total, tinit, tfinal)
    settings = {"begin": tinit / total, "end": 1 - tfinal / total, "interval": 2 / total}
    bench = Bench(total_steps=total, target_r=2.0, **settings)
    theirs = {
        f"{layer}.{part}": next(
            p for n, p in model.named_parameters() if n.endswith(f"{layer}.{name}.default")
        )
        for layer in SHAPES
        for part, name in PEFT_NAMES.items()
    }
    mine, rng, masked = bench.parameters(), torch.Generator().manual_seed(1), 0
    for step in range(1, total - tfinal):
        for number, (name, parameter) in enumerate(mine.items()):
            parameter.data = torch.randn(parameter.shape, generator=rng)
            # Layers of different importance, so that they end with different ranks.
            parameter.grad = (1 + number / 12) * torch.randn(parameter.shape, generator=rng)
            theirs[name].data = parameter.data.clone().view_as(theirs[name])
            theirs[name].grad = parameter.grad.clone().view_as(theirs[name])
        bench.method.before_step(step)
        bench.method.after_step(step)
        budget, pattern = allocator.update_and_allocate(model, step)
        assert bench.method.budget(step) == budget
        if pattern is not None:
            assert bench.method.rank_state().cost == budget
        for layer in SHAPES:
            gate, values = mine[f"{layer}.gate"], theirs[f"{layer}.gate"].view(-1)
            assert torch.equal(gate, values), step
            masked += int((gate == 0).sum())
        for name, parameter in mine.items():
            key = next(n for n, p in model.named_parameters() if p is theirs[name])
            state = bench.optimizer.state[parameter]
            for here, there in (
                (state.sensitivity, allocator.exp_avg_ipt[key]),
                (state.uncertainty, allocator.exp_avg_unc[key]),
            ):
                assert here is not None
                torch.testing.assert_close(here, there.view_as(here), rtol=1e-5, atol=1e-7)
    assert masked > 20
    assert len(set(bench.method.rank_state().ranks.values())) > 1


# -- along a run -----------------------------------------------------------------------------------


def test_closed_triplets_are_held_may_come_back_and_leave_at_the_end() -> None:
    bench = Bench(target_r=1.0, begin=0.1, end=0.5, interval=0.05)
    # From 16, a cube over steps 2 to 10: 4 + 12 (1 - i / 8)³.
    assert bench.go(2) == [16, 16]
    assert bench.go(7) == [12, 9, 6, 5, 4, 4, 4]
    ranks = bench.method.rank_state().ranks
    assert {adapter.rank for adapter in bench.adapters.values()} == {4}
    assert sum(ranks.values()) == 4
    for name, rank in ranks.items():
        assert int(bench.adapters[name].components()["gate"].count_nonzero()) == rank
    assert not bench.method.is_final
    before = copy.deepcopy(bench.parameters())
    bench.go(1)
    assert bench.method.is_final
    assert sum(adapter.rank for adapter in bench.adapters.values()) == 4
    assert bench.method.rank_state().ranks == {n: a.rank for n, a in bench.adapters.items()}
    for parameter, moments in bench.optimizer.state.items():
        assert moments.first.shape == parameter.shape
        assert moments.sensitivity is moments.uncertainty is None
    # What stays are components that were there, one step of Adam later.
    for layer in SHAPES:
        for row in bench.adapter(layer).lora_A:
            gaps = (before[f"{layer}.lora_A"] - row).abs().amax(1)
            assert gaps.min() < 0.02
    assert bench.go(10) == [4] * 10


def test_a_triplet_that_was_closed_comes_back_when_its_gradients_grow() -> None:
    bench = Bench(target_r=1.0, begin=0.1, end=0.9, interval=0.05)
    bench.go(12)
    closed = {
        (name, i)
        for name, adapter in bench.adapters.items()
        for i, value in enumerate(adapter.components()["gate"].tolist())
        if value == 0.0
    }
    name, number = min(closed)
    for _ in range(3):
        bench.step += 1
        for parameter in bench.parameters().values():
            parameter.grad = torch.zeros_like(parameter)
        adapter = bench.adapters[name]
        assert adapter.lora_A.grad is not None
        adapter.lora_A.grad[number] = 50.0
        components = adapter.components()
        assert components["gate"].grad is not None
        components["gate"].grad[number] = 50.0
        bench.method.before_step(bench.step)
        bench.optimizer.step(1e-2)
        bench.optimizer.zero_grad()
        bench.method.after_step(bench.step)
    assert bench.adapters[name].components()["gate"].tolist()[number] != 0.0


@pytest.mark.parametrize("cut", [1, 5, 9, 10, 14])
def test_a_run_that_is_cut_goes_on_as_if_it_were_not(cut: int, tmp_path: Path) -> None:
    settings = {"target_r": 1.0, "begin": 0.1, "end": 0.5, "interval": 0.05, "orth_reg_weight": 0.1}
    whole = Bench(**settings)
    whole.go(cut)
    state = checkpoint.RunState(step=cut)
    folder = checkpoint.save(tmp_path, whole.model, whole.method, whole.optimizer, state, keep=None)
    other = Bench(seed=4, **settings)
    saved = checkpoint.read(folder)
    saved.restore_model(other.model, other.method)
    other.optimizer = AdamW(other.method.param_groups())
    other.method.begin(other.optimizer, other.total_steps)
    saved.restore_optimizer(other.model, other.optimizer)
    other.step = cut
    other.rng.set_state(whole.rng.get_state())
    assert other.method.rank_state() == whole.method.rank_state()
    assert other.go(20 - cut) == whole.go(20 - cut)
    for name, parameter in whole.parameters().items():
        assert torch.equal(other.parameters()[name], parameter), name


def test_the_merged_layer_acts_as_the_masked_and_as_the_cut_adapter_do() -> None:
    bench = Bench(target_r=1.0, begin=0.1, end=0.5, interval=0.05)
    x = torch.randn(3, 12)
    for steps in (8, 12):
        bench.go(steps)
        copied = copy.deepcopy(bench.model)
        found = {n: m for n, m in copied.named_modules() if isinstance(m, TripletAdapter)}
        merge_all(copied, dict(found))
        torch.testing.assert_close(copied(x), bench.model(x), rtol=1e-5, atol=1e-5)
        for adapter in bench.adapters.values():
            a, b = bench.method.export(adapter)
            torch.testing.assert_close(adapter.scale * (b @ a), adapter.delta().detach())


# -- its recipe ------------------------------------------------------------------------------------


def test_keys_that_can_not_work_are_refused() -> None:
    for settings, said in (
        ({"begin": 0.6}, "arrives at 0.5, before it falls at 0.6"),
        ({"beta1": 1.0}, "less than 1"),
    ):
        with pytest.raises(ValueError, match=said):
            Config.model_validate(settings)
    targets = {"a": Target(12, 8, 4, True), "b": Target(12, 8, 2, True)}
    assert Config.model_validate({"target_r": 3.0}).misfits(targets) == []
    (problem,) = Config.model_validate({"target_r": 3.5}).misfits(targets)
    assert (problem.key, "from 3 to 3.5" in problem.what) == ("method.target_r", True)


def test_sparse_factors_can_not_join_but_a_pruned_base_can() -> None:
    complete = config_classes()["adalora"]
    sparse = complete.model_validate({"with": [{"name": "salor"}]})
    (problem,) = sparse.conflicts(task_named("causal-lm"))
    assert (problem.key, "orthogonal" in problem.what) == ("method.with.0.factors", True)
    part = {"name": "salor", "factors": None, "base": {"criterion": "magnitude", "r_res": 2}}
    joined = complete.model_validate({"with": [part]})
    assert joined.conflicts(task_named("causal-lm")) == []
    assert build_method(joined, 0).config is joined


def test_keys_of_peft_are_explained(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "model: {name_or_path: ./m, task: causal-lm}\n"
        "data: {name_or_path: ./d}\n"
        "method: {name: adalora, init_r: 12, deltaT: 10, tinit: 200, tfinal: 500}\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    said = str(caught.value)
    for part in (
        "did you mean `r`?",
        "`interval`",
        "`begin`",
        "`end`",
        "deltaT divided by all steps",
    ):
        assert part in said, said
