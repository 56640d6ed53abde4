"""L1RA: the L1 step on the gates, rank updates under the budget, and what a rank of 0 means."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.adapters.base import in_out
from lorakit.adapters.inject import inject, match_targets, merge_all
from lorakit.adapters.layer import Adapter
from lorakit.adapters.optimizer import AdamW
from lorakit.methods.l1ra.config import DEFAULT_L1_SHARE, Config
from lorakit.methods.l1ra.method import L1RA
from lorakit.training import checkpoint

SHAPES = {"q": (12, 8), "k": (12, 5), "up": (12, 20), "down": (20, 12)}  # {layer: (in, out)}


class Layers(nn.Module):
    """Four layers of different shapes, used by all in one expression."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [nn.ModuleDict({name: nn.Linear(*shape) for name, shape in SHAPES.items()})]
        )

    def forward(self, x: Tensor) -> Tensor:
        block = self.blocks[0]
        down: Tensor = block["down"](torch.tanh(block["up"](x)))
        return torch.cat([block["q"](x), block["k"](x), down], -1)


class Bench:
    """An L1RA run whose gradients come from the test."""

    def __init__(self, total_steps: int, **settings: Any) -> None:
        torch.manual_seed(0)
        self.config = Config.model_validate({"r": 4, "l1_share": 0.0} | settings)
        self.method = L1RA(self.config, seed=3)
        self.model = Layers()
        self.adapters = inject(self.model, self.method, match_targets(self.model, self.config))
        self.optimizer = AdamW(self.method.param_groups())
        self.method.begin(self.optimizer, total_steps)
        self.total_steps, self.step = total_steps, 0

    def adapter(self, name: str) -> Any:
        return self.adapters[f"blocks.0.{name}"]

    @property
    def ranks(self) -> dict[str, int]:
        return {name.rpartition(".")[2]: adapter.rank for name, adapter in self.adapters.items()}

    def cost(self) -> int:
        """What the adapters cost by the sizes of their tensors."""
        if self.config.budget.unit == "rank":
            return sum(adapter.lora_A.shape[0] for adapter in self.adapters.values())
        return sum(
            adapter.lora_A.numel() + adapter.lora_B.numel() for adapter in self.adapters.values()
        )

    def close(self, name: str, count: int) -> None:
        """Set the first `count` gates of a layer to 0."""
        with torch.no_grad():
            self.adapter(name).gate[:count] = 0.0

    def advance(
        self, steps: int = 1, gate_grads: torch.Generator | None = None
    ) -> dict[str, float]:
        """Optimizer steps with no gradient, or with random ones for the gates; returns the last
        step's metrics."""
        metrics: dict[str, float] = {}
        for _ in range(steps):
            self.step += 1
            self.optimizer.zero_grad()
            for gate in self.method.gates.values():
                gate.grad = (
                    torch.zeros_like(gate)
                    if gate_grads is None
                    else torch.randn(gate.shape, generator=gate_grads)
                )
            self.method.before_step(self.step)
            self.optimizer.step(1e-3)
            metrics = self.method.after_step(self.step)
        return metrics


# -- the L1 step -----------------------------------------------------------------------------------


def test_the_proximal_step_subtracts_eta_times_lambda_and_stops_at_exactly_0() -> None:
    # 0.3 a step
    bench = Bench(100, l1_share=None, eta_c=0.02, l1ra_lambda=15.0, rank_update_ratio=1.0)
    seen = []
    for _ in range(5):
        bench.advance()
        seen.append(bench.adapter("q").gate.tolist())
    assert seen[:3] == [pytest.approx([value] * 4, abs=1e-6) for value in (0.7, 0.4, 0.1)]
    assert seen[3:] == [[0.0] * 4] * 2


def test_the_subgradient_step_straddles_0_and_rests_at_0() -> None:
    # 0.1 a step
    bench = Bench(
        100,
        l1_share=None,
        eta_c=0.02,
        l1ra_lambda=5.0,
        l1_step="subgradient",
        rank_update_ratio=1.0,
    )
    with torch.no_grad():
        bench.adapter("q").gate.copy_(torch.tensor([0.04, -0.04, 0.0, 1.0]))
    bench.advance()
    assert bench.adapter("q").gate.tolist() == pytest.approx([-0.06, 0.06, 0.0, 0.9], abs=1e-6)
    bench.advance()
    assert bench.adapter("q").gate.tolist() == pytest.approx([0.04, -0.04, 0.0, 0.8], abs=1e-6)


def test_both_steps_agree_far_from_0() -> None:
    gates = []
    for kind in ("proximal", "subgradient"):
        bench = Bench(100, l1_share=0.5, l1_step=kind, rank_update_ratio=1.0)
        bench.advance(5, torch.Generator().manual_seed(0))
        gates.append(torch.cat([gate.detach() for gate in bench.method.gates.values()]))
    assert torch.equal(gates[0], gates[1])
    assert gates[0].std() > 1e-3


@pytest.mark.parametrize("share", [0.0, 1.0, 4.0])
def test_gates_stay_between_0_and_1(share: float) -> None:
    bench = Bench(50, l1_share=share, eta_c=0.2, rank_update_ratio=1.0)
    rng = torch.Generator().manual_seed(1)
    touched = set()
    for _ in range(49):
        bench.advance(1, rng)
        for gate in bench.method.gates.values():
            assert gate.min() >= 0.0
            assert gate.max() <= 1.0
            touched |= set(gate.tolist()) & {0.0, 1.0}
    assert touched == {0.0, 1.0}


@pytest.mark.parametrize("total_steps", [7, 100, 4285])
def test_l1_share_is_what_l1_alone_takes_over_the_run(total_steps: int) -> None:
    config = Config.model_validate({"l1_share": 0.43, "eta_c": 0.02})
    assert config.l1_strength(total_steps) == pytest.approx(0.43 / (0.02 * total_steps))
    bench = Bench(total_steps, l1_share=0.43, rank_update_ratio=1.0)
    bench.advance(7)
    assert bench.adapter("up").gate.tolist() == pytest.approx(
        [1 - 0.43 * 7 / total_steps] * 4, abs=1e-5
    )


def test_the_raw_lambda_is_taken_as_it_is_and_the_default_is_a_share() -> None:
    assert Config.model_validate({"l1ra_lambda": 5e-3}).l1_strength(4285) == 5e-3
    assert Config().l1_strength(200) == pytest.approx(DEFAULT_L1_SHARE / (2e-2 * 200))


def test_both_strengths_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="l1_share and l1ra_lambda"):
        Config.model_validate({"l1_share": 1.0, "l1ra_lambda": 1e-3})


def test_gates_have_a_constant_rate_no_decay_and_are_not_clipped() -> None:
    method = Bench(10, eta_c=0.05).method
    factors, gates = method.param_groups()
    assert (gates.lr, gates.weight_decay, gates.clipped) == (0.05, 0.0, False)
    assert (factors.lr, factors.weight_decay, factors.clipped) == (None, None, True)
    assert {id(p) for p in gates.params} == {id(gate) for gate in method.gates.values()}
    assert {id(p) for p in factors.params} == {
        id(p) for a in method.adapters.values() for p in (a.lora_A, a.lora_B)
    }


def test_a_gate_scales_its_component() -> None:
    adapter = Bench(10).adapter("up")
    nn.init.normal_(adapter.lora_B)
    with torch.no_grad():
        adapter.gate.copy_(torch.tensor([0.0, 0.25, 0.5, 1.0]))
    expected = sum(
        c * torch.outer(b, a)
        for c, a, b in zip(adapter.gate, adapter.lora_A, adapter.lora_B.T, strict=True)
    )
    torch.testing.assert_close(adapter.delta(), adapter.scale * expected)


# -- rank updates ----------------------------------------------------------------------------------


def test_ranks_move_every_interval_and_never_before() -> None:
    bench = Bench(100, rank_update_ratio=0.1)
    bench.close("q", 2)
    bench.advance(9)
    assert bench.ranks == {"q": 4, "k": 4, "up": 4, "down": 4}
    bench.advance()  # step 10
    assert bench.ranks == {"q": 2, "k": 5, "up": 5, "down": 4}
    bench.close("down", 1)
    bench.advance(9)
    assert bench.ranks["down"] == 4
    bench.advance()  # step 20
    assert bench.ranks["down"] == 3


@pytest.mark.parametrize("total_steps", [1, 3, 9])
def test_a_short_run_has_an_interval_of_1(total_steps: int) -> None:
    bench = Bench(total_steps, rank_update_ratio=0.1)
    bench.close("q", 1)
    bench.advance()
    assert bench.ranks["q"] == 3


@pytest.mark.parametrize(
    ("total_steps", "ratio", "last_hand_out"),
    [(10, 0.1, 8), (100, 0.1, 80), (100, 0.3, 60), (7, 0.5, 3)],
)
def test_nothing_is_handed_out_in_the_last_interval(
    total_steps: int, ratio: float, last_hand_out: int
) -> None:
    grown = []
    for step in range(1, total_steps + 1):
        bench = Bench(total_steps, rank_update_ratio=ratio)
        bench.step = step - 1
        bench.close("q", 2)
        bench.advance()
        if any(rank > 4 for rank in bench.ranks.values()):
            grown.append(step)
            assert bench.ranks["q"] == 2
    interval = int(total_steps * ratio)
    assert grown == list(range(interval, last_hand_out + 1, interval))


def test_the_last_update_still_prunes() -> None:
    bench = Bench(10)
    bench.step = 9
    bench.close("q", 3)
    metrics = bench.advance()
    assert bench.ranks == {"q": 1, "k": 4, "up": 4, "down": 4}
    assert metrics == {"rank_total": 13, "pool": 3, "budget": 16}


def test_without_reassign_ranks_only_fall() -> None:
    bench = Bench(20, reassign=False, rank_update_ratio=0.05)
    bench.close("q", 2)
    assert bench.advance() == {"rank_total": 14, "pool": 2, "budget": 16}
    assert bench.ranks == {"q": 2, "k": 4, "up": 4, "down": 4}


def test_what_nobody_may_take_waits_in_the_pool_for_the_next_update() -> None:
    bench = Bench(100, rank_update_ratio=0.1)
    for name in SHAPES:
        bench.close(name, 1)
    assert bench.advance(10) == {"rank_total": 12, "pool": 4, "budget": 16}
    assert bench.advance(9) == {"rank_total": 12, "pool": 4, "budget": 16}
    assert bench.advance() == {"rank_total": 16, "pool": 0, "budget": 16}
    assert bench.ranks == {"q": 4, "k": 4, "up": 4, "down": 4}


def test_no_rank_grows_above_min_of_in_and_out() -> None:
    bench = Bench(100, rank_update_ratio=0.01, r=5)
    bench.close("up", 5)
    bench.close("down", 5)
    assert bench.advance() == {"rank_total": 13, "pool": 7, "budget": 20}
    assert bench.ranks == {"q": 8, "k": 5, "up": 0, "down": 0}


def test_an_emptied_adapter_may_get_components_again() -> None:
    bench = Bench(100, rank_update_ratio=0.01)
    bench.close("q", 4)
    bench.advance()
    assert bench.ranks["q"] == 0
    for name in ("k", "up", "down"):
        bench.close(name, 1)
    bench.advance()
    assert bench.ranks["q"] == 3
    assert bench.adapter("q").gate.tolist() == [1.0] * 3


def test_newcomers_have_an_open_gate_fresh_rows_of_a_and_zero_columns_of_b() -> None:
    bench = Bench(100, rank_update_ratio=0.01, exclude_pruned=False)
    adapter = bench.adapter("up")
    for other in bench.adapters.values():
        nn.init.ones_(other.lora_B)
    kept_a = adapter.lora_A[2:].detach().clone()
    with torch.no_grad():
        adapter.gate.fill_(0.5)
        for name in ("q", "k", "down"):
            bench.adapter(name).gate.fill_(0.25)
    bench.close("up", 2)
    # 5 are free: one for each, and a second for the one whose smallest gate is largest
    bench.close("q", 3)
    before = adapter.delta().detach()
    bench.advance()
    assert adapter.rank == 4
    assert torch.equal(adapter.lora_A[:2], kept_a)
    assert adapter.gate.tolist() == [0.5, 0.5, 1.0, 1.0]
    assert not adapter.lora_B[:, 2:].any()
    assert adapter.lora_B[:, :2].all()
    newcomers = adapter.lora_A[2:]
    assert newcomers.abs().max() <= 12**-0.5
    assert newcomers.std() > 0.1
    assert not torch.equal(newcomers[0], newcomers[1])
    # closed ones did nothing, new ones do not yet
    torch.testing.assert_close(adapter.delta(), before)


def test_the_scale_does_not_move_with_the_rank() -> None:
    bench = Bench(100, rank_update_ratio=0.01, lora_alpha=6.0)
    bench.close("q", 3)
    bench.advance()
    assert bench.ranks["q"] == 1
    assert bench.ranks["up"] > 4
    assert {adapter.scale for adapter in bench.adapters.values()} == {1.5}


def test_survivors_keep_their_moments_through_a_rank_update() -> None:
    bench = Bench(100, rank_update_ratio=0.1)
    rng = torch.Generator().manual_seed(0)
    bench.advance(9, rng)
    adapter = bench.adapter("q")
    bench.close("q", 1)
    moments = bench.optimizer.state[adapter.gate]
    last = torch.Generator()
    last.set_state(rng.get_state())
    grad = torch.randn(4, generator=last)  # of "q", the first layer, at step 10
    first, second = moments.first.clone(), moments.second.clone()
    with torch.no_grad():  # push the closed gate down, so that this step does not open it again
        moments.first[0] = 10.0 * grad.abs()[0]
    bench.advance(1, rng)
    assert adapter.rank == 3
    state = bench.optimizer.state[adapter.gate]
    torch.testing.assert_close(state.first, 0.9 * first[1:] + 0.1 * grad[1:])
    torch.testing.assert_close(state.second, 0.999 * second[1:] + 0.001 * grad[1:] ** 2)
    assert state.age.tolist() == [10.0] * 3


# -- the budget over a run -------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["rank", "params"])
@pytest.mark.parametrize(
    "budget",
    [{}, {"end": 0.5}, {"start": 1.5, "end": 0.75, "shape": "linear"}, {"end": 0.0}, {"end": 1.5}],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 1])
def test_cost_and_pool_are_the_budget_at_every_step_of_a_run(
    unit: str, budget: dict[str, Any], seed: int
) -> None:
    total = 60
    settings = {
        "l1_share": 6.0,
        "eta_c": 0.1,
        "rank_update_ratio": 0.05,
        "budget": budget | {"unit": unit},
    }
    bench = Bench(total, **settings)
    initial = bench.cost()
    rng = torch.Generator().manual_seed(seed)
    assert bench.method.rank_state().budget == round(budget.get("start", 1.0) * initial)
    counts, budgets = [], []
    for _ in range(total):
        metrics = bench.advance(1, rng)
        state = bench.method.rank_state()
        assert metrics["pool"] == state.pool >= 0
        assert bench.cost() == state.cost
        assert bench.cost() + metrics["pool"] == metrics["budget"] == state.budget
        assert metrics["rank_total"] == sum(bench.ranks.values())
        for adapter in bench.adapters.values():
            in_features, out_features = in_out(adapter.base)
            assert adapter.lora_A.shape == (adapter.rank, in_features)
            assert adapter.lora_B.shape == (out_features, adapter.rank)
            assert adapter.gate.shape == (adapter.rank,)
            assert adapter.rank <= min(in_features, out_features)
        counts.append(metrics["rank_total"])
        budgets.append(metrics["budget"])
    assert len(set(counts)) > 2
    # 20 updates; the budget arrives with the last but one.
    assert budgets[56:] == [round(budget.get("end", 1.0) * initial)] * 4
    assert budgets[55] != budgets[56] or budget.get("shape") != "linear"


def test_a_cubic_budget_falls_fast_at_first() -> None:
    # 20 components, 10 updates, arrival at step 90
    bench = Bench(100, rank_update_ratio=0.1, r=5, budget={"end": 0.0})
    seen = [bench.advance(10)["budget"] for _ in range(10)]
    assert seen == [round(20 * (1 - step / 90) ** 3) for step in range(10, 91, 10)] + [0]
    assert seen[0] == 14
    assert bench.ranks == {"q": 0, "k": 0, "up": 0, "down": 0}


def test_a_falling_budget_takes_the_smallest_gates_first() -> None:
    bench = Bench(2, rank_update_ratio=0.5, budget={"end": 0.25})  # 16 → 4 at step 1
    with torch.no_grad():
        for value, name in zip((0.9, 0.2, 0.8, 0.3), SHAPES, strict=True):
            bench.adapter(name).gate.copy_(value + torch.arange(4) / 100)
    bench.advance()
    assert bench.ranks == {"q": 4, "k": 0, "up": 0, "down": 0}


def test_params_budget_counts_in_plus_out() -> None:
    bench = Bench(100, rank_update_ratio=0.01, budget={"unit": "params"})
    # frees 2 · (12 + 8) = 40: one component of up (32); k has (17), but comes after up's larger
    # gate
    bench.close("q", 2)
    with torch.no_grad():
        bench.adapter("k").gate.fill_(0.5)
        bench.adapter("down").gate.fill_(0.4)
    metrics = bench.advance()
    assert bench.ranks == {"q": 2, "k": 4, "up": 5, "down": 4}
    assert metrics["pool"] == 8


# -- warnings, state, rank 0 -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "key"),
    [({}, "l1_share"), ({"l1_share": None, "l1ra_lambda": 1e-9}, "l1ra_lambda")],
)
def test_a_run_in_which_nothing_moved_warns_and_names_the_key(
    settings: dict[str, Any], key: str
) -> None:
    bench = Bench(10, **settings)
    bench.advance(10)
    [warning] = bench.method.finish()
    assert "no rank ever moved" in warning
    assert key in warning


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"l1_share": 0.4, "eta_c": 0.02}, "raise eta_c above 0.04, or train for more steps"),
        ({"l1_share": None, "l1ra_lambda": 2.0, "eta_c": 1e-4}, "lower l1ra_lambda below 1"),
    ],
)
def test_the_warnings_before_and_after_a_run_agree(
    settings: dict[str, Any], advice: str, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(10, rank_update_ratio=1.0, **settings)
    assert advice in caplog.text
    [after] = bench.method.finish()
    assert advice in after
    assert "larger" not in after


def test_a_run_in_which_something_moved_does_not_warn() -> None:
    bench = Bench(10)
    bench.close("q", 1)
    bench.advance(10)
    assert bench.method.finish() == []


def test_its_state_goes_on_where_it_stood() -> None:
    first = Bench(100, rank_update_ratio=0.01, budget={"end": 0.5})
    first.advance(5)
    second = Bench(100, rank_update_ratio=0.01, budget={"end": 0.5})
    second.method.load_state_dict(first.method.state_dict())
    assert second.method.state_dict() == first.method.state_dict()
    assert second.method.budget == first.method.budget < 16
    assert second.method.finish() == []
    assert torch.equal(
        torch.rand(3, generator=first.method.newcomers),
        torch.rand(3, generator=second.method.newcomers),
    )


def test_rank_0_everywhere_trains_saves_loads_and_merges(tmp_path: Path) -> None:
    bench = Bench(10, rank_update_ratio=0.1, budget={"end": 0.0, "shape": "linear"})
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(5))
    base = Layers()
    base.load_state_dict(
        {
            name.replace(".base.layer.", "."): t
            for name, t in bench.model.state_dict().items()
            if ".base." in name
        }
    )
    bench.advance(9, torch.Generator().manual_seed(0))
    assert set(bench.ranks.values()) == {0}
    assert torch.equal(bench.model(x), base(x))
    bench.advance()  # a step with nothing to train
    assert all(adapter.delta().abs().max() == 0 for adapter in bench.adapters.values())

    run = checkpoint.RunState(step=10)
    saved = checkpoint.read(
        checkpoint.save(tmp_path, bench.model, bench.method, bench.optimizer, run, None)
    )
    other = Bench(10, rank_update_ratio=0.1, budget={"end": 0.0, "shape": "linear"})
    assert set(other.ranks.values()) == {4}
    saved.restore_model(other.model, other.method)
    optimizer = AdamW(other.method.param_groups())
    saved.restore_optimizer(other.model, optimizer)
    assert set(other.ranks.values()) == {0}
    assert torch.equal(other.model(x), base(x))

    merged = copy.deepcopy(other.model)
    merge_all(merged, {n: m for n, m in merged.named_modules() if isinstance(m, Adapter)})
    assert torch.equal(merged(x), base(x))
    assert merged.state_dict().keys() == base.state_dict().keys()
