"""Evaluation by generation: which prompts are asked, how they are tokenised, what is compared and
written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorakit.cli import main
from lorakit.data.formats import Question
from lorakit.errors import UsageError
from lorakit.inference.generator import GenerationSettings
from lorakit.report.progress import Progress
from lorakit.runs.answer import Answer, answer
from lorakit.training.answer_metrics import exact_match, f1
from tests.support.tiny import write_jsonl

Call = Callable[..., str]
PROGRESS = Progress(Console(stderr=True))
RECIPE = """\
model: {{name_or_path: {model}, task: causal-lm}}
data: {{name_or_path: {data}, prompt: "{{question}}", completion: "{{answer}}"}}
method: {{name: vanilla, r: 8, lora_alpha: 16}}
train:
  {{num_train_epochs: 12, per_device_train_batch_size: 8, learning_rate: 2e-2, precision: fp32}}
output_dir: {run}
"""


@dataclass
class Reply:
    tokens: list[int]
    text: str


class Echo:
    """Stands in for the generator: answers with the first tokens of the prompt, and keeps what it
    was asked."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.asked: list[list[int]] = []

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings,
        progress: Callable[[int, int], None],
    ) -> list[Reply]:
        self.asked += map(list, prompts)
        progress(len(prompts), len(prompts))
        replies = [list(prompt[: settings.max_new_tokens]) for prompt in prompts]
        return [Reply(tokens, self.tokenizer.decode(tokens)) for tokens in replies]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A finished run of an adapter that has learned one answer, so that it answers something at
    all."""
    folder = tmp_path_factory.mktemp("answers")
    rows = [
        {"question": f"how many {word} ?", "answer": "there are 3 hens"}
        for word in ("hens", "eggs", "boxes")
    ]
    for split, chosen in (
        ("train", rows * 4),
        ("validation", [*rows, {"question": "how many eggs ?", "answer": "3"}]),
    ):
        write_jsonl(folder / f"{split}.jsonl", chosen)
    path = folder / "recipe.yaml"
    path.write_text(
        RECIPE.format(model=tiny_llama, data=folder, run=folder / "run"), encoding="utf-8"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lorakit", "train", str(path)])
        with pytest.raises(SystemExit) as exit_:
            main()
    assert not exit_.value.code
    return folder / "run"


def test_prompts_that_leave_no_room_are_left_out_and_cut_answers_are_told(
    tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    asked = [
        Question("how many hens ?", ["3"]),
        Question("how " * 7, ["4"]),
        Question("eggs", ["eggs"]),
    ]
    echo = Echo(tokenizer)
    settings = GenerationSettings(max_new_tokens=2)
    found = answer(echo, tokenizer, asked, settings, 8, None, PROGRESS)  # type: ignore[arg-type]
    assert found == [Answer(asked[0], "how many", 2), Answer(asked[2], "eggs", 1)]
    assert echo.asked == [tokenizer("how many hens ?")["input_ids"], tokenizer("eggs")["input_ids"]]
    assert "1 of 3 prompts leave no room for 2 new tokens within the 8" in caplog.text
    assert "1 of 2 answers were cut at 2 new tokens" in caplog.text
    assert len(answer(echo, tokenizer, asked, settings, None, None, PROGRESS)) == 3  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no prompt leaves room for 2 new tokens"):
        answer(echo, tokenizer, asked, settings, 2, None, PROGRESS)  # type: ignore[arg-type]


def test_a_run_answers_as_its_merged_model_does_in_transformers(
    run: Path, call: Call, tmp_path: Path
) -> None:
    file = tmp_path / "answers.jsonl"
    arguments = [
        "eval",
        run,
        "--generate",
        "--max-new-tokens",
        6,
        "--batch-size",
        2,
        "--answers",
        file,
    ]
    found = json.loads(call(*arguments, "--json"))
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    # Four rows, but three prompts: one has two accepted answers.
    assert (found["rows"], found["prompts"], found["answers"]) == (4, 3, str(file))
    assert [line["prompt"] for line in lines] == [
        "how many hens ?",
        "how many eggs ?",
        "how many boxes ?",
    ]
    assert [line["references"] for line in lines] == [
        ["there are 3 hens"],
        ["there are 3 hens", "3"],
        ["there are 3 hens"],
    ]

    call("export", run, "--merge", "--out", tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    lengths = []
    for line in lines:
        prompt = tokenizer(line["prompt"], return_tensors="pt")
        prompt.pop("token_type_ids", None)
        with torch.inference_mode():
            new = model.generate(
                **prompt, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.eos_token_id
            )
        new = [
            token
            for token in new[0, prompt["input_ids"].shape[1] :].tolist()
            if token != tokenizer.eos_token_id
        ]
        assert line["answer"] == tokenizer.decode(new, skip_special_tokens=True)
        lengths.append(len(new))
    texts, references = [line["answer"] for line in lines], [line["references"] for line in lines]
    assert found["metrics"] == {
        "exact_match": exact_match(texts, references),
        "f1": f1(texts, references),
        "mean_answer_tokens": pytest.approx(sum(lengths) / 3),
    }
    assert found["metrics"]["f1"] > 0.5, "it has learned the answer"


def test_metrics_data_and_references_are_chosen_on_the_command_line(
    run: Path, call: Call, tmp_path: Path
) -> None:
    rows = [
        {"question": "how many eggs ?", "answer": "x", "right": {"text": ["9", "there are 3 hens"]}}
    ] * 3
    write_jsonl(tmp_path / "test.jsonl", rows)
    data = [
        f"data.name_or_path={tmp_path / 'test.jsonl'}",
        "data.references=right[text]",
        "data.max_eval_samples=2",
    ]
    arguments = [
        "--generate",
        "--metric",
        "f1",
        "--max-new-tokens",
        5,
        "--answers",
        tmp_path / "answers.jsonl",
        *data,
    ]
    found = json.loads(call("eval", run, *arguments, "--json"))
    (line,) = [
        json.loads(line)
        for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert line["references"] == ["9", "there are 3 hens"]
    assert (found["rows"], found["prompts"], found["data"]["name"]) == (
        2,
        1,
        str(tmp_path / "test.jsonl"),
    )
    assert list(found["metrics"]) == ["f1", "mean_answer_tokens"]
    assert found["metrics"]["f1"] == f1([line["answer"]], [["there are 3 hens"]]) > 0.5
    table = call("eval", run, *arguments)
    assert f"{found['metrics']['f1']:.4f}" in table
    assert "mean_answer_tokens" in table


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--metric", "f1"], ["`--metric` is for answers", "--generate"]),
        (["--answers", "x.jsonl"], ["`--answers` is for answers"]),
        (["--generate", "--metric", "exact"], ["no metric `exact`", "exact_match, f1, bleu"]),
        (["--generate", "--metric", "blue"], ["Did you mean `bleu`?"]),
        (["--generate", "--answers", "none/x.jsonl"], ["the folder `none` is not there"]),
        (["--generate", "--max-new-tokens", "0"], ["--max-new-tokens"]),
        (["--generate", "method.r=2"], ["`method.r=2` can not be set"]),
        (
            [
                "--generate",
                "data.format=text",
                "data.text_columns=question",
                "data.prompt=null",
                "data.completion=null",
            ],
            ["the data of the run is text", "--generate"],
        ),
        (
            ["--generate", "data.prompt='{question[0]}'"],
            ["row 1 (", "validation.jsonl:1) has a string in `question`"],
        ),
        (["--generate", "data.references=answers"], ["no column `answers`", "`answer`"]),
    ],
)
def test_wrong_use_is_told_before_the_model_is_loaded(
    run: Path,
    arguments: list[str],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        "lorakit.runs.answer.saved_model", lambda *_: pytest.fail("the model was loaded")
    )
    monkeypatch.setattr(sys, "argv", ["lorakit", "eval", str(run), *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    error = capfd.readouterr().err
    assert exit_.value.code == 2, error
    for word in words:
        assert word in error
