"""`lorakit estimate`: what it counts against the run itself and numbers computed by hand. How long
things take is not tested."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from lorakit.cli import main
from lorakit.data.batches import Batch, StepOrder, batch_tokens, micro_batches
from lorakit.recipes.recipe import load_recipe
from lorakit.report.progress import Progress
from lorakit.runs import estimate as estimating
from lorakit.runs.estimate import count_evaluations
from lorakit.runs.memory import MB, LiveStorages, memory_kept, memory_passing, watching
from lorakit.runs.session import Session, assemble, calibration
from lorakit.runs.step_plan import StepPlan, fit_step_time, plan_steps
from lorakit.training.loop import build_optimizer, train
from lorakit.training.spec import TrainSpec

TASKS = ("sequence-classification", "causal-lm")
KINDS = [
    "base",
    "heads",
    "adapters",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "libraries",
    "other",
]
# What the run's result.json says under the same name.
SAME = ("method", "task", "model", "data", "steps", "tokens", "trainable_parameters")
HIDDEN, FEED_FORWARD, LAYERS, RANK = 32, 48, 2, 4


@pytest.fixture
def recipes(
    tmp_path: Path, tiny_bert: Path, tiny_llama: Path, sentiment: Path, sums: Path
) -> dict[str, Path]:
    """{task: a recipe file for it}."""
    found = {}
    columns = ", format: prompt-completion, prompt: '{question}', completion: ' {answer}'"
    inputs = {
        "sequence-classification": (tiny_bert, sentiment, ""),
        "causal-lm": (tiny_llama, sums, columns),
    }
    for task, (model, data, more) in inputs.items():
        found[task] = tmp_path / f"{task}.yaml"
        found[task].write_text(
            f"model: {{name_or_path: {model}, task: {task}}}\ndata: {{name_or_path:"
            f" {data}{more}}}\nmethod: {{name: vanilla, r: {RANK}}}\ntrain: {{max_steps: 14,"
            " per_device_train_batch_size: 4, gradient_accumulation_steps: 2, precision: fp32,\n  "
            f"      eval_steps: 5}}\noutput_dir: {tmp_path / 'run'}\n"
        )
    return found


def session_of(recipe: Path, *overrides: str) -> Session:
    return assemble(load_recipe(recipe, overrides), Progress(Console(quiet=True)))


def exit_code(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["lorakit", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code or 0)


@pytest.mark.parametrize("task", TASKS)
def test_it_says_what_the_run_then_shows_and_writes_nothing(
    task: str,
    recipes: dict[str, Path],
    call: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    found = json.loads(call("estimate", recipes[task], "--json", "--seconds", "0.2"))
    assert sorted(tmp_path.rglob("*")) == before
    call("train", recipes[task])
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert {key: found[key] for key in SAME} == {key: result[key] for key in SAME}
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert found["evaluations"]["count"] == sum("eval_loss" in line for line in lines) == 3
    assert list(found["memory_mb"]) == KINDS
    assert (
        found["parameters"]["trained"]
        == found["parameters"]["adapters"] + found["parameters"]["heads"]
    )
    assert found["wall_seconds"] == pytest.approx(sum(found["seconds"].values()), abs=0.01)
    assert found["train_seconds"] == found["seconds"]["training"] > 0


def test_the_kinds_of_memory_add_up_to_the_peak_of_a_fresh_process(
    recipes: dict[str, Path],
) -> None:
    entry = [sys.executable, "-c", "from lorakit.cli import main; main()"]
    command = [*entry, "estimate", str(recipes["causal-lm"]), "--json", "--seconds", "0.2"]
    found = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert found["peak_memory_mb"] > found["memory_mb"]["libraries"] > 0
    assert found["peak_memory_mb"] == pytest.approx(sum(found["memory_mb"].values()), abs=0.1)


def test_a_run_no_longer_than_the_calibration_takes_what_its_steps_took(
    recipes: dict[str, Path], call: Callable[..., str]
) -> None:
    found = json.loads(call("estimate", recipes["causal-lm"], "train.max_steps=3", "--json"))
    assert found["calibration"]["warm_up_steps"] + found["calibration"]["timed_steps"] == 3
    assert found["train_seconds"] == pytest.approx(found["calibration"]["seconds"], abs=0.002)


@pytest.mark.parametrize("method", ["l1ra", "salor", "chunkwise"])
def test_every_method_can_be_estimated(
    method: str, recipes: dict[str, Path], call: Callable[..., str]
) -> None:
    more = (
        ["method.base={density: 0.5, r_res: 2, calibration_rows: 4}"] if method == "salor" else []
    )
    more += ["method.ladder=[2,4]", "method.rank_target=3"] if method == "chunkwise" else []
    found = json.loads(
        call(
            "estimate",
            recipes["causal-lm"],
            f"method.name={method}",
            *more,
            "--json",
            "--seconds",
            "0.2",
        )
    )
    assert found["trainable_parameters"] > 0
    assert found["memory_mb"]["activations"] > 0


def test_the_tables_show_every_kind_of_memory_and_part_of_the_time(
    recipes: dict[str, Path], call: Callable[..., str]
) -> None:
    shown = call("estimate", recipes["causal-lm"], "train.max_steps=2").split()
    assert {*KINDS, "peak", "loading", "preparing", "training", "evaluating", "tokens/s"} <= set(
        shown
    )


def test_a_wrong_recipe_ends_with_2(
    recipes: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    assert exit_code(monkeypatch, "estimate", recipes["causal-lm"], "method.r=1000") == 2
    assert "larger than a layer" in capfd.readouterr().err
    assert exit_code(monkeypatch, "estimate", recipes["causal-lm"], "method.rank=4") == 2


def test_control_c_ends_it_with_130(
    recipes: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(estimating, "train", interrupted)
    assert exit_code(monkeypatch, "estimate", recipes["causal-lm"]) == 130


def test_calibration_keeps_to_the_limit_of_tokens_and_stands_for_all_lengths(
    recipes: dict[str, Path],
) -> None:
    """What a method looks at before the first step is cut as steps are, but never grouped by
    length."""
    where, limits = (
        recipes["causal-lm"],
        ("train.max_tokens_per_micro_batch=40", "train.group_by_length=true"),
    )
    plain, limited = (
        calibration(session_of(where, *more), Progress(Console(quiet=True)).stage)
        for more in ((), limits)
    )
    for name, batches in (
        ("batches", lambda found: found.batches(10)),
        ("held_out", lambda found: found.held_out()),
    ):
        rows = [
            [row for batch in batches(found) for row in batch.row_ids] for found in (plain, limited)
        ]
        assert sorted(rows[0]) == sorted(rows[1]), name
        sizes = [
            [batch.input_ids.numel() for batch in batches(found) if len(batch.row_ids) > 1]
            for found in (plain, limited)
        ]
        assert max(sizes[0]) > 40 >= max(sizes[1]), name


@pytest.mark.parametrize("packed", [True, False])
def test_the_plan_knows_the_largest_micro_batch_of_every_step(
    packed: bool, recipes: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the loop makes them: real tokens count where rows are packed, padded ones elsewhere."""
    more = (
        "train.max_tokens_per_micro_batch=60",
        "train.per_device_train_batch_size=8",
        "train.group_by_length=true",
    )
    session = session_of(recipes["causal-lm"], *more)
    assert session.task_model.packs
    session.task_model.packs = packed
    plan = plan_steps(
        session.train.lengths, session.recipe.train, session.task_model.longest_packed
    )
    steps: list[list[Batch]] = [[]]
    monkeypatch.setattr(session.method, "before_forward", lambda batch: steps[-1].append(batch))
    optimizer = build_optimizer(session.method, session.heads, session.recipe.train)
    session.method.begin(optimizer, len(plan.tokens))
    for _ in train(
        session.task_model, session.method, optimizer, session.train, session.recipe.train
    ):
        steps.append([])
    real = [max(batch.tokens for batch in step) for step in steps[:-1]]
    padded = [max(batch.input_ids.numel() for batch in step) for step in steps[:-1]]
    assert plan.at_once.tolist() == (real if packed else padded)
    assert max(plan.at_once) <= 60
    assert real != padded
    assert plan.tokens.tolist() == [sum(batch.tokens for batch in step) for step in steps[:-1]]


def test_the_longest_evaluation_batch_is_within_the_limit(
    recipes: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_of(recipes["causal-lm"], "train.max_tokens_per_micro_batch=40")
    seen: list[int] = []
    row_losses = session.task_model.row_losses

    def watched(batch: Batch) -> Any:
        seen.append(batch.tokens)
        return row_losses(batch)

    monkeypatch.setattr(session.task_model, "row_losses", watched)
    estimating.evaluation_seconds(session, lambda done, total: None)
    assert 20 < max(seen) <= 40
    assert sum(seen) > 2 * max(seen)


# -- memory ----------------------------------------------------------------------------------------


def test_what_is_kept_counts_every_number_once(recipes: dict[str, Path], tiny_bert: Path) -> None:
    session = session_of(recipes["sequence-classification"])
    kept = memory_kept(
        session, build_optimizer(session.method, session.heads, session.recipe.train)
    )
    # Per layer: query, key, value and output are square, the feed-forward's two are not.
    adapters = LAYERS * RANK * (4 * 2 * HIDDEN + 2 * (HIDDEN + FEED_FORWARD))
    # the pooler and the classifier of two labels
    heads = (HIDDEN * HIDDEN + HIDDEN) + (HIDDEN * 2 + 2)
    assert kept["adapters"] * MB == 4 * adapters
    assert kept["heads"] * MB == 4 * heads
    assert kept["gradients"] * MB == 4 * (adapters + heads)
    tensors = 6 * LAYERS * 2 + 4
    # two moments each, and an age a tensor
    assert kept["optimizer"] * MB == 2 * 4 * (adapters + heads) + 4 * tensors
    stored = sum(
        t.numel()
        for name, t in load_file(tiny_bert / "model.safetensors").items()
        if "pooler" not in name
    )
    buffers = sum(
        buffer.numel() * buffer.element_size() for buffer in session.task_model.model.buffers()
    )
    assert kept["base"] * MB == 4 * stored + buffers


def test_a_weight_that_is_shared_counts_once(recipes: dict[str, Path]) -> None:
    session = session_of(recipes["causal-lm"])
    model = session.task_model.model
    optimizer = build_optimizer(session.method, session.heads, session.recipe.train)
    apart = memory_kept(session, optimizer)["base"]
    model.lm_head.weight = model.get_input_embeddings().weight
    assert (
        apart - memory_kept(session, optimizer)["base"]
    ) * MB == model.lm_head.weight.numel() * 4


def test_what_passes_grows_with_the_step_and_ends_with_it(recipes: dict[str, Path]) -> None:
    sizes = []
    for rows in (2, 4):
        session = session_of(
            recipes["causal-lm"],
            f"train.per_device_train_batch_size={rows}",
            "train.gradient_accumulation_steps=1",
        )
        optimizer = build_optimizer(session.method, session.heads, session.recipe.train)
        session.method.begin(optimizer, 14)
        plan = plan_steps(
            session.train.lengths, session.recipe.train, session.task_model.longest_packed
        )
        memory_passing(session, optimizer, [1])  # the first step tries out what the model's head is
        once = memory_passing(session, optimizer, plan.largest(1))
        again = memory_passing(session, optimizer, plan.largest(1) * 2)
        assert again == once, "what one step kept is counted for the next"
        sizes.append(once)
    assert sizes[0]["activations"] < sizes[1]["activations"]
    assert sizes[0]["logits"] < sizes[1]["logits"]


def test_only_storages_that_live_count_and_each_once() -> None:
    fixed = torch.zeros(100)
    live = LiveStorages({fixed.untyped_storage().data_ptr()})
    first = torch.zeros(10)
    for tensor in (fixed, fixed[:5], first, first[2:], first.view(2, 5)):
        live.add(tensor)
    assert live.most == 40
    live.add(second := torch.zeros(20))
    assert live.most == 120
    del first, second, tensor
    live.add(torch.zeros(25))
    assert live.most == 120


def test_activations_and_logits_of_a_known_graph() -> None:
    x = torch.randn(6, 4, requires_grad=True)
    weight = torch.randn(4, 9)
    activations, logits = (LiveStorages({weight.untyped_storage().data_ptr()}) for _ in range(2))
    with watching(activations, logits, width=9):
        (torch.exp(x) @ weight).logsumexp(1).sum().backward()  # type: ignore[no-untyped-call]
    assert activations.most == 6 * 4 * 4 + 6 * 4  # what exp gave, and what logsumexp gave
    assert logits.most >= 2 * 6 * 9 * 4  # the logits and their gradient


# -- the plan and the time -------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [0, 20, math.inf])
@pytest.mark.parametrize("more", [{}, {"max_tokens_per_micro_batch": 90, "group_by_length": True}])
@pytest.mark.parametrize(
    ("rows", "batch", "steps"), [(10, 4, None), (10, 4, 7), (3, 8, 2), (64, 8, 1), (99, 4, 20)]
)
def test_the_plan_holds_the_steps_of_the_loop(
    rows: int, batch: int, steps: int | None, more: dict[str, Any], packed: float
) -> None:
    spec = TrainSpec.model_validate(
        {
            "num_train_epochs": 1.5,
            "max_steps": steps,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": 2,
            "seed": 3,
        }
        | more
    )
    lengths = np.random.default_rng(0).integers(1, 50, rows)
    plan = plan_steps(lengths, spec, packed)
    order = StepOrder(rows, 2 * batch, 3, lengths if more else None)
    numbers = [order.of_step(step) for step in range(1, len(plan.tokens) + 1)]
    parts = [lengths[of_step] for of_step in numbers]
    assert plan.tokens.tolist() == [part.sum() for part in parts]
    assert plan.longest.tolist() == [part.max() for part in parts]
    limit = more.get("max_tokens_per_micro_batch")
    batches = [
        [lengths[rows] for rows in micro_batches(lengths, of_step, batch, limit, packed)]
        for of_step in numbers
    ]
    assert plan.positions.tolist() == [
        sum(len(part) * part.max() for part in step) for step in batches
    ]
    assert plan.at_once.tolist() == [
        max(batch_tokens(part, packed) for part in step) for step in batches
    ]


def test_the_largest_steps_are_those_of_the_largest_micro_batch_and_of_the_longest_rows() -> None:
    tokens, longest = np.array([90, 70, 90, 80, 60]), np.array([10, 30, 10, 20, 30])
    plan = StepPlan(1000 - tokens, 1000 - tokens, longest, tokens)
    assert plan.largest(1) == [1, 2]
    assert plan.largest(2) == [1, 4, 2]
    assert plan.largest(9) == [1, 4, 5, 2]


@pytest.mark.parametrize(
    ("eval_steps", "on_start", "steps", "count"),
    [(None, False, 10, 1), (5, False, 10, 2), (4, False, 10, 3), (20, True, 10, 2)],
)
def test_evaluations_are_those_of_the_run(
    eval_steps: int | None, on_start: bool, steps: int, count: int
) -> None:
    spec = TrainSpec.model_validate({"eval_steps": eval_steps, "eval_on_start": on_start})
    assert count_evaluations(spec, steps) == count


def fitted(sizes: list[int], seconds: list[float]) -> tuple[float, float]:
    """(seconds of a step, seconds of a token) for steps of these tokens, none of them padded."""
    found = fit_step_time(StepPlan(*np.array([sizes] * 4)), 0, seconds)
    assert found.measure == "tokens"
    return found.overhead, found.each


def test_a_step_is_overhead_and_tokens() -> None:
    sizes = [100, 200, 400, 150]
    assert fitted(sizes, [0.5 + 0.01 * count for count in sizes]) == pytest.approx((0.5, 0.01))
    # Nothing takes less time for more tokens, nor less than none for no tokens.
    assert fitted([100, 200], [2.0, 1.0]) == pytest.approx((1.5, 0.0))
    assert fitted([100, 200], [1.0, 4.0]) == pytest.approx((0.0, 5.0 / 300))
    assert fitted([100, 100], [1.0, 3.0]) == pytest.approx((0.0, 0.02))
    assert fitted([100], [1.0]) == pytest.approx((0.0, 0.01))


def test_the_measure_is_what_the_seconds_follow() -> None:
    tokens, positions = np.array([7, 100, 200, 300]), np.array([7, 400, 250, 900])
    plan = StepPlan(tokens, positions, tokens, tokens)
    for measure, sizes in (("tokens", tokens), ("positions", positions)):
        found = fit_step_time(plan, 1, list(0.01 * sizes[1:]))
        assert found.measure == measure
        assert [found.each, found.relative_error] == pytest.approx([0.01, 0.0])
    apart = fit_step_time(StepPlan(*np.array([[100, 100]] * 4)), 0, [1.0, 3.0])
    assert apart.relative_error == pytest.approx(0.5)
    assert math.isnan(fit_step_time(plan, 0, [1.0]).relative_error)


def test_all_rows_picked_are_the_examples_themselves(recipes: dict[str, Path]) -> None:
    for task in TASKS:
        examples = session_of(recipes[task]).validation
        assert examples.select(np.arange(len(examples))).digest() == examples.digest()
        some = examples.select(np.array([3, 1]))
        assert some.tokens.tolist() == [
            *examples.tokens[slice(*examples.offsets[3:5])],
            *examples.tokens[slice(*examples.offsets[1:3])],
        ]
