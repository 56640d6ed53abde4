"""The keys of the `data` section of a recipe, those of all formats together.

Each format says in its own file (lorakit/data/formats/) which of them it has; `lorakit.data.spec`
checks them by that.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lorakit.spec import Spec


class DataKeys(Spec):
    """Where the rows come from and how a row becomes an example."""

    name_or_path: str = Field(min_length=1)
    """A data set on the hub, `builtin/…`, a local folder with train and validation files, or one
    local file."""
    subset: str | None = None
    """The hub's configuration (GLUE: sst2, cola …), or a subfolder of a local folder."""
    offline: str | None = None
    """Source to use instead when, and only when, the hub can not be reached: `builtin/…` or a local
    path."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    train_split: str = "train"
    """Name of the training split."""
    validation_split: str | float | None = None
    """Name of the validation split, or the fraction of the training rows to hold out. By default
    the split named validation, dev or valid, or else a tenth. Held-out rows are the same whatever
    train.seed is: drawn by classes for classification, with rows of the same text or prompt on one
    side; the last lines of a text file."""
    format: str | None = None
    """Name of the format."""
    text_columns: str | list[str] | None = None
    """The text column, or the two columns of a pair. By default sentence, text, sentence1 +
    sentence2, premise + hypothesis …"""
    label_column: str | None = None
    """The label column. By default label or labels."""
    problem_type: Literal["single_label_classification", "regression"] | None = None
    """By default regression if the labels are numbers with fractions, else classification; it must
    be said where labels do not tell."""
    prompt: str | None = None
    """Template of the prompt over the columns, as "Question: {question}\\nAnswer: ". A field may
    name an item inside a column that holds lists or mappings, as in "{answers[text][0]}". By
    default the column prompt, instruction or question; with an input or context beside an
    instruction Stanford Alpaca's template, with a context or passage beside a question both."""
    completion: str | None = None
    """Template of the completion over the columns, as "{answer}"; the end-of-sequence token is
    added."""
    references: str | None = None
    """prompt-completion: the field that holds the accepted answers of a row, a list of texts, as
    "answers[text]"; for evaluation by generation. By default the completion. Rows with the same
    prompt share their references."""
    loss_on: str = "completion"
    """Which tokens are targets."""
    max_seq_length: int | None = Field(None, ge=1)
    """Longest example in tokens. By default what the model can read, at most 1024."""
    truncation: Literal["cut", "drop", "error"] = "cut"
    """Treatment of a row of more tokens than max_seq_length: it is cut, it is left out, or the run
    stops before training; the number of such rows is reported, and packed text, which is cut into
    pieces, has none."""
    packing: bool | None = None
    """text: join all rows and cut them into pieces of max_seq_length (the default for text),
    instead of one example a row."""
    stride: int | None = Field(None, ge=1)
    """text with packing: evaluate with a sliding window. Windows of max_seq_length move by so many
    tokens (less than max_seq_length), and each token is predicted once, from at least
    max_seq_length - stride tokens. The smaller the stride, the longer an evaluation takes. By
    default text is cut into pieces that do not overlap, and a piece's first tokens have little
    before them."""
    max_train_samples: int | None = Field(None, ge=1)
    """Use only so many training rows, drawn by classes for classification; the first lines of a
    text file."""
    max_eval_samples: int | None = Field(None, ge=1)
    """Use only so many validation rows, drawn in the same way."""
    cache: bool = True
    """Keep tokenised rows in lorakit's cache folder, for the next command that needs the very
    same."""


class ChosenSpec(DataKeys):
    """The section with the format, the columns and the templates that rows are read by, each of
    them named."""

    beside: str | None = None
    """The column that goes into the prompt beside its own, in rows where it is not empty."""
