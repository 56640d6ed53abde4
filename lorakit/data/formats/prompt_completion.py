"""Format `prompt-completion`: a prompt, and the text to write after it.

Without `data.prompt` the prompt is the column prompt, instruction or question. An `input` or
`context` beside an instruction is combined with it as in Stanford Alpaca
(github.com/tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT); a `context` or `passage` beside a
prompt or a question is put before it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from lorakit.data.cells import NOTHING, Kind
from lorakit.data.collect import Made
from lorakit.data.columns import (
    column_of,
    field_cells,
    field_text_lists,
    first_of,
    listed,
    render,
    template_columns,
)
from lorakit.data.formats._base import Format, Question, Record, Split, are_there, say_stand_in
from lorakit.data.keys import ChosenSpec, DataKeys
from lorakit.data.table import Table
from lorakit.data.tokenise import Tokeniser
from lorakit.errors import RecipeError

log = logging.getLogger("lorakit")

PROMPTS = ("prompt", "instruction", "question")
COMPLETIONS = ("completion", "response", "output", "answer")
# Columns that may accompany the prompt's column, and the template of the two. Rows in which the
# second is empty use the prompt's column alone.
BESIDE = {
    "instruction": ("input", "context"),
    "prompt": ("context", "passage"),
    "question": ("context", "passage"),
}
ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further"
    " context. Write a response that appropriately completes the request.\n\n###"
    " Instruction:\n{%s}\n\n### Input:\n{%s}\n\n### Response:"
)
ALPACA_ALONE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes"
    " the request.\n\n### Instruction:\n{%s}\n\n### Response:"
)


class PromptCompletion(Format):
    """One example per row: the prompt, the completion, and the end-of-sequence token."""

    name = "prompt-completion"
    task = "causal-lm"
    keys = ("prompt", "completion", "references", "loss_on")
    column_keys = "data.prompt or data.completion"
    losses = ("completion", "all")
    told_by = ("a prompt and a completion column", "data.prompt and data.completion as templates")
    called_elsewhere = dict.fromkeys(("sft", "prompt_completion"))
    has_questions = True
    when_cut = "are cut: they lose their end, and nobody learns from them where to stop"

    def detects(self, spec: DataKeys, columns: Sequence[str]) -> bool:
        if spec.prompt is not None or spec.completion is not None:
            return True
        return bool(first_of(columns, PROMPTS) and first_of(columns, COMPLETIONS))

    def is_recorded(self, record: Record, columns: Sequence[str]) -> bool:
        prompt = record.get("prompt")
        return (
            record.get("format") == self.name
            and prompt is not None
            and _is_there(prompt, "data.prompt", columns)
        )

    def chosen(self, spec: DataKeys, columns: Sequence[str], record: Record) -> dict[str, Any]:
        return _templates(spec, columns, record)

    def say_choice(self, spec: ChosenSpec, columns: Sequence[str]) -> None:
        """Log a line where the prompt is made of two columns that the recipe does not name."""
        if spec.beside in columns and spec.beside is not None and spec.prompt is not None:
            both, _ = _with_beside(spec.prompt[1:-1], spec.beside)
            message = "the prompt is %r, without `%s` where it is empty; data.prompt sets another"
            log.info(message, both, spec.beside)

    def used_columns(self, spec: ChosenSpec, columns: Sequence[str]) -> list[str]:
        found = template_columns(spec.prompt, "data.prompt", columns)
        # Rows with references can be evaluated without a completion.
        required = spec.references is None
        found += template_columns(spec.completion, "data.completion", columns, required)
        if spec.references is not None:
            found.append(column_of(spec.references, columns))
        return list(dict.fromkeys([*found, *([spec.beside] if spec.beside else [])]))

    def naming_keys(self, spec: ChosenSpec, columns: Sequence[str]) -> dict[str, str]:
        """Leaves out the completion's columns where rows have references, which evaluation uses
        instead."""
        found = dict.fromkeys(_fields(spec.prompt, "data.prompt", columns), "data.prompt")
        found |= {spec.beside: "data.prompt"} if spec.beside else {}
        if spec.references is not None:
            return found | {column_of(spec.references, columns): "data.references"}
        fields = _fields(spec.completion, "data.completion", columns)
        return found | dict.fromkeys(fields, "data.completion")

    def input_keys(self, data: Table, spec: ChosenSpec) -> list[Any]:
        return list(prompts(data, spec))

    def questions(self, data: Table, spec: ChosenSpec, tokenizer: Any) -> list[Question]:
        """References are the texts of `data.references`, by default the completion."""
        if spec.references is not None:
            accepted = field_text_lists(data, spec.references, "data.references")
        else:
            accepted = [[completion] for completion in completions(data, spec)]
        found: dict[str, dict[str, None]] = {}
        for row, (prompt, references) in enumerate(zip(prompts(data, spec), accepted, strict=True)):
            if not prompt:
                what = f"the prompt of {data.place(row)} is empty"
                raise RecipeError.at("data.prompt", what, "at least a word to begin with")
            found.setdefault(prompt, {}).update(dict.fromkeys(references))
        return [Question(prompt, list(references)) for prompt, references in found.items()]

    def read(self, split: Split) -> Made:
        spec, rows, tokeniser = split.spec, split.collector(), Tokeniser(split.tokenizer)
        template = (spec.prompt or "") + (spec.completion or "")
        for start, block in split.data.blocks():
            asked, answered = prompts(block, spec), completions(block, spec)
            for row, one in enumerate(tokeniser.completed(asked, answered), start):
                begin = one.first if spec.loss_on == "completion" else 0
                if one.first == 0 and len(one.ids) > 1:
                    rows.count("unprompted", row)
                targets = np.arange(len(one.ids)) >= begin
                if rows.add(row, one.ids, len(one.ids), targets=targets) and not one.exact:
                    rows.count("inexact", row)
            rows.end_block(tokeniser, [asked, answered], start, template)
            split.progress(len(block))
        return rows.made()

    def learned_texts(self, data: Table, spec: ChosenSpec, lines: bool) -> list[str]:
        pairs = zip(prompts(data, spec), completions(data, spec), strict=True)
        return [prompt + completion for prompt, completion in pairs]

    def empty_row(self) -> tuple[str, str]:
        return "data.completion", "prompt and completion"


def prompts(data: Table, spec: ChosenSpec) -> list[str]:
    """The text of each row's prompt."""
    template, beside = _prompt_template(spec, data.column_names), spec.beside
    if beside is None:
        return render(template, "data.prompt", data)
    both, alone = _with_beside(template[1:-1], beside)
    if beside not in data.column_names:
        return render(alone, "data.prompt", data)
    cells = field_cells(data, beside, "data.prompt")
    there = [
        kind not in (*NOTHING, Kind.EMPTY) and bool(text.strip())
        for kind, text in zip(cells.kinds, cells.texts, strict=True)
    ]
    texts = render(alone, "data.prompt", data)
    rows = np.flatnonzero(there)
    for row, text in zip(rows, render(both, "data.prompt", data.select(rows)), strict=True):
        texts[row] = text
    return texts


def completions(data: Table, spec: DataKeys) -> list[str]:
    """The text of each row's completion."""
    return render(_completion_template(spec, data.column_names), "data.completion", data)


def _templates(spec: DataKeys, columns: Sequence[str], record: Record) -> dict[str, str | None]:
    """{"prompt", "beside", "completion"}; no completion where the recipe names references and none
    of the columns is a completion."""
    completion, named = spec.completion, record.get("completion")
    there = bool(first_of(columns, COMPLETIONS))
    if completion is None and named is not None and _is_there(named, "data.completion", columns):
        completion = named
    elif completion is None and (spec.references is None or there):
        completion = _completion_template(spec, columns)
        if named is not None:
            say_stand_in("data.completion", [named], [completion])
    if spec.prompt is not None:
        return {"prompt": spec.prompt, "beside": None, "completion": completion}
    named, beside = record.get("prompt"), record.get("beside")
    if named is not None and _is_there(named, "data.prompt", columns):
        if beside is not None and beside not in columns:
            message = (
                "the run's prompts have the column `%s`, which this data does not have: they are"
                " made as where it is empty"
            )
            log.warning(message, beside)
        return {"prompt": named, "beside": beside, "completion": completion}
    prompt = _prompt_template(spec, columns)
    if named is not None:
        say_stand_in("data.prompt", [named], [prompt])
    beside = _beside_column(prompt, completion, columns)
    return {"prompt": prompt, "beside": beside, "completion": completion}


def _prompt_template(spec: DataKeys, columns: Sequence[str]) -> str:
    if spec.prompt is not None:  # an empty template counts as one
        return spec.prompt
    return _field("data.prompt", "prompt", PROMPTS, columns)


def _completion_template(spec: DataKeys, columns: Sequence[str]) -> str:
    if spec.completion is not None:
        return spec.completion
    return _field("data.completion", "completion", COMPLETIONS, columns)


def _beside_column(prompt: str, completion: str | None, columns: Sequence[str]) -> str | None:
    """The column to combine with the prompt's own column; never the completion's."""
    answered = _fields(completion, "data.completion", columns)
    others = [name for name in columns if name not in answered]
    return first_of(others, BESIDE.get(prompt[1:-1], ()))


def _with_beside(prompt: str, beside: str) -> tuple[str, str]:
    """Templates of (both columns, the prompt's column alone)."""
    if prompt == "instruction":
        return ALPACA % (prompt, beside), ALPACA_ALONE % prompt
    return f"{{{beside}}}\n\n{{{prompt}}}", f"{{{prompt}}}"


def _field(key: str, what: str, names: Sequence[str], columns: Sequence[str]) -> str:
    """The template with the one column that has one of these `names`."""
    column = first_of(columns, names)
    if column is None:
        expected = f'{key}: a template over the columns, as "{{{columns[0]}}}"'
        raise RecipeError.at(key, f"no {what} column among {listed(columns)}", expected)
    return f"{{{column}}}"


def _fields(template: str | None, key: str, columns: Sequence[str]) -> list[str]:
    """The columns that a template reads."""
    return template_columns(template, key, columns, required=False)


def _is_there(template: str, key: str, columns: Sequence[str]) -> bool:
    return are_there(_fields(template, key, columns), columns)


FORMAT = PromptCompletion()
