"""lorakit from Python: the programs of docs/python.md, errors, interrupts, threads; and what is
left as it was."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lorakit
from lorakit.recipes.recipe import load_recipe

PAGE = Path(lorakit.__file__).parent.parent / "docs/python.md"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def place(tmp_path: Path, tiny_llama: Path, sums: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a model and data of the names that the page has."""
    (tmp_path / "model").symlink_to(tiny_llama)
    (tmp_path / "data").symlink_to(sums)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(**train: Any) -> dict[str, Any]:
    columns = {"prompt": "{question}", "completion": " {answer}"}
    return {
        "model": {"name_or_path": Path("./model"), "task": "causal-lm"},
        "data": {"name_or_path": "./data", **columns},
        "method": {"name": "vanilla", "r": 2},
        "train": {"max_steps": 4, "precision": "fp32", **train},
        "output_dir": "runs/a",
    }


def test_the_pages_programs_run_as_they_are_written(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    for program in programs:
        exec(program, names)
    assert {rank: set(run.ranks.values()) for rank, run in names["runs"].items()} == {
        2: {2},
        4: {4},
    }
    assert names["best"] in names["runs"].values()
    assert len(names["texts"]) == 2
    assert names["logits"].shape[:2] == names["ids"].shape
    assert names["losses"]
    run, (metrics, _text, evaluated) = names["run"], capsys.readouterr().out.splitlines()
    assert metrics.startswith("{'loss'")
    assert evaluated.startswith("{'loss'")
    assert run.result["steps"] == 6
    assert set(run.ranks.values()) == {4}
    assert names["folder"] == Path("runs/python/adapter-peft")
    assert (place / "runs/python/adapter-peft/adapter_model.safetensors").is_file()
    assert (
        str(run) == f"<lorakit run runs/python: loss {run.metrics['loss']:.4g}, perplexity"
        f" {run.metrics['perplexity']:.4g}>"
    )


def test_nothing_is_printed_and_all_is_logged(
    place: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = (
        [signal.getsignal(number) for number in SIGNALS],
        logging.getLogger("lorakit").handlers[:],
        dict(os.environ),
    )
    with caplog.at_level(logging.INFO, "lorakit"):
        run = lorakit.train(recipe(logging_steps=1), "train.max_steps=2")
        folder = run.export()
    assert (
        [signal.getsignal(n) for n in SIGNALS],
        logging.getLogger("lorakit").handlers,
        dict(os.environ),
    ) == before
    assert capsys.readouterr() == ("", "")
    steps = [record.message for record in caplog.records if record.message.startswith("step ")]
    assert [step.partition(" · ")[0] for step in steps[:1]] == ["step 1/2"]
    assert f"merged model written to {folder}" in caplog.messages
    assert {record.name for record in caplog.records if record.name.startswith("lorakit")} == {
        "lorakit"
    }


def test_it_gives_what_the_command_line_gives(place: Path, call: Callable[..., str]) -> None:
    first = lorakit.train(recipe())
    loaded = load_recipe("runs/a/recipe.yaml")
    call("train", "runs/a/recipe.yaml", "output_dir=runs/b")
    second = lorakit.load_run("runs/b")
    assert first.metrics == second.metrics
    prompts = ["how many hens", "how many eggs are there"]
    texts = second.generate(prompts, max_new_tokens=5)
    assert texts == [second.generate(prompt, max_new_tokens=5) for prompt in prompts]
    assert (
        call("generate", "runs/b", "--prompt", prompts[0], "--max-new-tokens", "5").rstrip("\n")
        == texts[0]
    )
    # it is finished: nothing to do
    assert lorakit.train(loaded, resume="auto").metrics == first.metrics
    merged = AutoModelForCausalLM.from_pretrained(second.export("merged"))
    ids = second.tokenizer("how many hens", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, second.model(input_ids=ids).logits, atol=1e-4)


def test_errors_are_the_blocks_of_the_command_line(place: Path) -> None:
    wrong = recipe() | {"method": {"name": "vanilla", "rank": 2}}
    with pytest.raises(lorakit.LorakitError) as caught:
        lorakit.train(wrong, "train.max_stepz=2")
    lines = str(caught.value).splitlines()
    assert "the recipe, method.rank: unknown key `rank` in method" in lines
    assert "  did you mean `r`?" in lines
    assert any("max_stepz" in line for line in lines)
    for refused in (
        lambda: lorakit.load_run("runs/none"),
        lambda: lorakit.train(load_recipe_of(place), "train.seed=1"),
    ):
        with pytest.raises(lorakit.LorakitError):
            refused()
    assert sorted(path.name for path in place.iterdir()) == ["data", "model", "r.yaml"]


def load_recipe_of(place: Path) -> Any:
    lines = (
        "model: {name_or_path: ./model, task: causal-lm}",
        "data: {name_or_path: ./data}",
        "method: {name: vanilla}",
    )
    (place / "r.yaml").write_text("\n".join(lines))
    return load_recipe(place / "r.yaml")


class _Signals(logging.Handler):
    """Sends SIGINT to this process when the first step is logged."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("step 1/"):
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_leaves_a_checkpoint_and_raises_keyboard_interrupt(place: Path) -> None:
    log, sender, before = logging.getLogger("lorakit"), _Signals(), signal.getsignal(signal.SIGINT)
    level = log.level
    log.addHandler(sender)
    log.setLevel(logging.INFO)
    try:
        with pytest.raises(
            KeyboardInterrupt, match=r"stopped after step \d of 4; saved runs/a/checkpoints/step-"
        ):
            lorakit.train(recipe(logging_steps=1))
    finally:
        log.removeHandler(sender)
        log.setLevel(level)
    assert signal.getsignal(signal.SIGINT) == before
    assert len(list((place / "runs/a/checkpoints").glob("step-*"))) == 1
    cut = lorakit.load_run("runs/a")
    assert 1 <= cut.result["steps"] < cut.result["total_steps"] == 4
    assert cut.evaluate().keys() >= {"loss"}
    assert lorakit.train(recipe(logging_steps=1), resume="auto").result["steps"] == 4


def test_in_another_thread_no_signal_is_taken(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: taken.append(number))
    runs: list[lorakit.Run] = []
    thread = threading.Thread(target=lambda: runs.append(lorakit.train(recipe())))
    thread.start()
    thread.join()
    assert runs[0].result["steps"] == 4
    assert taken == []
