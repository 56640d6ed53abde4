"""The sparse form: every bit comes back, what is inconsistent is refused, and a pruned base goes
with its adapter."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from lorakit.adapters.base import PrunedBase, dense_weight, in_out
from lorakit.adapters.inject import inject, match_targets
from lorakit.data.batches import Batch
from lorakit.data.labels import Labels
from lorakit.errors import RunError
from lorakit.export import sparse
from lorakit.export.native import AdapterFacts
from lorakit.export.sparse import (
    decode,
    load_base,
    load_sparse,
    load_sparse_model,
    save_sparse,
    write_sparse,
)
from lorakit.methods import Method, build_method, config_classes
from lorakit.models.heads import train_heads
from lorakit.models.load import load_model
from lorakit.models.spec import ModelSpec
from lorakit.models.task_model import TaskModel
from lorakit.models.tasks import task_named
from lorakit.models.tokenizer import load_tokenizer
from lorakit.sources.resolve import Wanted, resolve

TASKS = {
    "tiny_bert": "sequence-classification",
    "tiny_llama": "causal-lm",
    "tiny_gpt2": "causal-lm",
}
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
PREFIX = "base_model.model."


def thinned(
    *shape: int, dtype: torch.dtype = torch.float32, zeros: float = 0.8, seed: int = 0
) -> Tensor:
    """Random entries, most of them zero."""
    rng = torch.Generator().manual_seed(seed)
    return (
        torch.randn(shape, generator=rng)
        .masked_fill(torch.rand(shape, generator=rng) < zeros, 0.0)
        .to(dtype)
    )


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(found[name]) == raw(tensor), name


def raw(tensor: Tensor) -> bytes:
    return (
        tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        if tensor.numel()
        else b""
    )


def stored(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return load_file(path), file.metadata()


# -- tensors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_bit_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "matrix": thinned(16, 384, dtype=dtype),
        "odd": thinned(7, 61, dtype=dtype),
        "three dimensions": thinned(3, 5, 67, dtype=dtype),
        "vector": thinned(1001, dtype=dtype),
        "many dimensions": thinned(500, dtype=dtype).view([1] * 20 + [500]),
        "nothing but zeros": torch.zeros(30, 40, dtype=dtype),
        "dense": thinned(8, 32, dtype=dtype, zeros=0.0),
        "transposed": thinned(40, 50, dtype=dtype).T,
        "scalar": torch.tensor(0.0, dtype=dtype),
        "small": torch.zeros(3, dtype=dtype),
        "empty": torch.zeros(0, dtype=dtype),
        "rank 0, A": torch.zeros(0, 384, dtype=dtype),
        "rank 0, B": torch.zeros(384, 0, dtype=dtype),
        "parameter": nn.Parameter(thinned(20, 50, dtype=dtype)),
    }
    save_sparse(tensors, tmp_path / "x.safetensors")
    assert_same_bits(load_sparse(tmp_path / "x.safetensors"), tensors)
    encoded = {
        name.removesuffix(".bitmap")
        for name in stored(tmp_path / "x.safetensors")[0]
        if name.endswith(".bitmap")
    }
    left = {"dense", "scalar", "small", "empty", "rank 0, A", "rank 0, B"}
    assert encoded == tensors.keys() - left
    assert (tmp_path / "x.safetensors").stat().st_size < sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_zero_is_what_has_the_bits_of_zero(tmp_path: Path, dtype: torch.dtype) -> None:
    """-0.0, infinities, subnormal numbers and the payloads of NaNs are values as others are."""
    odd = torch.zeros(2000, dtype=dtype)
    info = torch.finfo(dtype)
    odd[::40] = torch.tensor(
        [-0.0, float("inf"), -float("inf"), float("nan"), info.tiny / 2], dtype=dtype
    ).repeat(10)
    integers = sparse.BITS[dtype]
    payload = odd.clone().view(integers)
    payload[3] = torch.tensor(float("nan"), dtype=dtype).view(integers) | 5
    payload[5] = payload[3] | torch.iinfo(integers).min
    tensors = {
        "odd": odd,
        "payload": payload.view(dtype),
        "negative zeros": torch.full((500,), -0.0, dtype=dtype),
    }
    save_sparse(tensors, tmp_path / "x.safetensors")
    assert_same_bits(load_sparse(tmp_path / "x.safetensors"), tensors)
    names = stored(tmp_path / "x.safetensors")[0].keys()
    assert names == {
        "odd.bitmap",
        "odd.values",
        "payload.bitmap",
        "payload.values",
        "negative zeros",
    }


def test_only_floating_point_is_encoded_and_cast(tmp_path: Path) -> None:
    others = {
        "long": torch.zeros(500, dtype=torch.long),
        "bytes": torch.zeros(500, dtype=torch.uint8),
        "flags": torch.zeros(500, dtype=torch.bool),
    }
    save_sparse(others | {"a": thinned(20, 50)}, tmp_path / "x.safetensors", torch.bfloat16)
    expected = others | {"a": thinned(20, 50, dtype=torch.bfloat16)}
    assert_same_bits(load_sparse(tmp_path / "x.safetensors"), expected)
    assert stored(tmp_path / "x.safetensors")[0].keys() == {*others, "a.bitmap", "a.values"}


def test_a_tensor_is_encoded_only_where_that_makes_the_file_smaller(tmp_path: Path) -> None:
    for zeros in (0.0, 0.02, 0.05, 0.1, 0.5):
        for size in (10, 30, 100, 300, 10_000):
            tensors = {"some.longer.name": thinned(size, zeros=zeros)}
            save_sparse(tensors, tmp_path / "sparse")
            save_file(tensors, tmp_path / "dense")
            # 40: the key of the metadata, once a file; 16: safetensors pads to 8 bytes, twice.
            assert (tmp_path / "sparse").stat().st_size <= (
                tmp_path / "dense"
            ).stat().st_size + 40 + 16


def test_the_files_hold_a_bitmap_and_the_values_and_are_the_same_each_time(tmp_path: Path) -> None:
    tensors = {"b": torch.zeros(100, 2), "a": torch.zeros(10, 20)}
    tensors["a"][0, 0], tensors["a"][0, 9], tensors["a"][1, 0] = 1.0, -2.0, 3.0
    for name in ("x", "y"):
        save_sparse(tensors, tmp_path / name)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    parts, metadata = stored(tmp_path / "x")
    assert metadata == {"lorakit_sparse": "1 10x20 100x2"}
    assert parts["a.bitmap"].tolist() == [1, 2, 16] + [0] * 22
    assert parts["a.values"].tolist() == [1.0, -2.0, 3.0]
    assert parts["b.bitmap"].tolist() == [0] * 25
    assert parts["b.values"].shape == (0,)


def test_no_tensors_at_all(tmp_path: Path) -> None:
    save_sparse({}, tmp_path / "x.safetensors")
    assert load_sparse(tmp_path / "x.safetensors") == {}


@pytest.mark.parametrize("name", ["memory.values", "memory.bitmap", ".values"])
def test_names_of_encoded_tensors_are_kept_for_them(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunError, match=name):
        save_sparse({name: torch.ones(3)}, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float32, 0.25), (torch.bfloat16, 0.30), (torch.float16, 0.30)],
    ids=str,
)
def test_factors_of_minilm_at_80_percent_zeros_take_less_than_a_third(
    tmp_path: Path, dtype: torch.dtype, limit: float
) -> None:
    shapes = {
        f"attention.{name}": (384, 384)
        for name in ("self.query", "self.key", "self.value", "output.dense")
    }
    shapes |= {"intermediate.dense": (384, 1536), "output.dense": (1536, 384)}
    factors = {}
    for layer in range(6):
        for kind, (in_features, out_features) in shapes.items():
            name = f"{PREFIX}bert.encoder.layer.{layer}.{kind}"
            factors[f"{name}.lora_A.weight"] = thinned(8, in_features, dtype=dtype)
            factors[f"{name}.lora_B.weight"] = thinned(out_features, 8, dtype=dtype)
    save_file(factors, tmp_path / "dense")
    save_sparse(factors, tmp_path / "sparse")
    assert_same_bits(load_sparse(tmp_path / "sparse"), factors)
    assert (tmp_path / "sparse").stat().st_size <= limit * (tmp_path / "dense").stat().st_size


# -- refusals --------------------------------------------------------------------------------------

Parts = dict[str, Tensor]


def replaced(**changes: Tensor | None) -> Callable[[Parts], Parts]:
    """Tensors of the file put in place of others; None takes one away. `_` stands for the dot."""
    new = {name.replace("_", "."): tensor for name, tensor in changes.items()}
    return lambda parts: {
        name: tensor for name, tensor in (parts | new).items() if tensor is not None
    }


def with_zero(parts: Parts) -> Parts:
    values = parts["a.values"].clone()
    values[4] = 0.0
    return parts | {"a.values": values}


def with_bits(*positions: int) -> Callable[[Parts], Parts]:
    """`a` has 13 · 17 = 221 entries: 3 bits of padding."""

    def change(parts: Parts) -> Parts:
        bitmap = parts["a.bitmap"].clone()
        for position in positions:
            bitmap[position // 8] ^= 1 << position % 8
        return parts | {"a.bitmap": bitmap}

    return change


BYTES, ZERO = torch.ones(3, dtype=torch.uint8), torch.zeros(0)
DAMAGE: dict[str, tuple[Callable[[Parts], Parts], str]] = {
    "no values": (replaced(a_values=None), r"`a` has no \.values"),
    "no bitmap": (replaced(a_bitmap=None), r"`a` has no \.bitmap"),
    "a shorter bitmap": (replaced(a_bitmap=BYTES), r"`a`: a bitmap of 221 entries"),
    "an empty bitmap": (replaced(a_bitmap=BYTES[:0]), r"`a`: a bitmap"),
    "a longer bitmap": (
        lambda parts: parts | {"a.bitmap": torch.cat([parts["a.bitmap"], BYTES])},
        r"`a`: a bitmap",
    ),
    "a bitmap of another type": (
        lambda parts: parts | {"a.bitmap": parts["a.bitmap"].to(torch.int16)},
        r"`a`: a bitmap",
    ),
    "a bitmap of two dimensions": (
        lambda parts: parts | {"a.bitmap": parts["a.bitmap"][None]},
        r"`a`: a bitmap",
    ),
    "a bitmap of no dimension": (
        replaced(a_bitmap=torch.tensor(1, dtype=torch.uint8)),
        r"`a`: a bitmap",
    ),
    "a bit of the padding": (with_bits(221), "`a`: bits beyond its last entry"),
    "the last bit of the padding": (with_bits(223), "`a`: bits beyond its last entry"),
    "a bit too many": (with_bits(3), "`a`: its bitmap says"),
    "too few values": (
        lambda parts: parts | {"a.values": parts["a.values"][1:].clone()},
        "`a`: its bitmap says",
    ),
    "no values at all": (replaced(a_values=ZERO), "`a`: its bitmap says"),
    "values of another type": (
        lambda parts: parts | {"a.values": parts["a.values"].to(torch.int32)},
        "`a`: its values are",
    ),
    "values of two dimensions": (
        lambda parts: parts | {"a.values": parts["a.values"][None]},
        "`a`: its values are",
    ),
    "values of no dimension": (replaced(a_values=torch.tensor(1.0)), "`a`: its values are"),
    "a zero among the values": (with_zero, "`a`: a zero is among its values"),
    "dense and encoded": (replaced(a=torch.ones(13, 17)), "`a` is there twice"),
    "one more encoded tensor": (replaced(c_bitmap=BYTES, c_values=ZERO), "`c` has no shape"),
    "one encoded tensor less": (
        replaced(b_bitmap=None, b_values=None),
        "2 shapes for 1 encoded tensors, `a`",
    ),
    "half of another tensor": (replaced(c_values=ZERO), r"`c` has no \.bitmap"),
}
HEADERS = {
    "none": (None, "not of the sparse form"),
    "of others": ({"format": "pt"}, "not of the sparse form"),
    "empty": ("", "version ''"),
    "the next version": ("2 13x17 20x30", "version '2'"),
    "no version": ("13x17 20x30", "version '13x17'"),
    "no shapes": ("1", "`a` has no shape"),
    "a shape less": ("1 13x17", "`b` has no shape"),
    "a shape more": ("1 13x17 20x30 1", "3 shapes for 2 encoded tensors, `b`"),
    "two blanks": ("1 13x17  20x30", "3 shapes"),
    "a blank for a shape": ("1 13x17 ", "`b`: '' is not a shape"),
    "other shapes": ("1 20x30 13x17", "`a`: a bitmap of 600 entries"),
    "a negative size": ("1 -13x-17 20x30", "`a`: '-13x-17' is not"),
    "a fraction": ("1 13.0x17 20x30", "`a`: '13.0x17' is not"),
    "a word": ("1 13x17 20xNaN", "`b`: '20xNaN' is not"),
    "a zero": ("1 0x17 20x30", "`a`: '0x17' is not"),
    "digits of another script": ("1 ١٣x17 20x30", "`a`: .* is not a shape"),
    "a number too long to read": ("1 13x17 " + "9" * 5000, "`b`: '9+' is not a shape"),
    "more memory than there is": ("1 13x17 999999999999999x999999999999999", "`b`: a bitmap of"),
    "an overflow that fits again": ("1 13x17 4294967296x4294967296", "`b`: a bitmap of"),
    "an endless shape": ("1 13x17 " + "x".join(["9"] * 100_000), "`b`: .* is not a shape"),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A good file: `a` [13, 17] and `b` [20, 30] encoded, `d` dense."""
    save_sparse(
        {"a": thinned(13, 17), "b": thinned(20, 30, dtype=torch.bfloat16), "d": torch.ones(4)},
        tmp_path / "x.safetensors",
    )
    assert stored(tmp_path / "x.safetensors")[1] == {"lorakit_sparse": "1 13x17 20x30"}
    return tmp_path / "x.safetensors"


def refused(path: Path, words: str | None = None) -> None:
    with pytest.raises(RunError, match=words) as caught:
        load_sparse(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGE)
def test_inconsistent_tensors_are_refused(file: Path, damage: str) -> None:
    change, words = DAMAGE[damage]
    parts, metadata = stored(file)
    save_file(change({name: tensor.clone() for name, tensor in parts.items()}), file, metadata)
    refused(file, words)
    with pytest.raises(ValueError, match=words):
        decode(*stored(file))


@pytest.mark.parametrize("header", HEADERS)
def test_wrong_metadata_is_refused(file: Path, header: str) -> None:
    value, words = HEADERS[header]
    parts, _ = stored(file)
    parts = {name: tensor.clone() for name, tensor in parts.items()}
    save_file(parts, file, {"lorakit_sparse": value} if isinstance(value, str) else value)
    refused(file, words)


def test_a_file_that_is_cut_off_is_refused_wherever_that_is(file: Path) -> None:
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        refused(file)


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no tensors")
    (tmp_path / "folder").mkdir()
    for name in ("text", "folder", "nothing"):
        refused(tmp_path / name)


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [2**62]}, {"shape": [-1]}, {"shape": [1.5]}, {"shape": [0, 2**63]},
        {"dtype": "F6_E2M3"}, {"dtype": "F4"}, {"dtype": 5},
        {"data_offsets": [0, 10**12]}, {"data_offsets": [8, 0]},
    ],
    ids=str,
)  # fmt: skip
def test_a_header_that_lies_is_refused(file: Path, entry: dict[str, Any]) -> None:
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    if entry.get("shape", [1])[0] == 0:  # of nothing, but beyond what torch counts with
        header["d2"] = {"dtype": "F32", "data_offsets": [len(data) - 8 - length] * 2} | entry
    else:
        header["d"] |= entry
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    refused(file)


# -- folders ---------------------------------------------------------------------------------------


@dataclass
class Run:
    """A model with trained adapters as `saved_model` gives it, and what it says."""

    task_model: TaskModel
    method: Method
    facts: AdapterFacts
    logits: Tensor
    pruned: dict[str, Tensor]
    scales: dict[str, float]


BATCH = Batch(
    input_ids=torch.tensor([[7, 9, 30, 12], [8, 6, 11, 0]]),
    attention_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
    lengths=torch.tensor([4, 3]),
    labels=torch.zeros(2, dtype=torch.long),
    row_ids=[0, 1],
)


@torch.no_grad()
def logits(task_model: TaskModel) -> Tensor:
    task_model.model.eval()
    found = task_model.logits(BATCH).float()
    return found if found.ndim == 2 else found * BATCH.attention_mask[:, :, None]


@torch.no_grad()
def as_trained(
    base: Path,
    task: str,
    pruned: bool = True,
    dtype: torch.dtype | str = "auto",
    method: dict[str, Any] | None = None,
) -> Run:
    source = resolve(Wanted("model", str(base)))
    spec = ModelSpec.model_validate({"name_or_path": str(base), "task": task})
    labels = Labels(["bad", "good"]) if task == "sequence-classification" else None
    torch.manual_seed(0)
    task_model, _ = load_model(source, spec, load_tokenizer(source, spec), labels, dtype)
    keys = {"name": "salor", "r": 4, "lora_alpha": 6} | (method or {})
    config = config_classes()[keys["name"]].model_validate(keys)
    built = build_method(config, 0)
    adapters = inject(
        task_model.model, built, match_targets(task_model.model, config, task_model.heads)
    )
    for parameter in train_heads(task_model):
        parameter += 0.3 * torch.randn_like(parameter)
    for number, adapter in enumerate(adapters.values()):
        in_features, out_features = in_out(adapter.base)
        rank = number % 5  # 0 among them
        parts = {
            "lora_A": thinned(rank, in_features, seed=number),
            "lora_B": thinned(out_features, rank, seed=99 + number),
        }
        if "gate" in adapter.component_dims:
            parts["gate"] = torch.rand(rank)
        adapter.load_tensors(parts)
        if pruned and number != 1:  # one layer stays whole
            mask, pair = torch.rand(out_features, in_features) < 0.5, None
            if number != 2:  # and one has no residual
                pair = torch.randn(3, in_features) / 4, torch.randn(out_features, 3) / 4
            adapter.set_base(PrunedBase(adapter.base.layer, mask, pair))
    facts = AdapterFacts(config.model_dump(mode="json", by_alias=True), task, labels, source)
    weights = {
        name: dense_weight(adapter.base).clone()
        for name, adapter in adapters.items()
        if adapter.base.is_changed
    }
    return Run(
        task_model,
        built,
        facts,
        logits(task_model),
        weights,
        {name: a.scale for name, a in adapters.items()},
    )


@pytest.fixture(params=TASKS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def exported(run: Run, folder: Path, dtype: torch.dtype | None = None) -> Path:
    folder.mkdir()
    write_sparse(folder, run.task_model, run.method, run.facts, dtype)
    return folder


PRUNED = {"model.safetensors", "base_config.json"}


@torch.no_grad()
def test_base_and_factors_make_the_runs_own_model(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """By hand, in plain transformers: W' + s · B A + B_r A_r."""
    run = as_trained(request.getfixturevalue(kind), TASKS[kind])
    folder = exported(run, tmp_path / "out")
    files = {path.name for path in folder.iterdir()}
    assert (
        files
        >= {
            "adapter_model.safetensors",
            "adapter_config.json",
            "lorakit.json",
            "tokenizer.json",
        }
        | PRUNED
    )
    assert "config.json" not in files
    model, tensors = load_base(folder), load_sparse(folder / "adapter_model.safetensors")
    assert not [name for name in tensors if name.endswith("base_mask")]
    for name, scale in run.scales.items():
        layer = model.get_submodule(name)
        update = (
            scale
            * tensors[f"{PREFIX}{name}.lora_B.weight"]
            @ tensors[f"{PREFIX}{name}.lora_A.weight"]
        )
        if f"{PREFIX}{name}.residual_A" in tensors:
            update += tensors[f"{PREFIX}{name}.residual_B"] @ tensors[f"{PREFIX}{name}.residual_A"]
        layer.weight += update.T if isinstance(layer, Conv1D) else update
    merged = TaskModel(
        model, run.task_model.tokenizer, task_named(TASKS[kind]), run.task_model.heads
    )  # type: ignore[arg-type]
    torch.testing.assert_close(logits(merged), run.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pruned", [True, False])
@pytest.mark.parametrize(
    "method",
    [
        {},
        {"name": "vanilla"},
        {"name": "l1ra"},
        {"name": "l1ra", "with": [{"name": "salor", "base": {"criterion": "magnitude"}}]},
    ],
    ids=["salor", "vanilla", "l1ra", "l1ra+salor"],
)
def test_the_model_comes_back_with_its_adapters(
    kind: str, pruned: bool, method: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = as_trained(request.getfixturevalue(kind), TASKS[kind], pruned, method=method)
    own = {name: adapter.own_tensors() for name, adapter in run.method.adapters.items()}
    folder = exported(run, tmp_path / "out")
    assert ({path.name for path in folder.iterdir()} >= PRUNED) is pruned
    task_model, found = load_sparse_model(folder)
    assert torch.equal(logits(task_model), run.logits)
    assert found.adapters.keys() == own.keys()
    for name, adapter in found.adapters.items():
        own[name].pop("base_mask", None)
        assert_same_bits(adapter.own_tensors(), own[name])
        assert adapter.scale == run.scales[name]
    for name, weight in run.pruned.items():
        assert torch.equal(dense_weight(found.adapters[name].base), weight)


def test_a_base_in_half_precision_stays_as_it_is(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The base's dtype is its own; adapters and heads have the one that was asked for; ties are
    tied again."""
    auto: Any = AutoModelForSequenceClassification if kind == "tiny_bert" else AutoModelForCausalLM
    half = auto.from_pretrained(request.getfixturevalue(kind), dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(request.getfixturevalue(kind)).save_pretrained(tmp_path / "half")
    run = as_trained(tmp_path / "half", TASKS[kind])
    heads = tuple(f"{head}." for head in run.task_model.heads)
    folder = exported(run, tmp_path / "out", torch.float16)
    expected = {
        n: p.detach() for n, p in run.task_model.model.named_parameters() if not n.startswith(heads)
    }
    # no head, and what is tied but once
    assert_same_bits(load_sparse(folder / "model.safetensors"), expected)
    assert {tensor.dtype for tensor in expected.values()} == {torch.bfloat16}
    assert {
        tensor.dtype for tensor in load_sparse(folder / "adapter_model.safetensors").values()
    } == {torch.float16}
    model = load_base(folder)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(torch.equal(p, expected[n]) for n, p in model.named_parameters() if n in expected)
    with torch.no_grad():
        model(BATCH.input_ids)
    if kind == "tiny_gpt2":
        assert model.lm_head.weight is model.transformer.wte.weight
    task_model, _ = load_sparse_model(folder)
    assert all(
        p.dtype == torch.float32
        for n, p in task_model.model.named_parameters()
        if n.startswith(heads) and heads
    )
    torch.testing.assert_close(logits(task_model), run.logits, rtol=0, atol=0.05)


def test_others_refuse_the_folder_instead_of_misreading_it(
    tiny_llama: Path, tmp_path: Path
) -> None:
    folder = exported(as_trained(tiny_llama, "causal-lm"), tmp_path / "out")
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORAKIT_SPARSE"
    with pytest.raises((ValueError, KeyError), match="LORAKIT_SPARSE"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), folder)
    autos = (AutoModelForCausalLM, LlamaForCausalLM)
    for auto in autos:  # with PEFT, transformers reads adapter_config.json first
        with pytest.raises((ValueError, KeyError), match="LORAKIT_SPARSE"):
            auto.from_pretrained(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises((OSError, ValueError), match=r"Unrecognized model"):
        AutoModelForCausalLM.from_pretrained(folder)


def damaged_base(folder: Path, change: Callable[[Parts], Parts]) -> None:
    file = folder / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_sparse(file).items()}
    save_sparse(change(weights), file)


def test_a_damaged_folder_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    folder = exported(as_trained(tiny_llama, "causal-lm"), tmp_path / "out")
    whole = (folder / "model.safetensors").read_bytes()
    changes: dict[str, Callable[[Parts], Parts]] = {
        r"`model\.norm\.weight` is missing": lambda w: {
            n: t for n, t in w.items() if n != "model.norm.weight"
        },
        "`more` is not in the model": lambda w: w | {"more": torch.ones(3)},
        r"`model\.norm\.weight` is not in the model, or has another shape": lambda w: (
            w | {"model.norm.weight": torch.ones(3)}
        ),
    }
    for words, change in changes.items():
        damaged_base(folder, change)
        with pytest.raises(RunError, match=words):
            load_base(folder)
        (folder / "model.safetensors").write_bytes(whole)
    load_base(folder)
    facts = (folder / "lorakit.json").read_text()
    for wrong in (
        facts.replace("causal-lm", "poetry"),
        facts.replace('"salor"', '"salat"'),
        facts.replace('"name"', '"nome"'),
    ):
        (folder / "lorakit.json").write_text(wrong)
        with pytest.raises(RunError, match="lorakit"):
            load_sparse_model(folder)
    (folder / "lorakit.json").write_text(facts)
    (folder / "base_config.json").unlink()
    with pytest.raises(RunError, match="base_config"):
        load_base(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(RunError, match=r"model\.safetensors"):
        load_base(folder)


@torch.no_grad()
def test_a_pruned_base_is_smaller_on_disk(tmp_path: Path) -> None:
    """Half of a matrix at zero, bf16: half of the values and a bit an entry."""
    weight = thinned(512, 512, dtype=torch.bfloat16, zeros=0.5)
    save_sparse({"w": weight}, tmp_path / "sparse")
    share = (tmp_path / "sparse").stat().st_size / weight.nbytes
    assert 0.55 < share < 0.57
