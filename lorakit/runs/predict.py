"""Prediction: the classes, with their probabilities, or the values that a run gives to texts."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lorakit.cpu.speed_up import speed_up
from lorakit.data.columns import listed
from lorakit.data.formats import chosen_texts
from lorakit.data.keys import ChosenSpec, DataKeys
from lorakit.data.labels import Labels
from lorakit.data.readers import read_file
from lorakit.data.table import Table
from lorakit.errors import UsageError
from lorakit.export.native import AdapterFacts
from lorakit.files import write_text
from lorakit.kernels.dispatch import announce
from lorakit.models.load import compute_dtype, default_device
from lorakit.models.task_model import TaskModel
from lorakit.models.tasks import task_named
from lorakit.recipes.recipe import Recipe, locating
from lorakit.report.output import try_output
from lorakit.report.progress import Progress
from lorakit.runs.moment import chosen
from lorakit.runs.saved import saved_model, saved_recipe, trained_columns
from lorakit.runs.session import check_rows, reading
from lorakit.runs.sets import data_sets
from lorakit.training.loop import evaluation_limits
from lorakit.training.metrics import class_logits

log = logging.getLogger("lorakit")
# Keys that a prediction may set.
SETTABLE = (
    *("data.text_columns=", "data.max_seq_length=", "data.truncation=", "data.cache="),
    *("train.per_device_eval_batch_size=", "train.max_tokens_per_micro_batch="),
    "train.precision=",
)
# From so many rows on, the processor's fast path saves more than the second that verifying takes.
SPED_UP = 1000
SUFFIXES = (".jsonl", ".csv")
Text = str | tuple[str, str]


@dataclass(frozen=True)
class Prediction:
    """The prediction for one row. row: its number, from 1; probabilities: {class: probability}, the
    likeliest first; value: of a regression, whose probabilities are {}."""

    row: int
    probabilities: dict[str, float]
    value: float | None = None

    @property
    def label(self) -> str | None:
        """The likeliest class."""
        return next(iter(self.probabilities), None)

    def as_json(self) -> dict[str, Any]:
        if self.value is not None:
            return {"row": self.row, "value": self.value}
        label = self.label
        assert label is not None
        likeliest = {"label": label, "probability": self.probabilities[label]}
        return {"row": self.row, **likeliest, "probabilities": self.probabilities}


def predict(
    run: Path,
    rows: Path | Sequence[str],
    progress: Progress,
    overrides: Sequence[str] = (),
    top: int | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """{run, rows, classes, predictions, and out if it is given}: a Prediction for every row, in
    their order.

    rows: a data file with the run's text columns, or texts; of a run on pairs, each two of them
    are one row. top: so many classes of each row instead of all; out: a .jsonl or .csv file that
    the predictions are written to. Raises UsageError for wrong use, before the model is loaded.
    """
    for override in overrides:
        if not override.startswith(SETTABLE):
            what = f"`{override}` can not be set for predictions"
            raise UsageError(what, f"What may be set: {listed(k.strip('=') for k in SETTABLE)}.")
    if out is not None:
        _try(out)
    run = chosen(run)
    recipe = saved_recipe(run, overrides)
    check_predicts(run, recipe)
    with locating(recipe):
        if isinstance(rows, Path):
            data, spec = _of_file(run, recipe, rows, overrides)
        else:
            data, spec = _of_texts(recipe, _paired(rows, texts_of(run)))
    device = default_device()
    announce(device)
    with progress.stage("loading the model"):
        dtype = compute_dtype(recipe.train.precision, device)
        task_model, method, facts = saved_model(run, recipe, dtype)
    if len(data) >= SPED_UP:
        for note in speed_up(task_model, method.adapters):
            log.info(note)
    found = predicted(task_model, facts, recipe, data, spec, progress, top)
    if out is not None:
        write_text(out, _lines(found, out.suffix.lower(), facts.labels))
    return {
        "run": str(run),
        "rows": len(found),
        "classes": facts.labels.names if facts.labels and not facts.labels.regression else None,
        "predictions": [one.as_json() for one in found],
        **({} if out is None else {"out": str(out)}),
    }


def check_predicts(run: Path, recipe: Recipe) -> None:
    """Raise UsageError for a run that predicts tokens."""
    if task_named(task := recipe.model.task).predicts_tokens:
        what = f"the run `{run}` is of {task}: it has no classes to predict"
        raise UsageError(what, "lorakit generate goes on with a text.")


def texts_of(run: Path) -> int:
    """The number of texts of a row: 1, or 2 for a pair; for a mix of data sets as in the first."""
    return len(trained_columns(run, saved_recipe(run), ())[0].get("columns") or [""])


def predict_texts(
    opened: tuple[TaskModel, Any, AdapterFacts],
    recipe: Recipe,
    texts: Sequence[Text],
    count: int,
    progress: Progress,
) -> list[Prediction]:
    """A Prediction for each text, or for each pair where `count` is 2, by a model that is loaded.
    Raises UsageError for rows of another shape."""
    rows = [(one,) if isinstance(one, str) else tuple(one) for one in texts]
    if wrong := next((row for row in rows if len(row) != count), None):
        what = f"the run reads {_shape(count)} a row, not {wrong!r}"
        raise UsageError(what, "Give texts, or pairs (text, text), as it was trained on.")
    if not rows:
        return []
    task_model, _, facts = opened
    return predicted(task_model, facts, recipe, *_of_texts(recipe, rows), progress)


def predicted(
    task_model: TaskModel,
    facts: AdapterFacts,
    recipe: Recipe,
    data: Table,
    spec: ChosenSpec,
    progress: Progress,
    top: int | None = None,
) -> list[Prediction]:
    """A Prediction for every row of `data`, read as `spec` says."""
    parts = (task_model.tokenizer, task_model.model.config, progress)
    with locating(recipe):
        with reading(recipe, spec, None, *parts) as reader:
            examples = reader.unlabelled(data)
        check_rows(task_model, examples, "given")
    with progress.stage("predicting") as advance:
        logits = class_logits(task_model, examples, *evaluation_limits(recipe.train), advance)
    assert facts.labels is not None
    return _predictions(logits, examples.row_ids.tolist(), facts.labels, top)


def _predictions(
    logits: NDArray[np.float64], numbers: list[int], labels: Labels, top: int | None
) -> list[Prediction]:
    if labels.regression:
        values = logits[:, 0].tolist()
        return [Prediction(row, {}, value) for row, value in zip(numbers, values, strict=True)]
    powers = np.exp(logits - logits.max(1, keepdims=True))
    shares = powers / powers.sum(1, keepdims=True)
    order = np.argsort(-shares, axis=1, kind="stable")[:, :top]
    found = zip(numbers, order.tolist(), shares.tolist(), strict=True)
    return [Prediction(n, {labels.names[i]: row[i] for i in best}) for n, best, row in found]


# -- rows ------------------------------------------------------------------------------------------


def _of_file(
    run: Path, recipe: Recipe, file: Path, overrides: Sequence[str]
) -> tuple[Table, ChosenSpec]:
    """The rows of a file, whatever labels it has."""
    if not file.is_file():
        what = f"`{file}` is {'a folder' if file.is_dir() else 'not there'}"
        raise UsageError(what, "Name a file of rows, - for standard input, or give --text.")
    data = read_file(file)
    if not len(data):
        raise UsageError(f"`{file}` has no rows", "Name a file with at least one.")
    records = trained_columns(run, recipe, overrides)
    # Of a mix, as the first set whose columns the file has.
    there = set(data.column_names)
    whole = [one for one in records if there.issuperset(one.get("columns") or [""])]
    record = [*whole, *records][0]
    columns = chosen_texts(data_sets(recipe)[0].spec, data.column_names, record)
    if len(columns) != (count := texts_of(run)):
        what = f"the run reads {_shape(count)}, and these are {_shape(len(columns))}: "
        remedy = f"Name {count} of {listed(data.column_names)} in data.text_columns."
        raise UsageError(what + listed(columns), remedy)
    return data, _spec(recipe, columns)


def _of_texts(recipe: Recipe, rows: Sequence[Sequence[str]]) -> tuple[Table, ChosenSpec]:
    """Rows of one text each, or of two."""
    names = ["text"] if len(rows[0]) == 1 else ["text1", "text2"]
    columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    table = Table.from_arrow(pa.table(columns))
    # What is typed once is not worth keeping.
    return table, _spec(recipe, names).model_copy(update={"cache": False})


def _spec(recipe: Recipe, columns: list[str]) -> ChosenSpec:
    # Every row gets its prediction, those that training would leave out as well.
    truncation = "cut" if recipe.data.truncation == "drop" else recipe.data.truncation
    read = {"format": "classification", "text_columns": columns, "label_column": None}
    spec = data_sets(recipe)[0].spec
    keys = {key: getattr(spec, key) for key in DataKeys.model_fields}
    return ChosenSpec.model_validate(keys | read | {"truncation": truncation})


def _paired(texts: Sequence[str], count: int) -> list[tuple[str, ...]]:
    if not texts:
        raise UsageError("there is no text", "Give at least one.")
    if len(texts) % count:
        what = f"the run reads {_shape(count)}, and these are {len(texts)} texts"
        raise UsageError(what, "Give --text twice for each pair.")
    return [tuple(texts[i : i + count]) for i in range(0, len(texts), count)]


def _shape(count: int) -> str:
    return "a pair of texts" if count == 2 else "a single text"


# -- the file --------------------------------------------------------------------------------------


def _try(out: Path) -> None:
    """Raise UsageError unless the file can be written."""
    if out.suffix.lower() not in SUFFIXES:
        what = f"predictions can not be written as `{out.name}`"
        raise UsageError(what, f"Give it a name that ends in {' or '.join(SUFFIXES)}.")
    remedy = "Name another file with --out."
    if not out.parent.is_dir():
        raise UsageError(f"`{out}` can not be written: its folder is not there", remedy)
    try_output(out, remedy)


def _lines(found: Sequence[Prediction], suffix: str, labels: Labels | None) -> str:
    """The content of a file: a JSON object a line, or a table with a column for each class."""
    if suffix == ".jsonl":
        return "".join(json.dumps(one.as_json(), ensure_ascii=False) + "\n" for one in found)
    assert labels is not None
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    if labels.regression:
        writer.writerow(["row", "value"])
        writer.writerows([one.row, one.value] for one in found)
    else:
        names = [f"probability of {name}" for name in labels.names]
        writer.writerow(["row", "label", "probability", *names])
        for one in found:
            shares = [one.probabilities.get(name) for name in labels.names]
            writer.writerow([one.row, one.label, one.probabilities[str(one.label)], *shares])
    return stream.getvalue()
