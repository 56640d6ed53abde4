"""A run trained on conversations, from its recipe to a conversation with it: real processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import lorakit
from tests.support.chats import MARKED, PLAIN, chat_tokenizer
from tests.support.processes import end, start
from tests.support.tiny import write_jsonl

ASK = {"role": "user", "content": "how many hens?"}
SAY = {"role": "assistant", "content": "17 hens."}
ROWS = [{"messages": [ASK, SAY]}] * 12
RECIPE = """\
model: {{name_or_path: {folder}/base, task: causal-lm}}
data: {{name_or_path: {folder}/rows.jsonl, validation_split: 0.25{more}}}
method: {{name: vanilla, r: 64, lora_alpha: 64}}
train: {{max_steps: 100, per_device_train_batch_size: 4, learning_rate: 5e-3, precision: fp32}}
output_dir: {folder}/run
"""


def make_base(folder: Path, template: str | None) -> None:
    tokenizer = chat_tokenizer(template)
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=2, eos_token_id=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learnt its one conversation by heart; its base has no chat template."""
    folder = tmp_path_factory.mktemp("chat")
    make_base(folder / "base", None)
    write_jsonl(folder / "rows.jsonl", ROWS)  # type: ignore[arg-type]
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=folder, more=", chat_template: chatml"))
    lorakit.train(str(recipe))
    return folder / "run"


def test_the_template_of_the_recipe_goes_with_the_adapter(
    trained: Path, call: Callable[..., str]
) -> None:
    text = AutoTokenizer.from_pretrained(trained / "adapter").chat_template
    assert "<|im_start|>" in text
    assert text.startswith("{{- bos_token -}}")
    call("export", trained, "--merge", "--out", trained.parent / "merged")
    tokenizer = AutoTokenizer.from_pretrained(trained.parent / "merged")
    assert tokenizer.chat_template == text
    # Plain transformers holds the same conversation.
    model = AutoModelForCausalLM.from_pretrained(trained.parent / "merged")
    ids = tokenizer.apply_chat_template(
        [ASK], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    written = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=end)
    assert tokenizer.decode(written[0, ids.shape[1] :]) == "17 hens.<|im_end|>"


def test_a_conversation_stops_at_the_end_of_a_turn(trained: Path, call: Callable[..., str]) -> None:
    found = json.loads(
        call("generate", trained, "--chat", "-p", "how many hens?", "-p", "how many?", "--json")
    )
    first, second = found["texts"]
    assert first["text"] == "17 hens."
    assert second["prompt_tokens"] > 2 * first["prompt_tokens"]
    answers = call("generate", trained, "--chat", "-p", "how many hens?", "--system", "")
    assert answers.strip()


def test_turns_come_from_standard_input(trained: Path) -> None:
    process = start(trained.parent, "generate", trained, "--chat", given="how many hens?\n\n")
    assert end(process).out == "17 hens.\n"


def test_a_run_answers_its_own_rows(trained: Path, call: Callable[..., str]) -> None:
    found = json.loads(call("eval", trained, "--generate", "--metric", "exact_match", "--json"))
    assert found["prompts"] == 1
    assert found["metrics"]["exact_match"] == 1.0
    assert json.loads(call("eval", trained, "--json"))["rows"] == 3


def test_from_python(trained: Path) -> None:
    run = lorakit.load_run(trained)
    assert run.generate("how many hens?", chat=True) == "17 hens."
    assert run.generate(["how many hens?"] * 2, chat=True) == ["17 hens."] * 2


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--system", "x", "-p", "x"], "Add --chat"),
        ([], "there is no prompt"),
        (["--chat", "--plot", "x.png"], "--plot is for one prompt"),
    ],
)
def test_options_that_do_not_go_together(
    trained: Path, options: list[str], why: str, tmp_path: Path
) -> None:
    done = end(start(tmp_path, "generate", trained, *options))
    assert done.code == 2, done.err
    assert why in done.err


def test_the_template_of_a_finished_run_is_its_own(trained: Path) -> None:
    with pytest.raises(lorakit.LorakitError, match="beside its adapter"):
        lorakit.load_run(trained).evaluate("data.chat_template=alpaca")


@pytest.mark.parametrize("template", [MARKED, PLAIN])
def test_a_base_keeps_its_own_template(template: str, tmp_path: Path) -> None:
    make_base(tmp_path / "base", template)
    write_jsonl(tmp_path / "rows.jsonl", ROWS)  # type: ignore[arg-type]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=tmp_path, more=""))
    run: Any = lorakit.train(str(recipe), "train.max_steps=1")
    assert AutoTokenizer.from_pretrained(tmp_path / "run/adapter").chat_template == template
    assert run.metrics
