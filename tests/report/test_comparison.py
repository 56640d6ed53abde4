"""Finished runs side by side: groups, means, paired differences, and what is not compared."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorakit.errors import UsageError
from lorakit.report.comparison import as_json, group_name, mean_of
from lorakit.report.comparison_figure import plot_comparison
from lorakit.report.comparison_tables import comparison_tables
from lorakit.runs.compare import compare
from tests.support.records import rendered

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A function that writes a finished run: name, accuracy, seed, and what else differs."""

    def write(
        name: str,
        accuracy: float | None,
        seed: int = 0,
        validation: str = "v",
        machine: str = "one",
        method: dict[str, Any] | None = None,
        **result: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        chosen = {"name": "vanilla", "r": 8} | (method or {})
        recipe = {
            "model": {"task": "sequence-classification"},
            "method": chosen,
            "train": {"seed": seed, "logging_steps": seed + 1},
            "output_dir": str(folder),
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        loss = None if accuracy is None else 1 - accuracy
        content = {
            "method": chosen["name"],
            "task": "sequence-classification",
            "metrics": {"accuracy": accuracy, "loss": loss},
            "train_seconds": 10.0 + seed,
            "tokens_per_second": 1000.0,
            "peak_memory_mb": 500.0,
            "trainable_parameters": 1000,
            "adapter_bytes": 4000,
            "rank_total": 16,
            "steps": 20,
            "seed": seed,
            "precision": "fp32",
        }
        (folder / "result.json").write_text(json.dumps(content | result))
        data = {"train_sha256": "t", "validation_sha256": validation}
        manifest = {"data": data, "machine": {"processor": machine}, "model": {"sha256": "m"}}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        lines = [{"step": step, "loss": 1 / step} for step in range(1, 21)]
        lines += [{"step": step, "eval_loss": 1 / step} for step in (10, 20)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return write


def text(folders: list[Path], **options: Any) -> str:
    return rendered(comparison_tables(compare(folders, **options)), 120)


def test_the_mean_and_its_standard_error() -> None:
    assert mean_of([]) is None
    assert mean_of([1.0, None]) is None
    assert mean_of([1.0, math.nan]) is None
    one, three = mean_of([2.0]), mean_of([1.0, 2.0, 6.0])
    assert one is not None
    assert (one.mean, one.error) == (2.0, None)
    assert three is not None
    assert three.mean == pytest.approx(3.0)
    assert three.error == pytest.approx(math.sqrt(7 / 3))  # variance (4 + 1 + 9) / 2, over 3


def test_runs_of_other_seeds_are_one_row_with_paired_differences(make: Make) -> None:
    ours = [make(f"a_{seed}", 0.7 + 0.1 * seed, seed) for seed in range(2)]
    theirs = [make(f"b_{seed}", 0.8 + 0.15 * seed, seed, method={"r": 4}) for seed in range(2)]
    found = as_json(compare([*ours, *theirs]))
    a, b = found["groups"]
    assert (a["group"], a["seeds"], a["differences"]) == ("a_{0,1}", [0, 1], {})
    assert a["means"]["accuracy"] == {
        "mean": pytest.approx(0.75),
        "standard_error": pytest.approx(0.05),
        "seeds": 2,
    }
    # differences 0.1 and 0.15
    assert b["differences"]["accuracy"] == {
        "mean": pytest.approx(0.125),
        "standard_error": pytest.approx(0.025),
        "seeds": 2,
    }
    assert b["differences"]["loss"]["mean"] == pytest.approx(-0.125)
    assert found["best"] == {"accuracy": ["b_{0,1}"], "loss": ["b_{0,1}"]}
    assert found["recipes"] == {
        "method.r": [{"value": 8, "groups": ["a_{0,1}"]}, {"value": 4, "groups": ["b_{0,1}"]}]
    }
    shown = text([*ours, *theirs])
    assert "accuracy ↑" in shown
    assert "loss ↓" in shown
    assert "0.8750 ± 0.0750*" in shown  # marked without colour
    assert "+0.1250 ± 0.0250" in shown
    assert "method.r: 8 (a_{0,1}) · 4 (b_{0,1})" in shown


def test_the_baseline_is_the_first_or_the_one_that_is_named(make: Make) -> None:
    a, b = make("a", 0.7), make("b", 0.8, method={"r": 4})
    assert as_json(compare([a, b]))["baseline"] == "a"
    named = as_json(compare([a, b], baseline=b))
    assert named["baseline"] == "b"
    assert named["groups"][0]["differences"]["accuracy"]["mean"] == pytest.approx(-0.1)
    c = make("c", 0.9, method={"r": 2})
    assert [run["run"] for run in as_json(compare([a, b], baseline=c))["runs"]] == ["c", "a", "b"]


def test_other_seeds_give_no_difference(make: Make) -> None:
    found = as_json(compare([make("a", 0.7, 0), make("b", 0.8, 1, method={"r": 4})]))
    assert [group["differences"] for group in found["groups"]] == [{}, {}]


def test_runs_of_one_seed_count_once(make: Make) -> None:
    runs = [make("a", 0.7, 0), make("a_again", 0.9, 0), make("a_1", 0.6, 1)]
    comparison = compare([*runs, make("b", 0.5, method={"r": 4})])
    mean = comparison.groups[0].mean("accuracy")
    assert mean is not None
    assert (mean.mean, mean.count) == (pytest.approx(0.7), 2)
    assert "2 (3 runs)" in rendered(comparison_tables(comparison), 120)


def test_keys_that_one_method_alone_has_are_listed_unless_they_are_its_defaults(make: Make) -> None:
    l1ra = {"name": "l1ra", "l1_share": 0.9, "reassign": True}
    found = as_json(compare([make("a", 0.7), make("b", 0.8, method=l1ra)]))["recipes"]
    assert list(found) == ["method.name", "method.l1_share"]


def test_other_rows_and_other_tasks_have_no_best_and_no_difference(make: Make) -> None:
    a, b = make("a", 0.7), make("b", 0.8, validation="other", method={"r": 4})
    found = as_json(compare([a, b]))
    assert found["comparable"] == {"quality": False, "time": True}
    assert "accuracy" not in found["best"]
    assert found["groups"][1]["differences"] == {}
    assert "evaluated on different rows" in text([a, b])
    c = make("c", 0.8, task="causal-lm", metrics={"loss": 2.0, "perplexity": 7.4})
    found = as_json(compare([a, c]))
    assert set(found["groups"][0]["means"]) & {"accuracy", "loss", "perplexity"} == {"loss"}
    assert "different tasks (sequence-classification, causal-lm)" in text([a, c])


def test_times_of_other_machines_have_no_best(make: Make) -> None:
    a = make("a", 0.7, train_seconds=1.0)
    b = make("b", 0.8, machine="two", method={"r": 4})
    found = as_json(compare([a, b]))
    assert "train_seconds" not in found["best"]
    assert found["comparable"] == {"quality": True, "time": False}
    assert "different machines" in text([a, b])


def test_a_run_that_was_only_converted_is_not_the_fastest(make: Make) -> None:
    trained = [make("a", 0.7), make("c", 0.7, method={"r": 2}, train_seconds=20.0)]
    converted = make("b", 0.8, method={"r": 4}, train_seconds=0.0, tokens_per_second=0.0)
    found = as_json(compare([*trained, converted]))
    assert found["best"]["train_seconds"] == ["a"]
    assert "train_seconds" not in found["groups"][2]["means"]


def test_an_undefined_metric_is_said_to_be_so(make: Make) -> None:
    shown = text([make("a", None), make("b", 0.8, method={"r": 4})])
    assert "undefined" in shown
    assert "0.8000 " in shown


def test_folders_without_a_finished_run_are_one_error(make: Make, tmp_path: Path) -> None:
    a, b = make("a", 0.7), make("b", 0.8)
    (b / "result.json").unlink()
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UsageError) as caught:
        compare([a, b, tmp_path / "notes.txt", tmp_path / "nowhere"])
    message = str(caught.value)
    assert "are no finished runs" in message
    assert all(f"`{tmp_path / name}`" in message for name in ("b", "notes.txt", "nowhere"))
    assert "--resume auto" in message
    with pytest.raises(UsageError, match="alone is nothing to compare"):
        compare([a, a])
    (a / "result.json").write_text("[]")
    with pytest.raises(UsageError, match=r"result\.json: not an object"):
        compare([a, make("c", 0.5)])


def test_names_of_groups() -> None:
    assert group_name(["runs/a"]) == "runs/a"
    assert group_name(["a_0", "a_1", "a_2"]) == "a_{0,1,2}"
    assert group_name(["s0/a", "s1/a"]) == "s{0,1}/a"
    assert group_name([f"a{i}" for i in range(9)]) == "a{0,…,8}"
    assert group_name(["x", "y"]) == "{x,y}"


@pytest.mark.parametrize("suffix", ["png", "html"])
def test_plots_of_a_few_and_of_many_runs(make: Make, tmp_path: Path, suffix: str) -> None:
    few = [make(f"<b>_{seed}", 0.7 + seed / 10, seed) for seed in range(2)]
    few.append(make("other", 0.6, method={"r": 4}))
    many = [make(f"{r}_{seed}", 0.5, seed, method={"r": r}) for r in (1, 2) for seed in range(8)]
    for name, runs in (("few", few), ("many", many)):
        file = tmp_path / f"{name}.{suffix}"
        plot_comparison(compare(runs), file)
        content = file.read_bytes()
        assert content.startswith(b"\x89PNG" if suffix == "png" else b"<!doctype html>")
        assert b"<b>" not in content
    with pytest.raises(UsageError, match=r"\.png or \.html"):
        plot_comparison(compare(few), tmp_path / "x.pdf")


def test_the_command(make: Make, call: Callable[..., str], tmp_path: Path) -> None:
    a, b = make("a", 0.7), make("b", 0.8, method={"r": 4})
    assert "b" in call("compare", a, b)
    found = json.loads(call("compare", a, b, "--json", "--baseline", b))
    assert found["baseline"] == "b"
    assert "best of its column" in call("compare", a, b, "--plot", tmp_path / "p.png")
    assert (tmp_path / "p.png").is_file()
