"""Keys of a recipe's `data` section, for all formats together.

Each format lists in its own file (lorakit/data/formats/) the keys that apply to it, and
`lorakit.data.spec` checks them accordingly.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lorakit.spec import Spec

# Name of the data in the recipe of an adapter that was imported, whose data is not known.
NO_DATA = "./the-data-is-not-known"


class SetKeys(Spec):
    """Keys of one data set: where its rows come from, and the columns that they are read from."""

    name_or_path: str = Field(min_length=1)
    """A data set on the hub, `builtin/…`, a local file, or a local folder with train and validation
    files."""
    subset: str | None = None
    """The hub's configuration (GLUE: sst2, cola …), or a subfolder of a local folder."""
    offline: str | None = None
    """Source to use instead when, and only when, the hub cannot be reached: `builtin/…` or a local
    path."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    train_split: str = "train"
    """Name of the training split."""
    validation_split: str | float | None = None
    """Name of the validation split, or the fraction of the training rows to hold out. By default
    the split named validation, dev or valid, or else a tenth of the training rows. Held-out rows
    are the same for every train.seed. For classification they are drawn class by class, and rows
    with the same text or prompt stay on one side; of a text file they are the last lines."""
    format: str | None = None
    """Name of the format."""
    text_columns: str | list[str] | None = None
    """The text column, or the two columns of a pair. By default sentence, text, sentence1 +
    sentence2, premise + hypothesis …"""
    label_column: str | None = None
    """The label column. By default label or labels."""
    prompt: str | None = None
    """Template of the prompt over the columns, such as "Question: {question}\\nAnswer: ". A field
    may name an item inside a column that holds lists or mappings, such as "{answers[text][0]}". By
    default the column prompt, instruction or question; an instruction with a context is put into
    Stanford Alpaca's template, and a context or passage is put before a question."""
    completion: str | None = None
    """Template of the completion over the columns, such as "{answer}"; the end-of-sequence token is
    added."""
    references: str | None = None
    """prompt-completion: the field with the accepted answers of a row, a list of texts, such as
    "answers[text]"; for evaluation by generation. By default the completion. Rows with the same
    prompt share their references."""
    column_map: dict[str, str] | None = None
    """chat, sharegpt, alpaca: names of columns that are called otherwise, as {messages: dialogue}.
    chat reads messages (or conversations) and tools; sharegpt conversations, system and tools;
    alpaca instruction, input, output, system and history."""
    message_keys: dict[str, str] | None = None
    """chat, sharegpt: names of the parts of a message that are called otherwise, as {role: speaker,
    content: text}. By default role or from, and content or value."""
    roles: dict[str, str] | None = None
    """chat, sharegpt: what else speakers are called, as {customer: user, agent: assistant}. human
    is user, and gpt, bot and model are assistant, without this key."""
    loss_on: str | None = None
    """The tokens that are targets."""
    max_train_samples: int | None = Field(None, ge=1)
    """Maximum number of training rows, drawn class by class for classification; the first lines of
    a text file."""
    max_eval_samples: int | None = Field(None, ge=1)
    """Maximum number of validation rows, drawn in the same way."""


class DataKeys(SetKeys):
    """The source of the rows, and how a row becomes an example."""

    problem_type: Literal["single_label_classification", "regression"] | None = None
    """By default regression if the labels are numbers with fractions, else classification; required
    where the labels are ambiguous."""
    chat_template: str | None = None
    """chat, sharegpt, alpaca: chatml, alpaca, or a file with a template in Jinja, which the adapter
    then carries. By default the tokenizer's own; for alpaca Stanford Alpaca's."""
    max_seq_length: int | None = Field(None, ge=1)
    """Longest example in tokens. By default the longest input of the model, at most 1024."""
    truncation: Literal["cut", "drop", "error"] = "cut"
    """Treatment of a row with more than max_seq_length tokens: cut it, leave it out, or stop before
    training. The number of such rows is reported. Packed text is cut into pieces and has none."""
    packing: bool | Literal["joined", "documents"] | None = None
    """text: joined (or true, the default) joins all rows and cuts them into pieces of
    max_seq_length, whose tokens see what comes before them, of whatever row. documents puts rows
    together into packs of at most max_seq_length whose rows do not see each other; a longer row is
    cut into pieces, and nothing is lost. A batch counts packs. false: one example per row."""
    stride: int | None = Field(None, ge=1)
    """text with packing: joined: evaluate with a sliding window. Windows of max_seq_length tokens
    move by this many tokens (less than max_seq_length), and each token is predicted once, from at
    least max_seq_length - stride tokens. A smaller stride makes evaluation slower. By default the
    pieces do not overlap, and the first tokens of a piece have little context."""
    streaming: bool | Literal["auto"] = "auto"
    """Read a split in blocks and keep its tokens in files of lorakit's cache folder, which training
    reads from: memory is bounded, whatever the size of the data. Rows, their order and the results
    are the same. auto: for splits of more than 64 MB. A .json file is read whole; .jsonl is not."""
    cache: bool = True
    """Keep tokenised rows in lorakit's cache folder, for later commands that need exactly the same
    ones."""


class ChosenSpec(DataKeys):
    """The section with the chosen format, columns and templates, all of them explicit."""

    beside: str | None = None
    """The column that is combined with the prompt's own column, in rows where it is not empty."""
