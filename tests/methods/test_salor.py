"""SALOR: masks that ramp while real tiny models train, the pruned base and its residual, and salor
joined to l1ra."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.adapters.base import PlainBase, PrunedBase, dense_weight, in_out
from lorakit.adapters.inject import linear_layers
from lorakit.adapters.layer import Adapter, Target
from lorakit.adapters.optimizer import AdamW
from lorakit.data.batches import StepOrder, collate
from lorakit.errors import RunError
from lorakit.methods import Calibration, build_method, config_classes
from lorakit.methods.l1ra.method import L1RA
from lorakit.methods.salor.config import Config
from lorakit.methods.salor.method import Salor
from lorakit.numerics.sparsity import keep_count, masks, strongest, unpack_bits
from lorakit.numerics.structure import Structure
from lorakit.runs.factors import factor_facts
from lorakit.training.loop import StepReport, train
from lorakit.training.spec import TrainSpec
from lorakit.training.trained import trainable, trained_tensors
from tests.support.contract import CUT, STEPS, Built, Case, resumed, scramble, spec, started

Make = Callable[..., Case]
PARTS = ("lora_A", "lora_B")


@pytest.fixture
def make(tiny_bert: Path, tiny_llama: Path, tiny_gpt2: Path) -> Make:
    folders = {"bert": tiny_bert, "llama": tiny_llama, "gpt2": tiny_gpt2}

    def case(kind: str, method: str = "salor", **settings: Any) -> Case:
        return Case(method, kind, folders[kind], settings)

    return case


def factors(adapters: dict[str, Adapter]) -> dict[str, nn.Parameter]:
    return {
        f"{name}.{part}": getattr(adapter, part)
        for name, adapter in adapters.items()
        for part in PARTS
    }


@dataclass
class Moment:
    """After one step: what the method says the density is, and what the masks are (all True where
    there is none)."""

    report: StepReport
    masks: dict[str, Tensor]
    ranks: dict[str, int]
    is_final: bool

    @property
    def step(self) -> int:
        return self.report.step

    @property
    def said(self) -> float:
        return self.report.metrics["density"]

    @property
    def density(self) -> float:
        return sum(int(mask.sum()) for mask in self.masks.values()) / sum(
            mask.numel() for mask in self.masks.values()
        )


class Watched:
    """A run, each step of which must leave masked entries, their gradients and both their moments
    at exactly zero."""

    def __init__(self, built: Built, settings: TrainSpec) -> None:
        self.built, self.settings = built, settings
        self.optimizer = started(built, settings)
        self.gradients_seen = self.zeros_seen = 0
        self.history: list[Moment] = []
        method: Any = built.method
        self.before, self.after = method.before_step, method.after_step
        method.before_step, method.after_step = self.before_step, self.after_step

    def masked(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for parameter in factors(self.built.adapters).values():
            mask = self.optimizer.state[parameter].mask
            if mask is not None:
                assert mask.shape == parameter.shape
                yield parameter, mask

    def before_step(self, step: int) -> None:
        self.before(step)
        for parameter, mask in self.masked():
            if parameter.grad is not None:
                assert not parameter.grad[~mask].any()
                self.gradients_seen += int((~mask).sum())

    def zeros_hold(self) -> None:
        for parameter, mask in self.masked():
            state = self.optimizer.state[parameter]
            for tensor in (parameter, state.first, state.second):
                assert not tensor[~mask].any()
            self.zeros_seen += int((~mask).sum())

    def after_step(self, step: int) -> dict[str, float]:
        # of the optimizer's step alone, before the method can set anything to zero again
        self.zeros_hold()
        metrics: dict[str, float] = self.after(step)
        self.zeros_hold()
        return metrics

    def look(self, report: StepReport) -> Moment:
        found = {}
        for name, parameter in factors(self.built.adapters).items():
            mask = self.optimizer.state[parameter].mask
            found[name] = (
                torch.ones_like(parameter, dtype=torch.bool) if mask is None else mask.clone()
            )
        ranks = {name: adapter.rank for name, adapter in self.built.adapters.items()}
        return Moment(report, found, ranks, self.built.method.is_final)

    def run(self) -> list[Moment]:
        torch.manual_seed(self.settings.seed)
        built = self.built
        for report in train(
            built.task_model, built.method, self.optimizer, built.examples, self.settings
        ):
            self.history.append(self.look(report))
        return self.history


T = 50
# both would wake masked entries up, if they could
HARD = {"max_steps": T, "weight_decay": 0.2, "max_grad_norm": 0.05}


def expected_density(
    step: int,
    total: int,
    target: float,
    shape: str = "cubic",
    begin: float = 0.15,
    end: float = 0.7,
) -> float:
    """The ramp of METHODS.md: s_t = s_f + (s_i - s_f)(1 - (t - t0) / (n Δt))³, with densities for
    sparsities."""
    first, last = max(1, math.floor(begin * total + 1e-9)), math.floor(end * total + 1e-9)
    if step < first:
        return 1.0
    left = max(0.0, 1 - (step - first) / (last - first))
    if shape == "one-shot":
        return 1.0 if left else target
    return target + (1 - target) * (left**3 if shape == "cubic" else left)


# -- the masks along a run -------------------------------------------------------------------------

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("bert", {"density": 0.2}),
    "linear, sensitivity": (
        "llama",
        {"density": 0.3, "shape": "linear", "criterion": "sensitivity"},
    ),
    "global": ("bert", {"density": 0.3, "scope": "global"}),
    "global, sensitivity": (
        "gpt2",
        {"density": 0.25, "scope": "global", "criterion": "sensitivity"},
    ),
    "one-shot": ("llama", {"density": 0.1, "shape": "one-shot"}),
    "2:4": ("bert", {"structure": "2:4"}),
    "1:4, sensitivity": ("llama", {"structure": "1:4", "criterion": "sensitivity"}),
    "2:4, global": ("gpt2", {"structure": "2:4", "scope": "global"}),
    "group": ("llama", {"structure": "group", "group_size": 4, "density": 0.3}),
    "group, global, linear": (
        "bert",
        {
            "structure": "group",
            "group_size": 2,
            "density": 0.4,
            "scope": "global",
            "shape": "linear",
        },
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_over_50_steps_what_is_masked_stays_zero_and_the_density_is_that_of_the_ramp(
    name: str, make: Make
) -> None:
    kind, said = RUNS[name]
    built = make(kind, factors=said).build(r=8)
    watched = Watched(built, spec(**HARD))
    history = watched.run()
    assert len(history) == T
    assert watched.gradients_seen > 1000
    assert watched.zeros_seen > 1000
    assert sum(moment.report.grad_norm > 0.05 for moment in history) > 10, (
        "clipping should do something"
    )

    settings = config_classes()["salor"].model_validate({"factors": said}).factors  # type: ignore[attr-defined]
    form, target = settings.form, settings.target
    for earlier, later in pairwise(history):
        for key, mask in later.masks.items():
            assert not (mask & ~earlier.masks[key]).any(), "an entry came back"
    for moment in history:
        density = expected_density(moment.step, T, target, settings.shape)
        assert moment.said == pytest.approx(moment.density, abs=1e-12)
        for part in PARTS:
            found = [mask for key, mask in moment.masks.items() if key.endswith(part)]
            for group in [found] if settings.scope == "global" else [[mask] for mask in found]:
                entries = sum(mask.numel() for mask in group)
                piece = form.m if form.kind == "group" else 1
                count = keep_count(density, entries // piece) * piece
                if form.kind == "n:m":
                    count = max(count, entries * form.n // form.m)
                assert sum(int(mask.sum()) for mask in group) == count, (moment.step, part)
            for mask in found:
                pieces = mask.reshape(len(mask), -1, form.width)
                if form.kind == "n:m":
                    assert (pieces.sum(-1) >= form.n).all()
                    assert moment.step < 35 or (pieces.sum(-1) == form.n).all()
                if form.kind == "group":
                    assert (pieces.all(-1) == pieces.any(-1)).all()
    assert [moment.is_final for moment in history] == [False] * 34 + [True] * 16
    for moment in history[35:]:
        for key, mask in moment.masks.items():
            assert torch.equal(mask, history[34].masks[key]), (
                "the masks are final from the end of the ramp on"
            )
    assert history[-1].density == pytest.approx(target, abs=0.01)
    assert history[-1].density <= target
    # No live entry is zero by chance: what is counted in the tensors is what the masks say.
    facts = factor_facts(built.adapters)
    assert facts["density"]["total"] == pytest.approx(history[-1].said, abs=1e-6)
    assert any(
        torch.equal(a.lora_A != 0, history[-1].masks[f"{name}.lora_A"])
        for name, a in built.adapters.items()
    )


def test_different_scopes_give_different_shares_to_the_matrices(make: Make) -> None:
    shares = {}
    for scope in ("matrix", "global"):
        watched = Watched(
            make("bert", factors={"density": 0.3, "scope": scope}).build(), spec(max_steps=20)
        )
        last = watched.run()[-1]
        shares[scope] = [float(mask.float().mean()) for mask in last.masks.values()]
    assert max(shares["matrix"]) - min(shares["matrix"]) < 0.02
    assert max(shares["global"]) - min(shares["global"]) > 0.05
    assert min(shares["global"]) > 0.05, "B, which grew from zero, should not be wiped out by A"


def test_the_masks_change_every_interval_and_at_the_end_of_the_ramp(make: Make) -> None:
    said = {"density": 0.2, "begin": 0.2, "end": 0.7, "interval": 0.15, "shape": "linear"}
    history = Watched(make("bert", factors=said).build(), spec(max_steps=40)).run()
    changes = [
        later.step for earlier, later in pairwise(history) if later.density != earlier.density
    ]
    assert changes == [14, 20, 26, 28]  # 8, where the density is still 1, 14, 20, 26, and the end


def test_the_ramp_may_begin_at_once_and_end_with_the_run(make: Make) -> None:
    said = {"density": 0.5, "begin": 0.0, "end": 1.0, "shape": "linear"}
    history = Watched(make("bert", factors=said).build(), spec(max_steps=6)).run()
    assert [moment.density for moment in history] == pytest.approx(
        [1.0, 0.9, 0.8, 0.7, 0.6, 0.5], abs=0.01
    )


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_of_a_few_steps_still_ends_at_its_density(steps: int, make: Make) -> None:
    for said in (
        {"density": 0.25},
        {"density": 0.25, "begin": 1.0, "end": 1.0},
        {"density": 0.25, "shape": "one-shot"},
    ):
        built = make("bert", factors=said).build()
        history = Watched(built, spec(max_steps=steps)).run()
        assert history[-1].density == 0.25
        assert built.method.is_final


def test_a_density_of_1_masks_nothing(make: Make) -> None:
    ends = []
    for method, said in (("salor", {"factors": {"density": 1.0}}), ("vanilla", {})):
        built = make("bert", method, **said).build()
        optimizer = started(built, spec(max_steps=6))
        torch.manual_seed(0)
        for _ in train(
            built.task_model, built.method, optimizer, built.examples, spec(max_steps=6)
        ):
            pass
        ends.append(trained_tensors(built.model))
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name])


# -- what is dropped -------------------------------------------------------------------------------


def test_magnitude_drops_the_smallest_of_each_matrix(make: Make) -> None:
    built = make("bert", factors={"density": 0.4, "shape": "one-shot"}).build()
    watched, before = Watched(built, spec(max_steps=10)), {}
    method: Any = built.method
    inner = method.after_step

    def after_step(step: int) -> dict[str, float]:
        if step == 7:
            before.update({name: p.detach().clone() for name, p in factors(built.adapters).items()})
        found: dict[str, float] = inner(step)
        return found

    method.after_step = after_step
    history = watched.run()
    assert [moment.density == 1.0 for moment in history] == [True] * 6 + [False] * 4
    for name, mask in history[-1].masks.items():
        assert torch.equal(
            mask,
            strongest(before[name].abs().flatten(), keep_count(0.4, mask.numel())).view_as(mask),
        )
        kept = factors(built.adapters)[name]
        assert kept[mask].abs().min() > 0


def test_sensitivity_is_a_running_mean_of_entry_times_gradient_before_clipping(make: Make) -> None:
    built = make(
        "bert", factors={"density": 0.4, "shape": "one-shot", "criterion": "sensitivity"}
    ).build()
    watched = Watched(built, spec(max_steps=10, max_grad_norm=0.05))
    method: Any = built.method
    inner = method.before_step
    mean = {name: torch.zeros_like(p) for name, p in factors(built.adapters).items()}
    size: dict[str, Tensor] = {}

    def before_step(step: int) -> None:
        if step <= 7:
            for name, p in factors(built.adapters).items():
                assert p.grad is not None
                mean[name] = (0.85 * mean[name] + 0.15 * (p * p.grad).abs()).detach()
                size[name] = p.detach().abs().clone()
        inner(step)

    method.before_step = before_step
    history = watched.run()
    by_size = 0
    for name, mask in history[-1].masks.items():
        assert mask.float().mean() == pytest.approx(0.4, abs=0.01)
        kept, dropped = mean[name][mask], mean[name][~mask]
        assert kept.min() >= dropped.max() * (1 - 1e-5)
        by_size += int(
            (mask != strongest(size[name].flatten(), int(mask.sum())).view_as(mask)).sum()
        )
    assert by_size > 100, "magnitude should have chosen otherwise"


@pytest.mark.parametrize("scope", ["matrix", "global"])
@pytest.mark.parametrize("criterion", ["magnitude", "sensitivity"])
def test_the_rank_structure_takes_the_weakest_components_out(
    scope: str, criterion: str, make: Make
) -> None:
    said = {"structure": "rank", "density": 0.35, "scope": scope, "criterion": criterion}
    built = make("llama", factors=said).build(r=8, rank_pattern={"k_proj": 4, "v_proj": 0})
    watched = Watched(built, spec(**HARD))
    method: Any = built.method
    strength: dict[int, dict[str, Tensor]] = {}
    kept: dict[int, dict[str, Tensor]] = {}
    inner = method.after_step

    def after_step(step: int) -> dict[str, float]:
        before = {}
        strength[step] = {}
        for name, adapter in built.adapters.items():
            a, b = adapter.lora_A, adapter.lora_B
            before[name] = a.detach().clone()
            if criterion == "magnitude":
                strength[step][name] = adapter.scale * a.norm(dim=1) * b.norm(dim=0)
            else:
                scores = [watched.optimizer.state[p].sensitivity for p in (a, b)]
                strength[step][name] = (
                    torch.zeros(0) if adapter.rank == 0 else scores[0].sum(1) + scores[1].sum(0)
                )  # type: ignore[union-attr]
        found: dict[str, float] = inner(step)
        kept[step] = {
            name: torch.tensor(
                [bool((adapter.lora_A == row).all(1).any()) for row in before[name]],
                dtype=torch.bool,
            )
            for name, adapter in built.adapters.items()
        }
        return found

    method.after_step = after_step
    initial = {name: adapter.rank for name, adapter in built.adapters.items()}
    parameters = sum(p.numel() for p in factors(built.adapters).values())
    history = watched.run()
    assert sorted(strength) == list(range(1, T + 1))
    for step, scores in strength.items():
        density = expected_density(step, T, 0.35)
        if scope == "matrix":
            for name, score in scores.items():
                assert history[step - 1].ranks[name] == keep_count(density, initial[name])
                assert torch.equal(
                    kept[step][name], strongest(score, keep_count(density, initial[name]))
                ), (step, name)
        else:
            every, mine = torch.cat(list(scores.values())), torch.cat(list(kept[step].values()))
            assert torch.equal(mine, strongest(every, int(mine.sum())))
            # Entries count, not components: as many of the strongest as fit.
            costs = torch.cat(
                [
                    torch.full((len(s),), sum(in_out(built.adapters[n].base)))
                    for n, s in scores.items()
                ]
            )
            ordered = costs[every.sort(descending=True, stable=True).indices].cumsum(0)
            assert int(mine.sum()) == int((ordered <= keep_count(density, parameters)).sum())
    last = history[-1]
    assert all(moment.ranks == last.ranks for moment in history[34:])
    assert built.method.rank_state().ranks == last.ranks
    assert {name: adapter.lora_B.shape[1] for name, adapter in built.adapters.items()} == last.ranks
    left = sum(p.numel() for p in factors(built.adapters).values())
    assert left < 0.5 * parameters
    for moment in history:
        live = sum(
            moment.ranks[name] * sum(in_out(adapter.base))
            for name, adapter in built.adapters.items()
        )
        assert moment.said == pytest.approx(live / parameters)
    assert built.method.summary()["density"]["total"] == pytest.approx(left / parameters, abs=1e-6)
    if scope == "matrix":
        assert {name: rank for name, rank in last.ranks.items() if initial[name]} == {
            name: keep_count(0.35, rank) for name, rank in initial.items() if rank
        }
    else:
        assert len(set(last.ranks.values())) > 2
        assert left <= 0.35 * parameters


def test_a_component_that_stays_keeps_its_moments(make: Make) -> None:
    built = make("bert", factors={"structure": "rank", "density": 0.5, "shape": "one-shot"}).build()
    optimizer = started(built, spec(max_steps=10))
    name, adapter = next(iter(built.adapters.items()))
    before: dict[str, Tensor] = {}
    for report in train(
        built.task_model, built.method, optimizer, built.examples, spec(max_steps=10)
    ):
        state = optimizer.state[adapter.lora_B]
        if report.step == 6:
            before = {"B": adapter.lora_B.detach().clone(), "second": state.second.clone()}
            with torch.no_grad():  # the order of the components is ours
                adapter.lora_B.mul_(torch.tensor([1.0, 9.0, 1.0, 9.0]))
        if report.step == 7:
            assert adapter.rank == 2
            # One more step decays what was by beta2 = 0.999 and adds at least nothing.
            assert (state.second >= 0.999 * before["second"][:, [1, 3]] * (1 - 1e-6)).all()
            assert float(state.age.unique()) == 7.0
            break
    assert name


# -- resuming --------------------------------------------------------------------------------------

CUTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "unstructured": ("bert", "salor", {"factors": {"density": 0.2}}),
    "sensitivity": ("llama", "salor", {"factors": {"density": 0.2, "criterion": "sensitivity"}}),
    "global 2:4 sensitivity": (
        "bert",
        "salor",
        {"factors": {"structure": "2:4", "scope": "global", "criterion": "sensitivity"}},
    ),
    "rank": (
        "llama",
        "salor",
        {"r": 8, "factors": {"structure": "rank", "density": 0.3, "shape": "linear"}},
    ),
    "rank by sensitivity": (
        "bert",
        "salor",
        {
            "r": 8,
            "factors": {
                "structure": "rank",
                "density": 0.3,
                "criterion": "sensitivity",
                "shape": "linear",
                "scope": "global",
            },
        },
    ),
    "one-shot after the cut": (
        "bert",
        "salor",
        {"factors": {"density": 0.2, "shape": "one-shot", "criterion": "sensitivity"}},
    ),
    "after the ramp": ("bert", "salor", {"factors": {"density": 0.2, "begin": 0.1, "end": 0.4}}),
    "base, trained residual": (
        "gpt2",
        "salor",
        {"base": {"r_res": 4}, "factors": {"density": 0.3}},
    ),
    "base, frozen residual": (
        "llama",
        "salor",
        {"base": {"r_res": 4, "residual_lr_factor": 0.0}, "factors": None},
    ),
    "base, no residual": (
        "bert",
        "salor",
        {"base": {"r_res": 0, "criterion": "2:4"}, "factors": {"density": 0.3}},
    ),
    "joined": (
        "bert",
        "l1ra",
        {"with": [{"name": "salor", "factors": {"density": 0.3, "criterion": "sensitivity"}}]},
    ),
    "joined, base": (
        "llama",
        "l1ra",
        {
            "with": [
                {"name": "salor", "base": {"r_res": 4}, "factors": {"density": 0.3, "end": 0.8}}
            ]
        },
    ),
}


@pytest.mark.parametrize("name", CUTS)
def test_a_run_that_is_cut_in_the_middle_of_the_ramp_ends_with_the_same_bytes(
    name: str, make: Make, tmp_path: Path
) -> None:
    kind, method, settings = CUTS[name]
    history = resumed(make(kind, method, **settings), tmp_path)
    if method == "l1ra":
        for part in (history[: CUT + 1], history[CUT:]):
            assert len({tuple(ranks.items()) for ranks in part}) > 1, (
                "ranks should move on both sides of the cut"
            )
    if "rank" in name:
        totals = [sum(ranks.values()) for ranks in history]
        assert totals[0] > totals[CUT] > totals[-1]
    assert len(history) == STEPS + 1


# -- joined to l1ra --------------------------------------------------------------------------------


class Resizes:
    """Every resize of an optimizer: which components stay, and how many come."""

    def __init__(self, optimizer: AdamW) -> None:
        self.seen: list[tuple[nn.Module, str, int, Tensor, int]] = []
        original = optimizer.resize

        def resize(module: nn.Module, name: str, dim: int, keep: Tensor, new: Tensor) -> None:
            self.seen.append((module, name, dim, keep.clone(), new.shape[dim]))
            original(module, name, dim, keep, new)

        optimizer.resize = resize  # type: ignore[method-assign]


def moving(steps: int, ratio: float = 0.1) -> dict[str, Any]:
    """l1ra whose ranks move every `ratio` of a run."""
    return {"rank_update_ratio": ratio, "eta_c": 0.2, "l1_share": 0.2 * steps}


def joined(make: Make, steps: int, said: dict[str, Any], **more: Any) -> Built:
    return make("bert", "l1ra", **{"with": [{"name": "salor", "factors": said}]}).build(
        **moving(steps) | more
    )


def test_a_component_that_moves_brings_its_mask_and_newcomers_are_dense(make: Make) -> None:
    built = joined(make, 40, {"density": 0.3})
    watched = Watched(built, spec(max_steps=40, weight_decay=0.1))
    resizes = Resizes(watched.optimizer)
    composed: Any = built.method
    main: Any = composed.main
    inner = main.after_step
    stayed = came = masked = 0

    def after_step(step: int) -> dict[str, float]:
        nonlocal stayed, came, masked
        before = {
            (name, part): (
                watched.optimizer.state[getattr(adapter, part)].mask,
                getattr(adapter, part).detach().clone(),
            )
            for name, adapter in built.adapters.items()
            for part in PARTS
        }
        resizes.seen.clear()
        metrics: dict[str, float] = inner(step)
        for module, part, dim, keep, count in resizes.seen:
            if part not in PARTS:
                continue
            [name] = [name for name, adapter in built.adapters.items() if adapter is module]
            mask, values = before[name, part]
            parameter = getattr(module, part)
            now = watched.optimizer.state[parameter].mask
            assert torch.equal(parameter.narrow(dim, 0, len(keep)), values.index_select(dim, keep))
            if mask is None:
                assert now is None
                continue
            assert torch.equal(now.narrow(dim, 0, len(keep)), mask.index_select(dim, keep))
            assert now.narrow(dim, len(keep), count).all()
            stayed, came, masked = stayed + len(keep), came + count, masked + int((~mask).sum())
        return metrics

    main.after_step = after_step
    watched.run()
    assert min(stayed, came, masked) > 0, (stayed, came, masked)


def test_newcomers_are_spared_for_as_long_as_the_first_components_were(make: Make) -> None:
    total, first = 40, 6
    built = joined(make, total, {"density": 0.3})
    watched = Watched(built, spec(max_steps=total))
    spared = judged = 0
    torch.manual_seed(0)
    for report in train(
        built.task_model, built.method, watched.optimizer, built.examples, watched.settings
    ):
        for parameter in factors(built.adapters).values():
            state = watched.optimizer.state[parameter]
            if state.mask is None or state.age.ndim == 0 or parameter.numel() == 0:
                continue
            young = (state.age < first).expand(parameter.shape)
            if report.step < total:
                assert state.mask[young].all()
                spared += int(young.sum())
            elder = ((state.age >= first) & (state.age < report.step)).expand(parameter.shape)
            judged += int((~state.mask[elder]).sum())
    assert spared > 0
    assert judged > 0, "what came late should be judged in the end"


ENDS = [
    {"density": 0.3},
    {"density": 0.15, "scope": "global"},
    {"density": 0.3, "end": 0.4},
    {"density": 0.5, "interval": 0.2},
]


@pytest.mark.parametrize("said", ENDS, ids=str)
@pytest.mark.parametrize(
    ("steps", "ratio"), [(20, 0.1), (43, 0.1)], ids=["ranks move last", "masks move last"]
)
def test_ranks_that_move_end_at_most_at_the_density(
    said: dict[str, Any], steps: int, ratio: float, make: Make
) -> None:
    built = joined(make, steps, said, **moving(steps, ratio))
    watched = Watched(built, spec(max_steps=steps))
    history = watched.run()
    moves = [
        later.ranks[name] - earlier.ranks[name]
        for earlier, later in pairwise(history)
        for name in later.ranks
    ]
    assert min(moves) < 0 < max(moves)
    assert history[-1].density <= said["density"] + 1e-9
    assert 0 < factor_facts(built.adapters)["density"]["total"] <= said["density"] + 1e-6


def test_joined_cost_and_pool_are_the_budget(make: Make) -> None:
    built = joined(make, 30, {"density": 0.3}, budget={"end": 0.7})
    watched = Watched(built, spec(max_steps=30))
    torch.manual_seed(0)
    for report in train(
        built.task_model, built.method, watched.optimizer, built.examples, watched.settings
    ):
        moment, state = watched.look(report), built.method.rank_state()
        assert state.cost + state.pool == state.budget
        assert state.cost == sum(moment.ranks.values()) == report.metrics["rank_total"]
    assert state.budget == round(0.7 * 12 * 4)


def test_joined_the_density_of_a_step_is_that_of_its_masks(make: Make) -> None:
    history = Watched(joined(make, 30, {"density": 0.3}), spec(max_steps=30)).run()
    wrong = [
        (m.step, m.said, m.density) for m in history if m.said != pytest.approx(m.density, abs=1e-9)
    ]
    assert not wrong, "(step, density in the metrics, density of the masks)"


def test_joined_it_is_final_only_where_its_density_is_the_final_one(make: Make) -> None:
    """Else load_best_model_at_end may end with an adapter that is denser than the recipe says."""
    built = joined(make, 43, {"density": 0.3, "end": 0.5})
    watched, early = Watched(built, spec(max_steps=43)), []
    torch.manual_seed(0)
    for report in train(
        built.task_model, built.method, watched.optimizer, built.examples, watched.settings
    ):
        moment = watched.look(report)
        if moment.is_final and moment.density > 0.3 + 1e-9:
            early.append((moment.step, moment.density))
    assert built.method.is_final
    assert not early, "(step, density) of moments that count as final"


def test_joined_every_parameter_is_in_one_group_and_in_the_right_one(make: Make) -> None:
    part = {"name": "salor", "base": {"r_res": 4, "residual_lr_factor": 0.05}}
    built = make("bert", "l1ra", **{"with": [part]}).build(eta_c=0.123).prepare()
    groups = built.method.param_groups()
    held = [id(p) for group in groups for p in group.params]
    assert len(held) == len(set(held))
    by_kind = {}
    for name, parameter in trainable(built.model).items():
        group = next((g for g in groups if any(p is parameter for p in g.params)), None)
        by_kind.setdefault(name.rpartition(".")[2], set()).add(
            None if group is None else (group.lr, group.lr_factor, group.clipped)
        )
    # the classifier, which the loop adds
    assert by_kind.pop("weight") == by_kind.pop("bias") == {None}
    usual, gates, residual = {(None, 1.0, True)}, {(0.123, 1.0, False)}, {(None, 0.05, True)}
    assert by_kind == {
        "lora_A": usual,
        "lora_B": usual,
        "gate": gates,
        "residual_A": residual,
        "residual_B": residual,
    }


def test_joined_to_vanilla_it_is_salor_by_itself(make: Make) -> None:
    said = {"factors": {"density": 0.3, "criterion": "sensitivity"}, "base": {"r_res": 4}}
    ends = []
    for case in (
        make("bert", **said),
        make("bert", "vanilla", **{"with": [{"name": "salor", **said}]}),
    ):
        history = Watched(built := case.build(lora_dropout=0.1), spec(max_steps=12)).run()
        ends.append(
            (trained_tensors(built.model), [(moment.said, moment.is_final) for moment in history])
        )
    assert ends[0][1] == ends[1][1]
    assert [is_final for _, is_final in ends[0][1]] == [False] * 7 + [True] * 5
    for name, tensor in ends[0][0].items():
        assert torch.equal(tensor, ends[1][0][name])


def test_a_joined_method_takes_what_all_methods_have_from_the_main_one() -> None:
    config = config_classes()["l1ra"].model_validate(
        {
            "r": 6,
            "lora_alpha": 3.0,
            "target_modules": ["q_proj"],
            "with": [{"name": "salor", "factors": {"density": 0.4}}],
        }
    )
    composed: Any = build_method(config, seed=5)
    assert isinstance(composed.main, L1RA)
    [part] = composed.parts
    assert isinstance(part, Salor)
    assert (part.config.r, part.config.lora_alpha, part.config.target_modules) == (
        6,
        3.0,
        ["q_proj"],
    )
    assert (part.config.name, part.config.factors.density, part.seed) == ("salor", 0.4, 5)  # type: ignore[union-attr]


# -- the pruned base -------------------------------------------------------------------------------


def kept(adapter: Adapter) -> Tensor:
    """The mask [out, in] of a pruned base."""
    in_features, out_features = in_out(adapter.base)
    return unpack_bits(adapter.base.own_tensors()["base_mask"], in_features * out_features).view(
        out_features, in_features
    )


def residual_of(adapter: Adapter) -> Tensor:
    """The product [out, in] of a pruned base's residual pair."""
    pair = adapter.base.pair()
    assert pair is not None
    return pair[1] @ pair[0]


def originals(case: Case) -> dict[str, Tensor]:
    """{name: weight [out, in]} of the model as it was."""
    return {
        name: dense_weight(layer).detach().clone()
        for name, layer in linear_layers(case.bare().model).items()
    }


BASES: dict[str, dict[str, Any]] = {
    "magnitude": {"criterion": "magnitude", "density": 0.37},
    "magnitude global": {"criterion": "magnitude", "scope": "global", "density": 0.37},
    "wanda": {"criterion": "wanda", "density": 0.37},
    "wanda global": {"criterion": "wanda", "scope": "global", "density": 0.37},
    "wanda 2:4": {"criterion": "wanda", "structure": "2:4"},
    "wanda 1:4 global": {"criterion": "wanda", "structure": "1:4", "scope": "global"},
    "2:4": {"criterion": "2:4"},
    "default": {},
}


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("name", BASES)
def test_a_base_is_pruned_exactly_to_its_density_and_to_nothing_else(
    kind: str, name: str, make: Make
) -> None:
    wanda = BASES[name].get("criterion", "wanda") == "wanda"
    case = make(
        kind,
        factors=None,
        base={"r_res": 2} | ({"calibration_rows": 12} if wanda else {}) | BASES[name],
    )
    before, built = originals(case), case.build().prepare()
    base = built.method.config.base  # type: ignore[attr-defined]
    target = base.target
    assert target == BASES[name].get("density", {"wanda 1:4 global": 0.25}.get(name, 0.5))
    total = live = 0
    for module, adapter in built.adapters.items():
        mask, weight = kept(adapter), dense_weight(adapter.base)
        assert torch.equal(weight, before[module] * mask)
        assert int(torch.count_nonzero(weight)) == int(mask.sum())
        assert not adapter.base.weight.requires_grad
        pieces = mask.view(len(mask), -1, base.form.width).sum(-1)
        if base.form.kind == "n:m":
            assert (pieces == base.form.n).all()
        elif "global" in name:
            pass
        elif base.criterion == "wanda":
            assert (mask.sum(1) == math.floor(target * mask.shape[1] + 1e-9)).all()
        else:
            assert int(mask.sum()) == math.floor(target * mask.numel() + 1e-9)
        total, live = total + mask.numel(), live + int(mask.sum())
    if "global" in name:
        assert live == math.floor(target * total + 1e-9)
        if base.form.kind != "n:m":
            assert (
                len({float(kept(adapter).float().mean()) for adapter in built.adapters.values()})
                > 3
            )
    assert built.method.summary()["base_density"]["total"] == pytest.approx(live / total, abs=1e-6)
    # What is no layer with an adapter is as it was.
    fresh = case.bare().model.state_dict()
    others = {key: tensor for key, tensor in built.model.state_dict().items() if key in fresh}
    assert any("embed" in key or "wte" in key for key in others)
    assert all(torch.equal(tensor, fresh[key]) for key, tensor in others.items())


@pytest.mark.parametrize("name", ["magnitude", "magnitude global", "2:4"])
def test_by_magnitude_the_largest_weights_stay(name: str, make: Make) -> None:
    case = make("llama", factors=None, base={"r_res": 2} | BASES[name])
    before, built = originals(case), case.build()
    calibration = built.calibration()
    forwards = []
    built.method.prepare(replace(calibration, forward=lambda batch: forwards.append(batch)))
    assert not forwards, "magnitudes need no look at the data"
    sizes = [before[module].abs() for module in built.adapters]
    base = built.method.config.base  # type: ignore[attr-defined]
    expected = masks(sizes, base.target, base.form, "global" if "global" in name else "matrix")
    for adapter, mask in zip(built.adapters.values(), expected, strict=True):
        assert torch.equal(kept(adapter), mask)


def input_norms(case: Case, rows: list[int], padded: bool) -> dict[str, Tensor]:
    """{module: ‖x_j‖₂ over the tokens of these rows}, by hooks of our own; `padded`: all in one
    batch, padding and all."""
    task_model, sums = case.bare(), {}
    task_model.model.eval()
    for name, layer in linear_layers(task_model.model).items():

        def add(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            tokens = inputs[0].detach().double().reshape(-1, inputs[0].shape[-1])
            sums[name] = sums.get(name, 0) + tokens.square().sum(0)

        layer.register_forward_pre_hook(add)
    for part in [rows] if padded else [[row] for row in rows]:
        with torch.no_grad():
            task_model.run_body(collate(case.examples(), np.array(part), 0))
    return {name: total.sqrt().float() for name, total in sums.items()}


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_wanda_keeps_the_largest_of_weight_times_input_norm_in_every_row(
    kind: str, make: Make
) -> None:
    """arXiv 2306.11695, eq. 1, over real tokens alone, however the rows were padded together."""
    case = make(
        kind,
        factors=None,
        base={"criterion": "wanda", "density": 0.5, "calibration_rows": 10, "r_res": 0},
    )
    built, before = case.build(), originals(case)
    seen: list[int] = []
    calibration, before_hooks = built.calibration(batch_size=5), hooks(built)
    assert any(not batch.attention_mask.all() for batch in calibration.batches(10)), (
        "there should be padding"
    )

    def forward(batch: Any) -> None:
        seen.extend(batch.row_ids)
        calibration.forward(batch)

    built.method.prepare(replace(calibration, forward=forward))
    rows = [int(row) for row in StepOrder(24, 10, 0).of_step(1)]
    assert sorted(seen) == sorted(rows), (
        "the first rows of training, and no more than were asked for"
    )
    norms, spoilt = input_norms(case, rows, padded=False), input_norms(case, rows, padded=True)
    differ = otherwise = 0
    for name, adapter in built.adapters.items():
        scores, width = before[name].abs() * norms[name], in_out(adapter.base)[0]
        for row, mask in zip(scores, kept(adapter), strict=True):
            assert int(mask.sum()) == width // 2
            assert row[mask].min() >= row[~mask].max() * (1 - 1e-5)
        differ += int(
            (kept(adapter) != strongest(before[name].abs() * spoilt[name], width // 2)).sum()
        )
        otherwise += int((kept(adapter) != strongest(before[name].abs(), width // 2)).sum())
    assert differ > 0, "padding should matter, or the test shows nothing"
    assert otherwise > 0, "so should the inputs"
    assert hooks(built) == before_hooks, "no hook is left"


def test_how_the_calibration_rows_are_batched_does_not_matter(make: Make) -> None:
    found = []
    for size in (1, 3, 12):
        built = make("bert", factors=None, base={"calibration_rows": 12}).build()
        built.method.prepare(built.calibration(batch_size=size))
        found.append(torch.cat([kept(adapter).flatten() for adapter in built.adapters.values()]))
    assert all(torch.equal(mask, found[0]) for mask in found)


def test_hooks_go_with_a_calibration_that_fails(make: Make) -> None:
    built = make("bert", factors=None, base={}).build()
    before = hooks(built)

    def forward(batch: Any) -> None:
        assert hooks(built) == before + len(built.adapters)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        built.method.prepare(replace(built.calibration(), forward=forward))
    assert hooks(built) == before


def test_a_base_that_is_not_finite_is_refused_by_name(make: Make) -> None:
    for criterion in ("magnitude", "wanda"):
        built = make("bert", factors=None, base={"criterion": criterion}).build()
        name, adapter = list(built.adapters.items())[3]
        with torch.no_grad():
            dense_weight(adapter.base)[0, 0] = math.nan
        with pytest.raises(RunError, match=f"`{name}`"):
            built.prepare()


def hooks(built: Built) -> int:
    return sum(
        len(module._forward_pre_hooks) + len(module._forward_hooks)
        for module in built.model.modules()
    )


def distance(case: Case) -> float:
    """Between the logits of the model as it was and pruned, over real tokens."""
    built, batch = case.build(), case.batch()
    real = batch.attention_mask.bool() if case.task == "causal-lm" else slice(None)
    dense = built.logits(batch)[real]
    built.prepare()
    return float((built.logits(batch)[real] - dense).square().mean().sqrt())


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
def test_the_more_residual_the_closer_to_the_dense_model(
    kind: str, criterion: str, make: Make
) -> None:
    # of the smallest layer; llama's key and value heads are 32 → 16
    whole = 16 if kind == "llama" else 32
    far = [
        distance(
            make(kind, factors=None, base={"criterion": criterion, "r_res": rank, "density": 0.5})
        )
        for rank in (0, 8, whole)
    ]
    assert far[0] > 2e-5
    assert far[1] < 0.9 * far[0]
    assert far[2] < (1e-2 if kind != "llama" else 0.6) * far[0]


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_the_residual_is_the_truncated_svd_of_what_was_dropped(kind: str, make: Make) -> None:
    case = make(kind, factors=None, base={"criterion": "magnitude", "r_res": 6})
    before, built = originals(case), case.build().prepare()
    for name, adapter in built.adapters.items():
        error = (before[name] * ~kept(adapter)).double()
        u, s, vh = torch.linalg.svd(error, full_matrices=False)
        found = residual_of(adapter).detach()
        torch.testing.assert_close(found.double(), (u[:, :6] * s[:6]) @ vh[:6], rtol=0, atol=1e-5)
        # The factors say nothing yet, so this is all that is added to the base.
        torch.testing.assert_close(adapter.delta().detach(), found, rtol=1e-5, atol=1e-6)
        left = (
            (before[name] - dense_weight(adapter.base) - adapter.delta()).detach().square().mean()
        )
        assert left <= (1 - 6 / min(error.shape)) * error.square().mean()


def test_a_run_says_how_much_was_dropped_and_how_much_the_residual_recovers(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    case = make("bert", factors=None, base={"criterion": "magnitude", "density": 0.6, "r_res": 6})
    before, built = originals(case), case.build()
    with caplog.at_level("INFO", "lorakit"):
        built.prepare()
    [line] = [
        record.getMessage() for record in caplog.records if "base pruned" in record.getMessage()
    ]
    errors = {
        name: before[name] - dense_weight(adapter.base) for name, adapter in built.adapters.items()
    }
    dropped = sum(float(error.square().sum()) for error in errors.values())
    left = sum(
        float((error - built.adapters[name].delta().detach()).square().sum())
        for name, error in errors.items()
    )
    whole = sum(float(before[name].square().sum()) for name in errors)
    assert "density 0.6 in 12 layers" in line
    assert f"{100 * dropped / whole:.2f} %" in line
    assert f"the residual of rank 6 recovers {1 - left / dropped:.1%}" in line


@pytest.mark.parametrize("svd", ["exact", "randomised"])
def test_one_seed_gives_one_residual(svd: str, make: Make) -> None:
    ends = []
    for rng in (1, 2):
        built = make("bert", factors=None, base={"svd": svd, "r_res": 4}).build()
        torch.manual_seed(rng)
        expected = torch.get_rng_state()
        built.prepare()
        assert torch.equal(torch.get_rng_state(), expected)
        ends.append(trained_tensors(built.model))
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_embeddings_and_heads_are_never_pruned_even_where_they_have_adapters(make: Make) -> None:
    case = make("llama", factors=None, base={"r_res": 2}, target_modules=["q_proj", "lm_head"])
    before, built = originals(case), case.build().prepare()
    pruned = {name for name, adapter in built.adapters.items() if adapter.base.is_changed}
    assert len(built.adapters) == 3
    assert pruned == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    head = built.adapters["lm_head"]
    assert torch.equal(dense_weight(head.base), before["lm_head"])
    assert head.base.components() == {}
    assert head.own_tensors().keys() == {"lora_A", "lora_B"}
    assert built.method.summary()["base_density"]["modules"].keys() == pruned


def test_the_base_stays_as_it_was_pruned_and_the_residual_learns_at_its_own_rate(
    make: Make,
) -> None:
    for factor in (0.1, 0.0):
        built = make("llama", base={"r_res": 4, "residual_lr_factor": factor}).build().prepare()
        weights = {
            name: dense_weight(adapter.base).clone() for name, adapter in built.adapters.items()
        }
        residual = {name: p.detach().clone() for name, p in named_residual(built).items()}
        groups = [group for group in built.method.param_groups() if group.lr_factor != 1.0]
        if factor:
            [group] = groups
            assert group.lr_factor == 0.1
            assert {id(p) for p in group.params} == {id(p) for p in named_residual(built).values()}
        else:
            assert groups == []
        assert all(p.requires_grad == bool(factor) for p in named_residual(built).values())
        optimizer = started(built, spec(max_steps=5))
        rates = []
        for report in train(
            built.task_model, built.method, optimizer, built.examples, spec(max_steps=5)
        ):
            if report.step == 1 and factor:  # Adam's first update is the learning rate
                moved = torch.cat(
                    [
                        (p - residual[name]).abs().flatten()
                        for name, p in named_residual(built).items()
                    ]
                )
                rates.append(float(moved.detach().median() / report.learning_rate))
        assert rates == ([pytest.approx(0.1, rel=1e-2)] if factor else [])
        assert all(
            torch.equal(dense_weight(adapter.base), weights[name])
            for name, adapter in built.adapters.items()
        )
        for name, parameter in named_residual(built).items():
            assert torch.equal(parameter, residual[name]) == (factor == 0)


def named_residual(built: Built) -> dict[str, nn.Parameter]:
    return {
        f"{name}.{part}": p
        for name, adapter in built.adapters.items()
        for part, p in adapter.base.components().items()
    }


def test_without_factors_nothing_is_masked_and_no_density_is_told(make: Make) -> None:
    built = make("bert", factors=None, base={"r_res": 2}).build()
    watched = Watched(built, spec(max_steps=4))
    for moment in watched.run():
        assert "density" not in moment.report.metrics
        assert all(mask.all() for mask in moment.masks.values())
    assert built.method.is_final


# -- a pruned layer --------------------------------------------------------------------------------


@pytest.fixture(params=["linear", "conv1d", "bfloat16"])
def layer(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    if request.param == "conv1d":
        made: nn.Module = Conv1D(8, 12)  # 12 → 8
        nn.init.normal_(made.bias)  # type: ignore[arg-type]
        return made
    return nn.Linear(12, 8).to(torch.bfloat16 if request.param == "bfloat16" else torch.float32)


def pruned(
    layer: nn.Module, rank: int = 3, residual: int = 2, dropout: float = 0.0, scale: float = 0.7
) -> Adapter:
    """An adapter over the layer with a pruned base, factors and a residual that are none of them
    zero."""
    rng = torch.Generator().manual_seed(1)
    adapter = Adapter(layer, rank, scale, dropout, rng)
    mask, pair = torch.rand(8, 12, generator=rng) < 0.5, None
    if residual:
        pair = torch.randn(residual, 12, generator=rng), torch.randn(8, residual, generator=rng)
    adapter.set_base(PrunedBase(layer, mask, pair))
    nn.init.normal_(adapter.lora_B, generator=rng)
    return adapter


def tolerance(layer: nn.Module) -> dict[str, float]:
    return (
        {"rtol": 0.05, "atol": 0.1}
        if dense_weight(layer).dtype == torch.bfloat16
        else {"rtol": 1e-5, "atol": 1e-5}
    )


@pytest.mark.parametrize(("rank", "residual"), [(3, 2), (3, 0), (0, 2), (0, 0)])
@pytest.mark.parametrize("scale", [0.7, 8.0])
def test_forward_is_the_pruned_base_plus_delta(
    layer: nn.Module, rank: int, residual: int, scale: float
) -> None:
    whole = dense_weight(layer).clone()
    adapter = pruned(layer, rank, residual, scale=scale)
    weight, mask = dense_weight(adapter.base), kept(adapter)
    assert torch.equal(weight, whole * mask)
    assert not mask.all()
    expected = scale * (adapter.lora_B @ adapter.lora_A)
    if residual:
        expected = expected + residual_of(adapter)  # no scale of its own
    torch.testing.assert_close(adapter.delta(), expected, rtol=1e-5, atol=1e-5)
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(2)).to(weight.dtype)
    dense = x.float() @ (weight.float() + adapter.delta()).T + layer.bias.float()  # type: ignore[operator]
    for training in (True, False):
        torch.testing.assert_close(adapter.train(training)(x).float(), dense, **tolerance(layer))
    # What a plain LoRA layer of the same scale would need.
    config: Any = Config.model_validate({})
    a, b = Salor(config).export(adapter)
    assert len(a) == b.shape[1] == rank + residual
    torch.testing.assert_close(
        adapter.scale * (b @ a), adapter.delta().detach(), rtol=1e-5, atol=1e-5
    )
    before = adapter.eval()(x)
    merged = copy.deepcopy(adapter).merge()
    torch.testing.assert_close(merged(x), before, **tolerance(layer))


@pytest.mark.parametrize("rank", [3, 0])
def test_dropout_is_of_the_factors_input_and_never_of_the_residuals(
    layer: nn.Module, rank: int
) -> None:
    adapter = pruned(layer, rank, dropout=0.5)
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(2)).to(
        dense_weight(layer).dtype
    )
    if rank:
        assert not torch.equal(adapter.train()(x), adapter(x)), "dropout should do something"
        nn.init.zeros_(adapter.lora_B)
    dropped = adapter.train()(x)
    torch.testing.assert_close(dropped, adapter.eval()(x), **tolerance(layer))
    assert torch.equal(dropped, adapter.train()(x))
    expected = adapter.base.layer(x).float() + x.float() @ residual_of(adapter).T
    torch.testing.assert_close(dropped.float(), expected, **tolerance(layer))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_reach_factors_and_residual(dropout: float) -> None:
    adapter = pruned(nn.Linear(12, 8), dropout=dropout)
    x = torch.randn(6, 12, generator=torch.Generator().manual_seed(3))
    adapter.train()(x).square().sum().backward()
    for name, parameter in adapter.parts().items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert adapter.base.weight.grad is None
    if not dropout:
        dense = [p.detach().clone().requires_grad_() for p in adapter.parts().values()]
        a, b, a_r, b_r = dense
        y = adapter.base.layer(x).detach() + x @ (adapter.scale * (b @ a) + b_r @ a_r).T
        y.square().sum().backward()
        for mine, theirs in zip(adapter.parts().values(), dense, strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_what_is_saved_is_what_is_loaded(layer: nn.Module) -> None:
    other = copy.deepcopy(layer)
    adapter = pruned(layer)
    saved = {name: tensor.clone() for name, tensor in adapter.own_tensors().items()}
    assert saved.keys() == {"lora_A", "lora_B", "residual_A", "residual_B", "base_mask"}
    assert saved["base_mask"].dtype == torch.uint8
    assert len(saved["base_mask"]) == 8 * 12 / 8
    loaded = Adapter(other, 5, adapter.scale, 0.0, torch.Generator())
    loaded.load_tensors(saved)
    assert loaded.own_tensors().keys() == saved.keys()
    for name, tensor in loaded.own_tensors().items():
        assert torch.equal(tensor, saved[name]), name
    assert torch.equal(dense_weight(loaded.base), dense_weight(adapter.base))
    x = torch.randn(4, 12).to(dense_weight(layer).dtype)
    assert torch.equal(loaded(x), adapter(x))
    assert all(p.requires_grad for p in loaded.base.components().values())
    # It holds copies: what is trained on does not change what was read.
    nn.init.zeros_(loaded.lora_A)
    nn.init.zeros_(loaded.parts()["residual_A"])
    assert saved["lora_A"].any()
    assert saved["residual_A"].any()


def test_loading_again_replaces_the_residual_and_leaves_it_frozen_where_it_was(
    layer: nn.Module,
) -> None:
    adapter = pruned(layer)
    saved = {name: tensor.clone() for name, tensor in adapter.own_tensors().items()}
    for parameter in adapter.base.components().values():
        parameter.requires_grad_(False)
        nn.init.zeros_(parameter)
    adapter.load_tensors(saved)
    assert torch.equal(adapter.parts()["residual_A"], saved["residual_A"])
    assert not any(p.requires_grad for p in adapter.base.components().values())
    assert adapter.lora_A.requires_grad


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gate": torch.ones(3)}, "gate is not a part of it"),
        ({"lora_C": torch.ones(3), "mask": torch.ones(1)}, "lora_C, mask is not a part of it"),
        ({"lora_B": None}, "lora_B is missing"),
        ({"residual_B": None}, "residual_B is missing"),
        ({"residual_A": None}, "residual_A is missing"),
        ({"lora_A": torch.zeros(3, 8)}, "lora_A has shape"),
        ({"lora_A": torch.zeros(2, 12)}, "disagree about the rank"),
        ({"residual_A": torch.zeros(2, 8)}, "residual_A has shape"),
        ({"residual_B": torch.zeros(12, 2)}, "residual_B has shape"),
        ({"residual_A": torch.zeros(3, 12)}, "residual disagrees about the rank"),
        ({"residual_A": torch.zeros(12)}, "residual_A has shape"),
        ({"base_mask": torch.zeros(11, dtype=torch.uint8)}, "a bitmap of 96 entries has 12 bytes"),
        ({"base_mask": torch.ones(8, 12, dtype=torch.bool)}, "a bitmap of 96 entries"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused_and_nothing_is_changed(
    change: dict[str, Tensor | None], words: str
) -> None:
    torch.manual_seed(0)
    adapter, target = pruned(nn.Linear(12, 8)), nn.Linear(12, 8)
    tensors = {
        name: tensor
        for name, tensor in (adapter.own_tensors() | change).items()
        if tensor is not None
    }
    loaded = Adapter(target, 4, 1.0, 0.0, torch.Generator().manual_seed(0))
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        loaded.load_tensors(tensors)
    assert loaded.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())
    assert type(loaded.base) is PlainBase


def test_merged_logits_are_those_of_the_pruned_and_trained_model(make: Make) -> None:
    for kind in ("bert", "gpt2"):
        built = make(kind, base={"r_res": 4}).build().prepare()
        scramble(built)
        batch = make(kind).batch()
        before = built.logits(batch)
        for adapter in copy.deepcopy(built).adapters.values():
            dense = dense_weight(adapter.base).float() + adapter.delta()
            merged = dense_weight(adapter.merge())
            torch.testing.assert_close(merged, dense, rtol=0, atol=1e-6)
            assert float((merged == 0).float().mean()) < 0.01, "merging makes a dense weight again"
        assert torch.equal(built.logits(batch), before)


# -- what does not fit the model -------------------------------------------------------------------


def misfits(
    targets: dict[str, Target], method: str = "salor", **settings: Any
) -> list[tuple[str, str]]:
    config = config_classes()[method].model_validate(settings)
    return [(problem.key, problem.what) for problem in config.misfits(targets)]


FITTING = {"h.0.a": Target(32, 48, 8, True), "h.0.b": Target(48, 30, 4, True)}


@pytest.mark.parametrize(
    ("settings", "key", "words"),
    [
        (
            {"factors": {"structure": "2:4"}},
            "method.factors.structure",
            "input of `h.0.c` is 30 wide: no multiple of 4",
        ),
        (
            {"factors": {"structure": "group", "group_size": 4}},
            "method.factors.structure",
            "`h.0.c` is 30 wide",
        ),
        (
            {"factors": None, "base": {"criterion": "2:4", "r_res": 4}},
            "method.base.criterion",
            "`h.0.c` is 30 wide",
        ),
        (
            {"factors": None, "base": {"structure": "2:4", "r_res": 4}},
            "method.base.structure",
            "`h.0.c` is 30 wide",
        ),
        (
            {"factors": None, "base": {"r_res": 25}},
            "method.base.r_res",
            "r_res 25 is larger than a layer: `h.0.c` is 30 → 24",
        ),
    ],
)
def test_a_layer_that_does_not_fit_is_named(settings: dict[str, Any], key: str, words: str) -> None:
    targets = FITTING | {"h.0.c": Target(30, 24, 8, True)}
    [(where, what)] = misfits(targets, **settings)
    assert where == key
    assert words in what
    assert misfits(FITTING, **settings) == []
    [(where, what)] = misfits(targets, "l1ra", **{"with": [{"name": "salor", **settings}]})
    assert where == key.replace("method.", "method.with.0.")
    assert words in what


def test_ranks_must_be_cut_into_pieces_too_and_rank_0_can() -> None:
    for structure in ({"structure": "2:4"}, {"structure": "group", "group_size": 4}):
        [(where, what)] = misfits(
            FITTING | {"h.0.c": Target(32, 32, 6, True), "h.0.d": Target(32, 32, 6, True)},
            factors=structure,
        )
        assert where == "method.factors.structure"
        assert "rank of the adapter of `h.0.c` is 6 wide" in what
        assert "1 more do not fit" in what
        assert misfits(FITTING | {"h.0.c": Target(32, 32, 0, True)}, factors=structure) == []
    assert misfits({"h.0.c": Target(31, 29, 3, True)}, factors={"structure": "rank"}) == []


def test_only_blocks_have_to_fit_a_base() -> None:
    head = {"lm_head": Target(30, 7, 2, block=False)}
    assert misfits(FITTING | head, factors=None, base={"structure": "2:4", "r_res": 8}) == []
    [(where, what)] = misfits(head, factors=None, base={"r_res": 2})
    assert where == "method.base"
    assert "only those are pruned" in what


def test_a_calibration_says_which_layers_are_blocks(make: Make) -> None:
    built = make("llama", target_modules=["q_proj", "lm_head"], base={}).build()
    calibration = built.calibration()
    assert isinstance(calibration, Calibration)
    assert list(calibration.blocks) == [name for name in built.adapters if name != "lm_head"]
    assert Structure.parse("2:4").width == 4


# -- what a reader with fresh eyes found -----------------------------------------------------------


def test_a_global_rank_structure_keeps_at_least_one_component(make: Make) -> None:
    built = make("llama", factors={"structure": "rank", "scope": "global", "density": 0.01}).build()
    Watched(built, spec(max_steps=10)).run()
    assert sum(adapter.rank for adapter in built.adapters.values()) == 1
    assert any("ended at density" in warning for warning in built.method.finish())


def test_an_early_sensitivity_that_orders_nothing_gives_way_to_the_magnitude(make: Make) -> None:
    built = make(
        "bert", factors={"criterion": "sensitivity", "begin": 0, "end": 0.05, "density": 0.25}
    ).build()
    Watched(built, spec(max_steps=20)).run()
    for adapter in built.adapters.values():
        kept = (adapter.lora_A != 0).sum(1)
        assert int(kept.max()) < adapter.lora_A.shape[1]
        assert int((kept > 0).sum()) == adapter.rank


def test_a_base_that_keeps_everything_has_no_residual(make: Make) -> None:
    built = make("bert", factors=None, base={"density": 1.0}).build().prepare()
    assert all(adapter.base.components() == {} for adapter in built.adapters.values())


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ({"factors": {"begin": 0.8}}, "before it begins"),
        ({"factors": {"group_size": 8}}, "group_size does nothing"),
        ({"factors": {"shape": "one-shot", "interval": 0.5}}, "interval does nothing"),
        (
            {"base": {"criterion": "magnitude", "calibration_rows": 5}},
            "calibration_rows does nothing",
        ),
        ({"base": {"r_res": 0, "residual_lr_factor": 0.5}}, "residual_lr_factor does nothing"),
    ],
)
def test_keys_that_would_do_nothing_are_refused(said: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        config_classes()["salor"].model_validate(said)
