"""Evaluation of a saved run by generation: the model answers the prompts of the validation rows,
and the answers are compared with the accepted ones."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorakit.data.chat_template import ends_of_turn
from lorakit.data.draw import limited
from lorakit.data.formats import Question, formats, formats_of_task
from lorakit.data.tokenise import prompt_tokens
from lorakit.data.vocabulary import embedding_rows, without_embedding
from lorakit.errors import UsageError
from lorakit.export.native import read_facts
from lorakit.files import write_text
from lorakit.inference.generator import GenerationSettings, Generator
from lorakit.kernels.dispatch import announce
from lorakit.models.load import compute_dtype, default_device
from lorakit.models.positions import longest_input
from lorakit.recipes.recipe import Recipe, locating
from lorakit.report.output import try_output
from lorakit.report.progress import Progress
from lorakit.runs.evaluate import evaluated_recipe
from lorakit.runs.moment import adapter_of, chosen
from lorakit.runs.saved import (
    for_one_set,
    has_other_data,
    saved_model,
    saved_tokenizer,
    trained_columns,
)
from lorakit.runs.sets import (
    about,
    check_some_validation,
    data_sets,
    find_data,
    read_sets,
    source_facts,
)
from lorakit.sources.resolve import Source
from lorakit.training.answer_metrics import Metric, choose_metrics

log = logging.getLogger("lorakit")
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Answer:
    """Answer to a question; tokens: its length, without the end-of-sequence token."""

    question: Question
    text: str
    tokens: int


def evaluate_answers(
    run: Path,
    overrides: Sequence[str],
    metrics: Sequence[str],
    max_new_tokens: int,
    batch_size: int | None,
    answers_file: Path | None,
    progress: Progress,
) -> dict[str, Any]:
    """{run, data, rows, prompts, metrics, and answers if a file is given}: greedy answers to every
    distinct prompt, scored.

    `batch_size` prompts are answered at a time, by default the recipe's evaluation batch. The file
    gets a line {prompt, answer, references} for each prompt. Raises UsageError for wrong use,
    before the model is loaded.
    """
    measures = choose_metrics(metrics)
    if answers_file is not None:
        _try(answers_file)
    run = chosen(run)
    overrides = for_one_set(run, overrides)
    recipe = evaluated_recipe(run, overrides)
    tokenizer = saved_tokenizer(run, recipe, read_facts(adapter_of(run)).source)
    sources, rows, asked = _questions(run, recipe, overrides, tokenizer)
    batch_size = batch_size or recipe.train.per_device_eval_batch_size
    batch_size = batch_size or GenerationSettings().batch_size
    settings = GenerationSettings(max_new_tokens=max_new_tokens, batch_size=batch_size)
    device = default_device()
    announce(device)
    with progress.stage("loading the model"):
        dtype = compute_dtype(recipe.train.precision, device)
        task_model, method, _ = saved_model(run, recipe, dtype)
    generator, config = Generator(task_model, method), task_model.model.config
    limits = longest_input(config, task_model.tokenizer, recipe.model), embedding_rows(config)
    # Each set alone: a chat template begins its prompts itself.
    by_set = {
        name: answer(generator, task_model.tokenizer, of_set, settings, *limits, progress)
        for name, of_set in asked.items()
    }
    answers = [one for of_set in by_set.values() for one in of_set]
    if answers_file is not None:
        _write(answers_file, answers)
    scores = {name: _scores(of_set, measures) for name, of_set in by_set.items()}
    return {
        "run": str(run),
        "data": source_facts(recipe, sources),
        "rows": rows,
        "prompts": len(answers),
        "metrics": _scores(answers, measures),
        **({"metrics_by_set": scores} if len(scores) > 1 else {}),
        **({} if answers_file is None else {"answers": str(answers_file)}),
    }


def _try(answers_file: Path) -> None:
    """Raise UsageError unless the file can be written."""
    if not answers_file.parent.is_dir():
        what = f"the folder `{answers_file.parent}` is not there"
        raise UsageError(what, "Create it, or name another file for the answers.")
    try_output(answers_file, "Name another file for the answers.")


def _scores(answers: Sequence[Answer], metrics: Mapping[str, Metric]) -> dict[str, float]:
    """{metric: its value} over the answers."""
    texts, references = [a.text for a in answers], [a.question.references for a in answers]
    scores = {name: metric(texts, references) for name, metric in metrics.items()}
    return scores | {"mean_answer_tokens": sum(a.tokens for a in answers) / len(answers)}


def _questions(
    run: Path,
    recipe: Recipe,
    overrides: Sequence[str],
    tokenizer: Any,
) -> tuple[tuple[Source, ...], int, dict[str, list[Question]]]:
    """(data sources, number of validation rows used, {data set: their distinct prompts}). Of a mix,
    sets without prompts or without validation rows are left out."""
    sets = data_sets(recipe)
    if len(sets) == 1:
        _needs_prompts([sets[0].spec.format], recipe.model.task)
    columns = trained_columns(run, recipe, overrides)
    count, found = 0, {}
    with locating(recipe):
        sources = find_data(recipe)
        rows = read_sets(recipe, sources, columns, has_other_data(overrides))
        _needs_prompts([one.spec.format for one in rows], recipe.model.task)
        for one, loaded in zip(sets, rows, strict=True):
            how = (loaded.spec, loaded.lines)
            if not len(loaded.validation) or not loaded.format.has_questions:
                log.info("%s has no prompts to answer, and is left out", one.name)
                continue
            with about(one):
                asked = limited(loaded.validation, loaded.spec.max_eval_samples, *how)
                found[one.name] = loaded.format.questions(asked, loaded.spec, tokenizer)
            count += len(asked)
        if not found:
            check_some_validation([])
    return sources, count, found


def _write(answers_file: Path, answers: Sequence[Answer]) -> None:
    """Write one line of JSON for each answer."""
    lines = [
        {"prompt": a.question.prompt, "answer": a.text, "references": a.question.references}
        for a in answers
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text(answers_file, text)


def answer(
    generator: Generator,
    tokenizer: Any,
    asked: Sequence[Question],
    settings: GenerationSettings,
    limit: int | None,
    rows: int | None,
    progress: Progress,
) -> list[Answer]:
    """Answer each question whose prompt leaves room for `settings.max_new_tokens` more tokens.

    limit: the longest input of the model, in tokens; rows: the rows of its embedding. Prompts
    without room are left out, with a warning. Raises UsageError when none is left, and for a prompt
    with a token that the embedding lacks.
    """
    templated = any(question.templated for question in asked)
    tokens = prompt_tokens(tokenizer, [question.prompt for question in asked], templated)
    if templated:
        settings = replace(settings, ends=ends_of_turn(tokenizer))
    for question, ids in zip(asked, tokens, strict=True):
        if rows is not None and max(ids, default=0) >= rows:
            what = (
                f"the prompt {question.prompt!r} has {without_embedding(tokenizer, max(ids), rows)}"
            )
            raise UsageError(
                what,
                "Leave that text out of the data, or evaluate a run whose model has a row for it.",
            )
    fits = [
        i
        for i, ids in enumerate(tokens)
        if limit is None or len(ids) + settings.max_new_tokens <= limit
    ]
    room = f"{settings.max_new_tokens} new tokens within the {limit} that the model reads"
    if not fits:
        raise UsageError(f"no prompt leaves room for {room}", "Ask for fewer new tokens.")
    if len(fits) < len(asked):
        log.warning(
            "%d of %d prompts leave no room for %s and are left out",
            len(asked) - len(fits),
            len(asked),
            room,
        )
    with progress.stage("generating") as advance:
        generated = generator.run([tokens[i] for i in fits], settings, advance)
    answers = [
        Answer(asked[i], one.text, len(one.tokens)) for i, one in zip(fits, generated, strict=True)
    ]
    cut = sum(one.tokens == settings.max_new_tokens for one in answers)
    if cut:
        log.warning(
            "%d of %d answers were cut at %d new tokens",
            cut,
            len(answers),
            settings.max_new_tokens,
        )
    return answers


def _needs_prompts(names: Sequence[str | None], task: str) -> None:
    """Raise UsageError unless rows of one of these formats (None: not known yet) have prompts to
    answer."""
    forms = formats_of_task(task)
    if not any(form.has_questions for form in forms for name in names if name in (None, form.name)):
        known = " and ".join(dict.fromkeys(filter(None, names))) or forms[0].name
        what = f"the data of the run is {known}: it has no prompts to answer"
        fitting = " or ".join(form.name for form in formats() if form.has_questions)
        raise UsageError(what, f"Generation is for {fitting} data; leave out `--generate`.")
