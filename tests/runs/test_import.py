"""Import of PEFT adapters, with PEFT as the oracle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorakit.data.keys import NO_DATA
from lorakit.errors import LorakitError, UsageError
from lorakit.report.progress import Progress
from lorakit.runs.evaluate import evaluate_run
from lorakit.runs.import_adapter import run_import
from lorakit.runs.saved import saved_model, saved_recipe
from tests.support.exports import assert_same, export, inputs
from tests.support.peft_adapters import make_peft
from tests.support.tiny import write_jsonl

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 6},
    "patterns": {
        "rank_pattern": {r"layers\.0\..*down_proj": 6, "q_proj": 2},
        "alpha_pattern": {"down_proj": 5, r"layers\.1\.self_attn\.q_proj": 3},
    },
    "patterns and rslora": {
        "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {"down_proj": 5},
        "use_rslora": True,
    },
    "some layers": {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]},
    "all linear": {"target_modules": "all-linear", "lora_dropout": 0.1},
    "gaussian": {"init_lora_weights": "gaussian", "target_modules": r".*\.0\..*o_proj"},
}


def imported(folder: Path, out: Path, **more: Any) -> dict[str, Any]:
    return run_import(folder, out, Progress(Console(stderr=True)), **more)


def answers(model: Any, tokenizer: Any) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [model(**one).logits[0].float() for one in inputs(tokenizer)]


def of_run(run: Path) -> tuple[Any, Any]:
    task_model, method, _ = saved_model(run, saved_recipe(run), torch.float32)
    return task_model, method


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_an_imported_adapter_acts_as_in_peft_and_goes_out_as_it_came(
    tmp_path: Path, tiny_llama: Path, name: str, dtype: torch.dtype
) -> None:
    model = make_peft(tmp_path / "given", tiny_llama, dtype, **CONFIGS[name])
    found = imported(tmp_path / "given", tmp_path / "run")
    task_model, method = of_run(tmp_path / "run")
    assert_same(
        answers(task_model.model, task_model.tokenizer), answers(model, task_model.tokenizer)
    )
    assert found["steps"] == 0
    assert not found["metrics"]
    given = load_file(tmp_path / "given/adapter_model.safetensors")
    forms = ["peft"] if "pattern" in name else ["peft", "peft-portable"]
    for form in forms:
        export(tmp_path / "run", tmp_path / form, form)
        written = load_file(tmp_path / form / "adapter_model.safetensors")
        assert written.keys() == given.keys()
        for key, tensor in given.items():
            assert written[key].dtype == tensor.dtype == dtype
            assert torch.equal(written[key], tensor), key
        base = AutoModelForCausalLM.from_pretrained(tiny_llama)
        back = PeftModel.from_pretrained(base, tmp_path / form)
        for module, adapter in method.adapters.items():
            theirs = model.get_submodule(f"base_model.model.{module}").scaling["default"]
            mine = back.get_submodule(f"base_model.model.{module}").scaling["default"]
            assert adapter.scale == theirs
            assert mine == pytest.approx(theirs, rel=1e-15)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_gpt2"])
def test_a_classifier_comes_with_its_head(
    tmp_path: Path, kind: str, classes: int, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(kind)
    keys: dict[str, Any] = {"task": "SEQ_CLS", "classes": classes, "target_modules": "all-linear"}
    model = make_peft(tmp_path / "given", base, **keys)
    imported(tmp_path / "given", tmp_path / "run")
    task_model, _ = of_run(tmp_path / "run")
    assert task_model.heads == ["score"]
    assert_same(
        answers(task_model.model, task_model.tokenizer), answers(model, task_model.tokenizer)
    )
    export(tmp_path / "run", tmp_path / "out", "peft")
    given = load_file(tmp_path / "given/adapter_model.safetensors")
    written = load_file(tmp_path / "out/adapter_model.safetensors")
    assert written.keys() == given.keys()
    assert all(torch.equal(written[key], given[key]) for key in given)


def test_an_imported_classifier_is_evaluated_on_data_that_is_named(
    tmp_path: Path, tiny_gpt2: Path, call: Callable[..., str]
) -> None:
    make_peft(tmp_path / "given", tiny_gpt2, task="SEQ_CLS", classes=2, target_modules=["c_attn"])
    rows: list[dict[str, object]] = [
        {"text": f"{word} film", "label": label}
        for word, label in [("good", "fine"), ("bad", "poor")] * 4
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    call("import", tmp_path / "given", "--out", tmp_path / "run", "--labels", "poor,fine")
    with pytest.raises(LorakitError, match=r"imported.*\n.*data\.name_or_path=") as error:
        evaluate_run(tmp_path / "run", [], Progress(Console(stderr=True)))
    assert error.value.exit_code == 2
    data = f"data.name_or_path={tmp_path / 'rows.jsonl'}"
    found = json.loads(call("eval", tmp_path / "run", data, "--json"))
    assert found["rows"] == 8
    assert {"accuracy", "loss"} <= set(found["metrics"])
    with pytest.raises(UsageError, match="2 classes, not 3"):
        imported(tmp_path / "given", tmp_path / "other", labels=["a", "b", "c"])


def test_the_run_says_from_where_it_is_and_every_command_takes_it(
    tmp_path: Path, tiny_llama: Path, sums: Path, call: Callable[..., str]
) -> None:
    make_peft(tmp_path / "given", tiny_llama, torch.bfloat16, **CONFIGS["patterns"])
    call("import", tmp_path / "given", "--out", tmp_path / "run")
    record = json.loads((tmp_path / "run/manifest.json").read_text())["imported"]
    assert record["path"] == str((tmp_path / "given").resolve())
    assert len(record["sha256"]) == 64
    assert record["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "run/result.json").read_text())["imported"] == record
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text())["imported"] == record
    assert NO_DATA in (tmp_path / "run/recipe.yaml").read_text()
    assert "down_proj" in call("inspect-ranks", tmp_path / "run")
    call("inspect-ranks", tmp_path / "run", "--history")
    call("generate", tmp_path / "run", "--prompt", "how many", "--max-new-tokens", "3")
    call("export", tmp_path / "run", "--merge", "--out", tmp_path / "merged")
    data = f"data.name_or_path={sums}"
    call("convert", tmp_path / "run", data, "method.ladder=[2,4]", "--out", tmp_path / "tiers")
    metrics = json.loads(call("eval", tmp_path / "tiers", data, "--json"))["metrics"]
    assert metrics.keys() >= {"loss"}


# -- refusals --------------------------------------------------------------------------------------


def refused(tmp_path: Path, folder: Path, *words: str, **more: Any) -> None:
    with pytest.raises(LorakitError) as error:
        imported(folder, tmp_path / "run", **more)
    assert error.value.exit_code == 2
    for word in words:
        assert word in str(error.value), str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"use_dora": True}, ["`use_dora: true`"]),
        ({"lora_bias": True}, ["`lora_bias: true`"]),
        ({"bias": "lora_only"}, ['`bias: "lora_only"`']),
        ({"target_modules": ["q_proj", "embed_tokens"]}, ["lora_embedding", "embedding"]),
        ({"trainable_token_indices": [1, 2]}, ["`trainable_token_indices: "]),
        ({"modules_to_save": ["lm_head"]}, ["lm_head", "modules_to_save"]),
        ({"layer_replication": [[0, 2], [1, 2]]}, ["`layer_replication: "]),
        ({"task_type": "FEATURE_EXTRACTION"}, ["`task_type: FEATURE_EXTRACTION`"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_can_not_be_held_is_named(
    tmp_path: Path, tiny_llama: Path, keys: dict[str, Any], words: list[str]
) -> None:
    task = keys.pop("task_type", None)
    make_peft(tmp_path / "given", tiny_llama, **keys)
    if task:
        edit(tmp_path / "given", task_type=task)
    refused(tmp_path, tmp_path / "given", *words)


def edit(folder: Path, **keys: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.fixture
def given(tmp_path: Path, tiny_llama: Path) -> Path:
    make_peft(tmp_path / "given", tiny_llama)
    return tmp_path / "given"


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"peft_type": "IA3"}, "`peft_type: IA3`"),
        ({"peft_type": "LORAKIT"}, "`peft_type: LORAKIT`"),
        ({"init_lora_weights": "pissa_niter_4"}, "`init_lora_weights: pissa_niter_4`"),
        ({"r": 5}, "has rank 4"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"a_key_of_tomorrow": {"x": 1}}, "`a_key_of_tomorrow: "),
        ({"base_model_name_or_path": None}, "--base"),
        ({"base_model_name_or_path": "./not-there"}, "./not-there"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_can_not_be_right_is_named(
    given: Path, tmp_path: Path, keys: dict[str, Any], word: str
) -> None:
    edit(given, **keys)
    refused(tmp_path, given, word)


def test_files_that_are_missing_or_broken_are_named(
    given: Path, tmp_path: Path, tiny_bert: Path, tiny_gpt2: Path
) -> None:
    refused(tmp_path, given / "nowhere", "adapter_config.json")
    refused(tmp_path, given, "no such linear layers", base=str(tiny_gpt2))
    file = given / "adapter_model.safetensors"
    whole = load_file(file)
    save_file({key.replace("q_proj", "q_prj"): tensor for key, tensor in whole.items()}, file)
    refused(tmp_path, given, "q_prj", "nearest: `model.layers.0.self_attn.q_proj`")
    save_file(
        {key: tensor for key, tensor in whole.items() if "0.self_attn.q_proj.lora_A" not in key},
        file,
    )
    refused(tmp_path, given, "layers.0.self_attn.q_proj", "pair")
    file.write_bytes(file.read_bytes()[:-20])
    refused(tmp_path, given, "can not be read")
    file.rename(given / "adapter_model.bin")
    refused(tmp_path, given, "pickle")


def test_a_random_pooler_is_refused(tmp_path: Path, tiny_bert: Path) -> None:
    """PEFT saves `classifier` alone; the pooler between is the base's, which must have it."""
    keys: dict[str, Any] = {"task": "SEQ_CLS", "classes": 2, "target_modules": ["query"]}
    make_peft(tmp_path / "given", tiny_bert, **keys)
    imported(tmp_path / "given", tmp_path / "run")
    bare = Path(shutil.copytree(tiny_bert, tmp_path / "bare"))
    weights = load_file(bare / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "pooler" not in name}
    assert len(kept) < len(weights)
    save_file(kept, bare / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(tmp_path / "run")
    refused(tmp_path, tmp_path / "given", "pooler.dense", "random", base=str(bare))


def test_a_run_is_not_replaced_unless_told(given: Path, tmp_path: Path) -> None:
    imported(given, tmp_path / "run")
    with pytest.raises(UsageError, match="already holds a run"):
        imported(given, tmp_path / "run")
    imported(given, tmp_path / "run", overwrite=True)
    with pytest.raises(UsageError, match="adapter itself"):
        imported(given, given, overwrite=True)
