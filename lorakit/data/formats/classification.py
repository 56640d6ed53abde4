"""Format `classification`: a text, or a pair of texts, and a label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lorakit.data import labels as labelling
from lorakit.data.collect import Made
from lorakit.data.columns import field_texts, first_of, listed, text_columns
from lorakit.data.examples import Examples
from lorakit.data.formats._base import (
    Format,
    Record,
    Split,
    chosen_texts,
    named_texts,
    say_stand_in,
    text_keys,
)
from lorakit.data.keys import ChosenSpec, DataKeys
from lorakit.data.labels import LABELS, Labels, label_column
from lorakit.data.table import Table
from lorakit.data.tokenise import Tokeniser
from lorakit.errors import RecipeError


class Classification(Format):
    """One example per row: one text or two, with a class or a number as its target."""

    name = "classification"
    task = "sequence-classification"
    keys = ("text_columns", "label_column", "problem_type")
    predicts_tokens = False
    told_by = ("a text and a label column",)
    when_cut = "are cut"

    def chosen(self, spec: DataKeys, columns: Sequence[str], record: Record) -> dict[str, Any]:
        texts = chosen_texts(spec, columns, record)
        return {"text_columns": texts, "label_column": _chosen_label(spec, columns, record)}

    def used_columns(self, spec: ChosenSpec, columns: Sequence[str]) -> list[str]:
        found, label = text_columns(spec, columns), label_column(spec, columns)
        if label in found:
            what = f"`{label}` is the label column (data.label_column)"
            raise RecipeError.at("data.text_columns", what, "the column of the text")
        return [*found, label]

    def naming_keys(self, spec: ChosenSpec, columns: Sequence[str]) -> dict[str, str]:
        label = {spec.label_column: "data.label_column"} if spec.label_column else {}
        return named_texts(spec) | label

    def input_keys(self, data: Table, spec: ChosenSpec) -> list[Any]:
        return text_keys(data, spec)

    def strata(self, data: Table, spec: ChosenSpec) -> list[str] | None:
        return labelling.class_strata(data, spec)

    def check_labels(self, data: Table, spec: ChosenSpec) -> None:
        labelling.check_labels(data, spec)

    def count_labels(self, train: Table, spec: ChosenSpec) -> Labels:
        return labelling.count_labels(train, spec)

    def read(self, split: Split) -> Made:
        """Without `split.labels` the rows need none, and all have the label 0. Raises RecipeError
        for a row without tokens, from which no class can be read."""
        data, spec = split.data, split.spec
        columns = text_columns(spec, data.column_names)
        answers = np.zeros(len(data), np.int64)
        if split.labels is not None:
            answers = labelling.label_ids(data, split.labels, spec, split.name)
        rows, tokeniser = split.collector(), Tokeniser(split.tokenizer)
        for start, block in data.blocks():
            texts = [field_texts(block, column, "data.text_columns") for column in columns]
            for row, one in enumerate(tokeniser.classified(texts, split.max_length)):
                if not one.ids:
                    where = f"{block.place(row)} has no text in "
                    where += " and ".join(f"`{column}`" for column in columns)
                    what = f"{where} that the tokenizer has a token for"
                    raise RecipeError.at("data.text_columns", what, "at least a word in every row")
                if not any(column[row].strip() for column in texts):
                    rows.count("textless", start + row)
                rows.add(start + row, one.ids, one.length, types=one.types)
            rows.end_block(tokeniser, texts, start)
            split.progress(len(block))
        return rows.made(labels=answers)

    def check_examples(self, examples: Examples, data: Table, tokenizer: Any, config: Any) -> None:
        """Raises RecipeError where an encoder-decoder, which reads the class at the end-of-sequence
        token, gets a row without that token."""
        end = getattr(config, "eos_token_id", None)
        if not config.is_encoder_decoder or not isinstance(end, int):
            return
        present = np.zeros(len(examples), bool)
        places = np.flatnonzero(examples.tokens == end)
        present[np.searchsorted(examples.offsets, places, side="right") - 1] = True
        if not present.all():
            row = int(examples.row_ids[int(np.argmin(present))])
            name = tokenizer.convert_ids_to_tokens(end)
            where = f"{data.place(row)} has no `{name}` (id {end})"
            what = f"{where}, at which the model reads the class"
            expected = "a tokenizer that ends every text with it"
            raise RecipeError.at("model.name_or_path", what, expected)


def _chosen_label(spec: DataKeys, columns: Sequence[str], record: Record) -> str:
    named = record.get("label_column")
    if spec.label_column is not None or named is None:
        return label_column(spec, columns)
    if named in columns:
        return str(named)
    if first_of(columns, LABELS) is None:
        raise RecipeError.at(
            "data.label_column",
            f"the run's label column `{named}` is not among {listed(columns)}",
            "the name of the label column as data.label_column",
        )
    found = label_column(spec, columns)
    say_stand_in("data.label_column", [named], [found])
    return found


FORMAT = Classification()
