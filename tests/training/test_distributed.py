"""Runs of two processes: the same as one process, whatever happens to either."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from lorakit.methods import method_names
from lorakit.recipes.recipe import dump_yaml, load_recipe, recipe_of
from lorakit.report.progress import Progress
from lorakit.runs.train import run_training
from tests.support.contract import COMBINED
from tests.support.processes import WEIGHTS, Done, Process, checkpoints, end, start, wait_for

REPOSITORY = Path(__file__).parents[2]
OWN: dict[str, dict[str, Any]] = {
    "adalora": {"target_r": 2},
    "chunkwise": {"ladder": [2, 4]},
    "chunkwise+base": {"ladder": [2, 4]},
    "l1ra": {"rank_update_ratio": 0.1, "eta_c": 0.1, "l1_share": 0.8},
    "l1ra+salor": {"rank_update_ratio": 0.1, "eta_c": 0.1, "l1_share": 0.8},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, OWN.get(name, {})) for name in method_names()},
    **{name: (method, keys | OWN.get(name, {})) for name, (method, keys) in COMBINED.items()},
    "nested": ("chunkwise", {"training": "nested", "ladder": [1, 2, 4]}),
    "packed": ("vanilla", {}),
    "classes": ("vanilla", {}),
    "a step without rows for all": ("vanilla", {}),
}


def recipe(name: str, base: Path, data: Path, out: Path, **train: Any) -> str:
    method, keys = CASES[name]
    spec: dict[str, Any] = {"name_or_path": str(data)}
    task = "sequence-classification" if name == "classes" else "causal-lm"
    if name == "packed":
        spec |= {"packing": "documents", "format": "text", "text_columns": ["question"]}
    settings: dict[str, Any] = {
        "precision": "fp32",
        "max_steps": 20,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
    }
    if name.startswith("a step"):
        spec["max_train_samples"] = 5
        settings |= {"per_device_train_batch_size": 1, "max_tokens_per_micro_batch": 64}
    whole = {
        "model": {"name_or_path": str(base), "task": task},
        "data": spec,
        "method": {"name": method, "r": 4, "lora_alpha": 8} | keys,
        "train": settings | train,
        "distributed": {"timeout_seconds": 20},
        "output_dir": str(out),
    }
    return dump_yaml(recipe_of(whole))


def lines(run: Path, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / file).read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Path,
    tiny_bert: Path,
    sums: Path,
    sentiment: Path,
) -> Path:
    """A folder with the runs of all cases, by two processes and by one with the same rows a
    step."""
    folder = tmp_path_factory.mktemp("pairs")
    tiny_bert = shutil.copytree(tiny_bert, folder / "without dropout")
    config = json.loads((tiny_bert / "config.json").read_text("utf-8"))
    config |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    (tiny_bert / "config.json").write_text(json.dumps(config), "utf-8")
    for name in CASES:
        base, data = (tiny_bert, sentiment) if name == "classes" else (tiny_llama, sums)
        text = recipe(name, base, data, folder / "two" / name)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    pair = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.pair", str(folder)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for name in CASES:
        base, data = (tiny_bert, sentiment) if name == "classes" else (tiny_llama, sums)
        more = {"gradient_accumulation_steps": 2}
        text = recipe(name, base, data, folder / "one" / name, **more)
        file = folder / "one.yml"
        file.write_text(text, encoding="utf-8")
        run_training(load_recipe(file), Progress(Console(stderr=True)))
    for process in pair:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said[-3000:]
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(runs: Path, name: str) -> None:
    two, one = (lines(runs / count / name) for count in ("two", "one"))
    assert len(two) == len(one)
    for a, b in zip(two, one, strict=True):
        assert a.keys() == b.keys()
        assert a.get("tokens") == b.get("tokens")
        for key in ("loss", "eval_loss", "eval_accuracy", "density", "rank_total"):
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=1e-6), (key, a["step"])
    assert lines(runs / "two" / name, "ranks.jsonl") == lines(runs / "one" / name, "ranks.jsonl")
    result = json.loads((runs / "two" / name / "result.json").read_text("utf-8"))
    assert result["processes"] == 2
    assert result["ranks"] == json.loads((runs / "one" / name / "result.json").read_text())["ranks"]


def test_ranks_moved_somewhere(runs: Path) -> None:
    assert len(lines(runs / "two/l1ra", "ranks.jsonl")) > 1


# -- the command -----------------------------------------------------------------------------------


def workers(process: Process) -> list[int]:
    """Process ids of what a launcher has started, by rank."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
            environment = (status.parent / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"\nPPid:\t{process.pid}\n" in text:
            for entry in environment:
                if entry.startswith(b"RANK="):
                    found[int(entry[5:])] = int(status.parent.name)
    return [found[rank] for rank in sorted(found)]


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, sums: Path
) -> tuple[Path, Path]:
    """(recipe.yaml, the run of two processes that nothing happened to)."""
    folder = tmp_path_factory.mktemp("whole")
    text = recipe("l1ra", tiny_llama, sums, folder / "run", save_steps=5)
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    done = end(start(folder, "train", "recipe.yaml", "--nproc", "2"))
    assert done.code == 0, done.err
    assert "saved" in done.err
    assert (folder / "run/logs/attempt-0-process-1-stderr.log").is_file()
    return folder / "recipe.yaml", folder / "run"


@pytest.mark.parametrize(("first", "then"), [("2", "1"), ("1", "2")])
def test_other_processes_go_on_where_some_stopped(
    whole: tuple[Path, Path], tmp_path: Path, first: str, then: str
) -> None:
    # one process with as many rows a step as two
    rows = f"train.gradient_accumulation_steps={3 - int(first)}"
    command = ("train", whole[0], "output_dir=run", rows)
    process = start(tmp_path, *command, "--nproc", first)
    step = tmp_path / "run/checkpoints/step-00000005"
    wait_for(process, "a checkpoint", step.is_dir)
    for pid in workers(process):  # a cluster signals them too, and the launcher passes its own on
        os.kill(pid, signal.SIGINT)
    process.send_signal(signal.SIGINT)
    done = end(process)
    assert done.code == 130, done.err
    assert "Traceback" not in done.err
    assert checkpoints(tmp_path / "run")
    done = end(start(tmp_path, *command, "--nproc", then, "--resume", "auto"))
    assert done.code == 0, done.err
    losses, expected = (
        [line["loss"] for line in lines(run) if "loss" in line]
        for run in (tmp_path / "run", whole[1])
    )
    assert losses == pytest.approx(expected, rel=2e-5)
    assert lines(tmp_path / "run", "ranks.jsonl") == lines(whole[1], "ranks.jsonl")


def killed(process: Process, run: Path, rank: int) -> Done:
    """The end of a run of two processes one of which is killed after its first checkpoint."""
    wait_for(process, "a checkpoint", (run / "checkpoints/step-00000005").is_dir)
    os.kill(workers(process)[rank], signal.SIGKILL)
    done = end(process)
    assert "Traceback" not in done.err
    return done


def test_a_killed_process_ends_the_run(whole: tuple[Path, Path], tmp_path: Path) -> None:
    process = start(tmp_path, "train", whole[0], "--nproc", "2", "output_dir=run")
    done = killed(process, tmp_path / "run", 1)
    assert done.code == 1, done.err
    assert "process 1 of the run ended by SIGKILL" in done.err
    assert not (tmp_path / "run/result.json").exists()


def test_a_killed_process_is_started_anew(whole: tuple[Path, Path], tmp_path: Path) -> None:
    more = ("--restarts", "1", "output_dir=run")
    process = start(tmp_path, "train", whole[0], "--nproc", "2", *more)
    done = killed(process, tmp_path / "run", 0)
    assert done.code == 0, done.err
    expected, again = (load_file(run / WEIGHTS) for run in (whole[1], tmp_path / "run"))
    assert expected.keys() == again.keys()
    assert all(torch.equal(expected[name], again[name]) for name in expected)


def test_what_is_wrong_is_said_once(whole: tuple[Path, Path], tmp_path: Path) -> None:
    for wrong in ("train.max_step=3", "data.name_or_path=./none"):
        done = end(start(tmp_path, "train", whole[0], "--nproc", "2", "output_dir=run", wrong))
        assert done.code == 2, done.err
        assert done.err.count("error:") == 1, done.err
        assert not (tmp_path / "run").exists()
