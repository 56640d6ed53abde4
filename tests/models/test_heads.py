"""A base that is a classifier already: its head is used for the classes that it was trained for,
and for no others."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)

from lorakit.cli import main
from lorakit.data.labels import Labels, count_labels, label_ids
from lorakit.data.spec import DataSpec
from lorakit.data.table import Table
from lorakit.models.heads import fit_head
from lorakit.models.load import load_model
from lorakit.models.spec import ModelSpec
from lorakit.models.tokenizer import load_tokenizer
from lorakit.sources.resolve import Source
from tests.support.tiny import BAD, GOOD, VOCABULARY, tokenizer, write_jsonl

Call = Callable[..., str]
OTHER = ["film", "plot", "cast", "scene", "joke", "song"]
WORDS = {"bad": BAD, "good": GOOD, "other": OTHER}  # a text of one such word is of the class


def config(names: Sequence[str], architecture: str = "BertForSequenceClassification") -> BertConfig:
    return BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        architectures=[architecture],
    )


@pytest.fixture(scope="module")
def classifier(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Sequence[str], Sequence[str]], Path]:
    """A folder with a BERT that tells the kinds of words apart, all of them rightly: (kinds in the
    order of its classes, their names) → folder. Trained once, for each order."""
    trained: dict[tuple[str, ...], BertForSequenceClassification] = {}

    def make(kinds: Sequence[str], names: Sequence[str]) -> Path:
        words = [(VOCABULARY[word], i) for i, kind in enumerate(kinds) for word in WORDS[kind]]
        if tuple(kinds) not in trained:
            torch.manual_seed(0)
            model = BertForSequenceClassification(config(names)).train()
            frame = (VOCABULARY["[CLS]"], VOCABULARY["[SEP]"])
            ids = torch.tensor([[frame[0], word, frame[1]] for word, _ in words])
            labels = torch.tensor([label for _, label in words])
            optimizer = torch.optim.Adam(model.parameters(), 3e-3)
            for _ in range(60):
                optimizer.zero_grad()
                output = model(input_ids=ids, labels=labels)
                output.loss.backward()
                optimizer.step()
            assert (model.eval()(input_ids=ids).logits.argmax(1) == labels).all()
            trained[tuple(kinds)] = model
        model = trained[tuple(kinds)]
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: i for i, name in enumerate(names)}
        folder = tmp_path_factory.mktemp("classifier")
        model.save_pretrained(folder)
        tokenizer(pair=True).save_pretrained(folder)
        return folder

    return make


def recipe_of(folder: Path, model: Path, labels: dict[str, str | int]) -> Path:
    """A recipe whose first evaluation is of the base; labels: what the data calls the kinds of
    words."""
    rows = [
        {"text": word, "label": label} for kind, label in labels.items() for word in WORDS[kind][:6]
    ]
    for split in ("train", "validation"):
        write_jsonl(folder / f"{split}.jsonl", rows)
    path = folder / "recipe.yaml"
    path.write_text(
        f"model: {{name_or_path: {model}, task: sequence-classification}}\ndata: {{name_or_path:"
        f" {folder}}}\nmethod: {{name: vanilla, r: 2}}\ntrain: {{max_steps: 1, precision: fp32,"
        f" eval_on_start: true, learning_rate: 1e-9}}\noutput_dir: {folder / 'run'}\n"
    )
    return path


@pytest.mark.parametrize(
    ("kinds", "names", "labels"),
    [
        (["bad", "good"], ["bad", "good"], {"bad": "bad", "good": "good"}),
        (["good", "bad"], ["good", "bad"], {"bad": "bad", "good": "good"}),
        (["good", "bad"], ["POSITIVE", "NEGATIVE"], {"bad": "negative", "good": "positive"}),
        (["other", "bad", "good"], ["z", "y", "x"], {"bad": "y", "good": "x", "other": "z"}),
        (["bad", "good"], ["LABEL_0", "LABEL_1"], {"bad": 0, "good": 1}),
        (["bad", "good"], ["LABEL_0", "LABEL_1"], {"bad": "a", "good": "b"}),
        (["good", "bad"], ["positive", "negative"], {"good": 0, "bad": 1}),
        (["good", "bad"], ["1", "0"], {"bad": "0", "good": "1"}),
    ],
)
def test_a_trained_head_is_right_before_the_first_step(
    classifier: Callable[..., Path],
    kinds: list[str],
    names: list[str],
    labels: dict[str, str | int],
    tmp_path: Path,
    call: Call,
) -> None:
    call("train", recipe_of(tmp_path, classifier(kinds, names), labels))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert next(line for line in lines if "eval_accuracy" in line)["eval_accuracy"] == 1.0
    evaluated = json.loads(call("eval", tmp_path / "run", "--json"))
    assert evaluated["metrics"]["accuracy"] == 1.0
    call("export", tmp_path / "run", "--merge", "--out", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    for kind, label in labels.items():
        ids = torch.tensor([[VOCABULARY["[CLS]"], VOCABULARY[WORDS[kind][0]], VOCABULARY["[SEP]"]]])
        assert merged.config.id2label[int(merged(input_ids=ids).logits.argmax())] == str(label)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (
            {"bad": "dull", "good": "funny"},
            "a classifier of other classes (good, bad) than dull, funny: a new head is started",
        ),
        ({"bad": "bad", "good": "good"}, "they are numbered as there, good, bad"),
    ],
)
def test_what_becomes_of_the_head_is_said(
    classifier: Callable[..., Path],
    labels: dict[str, str | int],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = recipe_of(tmp_path, classifier(["good", "bad"], ["good", "bad"]), labels)
    monkeypatch.setattr(sys, "argv", ["lorakit", "train", str(path), "--dry-run"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert not exit_.value.code
    assert said in " ".join(capfd.readouterr().err.split())


def test_classes_of_other_names_get_a_new_head(classifier: Callable[..., Path]) -> None:
    folder = classifier(["bad", "good"], ["bad", "good"])
    spec = ModelSpec.model_validate(
        {"name_or_path": str(folder), "task": "sequence-classification"}
    )
    source = Source(str(folder), str(folder), "local", str(folder))
    own = AutoModelForSequenceClassification.from_pretrained(folder).classifier.weight
    weights = []
    for names in (["bad", "good"], ["dull", "funny"]):
        torch.manual_seed(1)
        model = load_model(
            source, spec, load_tokenizer(source, spec), Labels(names), torch.float32
        )[0].model
        weights.append(model.classifier.weight)
        assert names == ["bad", "good"] or not model.classifier.bias.any()
    assert torch.equal(weights[0], own)
    assert 0.01 < float(weights[1].detach().std()) < 0.03
    assert not torch.isclose(weights[1], own).any()


@pytest.mark.parametrize(
    ("base", "names", "ordered", "used", "said"),
    [
        (["b", "a"], ["a", "b"], ["b", "a"], True, "numbered as there, b, a"),
        (["a", "b"], ["a", "b"], ["a", "b"], True, None),
        (["B", "A"], ["a", "b"], ["b", "a"], True, "numbered as there, b, a"),
        (["LABEL_0", "LABEL_1"], ["a", "b"], ["a", "b"], True, "LABEL_0 is a, LABEL_1 is b"),
        (["LABEL_0", "LABEL_1"], ["0", "1"], ["0", "1"], True, None),
        (
            ["LABEL_1", "LABEL_0"],
            ["LABEL_0", "LABEL_1"],
            ["LABEL_1", "LABEL_0"],
            True,
            "numbered as there",
        ),
        (["x", "y"], ["0", "1"], ["0", "1"], True, "x is 0, y is 1"),
        (["x", "y"], ["1", "2"], ["1", "2"], False, "a new head is started"),
        (["x", "y"], ["x", "z"], ["x", "z"], False, "a new head is started"),
        (["A", "a"], ["a", "b"], ["a", "b"], False, "a new head is started"),
        (["x", "y", "z"], ["y", "x"], ["y", "x"], True, None),
    ],
)
def test_classes_are_matched_by_name_or_by_number(
    base: list[str], names: list[str], ordered: list[str], used: bool, said: str | None
) -> None:
    found, kept, words = fit_head(Labels(names), config(base))
    assert (found.names, kept) == (ordered, used)
    assert words is None if said is None else said in str(words)
    # Names in the configuration of a model without a head say nothing.
    assert fit_head(Labels(names), config(base, "BertModel")) == (Labels(names), True, None)
    assert fit_head(Labels(regression=True), config(base)) == (Labels(regression=True), True, None)


def test_numbers_of_glue_are_its_classes_in_any_order_of_a_head() -> None:
    spec = DataSpec.model_validate({"name_or_path": "./mnli"})
    data = Table.from_list([{"premise": "a", "hypothesis": "b", "label": i} for i in (0, 1, 2, 0)])
    labels = count_labels(data, spec)
    theirs, _, _ = fit_head(labels, config(["CONTRADICTION", "NEUTRAL", "ENTAILMENT"]))
    assert theirs.names == ["contradiction", "neutral", "entailment"]
    assert label_ids(data, labels, spec, "training").tolist() == [0, 1, 2, 0]
    assert label_ids(data, theirs, spec, "training").tolist() == [2, 1, 0, 2]
