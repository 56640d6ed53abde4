"""Exports, with PEFT and plain transformers as the oracles."""

from __future__ import annotations

import json
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lorakit.cli import main
from lorakit.errors import UsageError
from lorakit.runs import export_adapter, export_merged
from tests.support.exports import (
    RANKS,
    Trained,
    as_if_trained,
    assert_same,
    export,
    inputs,
)

CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
MODELS = ["tiny_bert", "tiny_llama", "tiny_gpt2"]


@torch.inference_mode()
def answers(model: Any, tokenizer: Any) -> list[Tensor]:
    return [model.eval()(**one).logits[0].float() for one in inputs(tokenizer)]


TASKS = {
    "tiny_bert": "sequence-classification",
    "tiny_llama": "causal-lm",
    "tiny_gpt2": "causal-lm",
}


@pytest.fixture(scope="module")
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Trained]:
    """trained(model, ranks, method): made once, and left alone by the tests."""
    made: dict[tuple[str, ...], Trained] = {}

    def get(model: str, ranks: str = "ragged", method: str = "l1ra") -> Trained:
        if (model, ranks, method) not in made:
            data = request.getfixturevalue(
                "sentiment" if TASKS[model] == "sequence-classification" else "sums"
            )
            folder = tmp_path_factory.mktemp("trained") / "runs" / "x"
            made[model, ranks, method] = as_if_trained(
                folder, request.getfixturevalue(model), data, method, RANKS[ranks], TASKS[model]
            )
        return made[model, ranks, method]

    return get


@pytest.fixture
def mine(trained: Callable[..., Trained], tmp_path: Path) -> Path:
    """A run of our own to write into: runs/x in an empty folder."""
    return Path(shutil.copytree(trained("tiny_bert").run, tmp_path / "runs/x"))


def in_peft(base: Path, adapter: Path, task: str) -> list[Tensor]:
    """What PEFT says with this adapter; it must find all it needs, and nothing that it does not
    know."""
    auto = (
        AutoModelForSequenceClassification
        if task == "sequence-classification"
        else AutoModelForCausalLM
    )
    model = auto.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = PeftModel.from_pretrained(model, adapter)
    keys = found.load_adapter(adapter, "default")
    assert not keys.unexpected_keys
    assert not [key for key in keys.missing_keys if "lora_" in key or "modules_to_save" in key]
    return answers(found, AutoTokenizer.from_pretrained(adapter))


# -- PEFT ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("form", ["peft", "peft-portable"])
def test_peft_says_what_the_merged_model_says(
    trained: Callable[..., Trained], tmp_path: Path, model: str, ranks: str, form: str
) -> None:
    run = trained(model, ranks)
    export(run.run, tmp_path / "out", form)
    assert_same(in_peft(run.base, tmp_path / "out", TASKS[model]), run.logits)
    assert {"tokenizer.json", "adapter_config.json", "adapter_model.safetensors"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("model", MODELS)
def test_the_portable_form_needs_no_pattern(
    trained: Callable[..., Trained], tmp_path: Path, model: str, ranks: str
) -> None:
    run = trained(model, ranks)
    export(run.run, tmp_path / "out", "peft-portable")
    path = tmp_path / "out/adapter_config.json"
    config = json.loads(path.read_text())
    assert config["r"] == config["lora_alpha"] == max(1, *run.ranks.values())
    assert not config.pop("rank_pattern")
    assert not config.pop("alpha_pattern")
    path.write_text(json.dumps(config))
    assert_same(in_peft(run.base, tmp_path / "out", TASKS[model]), run.logits)
    pairs = {
        name: len(a)
        for name, a in load_file(tmp_path / "out/adapter_model.safetensors").items()
        if "lora_A" in name
    }
    assert set(pairs.values()) == {config["r"]}
    assert len(pairs) == len(run.ranks)


def test_the_peft_form_leaves_out_modules_of_rank_0_and_says_so(
    trained: Callable[..., Trained], tmp_path: Path
) -> None:
    run = trained("tiny_llama", "one at rank 0")
    said = export(run.run, tmp_path / "out", "peft")
    empty = [name for name, rank in run.ranks.items() if rank == 0]
    assert len(empty) == 1
    assert "1 modules of rank 0 are left out" in said
    names = load_file(tmp_path / "out/adapter_model.safetensors")
    assert not [name for name in names if empty[0] in name]
    assert not [name for name in names if name.endswith((".gate", ".gate.weight"))]
    assert len(names) == 2 * (len(run.ranks) - 1)


@pytest.mark.parametrize("model", MODELS)
def test_patterns_are_anchored_full_names(
    trained: Callable[..., Trained], tmp_path: Path, model: str
) -> None:
    run = trained(model)
    export(run.run, tmp_path / "out", "peft")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["rank_pattern"]
    for patterns in (config["rank_pattern"], config["alpha_pattern"]):
        for pattern in patterns:
            # As PEFT reads a pattern (peft.utils.get_pattern_key).
            hits = [name for name in run.ranks if re.match(rf"(.*\.)?({pattern})$", name)]
            assert len(hits) == 1
            assert not re.match(rf"(.*\.)?({pattern})$", f"outer.{hits[0]}")
            assert not re.match(rf"(.*\.)?({pattern})$", hits[0].replace(".", "x", 1))
    assert [name for name in run.ranks if re.fullmatch(config["target_modules"], name)] == list(
        run.ranks
    )
    assert config["fan_in_fan_out"] is (model == "tiny_gpt2")


def test_a_name_that_ends_another_does_not_take_its_rank(
    tmp_path: Path, tiny_llama: Path, sums: Path
) -> None:
    """A classifier over Llama: `score` beside the blocks, and `layers.1.…` that also ends
    `layers.11.…`."""
    config = transformers.AutoConfig.from_pretrained(tiny_llama, num_hidden_layers=12)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "deep")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "deep")
    run = as_if_trained(
        tmp_path / "runs/x", tmp_path / "deep", sums, "l1ra",
        lambda number, adapter: number % 5, "causal-lm",
        "method.target_modules=[q_proj, down_proj]",
    )  # fmt: skip
    export(run.run, tmp_path / "out", "peft")
    assert_same(in_peft(run.base, tmp_path / "out", "causal-lm"), run.logits)
    shapes = {
        name: len(a)
        for name, a in load_file(tmp_path / "out/adapter_model.safetensors").items()
        if "lora_A" in name
    }
    assert {name[17:-14]: rank for name, rank in shapes.items()} == {
        name: rank for name, rank in run.ranks.items() if rank
    }


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
def test_a_classifier_over_a_decoder_loads_in_peft_with_its_head(
    model: str, tmp_path: Path, sentiment: Path, request: pytest.FixtureRequest
) -> None:
    run = as_if_trained(
        tmp_path / "runs/x",
        request.getfixturevalue(model),
        sentiment,
        "l1ra",
        RANKS["ragged"],
        "sequence-classification",
    )
    for form in ("peft", "peft-portable"):
        export(run.run, tmp_path / form, form)
        assert_same(in_peft(run.base, tmp_path / form, "sequence-classification"), run.logits)
    export(run.run, tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert_same(answers(merged, AutoTokenizer.from_pretrained(tmp_path / "merged")), run.logits)


@pytest.mark.parametrize("model", MODELS)
def test_the_adapter_of_a_vanilla_run_loads_in_peft_as_it_is(
    trained: Callable[..., Trained], model: str
) -> None:
    run = trained(model, "ragged", "vanilla")
    assert_same(in_peft(run.base, run.run / "adapter", TASKS[model]), run.logits)


def test_ranks_by_pattern_keep_their_own_scale(
    tmp_path: Path, tiny_bert: Path, sentiment: Path
) -> None:
    ranks = "method.rank_pattern={query: 8, 'layer.1.*value': 2}"
    run = as_if_trained(
        tmp_path / "runs/x",
        tiny_bert,
        sentiment,
        "vanilla",
        lambda n, a: a.rank,
        "sequence-classification",
        ranks,
    )
    assert set(run.ranks.values()) == {8, 4, 2}
    for form in ("peft", "peft-portable"):
        export(run.run, tmp_path / form, form)
        assert_same(in_peft(run.base, tmp_path / form, "sequence-classification"), run.logits)


def test_peft_refuses_an_adapter_with_gates_instead_of_ignoring_them(
    trained: Callable[..., Trained], tmp_path: Path
) -> None:
    run = trained("tiny_bert")
    export(run.run, tmp_path / "lorakit", "lorakit")
    for folder in (run.run / "adapter", tmp_path / "lorakit"):
        model = AutoModelForSequenceClassification.from_pretrained(run.base)
        with pytest.raises((ValueError, KeyError), match="LORAKIT"):
            PeftModel.from_pretrained(model, folder)


def test_heads_are_saved_whole(trained: Callable[..., Trained], tmp_path: Path) -> None:
    run = trained("tiny_bert")
    export(run.run, tmp_path / "out", "peft")
    names = load_file(tmp_path / "out/adapter_model.safetensors").keys()
    for head in (
        "classifier.weight",
        "classifier.bias",
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
    ):
        assert f"base_model.model.{head}" in names


@pytest.mark.parametrize("form", ["peft", "peft-portable"])
def test_an_adapter_in_half_precision_is_near(
    trained: Callable[..., Trained], tmp_path: Path, form: str
) -> None:
    run = trained("tiny_llama")
    export(run.run, tmp_path / "out", form, "bf16")
    assert {t.dtype for t in load_file(tmp_path / "out/adapter_model.safetensors").values()} == {
        torch.bfloat16
    }
    assert_same(in_peft(run.base, tmp_path / "out", "causal-lm"), run.logits, 0.1)


# -- merged ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("model", MODELS)
def test_the_merged_folder_is_all_that_transformers_needs(
    trained: Callable[..., Trained], tmp_path: Path, model: str, ranks: str
) -> None:
    run = trained(model, ranks)
    said = export(run.run, tmp_path / "merged")
    auto = AutoModelForSequenceClassification if model == "tiny_bert" else AutoModelForCausalLM
    found, report = auto.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert_same(answers(found, AutoTokenizer.from_pretrained(tmp_path / "merged")), run.logits)
    difference = re.search(
        r"largest logit difference to the unmerged model: (\S+) in float32", said
    )
    assert difference, said
    assert float(difference[1]) < 1e-4
    if model == "tiny_bert":
        assert found.config.id2label == {0: "0", 1: "1"}


def test_merging_keeps_the_type_of_the_base_and_the_chat_template(
    tmp_path: Path, tiny_llama: Path, sums: Path
) -> None:
    base = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tiny_llama).to(torch.bfloat16).save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(base)
    run = as_if_trained(tmp_path / "runs/x", base, sums, "l1ra", RANKS["ragged"], "causal-lm")
    said = export(run.run, tmp_path / "merged")
    assert {t.dtype for t in load_file(tmp_path / "merged/model.safetensors").values()} == {
        torch.bfloat16
    }
    assert "in bfloat16" in said
    assert "own rounding" in said
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert found.dtype == torch.bfloat16
    assert_same(answers(found, tokenizer), run.logits, 0.1)
    # Asked for float32, the very update is added to the very base.
    export(run.run, tmp_path / "exact", dtype="float32")
    assert_same(
        answers(AutoModelForCausalLM.from_pretrained(tmp_path / "exact"), tokenizer), run.logits
    )
    for folder in ("merged", "exact", "runs/x/adapter"):
        assert AutoTokenizer.from_pretrained(tmp_path / folder).chat_template == CHAT


def test_a_tokenizer_comes_out_as_it_went_in(
    trained: Callable[..., Trained], tmp_path: Path
) -> None:
    """Without the padding and truncation of our last call, which a fast tokenizer keeps."""
    run = trained("tiny_bert")
    export(run.run, tmp_path / "merged")
    long = "good " * 200
    for folder in (tmp_path / "merged", run.run / "adapter"):
        assert (
            AutoTokenizer.from_pretrained(folder)(long)["input_ids"]
            == AutoTokenizer.from_pretrained(run.base)(long)["input_ids"]
        )


# -- lorakit's own ---------------------------------------------------------------------------------


def test_the_native_form_is_the_adapter_itself(mine: Path, tmp_path: Path) -> None:
    export(mine, tmp_path / "out", "lorakit")
    found = tree(tmp_path / "out")
    assert found.pop("README.md").startswith(b"---\n")
    assert found == tree(mine / "adapter")
    with pytest.raises(UsageError, match="float32"):
        export(mine, tmp_path / "other", "lorakit", "bf16")
    assert not (tmp_path / "other").exists()


def test_no_file_is_for_its_owner_alone(mine: Path, tmp_path: Path) -> None:
    for form in (None, "peft", "peft-portable", "lorakit"):
        export(mine, tmp_path / f"out-{form}", form)
        for file in (tmp_path / f"out-{form}").iterdir():
            assert file.stat().st_mode & 0o044 == 0o044, file


# -- where to --------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"/"
        for p in sorted(folder.rglob("*"))
    }


def test_without_out_an_export_goes_into_the_run(mine: Path) -> None:
    export(mine)
    export(mine, form="peft")
    export(mine, form="peft-portable")
    assert {p.name for p in mine.iterdir()} >= {
        "merged",
        "adapter-peft",
        "adapter-peft-portable",
        "adapter",
    }


def test_what_exists_is_replaced_only_by_force(mine: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export(mine, out, "peft")  # an empty folder is as good as none
    (out / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    for form in (None, "peft", "lorakit"):
        with pytest.raises(UsageError, match="--force"):
            export(mine, out, form)
    (tmp_path / "file").write_text("x")
    for force in (False, True):
        with pytest.raises(UsageError, match="is a file"):
            export(mine, tmp_path / "file", force=force)
    (tmp_path / "file").unlink()
    assert tree(tmp_path) == before
    export(mine, out, force=True)
    assert (out / "model.safetensors").exists()
    assert not (out / "notes.txt").exists()
    assert not (out / "adapter_config.json").exists()


@pytest.mark.parametrize(
    "target", [".", "adapter", "adapter/sub", "checkpoints", "checkpoints/step-1", "..", "../.."]
)
@pytest.mark.parametrize("force", [True, False])
def test_a_target_that_would_harm_the_run_is_refused(
    mine: Path, tmp_path: Path, target: str, force: bool
) -> None:
    (mine / "checkpoints/step-1").mkdir(parents=True)
    (mine / "checkpoints/step-1/state.json").touch()
    before = tree(tmp_path)
    with pytest.raises(UsageError):
        export(mine, mine / target, "peft", force=force)
    assert tree(tmp_path) == before


def test_the_base_model_is_never_replaced(tmp_path: Path, tiny_bert: Path, sentiment: Path) -> None:
    base = Path(shutil.copytree(tiny_bert, tmp_path / "models/base"))
    run = as_if_trained(
        tmp_path / "runs/x", base, sentiment, "vanilla", RANKS["ragged"], "sequence-classification"
    )
    before = tree(tmp_path / "models")
    for target in (base, base.parent):
        with pytest.raises(UsageError):
            export(run.run, target, force=True)
    assert tree(tmp_path / "models") == before


def test_the_working_folder_is_never_replaced(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here/deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here/deeper")
    for target in (".", "..", tmp_path / "here"):
        with pytest.raises(UsageError, match="working folder"):
            export(mine, Path(target), "peft", force=True)
    assert sorted(p.name for p in tmp_path.rglob("*") if "runs" not in p.parts) == [
        "deeper",
        "here",
    ]


@pytest.mark.parametrize("form", [None, "peft", "peft-portable", "lorakit"])
@pytest.mark.parametrize("force", [False, True])
def test_a_failed_export_leaves_everything_as_it_was(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str | None, force: bool
) -> None:
    out = tmp_path / "out"
    if force:
        export(mine, out, "lorakit")
    before = tree(tmp_path)

    def full_disk(*arguments: Any, **more: Any) -> None:
        written = next(
            argument for argument in arguments if isinstance(argument, Path) and argument.is_dir()
        )
        (written / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    def full_tree(source: Path, target: Path, **more: Any) -> None:
        full_disk(target)

    monkeypatch.setattr(export_merged, "save_merged", full_disk)
    monkeypatch.setattr(export_adapter, "WRITERS", dict.fromkeys(export_adapter.WRITERS, full_disk))
    monkeypatch.setattr(export_adapter.shutil, "copytree", full_tree)
    with pytest.raises(OSError, match="No space left"):
        export(mine, out, form, force=force)
    assert tree(tmp_path) == before


def test_a_folder_made_on_the_way_goes_with_a_failed_export(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_merged, "save_merged", fail)
    with pytest.raises(OSError, match="No space left"):
        export(mine, tmp_path / "a/b/c")
    assert not (tmp_path / "a").exists()


def test_a_broken_adapter_is_named_and_nothing_is_written(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = mine / "adapter/adapter_model.safetensors"
    whole = load_file(file)
    left_out = sorted(whole)[0]
    cut = file.read_bytes()[:-50]
    for damage in ("cut", "a tensor gone"):
        file.write_bytes(cut)
        if damage != "cut":
            save_file({name: tensor for name, tensor in whole.items() if name != left_out}, file)
        monkeypatch.setattr(
            sys, "argv", ["lorakit", "export", str(mine), "--merge", "--out", str(tmp_path / "out")]
        )
        with pytest.raises(SystemExit) as exit_:
            main()
        err = capfd.readouterr().err
        assert exit_.value.code == 1, err
        assert "adapter" in err
        assert "should not have happened" not in err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--merge"),
        (["--merge", "--adapter"], "--merge"),
        (["--adapter", "--format", "peft-portabel"], "peft-portable"),
        (["--merge", "--dtype", "float8"], "float"),
    ],
)
def test_wrong_options_exit_2(
    mine: Path,
    tmp_path: Path,
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = tree(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lorakit", "export", str(mine), *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert words in capfd.readouterr().err
    assert tree(tmp_path) == before


def test_a_run_without_an_adapter_can_not_be_exported(mine: Path) -> None:
    shutil.rmtree(mine / "adapter")
    with pytest.raises(UsageError, match="no adapter yet"):
        export(mine)
