"""What lorakit computes for many architectures is what PEFT and plain transformers compute, or is
refused before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorakit.adapters.inject import find_targets, linear_layers
from lorakit.methods import MethodConfig
from lorakit.models.positions import position_limit, skeleton
from lorakit.models.spec import ModelSpec
from tests.support.architectures import (
    AUTO,
    EOS,
    Found,
    command,
    compared,
    recipe,
    save_base,
    tiny_config,
    tiny_model,
)

# Of any architecture: many do not run as the optimisations expect, and must train without them.
pytestmark = pytest.mark.usefixtures("lenient")

CLASSIFIERS = [
    *(
        "albert",
        "bart",
        "bert",
        "camembert",
        "canine",
        "convbert",
        "deberta",
        "deberta-v2",
        "distilbert",
        "electra",
        "esm",
    ),
    *(
        "fnet",
        "funnel",
        "gemma",
        "gpt2",
        "llama",
        "longformer",
        "luke",
        "megatron-bert",
        "mobilebert",
        "modernbert",
        "mpnet",
    ),
    *(
        "nystromformer",
        "qwen3_moe",
        "roberta",
        "roberta-prelayernorm",
        "t5",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xlnet",
        "xmod",
    ),
]
DECODERS = [
    *(
        "bloom",
        "cohere",
        "cohere2",
        "falcon",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gpt_neox",
    ),
    *(
        "gptj",
        "granite",
        "jamba",
        "jetmoe",
        "llama",
        "mistral",
        "mixtral",
        "mpt",
        "olmo2",
        "olmoe",
        "opt",
        "phi",
        "phi3",
    ),
    *("phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2"),
]
# Where PEFT itself does not load the adapter, which is said before training and when it is
# exported.
NOT_FOR_PEFT = ["falcon_mamba", "glm4_moe", "mamba", "qwen3_next"]


def assert_same_everywhere(losses: Found, moved: float) -> None:
    """moved: how far training has moved the loss at least, so that adapters that do nothing
    show."""
    assert not losses.refused
    assert losses.peft == pytest.approx(losses.lorakit, abs=1e-4)
    assert losses.merged == pytest.approx(losses.lorakit, abs=1e-4)
    assert losses.base != pytest.approx(losses.lorakit, abs=moved)


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_the_loss_of_a_classifier(kind: str, tmp_path: Path) -> None:
    assert_same_everywhere(compared(kind, "sequence-classification", tmp_path), moved=1e-4)


@pytest.mark.parametrize("kind", DECODERS)
def test_the_loss_of_a_decoder(kind: str, tmp_path: Path) -> None:
    assert_same_everywhere(compared(kind, "causal-lm", tmp_path), moved=1e-3)


@pytest.mark.parametrize("kind", NOT_FOR_PEFT)
def test_what_peft_does_not_load_is_said_before_training_and_is_not_exported(
    kind: str, tmp_path: Path
) -> None:
    losses = compared(kind, "causal-lm", tmp_path)
    assert "PEFT does not load adapters" in losses.not_for_peft
    assert losses.merged == pytest.approx(losses.lorakit, abs=1e-4)
    assert losses.base != pytest.approx(losses.lorakit, abs=1e-2)


@pytest.mark.parametrize(
    ("kind", "task", "said"),
    [
        ("ibert", "sequence-classification", "no layer is left to adapt"),
        ("squeezebert", "sequence-classification", "no layer is left to adapt"),
        ("bert", "causal-lm", "the tokens of BertLMHeadModel see those that come after them"),
        ("xlnet", "causal-lm", "the tokens of XLNetLMHeadModel see those that come after them"),
    ],
)
def test_what_can_not_be_trained_is_refused_before_training(
    kind: str, task: str, said: str, tmp_path: Path
) -> None:
    refused = compared(kind, task, tmp_path).refused
    assert said in refused
    assert "step 1" not in refused


def test_a_model_that_reads_rows_of_one_length_alone_is_refused_before_training(
    tmp_path: Path,
) -> None:
    """Nyströmformer cuts rows of 64 tokens into 16 landmarks, and takes no others."""
    own = {"segment_means_seq_len": 64, "num_landmarks": 16}
    refused = compared("nystromformer", "sequence-classification", tmp_path, **own).refused
    assert (
        "recipe.yaml:1:12: NystromformerForSequenceClassification can not read rows of different"
        " lengths" in refused
    )
    assert "step 1" not in refused


def test_a_decoder_by_its_configuration_is_trained(tmp_path: Path) -> None:
    losses = compared("bert", "causal-lm", tmp_path, is_decoder=True)
    assert losses.merged == pytest.approx(losses.lorakit, abs=1e-4)


# -- positions -------------------------------------------------------------------------------------

LIMITS = {
    # tables of 66 rows: RoBERTa and its kin count from behind the pad token's id, 0 here
    **dict.fromkeys(
        [
            "camembert",
            "data2vec-text",
            "esm",
            "ibert",
            "longformer",
            "luke",
            "roberta",
            "roberta-prelayernorm",
        ],
        65,
    ),
    **dict.fromkeys(["xlm-roberta", "xlm-roberta-xl", "xmod"], 65),
    "mpnet": 64,  # from behind 1, whatever the pad token
    **dict.fromkeys(
        ["bart", "bert", "deberta", "distilbert", "electra", "gpt2", "opt", "roformer"], 66
    ),
    **dict.fromkeys(["llama", "t5", "xlnet", "bloom"], None),
}


@pytest.mark.parametrize("kind", LIMITS)
def test_positions_are_those_that_the_model_can_read(kind: str) -> None:
    spec = ModelSpec.model_validate({"name_or_path": "x", "task": "sequence-classification"})
    config = tiny_config(kind)
    limit = position_limit(skeleton(config, spec, None))
    assert limit == LIMITS[kind]
    if limit is not None and kind != "roformer":  # whose positions wrap no one knows where
        model = AUTO["sequence-classification"].from_config(config).eval()
        model(input_ids=torch.tensor([[5] * (limit - 1) + [EOS]]))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.tensor([[5] * limit + [EOS]]))


def test_rows_are_cut_to_what_the_tables_hold_and_no_longer_ones_are_asked_for(
    tmp_path: Path,
) -> None:
    base = save_base(tmp_path / "base", "roberta-prelayernorm", "sequence-classification")
    file = recipe(tmp_path, base, "sequence-classification")
    code, _, said = command("train", file, "data.max_seq_length=66")
    assert code == 2
    assert "the model reads at most 65 tokens, not 66" in said
    (tmp_path / "rows.jsonl").write_text(
        '{"text": "%s", "label": 0}\n{"text": "bad", "label": 1}\n' % ("good " * 99) * 4
    )
    code, _, said = command("train", file, "data.max_seq_length=65", "train.max_steps=1")
    assert code == 0, said


# -- targets ---------------------------------------------------------------------------------------


def targets(
    kind: str, task: str = "causal-lm", **settings: Any
) -> tuple[dict[str, int], list[str]]:
    spec = ModelSpec.model_validate({"name_or_path": "x", "task": task})
    model = skeleton(tiny_config(kind), spec, None)
    return find_targets(model, MethodConfig.model_validate({"name": "any"} | settings), [])


def test_layers_that_are_read_by_their_weight_alone_get_no_adapter() -> None:
    ranks, said = targets("mamba", r=2)
    assert {name.rpartition(".")[2] for name in ranks} == {"in_proj", "x_proj", "out_proj"}
    assert (
        said[0] == "without adapter, since the model reads their weights without calling them: 2 ×"
        " mixer.dt_proj (2→48)"
    )


def test_a_layer_that_is_read_by_its_weight_is_refused_by_name(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "mamba", "causal-lm")
    file = recipe(tmp_path, base, "causal-lm")
    code, _, said = command("train", file, "method.r=2", "method.target_modules=[in_proj, dt_proj]")
    assert code == 2
    assert (
        "the model reads the weight of `backbone.layers.0.mixer.dt_proj` without calling it" in said
    )


def test_gates_of_one_output_get_no_adapter() -> None:
    ranks, said = targets("qwen2_moe", r=4)
    assert not any("shared_expert_gate" in name for name in ranks)
    assert any("mlp.shared_expert.up_proj" in name for name in ranks)
    assert (
        said[0]
        == "without adapter, since they are smaller than the rank: 2 × mlp.shared_expert_gate"
        " (32→1)"
    )


def test_the_share_of_experts_is_said_before_training_and_by_a_dry_run(tmp_path: Path) -> None:
    _, said = targets("mixtral", r=4)
    experts = 2 * 4 * 3 * 32 * 48
    rest = 2 * (32 * 32 * 2 + 32 * 16 * 2)
    share = f"{(experts + 2 * 4 * 32) / (experts + 2 * 4 * 32 + rest):.0%} of the blocks' weights"
    assert said == [
        f"without adapter, since they are no linear layers: {share}, 2 × mlp.experts.gate_up_proj"
        " [4, 96, 32], 2 × mlp.experts.down_proj [4, 32, 48], 2 × mlp.gate.weight [4, 32]"
    ]
    file = recipe(tmp_path, save_base(tmp_path / "base", "mixtral", "causal-lm"), "causal-lm")
    assert share in command("train", file, "--dry-run")[1]
    assert share in command("train", file)[2]


@pytest.mark.parametrize(("kind", "linear"), [("falcon", True), ("phimoe", False)])
def test_a_layer_with_a_forward_pass_of_its_own_is_tried(kind: str, linear: bool) -> None:
    model = tiny_model(kind, "causal-lm")
    own = {
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and type(layer) is not nn.Linear
    }
    assert own
    assert own.issubset(linear_layers(model)) is linear


@pytest.mark.parametrize("kind", ["bart", "gpt2", "llama"])
def test_nothing_is_left_out_of_models_that_call_their_layers(kind: str) -> None:
    ranks, said = targets(kind, r=4)
    assert ranks
    assert said == []
