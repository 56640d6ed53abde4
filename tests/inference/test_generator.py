"""Generation from saved runs: two forward passes that agree, batches, stops, tiers, caches, and the
command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lorakit.cli import main
from lorakit.inference.generator import GenerationSettings, Generator
from lorakit.methods import KVPolicies
from lorakit.methods.chunkwise.method import Chunkwise
from lorakit.recipes.recipe import load_recipe
from lorakit.report.progress import Progress
from lorakit.runs.saved import saved_model, saved_recipe
from lorakit.runs.train import run_training

Call = Callable[..., str]
RECIPE = """\
model: {{name_or_path: {model}, task: causal-lm}}
data: {{name_or_path: {data}, prompt: "{{question}} ", completion: "{{answer}}"}}
method: {{name: {method}, r: 8, lora_alpha: 16{more}}}
train: {{num_train_epochs: 6, per_device_train_batch_size: 8, learning_rate: 1e-2, precision: fp32}}
output_dir: {run}
"""
CHUNKS = ", min_len: 2, max_len: 8, fade: 1, ladder: [2, 4, 8]"
PROMPTS = [
    "how many hens are there ? 3 and 2",
    "how many hens are there a film and the plot ? 1 and 4",
    "there are",
]


def trained(folder: Path, method: str, model: Path, data: Path, more: str = "") -> Path:
    """A finished run."""
    recipe = folder / f"{method}.yaml"
    recipe.write_text(
        RECIPE.format(model=model, data=data, method=method, more=more, run=folder / method)
    )
    run_training(load_recipe(recipe), Progress(Console(stderr=True)))
    return folder / method


@pytest.fixture(scope="module")
def vanilla(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, sums: Path) -> Path:
    return trained(tmp_path_factory.mktemp("vanilla"), "vanilla", tiny_llama, sums)


@pytest.fixture(scope="module")
def chunkwise(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, sums: Path) -> Path:
    return trained(tmp_path_factory.mktemp("chunkwise"), "chunkwise", tiny_llama, sums, CHUNKS)


@pytest.fixture(scope="module")
def by_model(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, sums: Path) -> Path:
    more = CHUNKS + ", difficulty: {source: model}"
    return trained(tmp_path_factory.mktemp("by_model"), "chunkwise", tiny_llama, sums, more)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: Path, sums: Path) -> Path:
    return trained(tmp_path_factory.mktemp("gpt2"), "chunkwise", tiny_gpt2, sums, CHUNKS)


def generator(run: Path, own: bool = True, kv: KVPolicies | None = None) -> Generator:
    torch.manual_seed(0)
    task_model, method, _ = saved_model(run, saved_recipe(run), torch.float32)
    return Generator(task_model, method, kv, own)


def tokens(writer: Generator, texts: list[str] = PROMPTS) -> list[list[int]]:
    return [writer.task_model.tokenizer(text)["input_ids"] for text in texts]


def write(writer: Generator, texts: list[str] = PROMPTS, **settings: Any) -> list[Any]:
    return writer.run(
        tokens(writer, texts), GenerationSettings(**{"max_new_tokens": 12} | settings)
    )


@pytest.mark.parametrize("kv", ["full", "int8"])
@pytest.mark.parametrize("name", ["vanilla", "chunkwise", "by_model"])
def test_both_passes_write_the_same(name: str, kv: Any, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(name)
    policies = KVPolicies((kv,) * (1 if name == "vanilla" else 3))
    ours, theirs = generator(run, kv=policies), generator(run, own=False, kv=policies)
    assert ours.decoder is not None
    assert ours.fallback is None
    assert theirs.fallback
    for one, other in zip(write(ours), write(theirs), strict=True):
        assert one.tokens == other.tokens
        assert [token.tier for token in one.trace] == [token.tier for token in other.trace]


@pytest.mark.parametrize("kv", ["full", "int8"])
def test_both_passes_hold_as_many_bytes(chunkwise: Path, kv: Any) -> None:
    found = [
        write(generator(chunkwise, own, KVPolicies((kv,) * 3)), PROMPTS[:1], max_new_tokens=100)
        for own in (True, False)
    ]
    (ours,), (theirs,) = found
    assert ours.kv_bytes == theirs.kv_bytes
    assert ours.kv_bytes_full == theirs.kv_bytes_full


@torch.no_grad()
@pytest.mark.parametrize("own", [True, False])
def test_a_fixed_tier_acts_in_both_passes(chunkwise: Path, own: bool) -> None:
    """Against the model whose adapters hold the first components alone."""
    writer, cut = generator(chunkwise, own), generator(chunkwise, own=False)
    for adapter in cut.method.adapters.values():
        cut_off = adapter.lora_B.detach().clone()
        cut_off[:, 2:] = 0
        adapter.load_tensors({"lora_A": adapter.lora_A.detach(), "lora_B": cut_off})
    with writer.method.tiers.at_tier(0):
        found = writer.forward()
        logits = found.start(*prompt_of(writer))
    with cut.method.tiers.full_rank():
        expected = cut.forward().start(*prompt_of(cut))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    top = writer.forward().start(*prompt_of(writer))
    assert float((top - expected).abs().max()) > 1e-3


def prompt_of(writer: Generator) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([tokens(writer, PROMPTS[:1])[0]])
    return ids, torch.ones_like(ids, dtype=torch.bool)


def test_a_model_of_another_make_uses_its_own_pass(gpt2: Path) -> None:
    writer = generator(gpt2)
    assert writer.decoder is None
    assert writer.fallback
    (one,) = write(writer, PROMPTS[:1])
    assert one.tokens
    assert len(one.trace) in (
        len(one.prompt) + len(one.tokens),
        len(one.prompt) + len(one.tokens) - 1,
    )


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("name", ["vanilla", "chunkwise"])
def test_a_batch_writes_what_each_prompt_gets_by_itself(
    name: str, own: bool, request: pytest.FixtureRequest
) -> None:
    writer = generator(request.getfixturevalue(name), own)
    together = write(writer, batch_size=3)
    alone = [write(writer, [text])[0] for text in PROMPTS]
    for one, other in zip(together, alone, strict=True):
        assert one.tokens == other.tokens
        assert [token.tier for token in one.trace] == [token.tier for token in other.trace]


def test_the_order_of_prompts_is_kept_over_batches(chunkwise: Path) -> None:
    writer = generator(chunkwise)
    assert [one.prompt for one in write(writer, batch_size=2)] == tokens(writer)


def test_a_text_ends_with_the_end_of_sequence(vanilla: Path) -> None:
    writer = generator(vanilla)
    (one,) = write(writer, PROMPTS[:1], max_new_tokens=40)
    end = writer.task_model.tokenizer.eos_token_id
    assert 0 < len(one.tokens) < 40
    assert end not in one.tokens
    assert "[EOS]" not in one.text


def test_a_stop_ends_a_text_and_is_not_in_it(vanilla: Path) -> None:
    writer = generator(vanilla)
    (whole,) = write(writer, PROMPTS[:1], max_new_tokens=40)
    words = whole.text.split()
    (one,) = write(writer, PROMPTS[:1], max_new_tokens=40, stop=(words[1],))
    assert one.text.split() == words[:1]
    assert len(one.tokens) == 2


def test_drawing_is_seeded_and_obeys_top_k(vanilla: Path) -> None:
    writer = generator(vanilla)
    draws = [
        [one.tokens for one in write(writer, temperature=1.5, seed=seed)] for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    greedy = [one.tokens for one in write(writer)]
    assert [one.tokens for one in write(writer, temperature=1.5, top_k=1)] == greedy
    assert [one.tokens for one in write(writer, temperature=1.5, top_p=1e-6)] == greedy


def test_an_unscored_prompt_is_at_the_top_tier(by_model: Path) -> None:
    (one,) = write(generator(by_model), PROMPTS[:1])
    prompt, new = one.trace[: len(one.prompt)], one.trace[len(one.prompt) :]
    # NaN: it was not looked at
    assert all(token.tier == 2 and token.difficulty != token.difficulty for token in prompt)
    assert all(0 <= token.difficulty <= 1 for token in new)
    assert new[0].opened


def test_the_fast_pass_is_proved_with_all_components_whatever_the_tiers(chunkwise: Path) -> None:
    task_model, method, _ = saved_model(chunkwise, saved_recipe(chunkwise), torch.float32)
    assert isinstance(method, Chunkwise)
    assert method.tables is not None
    (difficulty, _), infinity = method.tables.by_pass[""], float("inf")
    method.tables.by_pass[""] = difficulty, [infinity, infinity]  # every token at the lowest tier
    assert Generator(task_model, method).fallback is None


@pytest.mark.parametrize("own", [True, False])
def test_a_fixed_tier_has_its_own_cache_policy(chunkwise: Path, own: bool) -> None:
    sizes = []
    for tier in range(3):
        writer = generator(chunkwise, own, KVPolicies(("window", "int8", "full"), 68))
        with writer.method.tiers.at_tier(tier):
            sizes.append(write(writer, [" ".join(PROMPTS * 6)], max_new_tokens=2)[0].kv_bytes)
    assert sizes[0] < sizes[1] < sizes[2]


def test_no_more_tokens_are_written_than_the_model_reads(gpt2: Path, call: Call) -> None:
    (one,) = json.loads(
        call("generate", gpt2, "-p", " ".join(PROMPTS * 5), "--max-new-tokens", 500, "--json")
    )["texts"]
    assert one["prompt_tokens"] + one["tokens"] <= 128


def test_what_is_shown_as_it_grows_is_the_text(vanilla: Path, call: Call) -> None:
    arguments = ("generate", vanilla, "-p", PROMPTS[1], "--max-new-tokens", 20)
    (whole,) = json.loads(call(*arguments, "--json"))["texts"]
    assert call(*arguments) == whole["text"] + "\n"
    stop = whole["text"].split()[1]
    (cut,) = json.loads(call(*arguments, "--json", "--stop", stop))["texts"]
    assert call(*arguments, "--stop", stop) == cut["text"] + "\n"
    assert stop not in cut["text"]


def test_tokens_are_told_as_they_come(chunkwise: Path) -> None:
    writer, told = generator(chunkwise), []
    ids = tokens(writer)
    found = writer.run(
        ids,
        GenerationSettings(max_new_tokens=5, batch_size=2),
        on_token=lambda row, token: told.append((row, token)),
    )
    for row, one in enumerate(found):
        assert [token for told_row, token in told if told_row == row] == one.tokens


# -- the command -----------------------------------------------------------------------------------


def test_the_command_writes_json_and_a_picture(chunkwise: Path, call: Call, tmp_path: Path) -> None:
    picture = tmp_path / "deep" / "chunks.png"
    out = call(
        "generate",
        chunkwise,
        "--prompt",
        PROMPTS[0],
        "--max-new-tokens",
        8,
        "--json",
        "--plot",
        picture,
    )
    found = json.loads(out)
    (text,) = found["texts"]
    assert found["own_forward"] is True
    assert text["ladder"] == [2, 4, 8]
    assert 2 <= text["mean_rank"] <= 8
    assert text["chunks"][0]["start"] == 0
    assert all(
        one["end"] == other["start"]
        for one, other in zip(text["chunks"], text["chunks"][1:], strict=False)
    )
    assert text["kv_bytes"] <= text["kv_bytes_full"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_command_shows_chunks_and_text(chunkwise: Path, vanilla: Path, call: Call) -> None:
    plain = call("generate", chunkwise, "-p", PROMPTS[0], "--max-new-tokens", 6)
    shown = call("generate", chunkwise, "-p", PROMPTS[0], "--max-new-tokens", 6, "--show-chunks")
    assert plain.strip()
    assert plain.strip() in shown.replace("▏", "")
    assert "rank 2" in shown
    assert (
        call("generate", vanilla, "-p", PROMPTS[0], "-p", PROMPTS[1], "--max-new-tokens", 3).count(
            "\n"
        )
        == 2
    )


def test_a_fixed_tier_and_another_cache(chunkwise: Path, call: Call) -> None:
    arguments = ("generate", chunkwise, "-p", PROMPTS[0], "--max-new-tokens", 6, "--json")
    (fixed,) = json.loads(call(*arguments, "--tier", 0, "--kv", "full"))["texts"]
    assert fixed["mean_rank"] == 2
    assert fixed["kv_bytes"] == fixed["kv_bytes_full"]
    long = (
        "generate",
        chunkwise,
        "-p",
        " ".join(["how many hens"] * 25),
        "--max-new-tokens",
        6,
        "--json",
    )
    (int8,), (full,) = (json.loads(call(*long, "--kv", kv))["texts"] for kv in ("int8", "full"))
    assert int8["kv_bytes"] < full["kv_bytes"] == full["kv_bytes_full"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--kv", "int9"], "Did you mean `int8`?"),
        (["--tier", "3"], "the tiers 0 to 2, of the ranks [2, 4, 8]"),
        (["--plot", "chunks.pdf"], "ends in .png"),
        (["--chat"], "no chat template"),
        (["-p", "a", "--plot", "two.png"], "one prompt"),
        (["--stop", ""], "an empty text"),
        (["--temperature", "1e-40"], "too low to draw"),
        (["--top-k", "5"], "temperature 0 draws nothing"),
    ],
)
def test_what_does_not_fit_is_said(
    chunkwise: Path,
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["lorakit", "generate", str(chunkwise), "-p", "how many", *arguments]
    )
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert said in " ".join(capfd.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_an_empty_prompt_and_a_classifier_are_refused(
    chunkwise: Path,
    tiny_bert: Path,
    sentiment: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
) -> None:
    recipe = tmp_path / "classifier.yaml"
    recipe.write_text(
        f"model: {{name_or_path: {tiny_bert}, task: sequence-classification}}\ndata:"
        f" {{name_or_path: {sentiment}}}\nmethod: {{name: vanilla, r: 2}}\ntrain: {{max_steps:"
        f" 1}}\noutput_dir: {tmp_path / 'classifier'}\n"
    )
    for arguments, code in (
        (["train", str(recipe)], None),
        (["generate", str(tmp_path / "classifier"), "-p", "a"], 2),
        (["generate", str(chunkwise), "-p", ""], 2),
    ):
        monkeypatch.setattr(sys, "argv", ["lorakit", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        assert (exit_.value.code or None) == code
    assert "the prompt is empty" in capfd.readouterr().err
