"""Metrics against scikit-learn, scipy and plain loops."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
import torch
from scipy import stats
from torch.nn.functional import cross_entropy

from lorakit.cli.common import say_json
from lorakit.data.batches import Batch, collate
from lorakit.data.choice import choose
from lorakit.data.examples import Examples
from lorakit.data.labels import Labels
from lorakit.data.load import Rows
from lorakit.data.reading import Reader
from lorakit.data.spec import DataSpec
from lorakit.data.table import Table
from lorakit.models.load import load_model
from lorakit.models.spec import ModelSpec
from lorakit.models.task_model import TaskModel
from lorakit.models.tasks import task_named
from lorakit.models.tokenizer import load_tokenizer
from lorakit.recipes.recipe import load_recipe
from lorakit.report.summary import metric_value
from lorakit.runs.session import reported_metrics
from lorakit.sources.resolve import Source
from lorakit.training.metrics import Evaluation, evaluate, is_better, metric_names

TASKS = ["cola", "sst2", "mrpc", "qqp", "mnli", "qnli", "rte", "wnli"]


class Fixed(TaskModel):
    """Says for each row what it was told to: its answer stands in the row's first token."""

    pad_id = 0

    def __init__(self, answers: torch.Tensor) -> None:
        super().__init__(torch.nn.Linear(1, 1), None, task_named("sequence-classification"), [])
        self.answers = answers  # [rows, classes], or [rows, 1] for regression
        self.seen: list[tuple[int, int]] = []  # rows and longest of each batch

    def logits(self, batch: Batch) -> torch.Tensor:
        self.seen.append((batch.input_ids.shape[0], batch.input_ids.shape[1]))
        return self.answers[batch.input_ids[:, 0]]


def rows(labels: np.ndarray[Any, Any]) -> Examples:
    """One row a label: its number, and padding of a random length."""
    lengths = np.random.default_rng(1).integers(1, 9, len(labels))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.zeros(offsets[-1], np.int32)
    tokens[offsets[:-1]] = np.arange(len(labels))
    return Examples(tokens, offsets, np.arange(len(labels)), labels=labels)


def found(
    labels: np.ndarray[Any, Any],
    logits: np.ndarray[Any, Any],
    subset: str | None,
    regression: bool = False,
) -> Evaluation:
    names = metric_names(
        Labels(regression=True) if regression else Labels(["a"] * logits.shape[1]), subset
    )
    return evaluate(Fixed(torch.from_numpy(logits)), rows(labels), names, batch_size=7)


def test_batches_keep_to_both_limits_and_change_no_metric() -> None:
    labels, logits = np.arange(101) % 2, np.random.default_rng(0).standard_normal((101, 2))
    names, everything = metric_names(Labels(["a", "b"]), "sst2"), []
    for size, tokens in ((7, None), (7, 20), (101, 20), (101, 5)):
        model = Fixed(torch.from_numpy(logits))
        everything.append(evaluate(model, rows(labels), names, size, tokens))
        assert sum(count for count, _ in model.seen) == 101
        assert all(count == 1 or count <= size for count, _ in model.seen)
        assert all(
            count == 1 or count * longest <= (tokens or 10**9) for count, longest in model.seen
        )
    for one in everything[1:]:
        assert one.metrics == pytest.approx(everything[0].metrics)
        assert one.predictions is not None
        assert everything[0].predictions is not None
        assert one.predictions.tolist() == everything[0].predictions.tolist()


@pytest.mark.parametrize("subset", TASKS)
@pytest.mark.parametrize("seed", range(3))
def test_classification_metrics_are_those_of_scikit_learn(subset: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    classes = 3 if subset == "mnli" else 2
    labels = rng.integers(0, classes, 101)
    logits = rng.normal(size=(101, classes)).astype(np.float32)
    evaluation = found(labels, logits, subset)
    predictions = logits.argmax(1)
    assert evaluation.predictions is not None
    assert evaluation.predictions.tolist() == predictions.tolist()
    average = "binary" if classes == 2 else "macro"
    expected = {
        "accuracy": (labels == predictions).mean(),
        "f1": sklearn.metrics.f1_score(labels, predictions, average=average),
        "matthews_correlation": sklearn.metrics.matthews_corrcoef(labels, predictions),
        "loss": sklearn.metrics.log_loss(
            labels, torch.from_numpy(logits).double().softmax(1).numpy()
        ),
    }
    assert evaluation.metrics == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_regression_metrics_are_those_of_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.uniform(0, 5, 101).astype(np.float32)
    values = (labels + rng.normal(size=101)).astype(np.float32)
    evaluation = found(labels, values[:, None], "stsb", regression=True)
    error = float(((labels - values) ** 2).mean())
    expected = {
        "pearson": np.corrcoef(labels, values)[0, 1],
        "spearmanr": np.corrcoef(stats.rankdata(labels), stats.rankdata(values))[0, 1],
        "mean_squared_error": error,
        "loss": error,
    }
    assert list(evaluation.metrics) == list(expected)
    assert evaluation.metrics == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("subset", "official"),
    [
        ("cola", "matthews_correlation"),
        ("sst2", "accuracy"),
        ("mrpc", "f1"),
        ("qqp", "f1"),
        ("mnli", "accuracy"),
        ("rte", "accuracy"),
        ("something else", "accuracy"),
        (None, "accuracy"),
    ],
)
def test_the_official_metric_of_a_task_comes_first(subset: str | None, official: str) -> None:
    names = metric_names(Labels(["a", "b"]), subset)
    assert names[0] == official
    assert set(names) == {"accuracy", "f1", "matthews_correlation", "loss"}
    assert len(names) == 4
    assert metric_names(Labels(regression=True), subset)[:2] == ("pearson", "spearmanr")
    assert metric_names(None, subset) == ("loss", "perplexity")


def test_a_local_copy_of_cola_is_known_by_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    text = (
        "model: {name_or_path: x/y, task: sequence-classification}\nmethod: {name: vanilla}\ndata:"
        " {name_or_path: %s}\n"
    )
    for place, subset in (("./glue", "cola"), ("./glue/cola", "null")):
        path.write_text(text % place)
        assert (
            reported_metrics(load_recipe(path, [f"data.subset={subset}"]), Labels(["0", "1"]))[0]
            == "matthews_correlation"
        )
    recipe = load_recipe(path, ["train.metric_for_best_model=eval_f1"])
    assert reported_metrics(recipe, Labels(["0", "1"])) == (
        "f1",
        "matthews_correlation",
        "accuracy",
        "loss",
    )


@pytest.mark.parametrize("answer", [0, 1])
@pytest.mark.filterwarnings("error")
def test_constant_predictions_have_every_metric_and_no_warning(answer: int) -> None:
    labels = np.array([0, 1, 1, 0, 1])
    logits = np.zeros((5, 2), np.float32)
    logits[:, answer] = 1.0
    metrics = found(labels, logits, "cola").metrics
    assert metrics["matthews_correlation"] == 0.0
    assert metrics["accuracy"] == pytest.approx((2 / 5, 3 / 5)[answer])
    assert metrics["f1"] == pytest.approx((0.0, 0.75)[answer])


@pytest.mark.filterwarnings("error")
def test_the_correlation_with_a_constant_is_undefined_as_in_scipy() -> None:
    labels = np.array([0, 1, 1, 0, 1], np.float32)
    cases = [(labels, np.ones(5)), (np.ones(5), labels), (labels[:1], labels[:1])]
    for right, values in cases:
        metrics = found(
            right.astype(np.float32), values.astype(np.float32)[:, None], "stsb", regression=True
        ).metrics
        assert math.isnan(metrics["pearson"])
        assert math.isnan(metrics["spearmanr"])
        assert metrics["mean_squared_error"] == pytest.approx(float(np.mean((right - values) ** 2)))
        assert not is_better("pearson", metrics["pearson"], None)
    with pytest.warns(stats.ConstantInputWarning):
        assert math.isnan(stats.pearsonr(*cases[0]).statistic)
    with pytest.warns(stats.ConstantInputWarning):
        assert math.isnan(stats.spearmanr(*cases[0]).statistic)


def test_what_is_undefined_is_null_in_json_and_said_in_words(
    capsys: pytest.CaptureFixture[str],
) -> None:
    say_json({"metrics": {"pearson": math.nan, "loss": 0.5}})
    assert capsys.readouterr().out == '{"metrics": {"pearson": null, "loss": 0.5}}\n'
    assert [metric_value(value, ".4f") for value in (math.nan, None, 0.5, 3)] == [
        "undefined",
        "undefined",
        "0.5000",
        "3",
    ]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("label", [0, 1])
def test_data_of_a_single_label_has_every_metric_and_no_warning(label: int) -> None:
    logits = np.zeros((5, 2), np.float32)
    logits[:, label] = 1.0
    metrics = found(np.full(5, label), logits, "sst2").metrics
    assert metrics["accuracy"] == 1.0
    assert all(math.isfinite(value) for value in metrics.values())


def test_f1_of_three_classes_is_macro_whichever_of_them_turn_up() -> None:
    """Else one run would compare two kinds of F1, by what an evaluation happens to predict."""
    labels = np.array([0, 1, 1, 0, 1])
    logits = np.eye(3, dtype=np.float32)[[0, 0, 0, 0, 1]]
    expected = sklearn.metrics.f1_score(labels, logits.argmax(1), average="macro")
    assert found(labels, logits, "mnli").metrics["f1"] == pytest.approx(expected)


def test_which_value_is_better() -> None:
    assert is_better("accuracy", 0.1, None)
    assert is_better("accuracy", 0.6, 0.5)
    assert not is_better("accuracy", 0.5, 0.5)
    assert is_better("loss", 0.4, 0.5)
    assert is_better("perplexity", 4.0, 5.0)
    assert is_better("mean_squared_error", 0.4, 0.5)
    assert not is_better("loss", 0.6, 0.5)
    assert not any(
        is_better(name, math.nan, best) for name in ("accuracy", "loss") for best in (None, 0.5)
    )


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_perplexity_weighs_every_token_alike(tiny_llama: Path, batch_size: int) -> None:
    """Against transformers on each row alone: a long row counts for more than a short one, padding
    for nothing."""
    source = Source("x", "x", "local", str(tiny_llama))
    task = ModelSpec.model_validate({"name_or_path": "x", "task": "causal-lm"})
    tokenizer = load_tokenizer(source, task)
    task_model, _ = load_model(source, task, tokenizer, None, torch.float32)
    data = Table.from_list(
        [
            {"question": "how many " * (i % 5 + 1), "answer": "hens " * (i * i % 17 + 1)}
            for i in range(23)
        ]
    )
    spec = DataSpec.model_validate({"name_or_path": "x"})
    chosen = choose(spec, "causal-lm", data.column_names)
    examples = Reader(None, chosen, tokenizer, 64, lambda *_: None).validation(Rows(data, data))
    total, targets = 0.0, 0
    with torch.inference_mode():
        for row in range(len(examples)):
            batch = collate(examples, np.array([row]), 0)
            logits = task_model.model(input_ids=batch.input_ids).logits[0].double()
            losses = cross_entropy(
                logits[:-1], batch.labels[0, 1:], ignore_index=-100, reduction="none"
            )
            total, targets = (
                total + float(losses.sum()),
                targets + int((batch.labels[0, 1:] != -100).sum()),
            )
    metrics = evaluate(task_model, examples, metric_names(None, None), batch_size).metrics
    assert metrics["loss"] == pytest.approx(total / targets, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(total / targets), rel=1e-4)
