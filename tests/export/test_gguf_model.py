"""Merged models as GGUF: read back by the gguf package and by transformers' own loader of GGUF
files, and compared with what was merged."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lorakit.errors import RunError, UsageError
from lorakit.export.gguf.model import About, check_written, plan_model, write_model
from lorakit.export.gguf.tokenizer import tokenizer_keys
from tests.support import tokenizers
from tests.support.architectures import tiny_model
from tests.support.exports import RANKS, Trained, as_if_trained, export
from tests.support.processes import in_this_process

NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer Llama of 4 heads and 2 key-value heads, with BPE over bytes and a chat template."""
    tokenizer = tokenizers.byte_level("<s> $A")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 3,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
    )
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# a model\n")
    return folder


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory, sums: Path) -> Trained:
    folder = tmp_path_factory.mktemp("trained") / "runs/x"
    return as_if_trained(folder, base, sums, "l1ra", RANKS["ragged"], "causal-lm")


def opened(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """({key: value}, {name: tensor}) of a GGUF file."""
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def as_transformers_has_it(name: str, weight: Tensor) -> tuple[str, Tensor]:
    """A tensor of the file under the name and in the order of transformers, worked out apart from
    the export: rows 2 i and 2 i + 1 of each head go back to i and i + half."""
    parts = name.split(".")
    if parts[0] != "blk":
        return f"{TOP[parts[0]]}.{parts[-1]}", weight
    heads = {"attn_q": 4, "attn_k": 2}.get(parts[2])
    if heads:
        width = len(weight) // heads
        order = [
            h * width + i + s for h in range(heads) for s in (0, 1) for i in range(0, width, 2)
        ]
        weight = weight[order]
    return f"model.layers.{parts[1]}.{NAMES[parts[2]]}.{parts[-1]}", weight


TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}


@pytest.mark.parametrize("dtype", TYPES)
def test_the_file_holds_the_merged_weights(tmp_path: Path, trained: Trained, dtype: str) -> None:
    assert "llama-server" in export(trained.run, tmp_path / "out", "gguf", dtype, merge=True)
    plain = dtype if dtype != "q8_0" else "float32"
    export(trained.run, tmp_path / "merged", dtype=plain)
    merged = load_file(tmp_path / "merged/model.safetensors")
    _, tensors = opened(tmp_path / "out/model.gguf")
    assert len(tensors) == len(merged)
    for name, tensor in tensors.items():
        wide = tensor.tensor_type.name
        # Rows of 80 numbers are not whole blocks of 32.
        expected = "F16" if dtype == "q8_0" and "ffn_down" in name else TYPES[dtype]
        assert wide == ("F32" if "norm" in name else expected)
        weight = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        key, weight = as_transformers_has_it(name, weight)
        there = merged[key].float()
        if dtype != "q8_0":  # it was merged in this type, which the file keeps
            assert torch.equal(weight, there), name
            continue
        step = there.abs().max() / 127  # of the block with the largest weight
        assert (weight - there).abs().max() <= step * 0.51, name
        assert wide == "F32" or not torch.equal(weight, there)


def test_the_file_says_what_the_base_is(tmp_path: Path, trained: Trained, base: Path) -> None:
    export(trained.run, tmp_path / "out", "gguf", merge=True)
    fields, _ = opened(tmp_path / "out/model.gguf")
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "x",
        "general.license": "mit",
        "general.file_type": 0,
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 80,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 50000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    assert {key: fields.get(key) for key in expected} == expected
    assert fields["llama.attention.layer_norm_rms_epsilon"] == np.float32(1e-5)
    assert not any(key.startswith("general.base_model") for key in fields), (
        "a folder of this machine"
    )
    spec = json.loads((base / "tokenizer.json").read_text())
    names = {number: token for token, number in spec["model"]["vocab"].items()}
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens[: len(names)] == [names[i] for i in range(len(names))]
    assert kinds == [3] * 3 + [1] * (len(names) - 3) + [5] * 3
    assert len(tokens) == fields["llama.vocab_size"] == len(names) + 3
    merges = [tuple(one) for one in spec["model"]["merges"]]
    assert [tuple(one.split(" ")) for one in fields["tokenizer.ggml.merges"]] == merges


def test_transformers_reads_the_model_that_was_merged(tmp_path: Path, trained: Trained) -> None:
    export(trained.run, tmp_path / "out", "gguf", merge=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf").eval()
    export(trained.run, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(loaded(ids).logits, merged(ids).logits, atol=1e-5, rtol=0)


# -- architectures ---------------------------------------------------------------------------------

SHARED = {"vocab_size": 410, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
GEMMA = {"query_pre_attn_scalar": 8, "head_dim": 8}


def written(folder: Path, kind: str, dtype: str = "float32", **own: Any) -> tuple[Any, Path]:
    """A tiny model of this architecture, and its file."""
    model = tiny_model(kind, "causal-lm", **SHARED | own)
    planned = plan_model(model, tokenizers.byte_level(), {2})
    about = About("tiny", "someone/something", None)
    write_model(folder / "model.gguf", model, planned, about, dtype)
    return model, folder / "model.gguf"


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_transformers_reads_other_architectures(tmp_path: Path, kind: str) -> None:
    model, file = written(tmp_path, kind)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name).eval()
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "own", "shift", "paired"),
    [
        ("qwen3", {}, 0, False),
        ("smollm3", {"num_hidden_layers": 4}, 0, True),
        ("granite", {}, 0, True),
        ("gemma", {}, 1, False),
        ("gemma2", GEMMA, 1, False),
        ("gemma3_text", GEMMA | {"num_hidden_layers": 6}, 1, False),
        ("olmo2", {}, 0, False),
    ],
)
def test_the_weights_are_in_the_order_of_llama_cpp(
    tmp_path: Path, kind: str, own: dict[str, Any], shift: int, paired: bool
) -> None:
    """transformers reads no such files, or not all of their settings; llama.cpp's numbers were
    compared by hand."""
    model, file = written(tmp_path, kind, **own)
    fields, tensors = opened(file)
    state = {key: value for key, value in model.state_dict().items() if key != "lm_head.weight"}
    found = {
        name: torch.tensor(np.array(t.data))
        for name, t in tensors.items()
        if name != "output.weight"
    }
    assert len(found) == len(state)
    q = model.model.layers[1].self_attn.q_proj.weight
    there = found["blk.1.attn_q.weight"]
    assert torch.equal(
        as_transformers_has_it("blk.1.attn_q.weight", there)[1] if paired else there, q
    )
    norm = model.model.norm.weight
    assert torch.equal(found["output_norm.weight"], norm + shift)
    assert torch.equal(found["token_embd.weight"], model.model.embed_tokens.weight)
    assert fields["general.base_model.0.organization"] == "someone"


def test_a_scaled_rotary_embedding_is_a_tensor_of_factors(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    }  # fmt: skip
    model, file = written(tmp_path, "llama", rope_parameters=scaling)
    factors = torch.tensor(np.array(opened(file)[1]["rope_freqs.weight"].data))
    plain = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(plain / factors, model.model.rotary_emb.inv_freq)
    assert factors[0] == 1
    assert factors[-1] == 8


def test_a_window_that_llama_cpp_does_not_know_ends_the_context(tmp_path: Path) -> None:
    model = tiny_model("mistral", "causal-lm", **SHARED, sliding_window=16)
    planned = plan_model(model, tokenizers.byte_level(), {2})
    assert planned.values["context_length"] == 16
    assert "sliding window" in planned.notes[0]


# -- tokenizers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "ignore_merges", "name"),
    [
        ([], False, "gpt-2"),
        ([pre_tokenizers.Digits(individual_digits=True)], False, "smollm"),
        (["\\p{N}"], False, "qwen2"),
        (["\\p{N}{1,3}"], True, "llama-bpe"),
        (["\\p{N}{1,3}"], False, "dbrx"),
    ],
)
def test_the_first_split_is_told_by_its_expressions(
    steps: list[Any], ignore_merges: bool, name: str
) -> None:
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBER| ?[^\s\p{L}\p{N}]+[\r\n]*"
    )
    words += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    own = not any(isinstance(step, str) for step in steps)
    parts = [
        pre_tokenizers.Split(Regex(words.replace("NUMBER", step)), "isolated")
        if isinstance(step, str)
        else step
        for step in steps
    ]
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own))
    tokenizer = tokenizers.byte_level()
    spec = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(one) for one in spec["merges"]]
    backend = Tokenizer(models.BPE(spec["vocab"], merges, ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts) if len(parts) > 1 else parts[0]
    backend.decoder = decoders.ByteLevel()
    found = tokenizer_keys(tokenizers.wrapped(backend), 410, {2}, None)
    assert found.values["tokenizer_pre"] == name


def joined_by_score(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's BPE: the pair of neighbours whose token has the highest score, the first one
    of several, becomes that token."""
    pieces = list(text)
    while True:
        pairs = [
            (-scores[left + right], i)
            for i, (left, right) in enumerate(pairwise(pieces))
            if left + right in scores
        ]
        if not pairs:
            return pieces
        at = min(pairs)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


def sentence_piece(prefix: bool) -> Any:
    """A tokenizer whose merges are all splits of each token, as those made from SentencePiece's
    files are."""
    given = tokenizers.llama()
    spec = json.loads(given.backend_tokenizer.to_str())["model"]
    vocabulary, tokens = spec["vocab"], dict.fromkeys("".join(pair) for pair in spec["merges"])
    merges = [
        (token[:cut], token[cut:])
        for token in tokens
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    backend = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    steps = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    backend.add_special_tokens(tokenizers.SPECIAL)
    return tokenizers.wrapped(backend, "<s> $A")


@pytest.mark.parametrize("prefix", [True, False])
def test_scores_join_what_the_merges_join(prefix: bool) -> None:
    tokenizer = sentence_piece(prefix)
    values = tokenizer_keys(tokenizer, len(tokenizer) + 1, {2}, None).values
    assert values["tokenizer_model"] == "llama"
    assert values["add_space_prefix"] is prefix
    assert values["token_types"][:4] == [2, 3, 3, 6]
    scores = {
        token: score
        for token, score, kind in zip(
            values["token_list"], values["token_scores"], values["token_types"], strict=True
        )
        if kind == 1
    }
    for line in [*tokenizers.LINES, "an answer and another answer", "  filmfilm  "]:
        text = "▁" * prefix + line.replace(" ", "▁")
        expected = [
            piece for piece in tokenizer.convert_ids_to_tokens(tokenizer(line).input_ids)[1:]
            if not piece.startswith("<0x")
        ]  # fmt: skip
        known = [piece for piece in joined_by_score(text, scores) if piece in scores]
        assert known == expected


@pytest.mark.parametrize(
    ("make", "words"),
    [
        ("byte-level with a blank in front", "first split"),
        ("llama", "does not join"),
        ("unigram", "Unigram"),
        ("word level", "WordLevel"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(make: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as error:
        tokenizer_keys(tokenizers.MAKES[make](), 600, {2}, None)
    assert "convert_hf_to_gguf.py" in str(error.value)


# -- what is refused -------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("kind", "own", "words"),
    [
        ("llama", {"hidden_act": "gelu"}, "activation is gelu"),
        ("qwen2", {"rope_parameters": YARN}, "yarn"),
        ("gemma2", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar 99"),
        ("gpt2", {}, "architecture `gpt2`"),
        ("phi3", {}, "architecture `phi3`"),
    ],
)  # fmt: skip
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(
    kind: str, own: dict[str, Any], words: str
) -> None:
    model = tiny_model(kind, "causal-lm", **SHARED | own)
    with pytest.raises(UsageError, match=words) as error:
        plan_model(model, tokenizers.byte_level(), {2})
    assert "convert_hf_to_gguf.py" in str(error.value)


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", "causal-lm", **SHARED)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    planned = plan_model(model, tokenizers.byte_level(), {2})
    with pytest.raises(UsageError, match=r"blk\.0\.ffn_up\.weight"):
        write_model(tmp_path / "x.gguf", model, planned, About("x", None, None), "float16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "q8_0"])
def test_a_file_with_another_weight_is_noticed(tmp_path: Path, dtype: str) -> None:
    model, file = written(tmp_path, "llama", dtype)
    check_written(file, {"general.name": "tiny"}, model, dtype)
    with pytest.raises(RunError, match=r"general\.name"):
        check_written(file, {"general.name": "large"}, model, dtype)
    name = "model.layers.1.self_attn.v_proj.weight"
    weight = dict(model.named_parameters())[name]
    weight.data[3, 5] += 0.05
    with pytest.raises(RunError, match=r"blk\.1\.attn_v\.weight"):
        check_written(file, {}, model, dtype)


def test_what_does_not_fit_together_is_refused(
    tmp_path: Path,
    trained: Trained,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    call = in_this_process(monkeypatch, capfd)
    done = call("export", trained.run, "--merge", "--format", "peft", "--out", tmp_path / "a")
    assert done.code == 2
    assert "`peft` is a format of an adapter alone" in done.err
    done = call("export", trained.run, "--merge", "--dtype", "q8_0", "--out", tmp_path / "a")
    assert done.code == 2
    assert "--merge --format gguf" in done.err
    done = call(
        "export", trained.run, "--merge", "--format", "gguf", "--dtype", "f16",
        "--out", tmp_path / "a",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "float16" in done.out
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["README.md", "model.gguf"]
    assert "ollama create" in (tmp_path / "a/README.md").read_text()
